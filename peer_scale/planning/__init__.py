"""Memory, traffic, bubble and time of a layout before a job is queued."""
