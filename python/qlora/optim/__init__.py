"""Optimizers whose state may be larger than the device's memory."""

from qlora.optim.paged_adamw import PagedAdamW

__all__ = ["PagedAdamW"]
