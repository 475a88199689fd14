"""Finds text that a calibration has seen: hashes of the runs of eight tokens."""

import base64

import torch
from torch import Tensor

_RUN = 8
_FACTOR = 6364136223846793005  # odd, of Knuth's MMIX generator: products modulo 2^64 spread tokens over all bits


def run_hashes(ids: Tensor) -> Tensor:
    """A hash of each run of eight tokens of ``ids`` [count], sorted and without repetitions, int64."""
    if len(ids) < _RUN:
        return torch.empty(0, dtype=torch.int64)
    runs = ids.to(torch.int64).cpu().unfold(0, _RUN, 1)
    hashes = torch.zeros(len(runs), dtype=torch.int64)
    for column in runs.T:
        hashes = (hashes + column + 1) * _FACTOR  # wraps around
        hashes ^= hashes >> 29
    return hashes.unique()


def share_seen(ids: Tensor, seen: Tensor) -> float:
    """The share of the runs of eight tokens in ``ids`` that are among the hashes ``seen``; 0 without a run."""
    hashes = run_hashes(ids)
    return torch.isin(hashes, seen).float().mean().item() if len(hashes) else 0.0


def to_text(hashes: Tensor) -> str:
    """Hashes as text for a JSON file."""
    return base64.b64encode(bytes(hashes.contiguous().view(torch.uint8).tolist())).decode()


def from_text(text: str) -> Tensor:
    """The hashes of :func:`to_text`. Raises ValueError for other text."""
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.int64)
