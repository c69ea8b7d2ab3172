"""From text to tokens on disk: file formats, WordPiece, and the store that samples are read from."""
