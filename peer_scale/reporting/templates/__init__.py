"""The page's frame, its style and its script."""
