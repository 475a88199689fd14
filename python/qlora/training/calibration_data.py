"""The text of a calibration from what users have: a text file, training records, or the default text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.calibration.texts import WINDOW, default_texts, token_ids
from qlora.training.data import tokenize_all
from qlora.training.records import read_records

DEFAULT = "default"
_TEXT_FILES = (".txt", ".md")
_WHOLE = 1 << 20  # tokens of a record: none is truncated


def calibration_ids(sources: Sequence[str], tokenizer: Any, tokens: int, skip_bad: bool = False) -> Tensor:
    """``tokens`` token ids, int64 [count], or as many as ``sources`` have.

    A source is "default", a UTF-8 text file (.txt, .md), or records as ``qlora finetune --data`` takes them, rendered
    by the chat template. Sources share the tokens equally; what a short one lacks comes from the others. Raises
    ValueError for text that is not UTF-8, BadRecord for bad records unless ``skip_bad``, FileNotFoundError for a
    missing file.
    """
    parts = [_ids(source, tokenizer, skip_bad) for source in sources]
    left, taken = tokens, {}
    for done, index in enumerate(sorted(range(len(parts)), key=lambda i: len(parts[i]))):
        taken[index] = min(len(parts[index]), -(-left // (len(parts) - done)))
        left -= taken[index]
    # Windows of the sources take turns, so that the unseen ones at the end come from all of them.
    pieces = [list(part[: taken[index]].split(WINDOW)) for index, part in enumerate(parts)]
    mixed = [piece for turn in range(max(map(len, pieces))) for part in pieces for piece in part[turn : turn + 1]]
    return torch.cat(mixed)


def _ids(source: str, tokenizer: Any, skip_bad: bool) -> Tensor:
    if source == DEFAULT:
        return token_ids(default_texts(), tokenizer)
    path = Path(source)
    if path.suffix.lower() in _TEXT_FILES:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
        return token_ids([text], tokenizer)
    records, _ = read_records(source, skip_bad)
    examples = tokenize_all(records, tokenizer, _WHOLE, skip_bad).examples
    return torch.tensor([token for example in examples for token in example.input_ids], dtype=torch.int64)
