"""Low-rank adapters: their files, their training in float32, merging them into the base."""
