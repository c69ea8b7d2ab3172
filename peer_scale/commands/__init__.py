"""The bodies of the commands `peer-scale NAME`; each module has a `main(argv, prog)` that gives the exit code."""
