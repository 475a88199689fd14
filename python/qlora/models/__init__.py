"""Whole models: loads them in 4 bit, puts 4-bit layers and adapters into any module, computes the loss in chunks."""
