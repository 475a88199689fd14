"""What a training step needs of memory, from a model's config alone."""
