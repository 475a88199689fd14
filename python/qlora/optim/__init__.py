"""Optimizers whose state can exceed the device's memory."""

from qlora.optim.paged_adamw import PagedAdamW

__all__ = ["PagedAdamW"]
