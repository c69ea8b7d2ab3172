"""One HTML page of runs side by side, or of an experiment: their files are read, drawn and written into it."""
