"""Files on disk: atomic writes, and reading checkpoints one tensor at a time."""
