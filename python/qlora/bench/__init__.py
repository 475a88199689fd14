"""Benchmarks of ``qlora bench``: qlora and its peers in one process, against limits measured in the same run."""
