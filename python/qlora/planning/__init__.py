"""Predicts the memory of a training step from a model's config alone."""
