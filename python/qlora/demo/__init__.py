"""What ``qlora demo`` fine-tunes: a small model from PyPI, and 240 records of our own."""
