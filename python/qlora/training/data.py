"""Training records: reading and checking JSON lines, turning them into token sequences, packing and padding."""

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # label of a token that is not learnt, as in torch's cross_entropy
_ROLES = ("system", "user", "assistant", "tool")


class BadRecord(ValueError):
    """A record that cannot be used; the message names file, line and rule."""


@dataclass(frozen=True)
class Record:
    """One checked record and where it stands: ``path:line``."""

    content: dict[str, Any]
    place: str


@dataclass(frozen=True)
class Example:
    """One tokenized record: ``labels[i]`` is ``input_ids[i]``, or IGNORED where the prompt stands."""

    input_ids: list[int]
    labels: list[int]


def _check(record: Any) -> None:
    """Raises ValueError with the rule that ``record`` breaks."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, not {type(record).__name__}")
    kinds = [kind for kind in ("messages", "prompt", "text") if kind in record]
    if len(kinds) != 1:
        raise ValueError(
            f"keys {sorted(record)}: a record has either 'messages', or 'prompt' and 'completion', or 'text'"
        )
    if kinds[0] == "messages":
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError("'messages' must be a list that is not empty")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise ValueError("each message needs a 'role' and a string 'content'")
            message["content"].encode()  # a lone surrogate is no text: UnicodeEncodeError is a ValueError
            if message.get("role") not in _ROLES:
                raise ValueError(f"role {message.get('role')!r} is none of {', '.join(_ROLES)}")
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("no message has the role 'assistant': there is nothing to learn")
        return
    for key in ("prompt", "completion") if kinds[0] == "prompt" else ("text",):
        if not isinstance(record.get(key), str) or not record[key]:
            raise ValueError(f"'{key}' must be a string that is not empty")
        record[key].encode()


def read_records(path: str | Path, skip_bad: bool = False) -> tuple[list[Record], int]:
    """The records of a JSON-lines file and the number of bad ones left out.

    Raises BadRecord naming file and line at the first bad record unless ``skip_bad``; FileNotFoundError; and BadRecord
    if no record is left. Blank lines are no records.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    records, bad = [], 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                content = json.loads(line.decode("utf-8"))
                _check(content)
            except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors too
                if not skip_bad:
                    raise BadRecord(f"{place}: {error}") from error
                bad += 1
                continue
            records.append(Record(content, place))
    if not records:
        raise BadRecord(f"{path} holds no usable record ({bad} bad ones)")
    return records, bad


@dataclass(frozen=True)
class Tokenized:
    """The examples of a list of records, and what became of the others."""

    examples: list[Example]
    bad: int  # the chat template refused them
    cut: int  # longer than max_length: the end is missing
    dropped: int  # nothing to learn was left within max_length


def tokenize_all(records: Sequence[Record], tokenizer: Any, max_length: int, skip_bad: bool = False) -> Tokenized:
    """Examples of all records, cut at ``max_length``. A record that the chat template refuses is a BadRecord that names
    its place, or is counted with ``skip_bad``."""
    from jinja2 import TemplateError

    examples, bad, cut, dropped = [], 0, 0, 0
    for record in records:
        try:
            example = tokenize(record.content, tokenizer)
        except (ValueError, TemplateError) as error:
            if not skip_bad:
                raise BadRecord(f"{record.place}: {error}") from error
            bad += 1
            continue
        if len(example.input_ids) > max_length:
            cut += 1
            example = Example(example.input_ids[:max_length], example.labels[:max_length])
        if all(label == IGNORED for label in example.labels[1:]):
            dropped += 1
            continue
        examples.append(example)
    return Tokenized(examples, bad, cut, dropped)


