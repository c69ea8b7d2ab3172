"""Pre-training of text encoders with PEER, ELECTRA, TEAMS and BERT objectives, at any scale."""

__version__ = "0.1.0"
