"""qlora."""
