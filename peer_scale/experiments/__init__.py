"""Comparisons of pre-training arms at equal FLOPs: planned, run, measured and tested, over days and machines."""
