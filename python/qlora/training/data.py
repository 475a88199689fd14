"""Converts records into batches: token sequences with labels, in packed or padded rows."""

import bisect
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora.models.chunked_loss import learnt_positions
from qlora.models.loading import end_tokens
from qlora.training.records import BadRecord, Record, digest, read_records
from qlora.training.settings import FinetuneSettings

# Without a chat template: what ends the turns of messages but the last one. qlora generate appends it to prompts.
PROMPT_END = "\n"
_MARK = "the-content-of-this-turn-7f3a9c"
IGNORED = -100  # label of a token without loss, as in torch's cross_entropy


@dataclass(frozen=True)
class Example:
    """One tokenized record: ``labels[i]`` is ``input_ids[i]``, or IGNORED in the prompt."""

    input_ids: list[int]
    labels: list[int]
    place: str = ""  # of the record: path:line


@dataclass(frozen=True)
class Tokenized:
    """The examples of a list of records, and the counts of records not used, or only in part."""

    examples: list[Example]
    bad: int  # refused by the chat template
    cut: int  # longer than max_length, truncated
    dropped: int  # without a token to learn within max_length


def tokenize_all(records: Sequence[Record], tokenizer: Any, max_length: int, skip_bad: bool = False) -> Tokenized:
    """Examples of all records, truncated at ``max_length`` tokens.

    If the chat template refuses a record, raises BadRecord with its place, or only counts it with ``skip_bad``.
    """
    from jinja2 import TemplateError

    examples, bad, cut, dropped = [], 0, 0, 0
    for record in records:
        try:
            example = tokenize(record.content, tokenizer)
        except (ValueError, TypeError, TemplateError) as error:
            if not skip_bad:
                raise BadRecord(f"{record.place}: {error}") from error
            bad += 1
            continue
        if len(example.input_ids) > max_length:
            cut += 1
            example = Example(example.input_ids[:max_length], example.labels[:max_length])
        example = replace(example, place=record.place)
        if all(label == IGNORED for label in example.labels[1:]):
            dropped += 1
            continue
        examples.append(example)
    return Tokenized(examples, bad, cut, dropped)


