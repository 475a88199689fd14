"""The text of a calibration from what users have: a text file, training records, or the default text."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.calibration.texts import default_texts, token_ids
from qlora.training.data import tokenize_all
from qlora.training.records import read_records

DEFAULT = "default"
_TEXT_FILES = (".txt", ".md")
_WHOLE = 1 << 20  # tokens of a record: none is truncated


def calibration_ids(source: str, tokenizer: Any, tokens: int) -> Tensor:
    """At least ``tokens`` token ids, int64 [count], if ``source`` has as many.

    ``source`` is "default", a UTF-8 text file (.txt, .md), or records as ``qlora finetune --data`` takes them, rendered
    by the chat template. Several sources joined by "+" share the tokens equally. Raises ValueError for text that is not
    UTF-8, BadRecord for bad records, FileNotFoundError for a missing file.
    """
    parts = [_ids(part, tokenizer) for part in source.split("+")]
    share = -(-tokens // len(parts))
    # Windows of the sources take turns, so that the unseen ones at the end come from all of them.
    window = 512
    pieces = [list(part[:share].split(window)) for part in parts]
    mixed = [piece for turn in range(max(map(len, pieces))) for part in pieces for piece in part[turn : turn + 1]]
    return torch.cat(mixed)


def _ids(source: str, tokenizer: Any) -> Tensor:
    if source == DEFAULT:
        return token_ids(default_texts(), tokenizer)
    path = Path(source)
    if path.suffix.lower() in _TEXT_FILES:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
        return token_ids([text], tokenizer)
    records, _ = read_records(source)
    examples = tokenize_all(records, tokenizer, _WHOLE).examples
    return torch.tensor([token for example in examples for token in example.input_ids], dtype=torch.int64)
