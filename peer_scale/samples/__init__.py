"""From tokens to micro-batches: windows, examples, masking, the loader."""