def tokenize(record: dict[str, Any], tokenizer: Any) -> Example:
    """Tokens and labels of one record: only the assistant's turns are learnt, of plain text all.

    Prompt/completion records go through the chat template as a user and an assistant turn if the tokenizer has one.
    Raises ValueError if the template rewrites earlier turns, so that the assistant's part cannot be found.
    """
    if "text" in record:
        text, spans = record["text"], None
    else:
        messages = record.get("messages") or [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
        text, spans = _render(messages, tokenizer)
    # A chat template writes its own special tokens; plain text gets those of the tokenizer, and an end.
    templated = spans is not None and bool(tokenizer.chat_template)
    encoded = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    input_ids = list(encoded["input_ids"])
    if spans is None:
        labels = list(input_ids)
    else:
        labels = [
            token if any(begin <= start and end <= stop and end > start for begin, stop in spans) else IGNORED
            for token, (start, end) in zip(input_ids, encoded["offset_mapping"], strict=True)
        ]
    if not templated and tokenizer.eos_token_id is not None and input_ids[-1:] != [tokenizer.eos_token_id]:
        input_ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return Example(input_ids, labels)


def _render(messages: Sequence[dict[str, str]], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the character spans of the assistant's turns."""
    if not tokenizer.chat_template:
        text, spans = "", []
        for message in messages:
            begin = len(text)
            text += message["content"]
            if message["role"] == "assistant":
                spans.append((begin, len(text)))
        return text, spans

    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, add_generation_prompt=prompt)

    text, spans = render(len(messages), False), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, True) if i else "", render(i + 1, False)
        if not (text.startswith(before) and text.startswith(after)):
            raise ValueError("the chat template rewrites earlier turns: the assistant's part cannot be found")
        spans.append((len(before), len(after)))
    return text, spans


@dataclass(frozen=True)
class Sequences:
    """What a data loader reads: each item is a list of examples that share one row."""

    rows: list[list[Example]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Example]:
        return self.rows[index]

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for row in self.rows for example in row)


def pack(examples: Sequence[Example], max_length: int) -> Sequences:
    """Best-fit decreasing: few rows of at most ``max_length`` tokens, no example cut. Deterministic."""
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for example in sorted(examples, key=lambda e: -len(e.input_ids)):
        length = len(example.input_ids)
        tightest = bisect.bisect_left(room, (length, 0))
        if tightest < len(room):
            left, row = room.pop(tightest)
            rows[row].append(example)
        else:
            left, row = max_length, len(rows)
            rows.append([example])
        bisect.insort(room, (left - length, row))
    return Sequences(rows)


class Collator:
    """Rows to a batch. Packed rows get positions that restart with each example and no attention mask, from which
    transformers derives block-diagonal attention; padded ones an attention mask."""

    def __init__(self, pad_token_id: int, packed: bool) -> None:
        self.pad_token_id = pad_token_id
        self.packed = packed

    def __call__(self, rows: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        width = max(sum(len(example.input_ids) for example in row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORED)
        positions = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            at = 0
            for example in row:
                end = at + len(example.input_ids)
                ids[i, at:end] = torch.tensor(example.input_ids)
                labels[i, at:end] = torch.tensor(example.labels)
                labels[i, at] = IGNORED  # no example predicts the first token of the next
                positions[i, at:end] = torch.arange(end - at)
                mask[i, at:end] = 1
                at = end
            positions[i, at:] = torch.arange(width - at)  # the padding is an example of its own
        batch = {"input_ids": ids, "labels": labels}
        return batch | ({"position_ids": positions} if self.packed else {"attention_mask": mask})


@torch.no_grad()
def packs_without_leaks(model: Any) -> bool:
    """Whether the examples of a packed row are invisible to each other: changes the first of two and compares the
    logits of the second. Models that ignore position_ids (OPT, ALiBi models, recurrent ones) fail."""
    was_training = model.training
    model.eval()
    collate = Collator(0, packed=True)
    second = Example([7, 8, 9, 10], [7, 8, 9, 10])
    logits = []
    try:
        for token in (3, 4):
            batch = collate([[Example([token] * 5, [token] * 5), second]])
            del batch["labels"]
            logits.append(model(**batch).logits[:, 5:])
    finally:
        model.train(was_training)
    return torch.equal(*logits)
