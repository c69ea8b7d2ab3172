"""What is learned: each objective describes its works, losses and metrics; nothing else knows one by name."""