def tokenize(record: dict[str, Any], tokenizer: Any) -> Example:
    """Tokens and labels of one record: the loss covers only the assistant's turns; in plain text, all tokens.

    If the tokenizer has a chat template, it renders prompt and completion as a user and an assistant turn, and gets the
    record's tools. Without one, the prompt of ``messages`` ends with :data:`PROMPT_END`. Raises ValueError if the
    assistant's part cannot be found in what the template renders, for tools or a system message beside prompt and
    completion without a template, and for tokenizers without offsets.
    """
    if "text" in record:
        text, spans = record["text"], None
    else:
        messages = record.get("messages") or [
            *([{"role": "system", "content": record["system"]}] if "system" in record else []),
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
        if not tokenizer.chat_template and ("tools" in record or "system" in record):
            raise ValueError("the tokenizer has no chat template, which would say where tools and 'system' belong")
        text, spans = _render(messages, tokenizer, PROMPT_END if "messages" in record else "", record.get("tools"))
    # A chat template adds its own special tokens; plain text gets the tokenizer's, and an end-of-sequence token.
    templated = spans is not None and bool(tokenizer.chat_template)
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not return token offsets: use a fast tokenizer")
    encoded = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    input_ids = list(encoded["input_ids"])
    if spans is None:
        labels = list(input_ids)
    else:
        # Compares only the ends of tokens, because tokenizers exclude leading white space from the start offset (of a
        # token of white space, all of it). A token across a boundary belongs to the answer that it begins.
        labels = [
            token if any(begin < end <= stop for begin, stop in spans) else IGNORED
            for token, (_, end) in zip(input_ids, encoded["offset_mapping"], strict=True)
        ]
    if not templated and tokenizer.eos_token_id is not None:
        if input_ids[-1:] != [tokenizer.eos_token_id]:
            input_ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        labels[-1] = tokenizer.eos_token_id
    return Example(input_ids, labels)


def _render(
    messages: Sequence[dict[str, Any]], tokenizer: Any, between: str = "", tools: list[Any] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the character spans of the assistant's turns.

    Without a chat template it joins the turns with ``between``. With one, a turn begins behind the prompt for it and
    ends where the next one begins. Templates may render a turn in another way when others follow (Phi-3 ends the last
    one with a token of its own, Qwen3 drops the reasoning of earlier ones), so the turn is found by rendering the
    conversation again with a mark in the place of its content.
    """
    if not tokenizer.chat_template:
        text, spans = "", []
        for message in messages:
            if text and between:
                text += between
            begin = len(text)
            text += message["content"]
            if message["role"] == "assistant":
                spans.append((begin, len(text)))
        return text, spans

    def render(turns: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False, add_generation_prompt=prompt)

    text, spans = render(messages), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:i], True) if i else ""
        after = render(messages[: i + 1])
        marked = {**message, "content": _MARK}
        _, mark_alone, tail_alone = render([*messages[:i], marked]).partition(_MARK)
        shown = mark_alone or message["content"].strip() in after[len(before) :]
        if shown and text.startswith(before) and text.startswith(after):
            spans.append((len(before), len(after)))
            continue
        head, mark, tail = render([*messages[:i], marked, *messages[i + 1 :]]).partition(_MARK)
        begin, stop = len(before), 0
        if mark and mark_alone and text.startswith(head) and text[len(head) :].endswith(tail):
            begin = len(before) if text.startswith(before) and len(before) <= len(head) else len(head)
            stop = len(text) - len(tail) + len(os.path.commonprefix([tail, tail_alone]))
        elif mark:
            stop = _end_of_turn(text, before, after, message)
        if i + 1 < len(messages):  # Gemma 4 renders what a tool answered before the text of the turn that called it
            next_marked = {**messages[i + 1], "content": _MARK}
            following = render([*messages[: i + 1], next_marked, *messages[i + 2 :]]).find(_MARK)
            stop = 0 if 0 <= following < stop else stop
        if stop == 0:
            raise ValueError(
                f"the assistant's part cannot be found: what the chat template renders around turn {i + 1} of"
                f" {len(messages)} depends on that turn's content, or the content is not shown"
            )
        spans.append((begin, stop))
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    for what, named in (("tools", tools or []), ("tool_calls", calls)):
        for name in map(_name_of, named):
            if name not in text:
                raise ValueError(f"the chat template does not render '{what}': '{name}' is not in its text")
    return text, spans


def _name_of(tool: dict[str, Any]) -> str:
    """The name of a tool or a call, with or without OpenAI's wrapper."""
    return str(tool.get("function", tool).get("name", ""))


def _end_of_turn(text: str, before: str, after: str, message: dict[str, Any]) -> int:
    """Where a turn ends that the template shortens at its beginning when others follow, as Qwen3 its reasoning.

    ``before`` is the text up to the turn, ``after`` the text with the turn as the last one. 0 if no end of ``after``
    with all that the message says stands in ``text`` behind ``before``.
    """
    turn = after.removeprefix(before)
    said = [message["content"].strip(), *map(_name_of, message.get("tool_calls") or ())]
    for cut in range(len(turn) if text.startswith(before) else 0):
        rest = turn[cut:]
        if text.startswith(rest, len(before)):
            return len(before) + len(rest) if all(words in rest for words in said) else 0
    return 0


@dataclass(frozen=True)
class Sequences:
    """Data set for a data loader: each item is the list of examples in one row."""

    rows: list[list[Example]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Example]:
        return self.rows[index]

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for row in self.rows for example in row)


def pack(examples: Sequence[Example], max_length: int) -> Sequences:
    """Packs whole examples into few rows of at most ``max_length`` tokens: best-fit decreasing, deterministic."""
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
    """Collates rows into a batch.

    Packed rows get positions that restart at each example and no attention mask; from these transformers derives
    block-diagonal attention. Padded rows get an attention mask.
    """

    def __init__(self, pad_token_id: int, packed: bool) -> None:
        self.pad_token_id = pad_token_id
        self.packed = packed

    def __call__(self, rows: Sequence[Sequence[Example]]) -> dict[str, Any]:
        width = max(sum(len(example.input_ids) for example in row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
        positions = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            at = 0
            for example in row:
                end = at + len(example.input_ids)
                ids[i, at:end] = torch.tensor(example.input_ids)
                labels[i, at:end] = torch.tensor(example.labels)
                labels[i, at] = IGNORED  # an example must not predict the first token of the next one
                positions[i, at:end] = torch.arange(end - at)
                mask[i, at:end] = 1
                at = end
            positions[i, at:] = torch.arange(width - at)  # the padding counts as a separate example
        batch: dict[str, Any] = {
            "input_ids": ids,
            "labels": labels,
            "loss_positions": learnt_positions(labels, IGNORED),
        }
        batch["records"] = [example.place for row in rows for example in row]
        return batch | ({"position_ids": positions} if self.packed else {"attention_mask": mask})


@torch.no_grad()
def packs_without_leaks(model: Any) -> bool:
    """Whether the model isolates the examples of a packed row: changes the first of two, compares the second's logits.

    Models that ignore position_ids (OPT, ALiBi models, recurrent models) do not isolate them.
    """
    was_training = model.training
    model.eval()
    collate = Collator(0, packed=True)
    second = Example([7, 8, 9, 10], [7, 8, 9, 10])
    logits = []
    try:
        device = next(model.parameters()).device
        for token in (3, 4):
            batch = collate([[Example([token] * 5, [token] * 5), second]])
            batch = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
            logits.append(model(**batch, use_cache=False).logits[:, 5:])
    finally:
        model.train(was_training)
    # With a tolerance: the number of tokens per expert changes the order of sums. A leak is as large as the logits.
    difference, size = (logits[0] - logits[1]).float().norm(), logits[0].float().norm()
    return bool(difference <= 4 * torch.finfo(logits[0].dtype).eps * size)


# ---- all steps together ----


@dataclass(frozen=True)
class RecordCounts:
    """Counts of records that the run used, and of those that it did not use, or only in part."""

    train: int
    evaluation: int
    bad: int  # malformed, skipped with skip_bad
    cut: int  # longer than max_length, truncated
    dropped: int  # no completion within max_length


@dataclass(frozen=True)
class Examples:
    """The training and evaluation examples of a run."""

    train: list[Example]
    evaluation: list[Example]
    counts: RecordCounts
    digests: dict[str, str | None]  # sha256 of the records, by the name of their setting
    prompt_end: str  # what ended the prompts, if there is no chat template


def load_examples(settings: FinetuneSettings, tokenizer: Any) -> Examples:
    """Reads, splits (at random, by the seed) and tokenizes the data of a run.

    Raises BadRecord with file and line, and ValueError if no training example remains, or no evaluation example when
    evaluation was requested.
    """
    records, bad = read_records(settings.data, settings.skip_bad)
    digests: dict[str, str | None] = {"data_sha256": digest(records), "eval_data_sha256": None}
    if settings.eval_data is not None:
        held_out, bad_held_out = read_records(settings.eval_data, settings.skip_bad)
        digests["eval_data_sha256"] = digest(held_out)
        bad += bad_held_out
    else:
        random.Random(settings.seed).shuffle(records)
        count = max(1, round(len(records) * settings.eval_fraction)) if settings.eval_fraction > 0 else 0
        count = count if settings.max_eval_records is None else min(count, settings.max_eval_records)
        held_out, records = records[:count], records[count:]
    if not records:
        raise ValueError(f"eval_fraction={settings.eval_fraction} leaves no record to train on")
    train = tokenize_all(records, tokenizer, settings.max_length, settings.skip_bad)
    evaluation = tokenize_all(held_out, tokenizer, settings.max_length, settings.skip_bad)
    for group, wanted in ((train, True), (evaluation, bool(held_out))):
        if wanted and not group.examples:
            reasons = [f"the chat template refused {group.bad} records"] if group.bad else []
            if group.dropped:
                reasons.append(f"max_length={settings.max_length} cuts off every completion")
            raise ValueError(f"{', and '.join(reasons)}: no example is left")
    counts = RecordCounts(
        train=len(train.examples),
        evaluation=len(evaluation.examples),
        bad=bad + train.bad + evaluation.bad,
        cut=train.cut + evaluation.cut,
        dropped=train.dropped + evaluation.dropped,
    )
    joined = not tokenizer.chat_template and "messages" in records[0].content
    return Examples(train.examples, evaluation.examples, counts, digests, PROMPT_END if joined else "")


def require_known_tokens(examples: Examples, tokenizer: Any, folder: Path) -> None:
    """Raises ValueError if an example has a token for which the model has no embedding.

    A padding token that the model does not know is replaced by the end-of-sequence token: nothing reads it.
    """
    from transformers import AutoConfig

    vocabulary = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "vocab_size", None)
    if vocabulary is None:
        return
    for example in (*examples.train, *examples.evaluation):
        largest = max(example.input_ids)
        if largest >= vocabulary:
            raise ValueError(
                f"{example.place}: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is outside of the"
                f" vocabulary of {vocabulary} of the model in {folder}: resize its embeddings"
                " (model.resize_token_embeddings(len(tokenizer))) and save it, or use the model's own tokenizer"
            )
    if tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token = tokenizer.eos_token


def stop_tokens(tokenizer: Any, folder: Path) -> set[int]:
    """Ids of the tokens that end generation, from the tokenizer and the model folder's generation_config.json."""
    file = folder / "generation_config.json"
    return set(end_tokens(tokenizer, json.loads(file.read_text()).get("eos_token_id") if file.exists() else None))


def learnt_ends(examples: Iterable[Example], stop_ids: set[int]) -> bool:
    """Whether any learnt answer ends in a token that ends generation, so that the model learns to stop."""
    return any(label in stop_ids for example in examples for label in example.labels)


def about_the_first(example: Example, tokenizer: Any) -> str:
    """One line about an example and the part of it that has a loss."""
    learnt = [label for label in example.labels if label != IGNORED]
    text = tokenizer.decode(learnt)
    shown = text if len(text) <= 80 else f"{text[:50]} … {text[-25:]}"
    return f"first record ({example.place}): {len(learnt)} of {len(example.labels)} tokens are learnt: {shown!r}"
