"""The checkpoint format: written in the background, loaded under any layout."""
