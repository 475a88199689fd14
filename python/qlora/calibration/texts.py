"""The text for a calibration: windows of tokens, the last ones unseen, and the default text of the package."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

UNSEEN_TOKENS = 1024  # at most
_SHORTEST = 16  # tokens of a window


@dataclass(frozen=True)
class Windows:
    """Windows of equal length, the last ``unseen`` of which only judge the result."""

    ids: Tensor  # int64 (windows, length)
    unseen: int

    @property
    def tokens(self) -> int:
        return (len(self.ids) - self.unseen) * self.ids.shape[1]

    @property
    def unseen_tokens(self) -> int:
        return self.unseen * self.ids.shape[1]

    def batches(self, tokens: int) -> Iterator[tuple[Tensor, bool]]:
        """(windows, whether they are unseen), at most ``tokens`` tokens or one window each."""
        rows = max(1, tokens // self.ids.shape[1])
        seen = len(self.ids) - self.unseen
        for part, is_unseen in ((self.ids[:seen], False), (self.ids[seen:], True)):
            for batch in part.split(rows):
                if len(batch):
                    yield batch, is_unseen

    def digest(self) -> str:
        return hashlib.sha256(
            bytes(self.ids.flatten().view(torch.uint8).tolist()) + str(self.unseen).encode()
        ).hexdigest()


def default_texts() -> list[str]:
    """The passages that come with the package, in order (calibration/SOURCES.md names their origins)."""
    lines = files("qlora.calibration").joinpath("default.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def windows_of(texts: str | Sequence[str] | Tensor, tokenizer: Any, model: Any, tokens: int, length: int) -> Windows:
    """Windows of at most ``length`` tokens, ``tokens`` for calibration and an eighth more (at most 1,024) unseen.

    Texts are joined by the end-of-sequence token. If there are fewer tokens, all are used, an eighth of them unseen;
    the caller reports how many. Raises ValueError for fewer than two windows, and for tokens that the model does not
    have.
    """
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None) or length
    length = min(length, context)
    if length < _SHORTEST or tokens < length:
        raise ValueError(f"window={length} must be at least {_SHORTEST}, and tokens={tokens} at least one window")
    ids = texts if isinstance(texts, Tensor) else _tokens(texts, tokenizer, model, tokens + UNSEEN_TOKENS)
    if ids.dim() == 2 and ids.shape[1] <= context:
        length = ids.shape[1]
    flat = ids.flatten().cpu()
    while len(flat) < 2 * length and length > _SHORTEST:
        length //= 2
    count = len(flat) // length
    if count < 2:
        raise ValueError(f"the text has {len(flat)} tokens: calibration needs at least {2 * length}")
    seen = min(tokens // length, count * 8 // 9 or 1, count - 1)
    unseen = max(1, min(seen // 8, UNSEEN_TOKENS // length, count - seen))
    flat = flat[: (seen + unseen) * length]
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and (flat.min() < 0 or flat.max() >= vocabulary):
        raise ValueError(
            f"token {flat.max().item()} is outside of the model's vocabulary of {vocabulary}: the tokenizer belongs to"
            " another model"
        )
    return Windows(flat.view(seen + unseen, length), unseen)


def _tokens(texts: str | Sequence[str], tokenizer: Any, model: Any, wanted: int) -> Tensor:
    if isinstance(texts, str):
        if texts != "default":
            raise ValueError(f"texts='{texts[:40]}' must be 'default' or a list of texts: [text]")
        texts = default_texts()
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    return token_ids(texts, tokenizer, wanted)


def token_ids(texts: Sequence[str], tokenizer: Any, wanted: int | None = None) -> Tensor:
    """The tokens of texts, each with an end-of-sequence token, int64 [count]; stops when it has ``wanted`` ones."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            ids.append(end)
        if wanted is not None and len(ids) >= wanted:
            break
    return torch.tensor(ids, dtype=torch.int64, device="cpu")
