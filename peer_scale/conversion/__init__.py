"""Between our checkpoints and what Hugging Face transformers opens."""
