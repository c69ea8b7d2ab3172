"""Which stage holds what, schedules as data, their simulator, and the runner that follows them."""
