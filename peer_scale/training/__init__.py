"""The engine, the loop and its callbacks."""
