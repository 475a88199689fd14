"""Whole models: quantizes and adapts every linear layer, saves, loads and merges adapters."""
