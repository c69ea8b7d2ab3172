"""Architecture only: layers, networks, heads, and what they cost."""
