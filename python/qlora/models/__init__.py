"""Whole models: loaded in 4 bit, prepared in place, their loss in chunks."""
