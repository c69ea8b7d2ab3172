"""Fine-tuning of encoders on GLUE and on anyone's classification or regression data."""
