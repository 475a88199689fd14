"""Serving: one 4-bit base and many adapters behind OpenAI's HTTP interface, on transformers' continuous batching."""
