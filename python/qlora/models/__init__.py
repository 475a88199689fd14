"""Whole models: quantize and adapt every linear layer, save and load adapters, merge."""
