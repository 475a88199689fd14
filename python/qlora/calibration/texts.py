"""The text for a calibration: windows of tokens, the last ones unseen, and the default text of the package."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from qlora.calibration.dense import revision_of

UNSEEN_TOKENS = 1024  # at most
WINDOW = 512  # tokens, by default
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
    if isinstance(texts, str) and texts != "default":
        raise ValueError(f"texts='{texts[:40]}' must be 'default' or a list of texts: [text]")
    if not isinstance(texts, Tensor) and tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, revision=revision_of(model, model.name_or_path))
    ids = (texts if isinstance(texts, Tensor) else _tokens(texts, tokenizer, tokens + UNSEEN_TOKENS)).to(torch.int64)
    if ids.dim() == 2 and ids.shape[1] <= context:
        length = ids.shape[1]
    flat = ids.flatten().cpu()
    while len(flat) < 2 * length and length > _SHORTEST:
        length //= 2
    count = len(flat) // length
    if count < 2:
        raise ValueError(f"the text has {len(flat)} tokens: calibration needs at least {2 * length}")
    unseen = max(1, min(tokens // length // 8, UNSEEN_TOKENS // length, count // 9))
    seen = min(tokens // length, count - unseen)
    flat = flat[: (seen + unseen) * length].clone()
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and (flat.min() < 0 or flat.max() >= vocabulary):
        raise ValueError(
            f"token {flat.max().item()} is outside of the model's vocabulary of {vocabulary}: the tokenizer belongs to"
            " another model"
        )
    windows = flat.view(seen + unseen, length)
    first = first_token(tokenizer)
    if first is not None:
        windows[:, 0] = first  # models that always begin with it have other activations without
    return Windows(windows, unseen)


def first_token(tokenizer: Any) -> int | None:
    """The token with which the tokenizer begins every text, if there is one."""
    if tokenizer is None or getattr(tokenizer, "bos_token_id", None) is None:
        return None
    ids = tokenizer("a")["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def _tokens(texts: str | Sequence[str], tokenizer: Any, wanted: int) -> Tensor:
    return token_ids(default_texts() if isinstance(texts, str) else texts, tokenizer, wanted)


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
