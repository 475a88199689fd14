"""Reads training records from JSON lines, JSON, CSV, Parquet or a data set of the Hub, and checks each one."""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    **{role: role for role in _ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
    "function": "tool",
}
SHAPES = "'messages', 'prompt' and 'completion', 'text', 'instruction' and 'output', or 'conversations'"


class BadRecord(ValueError):
    """A record that cannot be used; the message gives its place and the rule that it breaks."""


@dataclass(frozen=True)
class Record:
    """One checked record (messages, prompt and completion, or text) and its place (``path:line``)."""

    content: dict[str, Any]
    place: str


# ---- one record ----


def _shape(record: dict[str, Any]) -> str:
    """The key that determines the shape of a record. Raises ValueError if there is none, or more than one."""
    shapes = [
        key for key in ("messages", "conversations", "prompt", "instruction", "text") if record.get(key) is not None
    ]
    if "instruction" in shapes and "text" in shapes and record.get("output") is not None:
        shapes.remove("text")  # Alpaca's own files also contain the rendered text
    if len(shapes) != 1:
        raise ValueError(f"keys {sorted(map(str, record))}: a record has either {SHAPES}")
    return shapes[0]


def _text(record: dict[str, Any], key: str, may_be_empty: bool = False) -> str:
    value = record.get(key)
    if may_be_empty and value is None:
        return ""
    if not isinstance(value, str) or not (value or may_be_empty):
        raise ValueError(f"'{key}' must be a string that is not empty")
    value.encode()  # rejects lone surrogates: UnicodeEncodeError is a ValueError
    return value


def _list(record: dict[str, Any], key: str) -> list[Any]:
    value = record[key]
    if isinstance(value, str):  # JSON in a column of a CSV file
        value = json.loads(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{key}' must be a list that is not empty")
    return value


def _without_none(value: Any) -> Any:
    """The value without keys whose value is None, which Parquet adds; a template would treat such a key as given."""
    if isinstance(value, dict):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _system(record: dict[str, Any]) -> list[dict[str, str]]:
    """The system message of a record whose shape has a key for it."""
    return [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []


def _messages(messages: list[Any], tools: list[Any] | None = None) -> dict[str, Any]:
    messages = [_without_none(message) for message in messages]
    for message in messages:
        if isinstance(message, dict) and message.get("tool_calls"):
            message.setdefault("content", "")  # OpenAI's records of calls have none
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError("each message needs a 'role' and a string 'content'")
        message["content"].encode()
        if message.get("role") not in _ROLES:
            raise ValueError(f"role {message.get('role')!r} is not one of {', '.join(_ROLES)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message has the role 'assistant': there is nothing to learn")
    return {"messages": messages} | ({"tools": _without_none(tools)} if tools else {})


def _tools(record: dict[str, Any]) -> list[Any] | None:
    return _list(record, "tools") if record.get("tools") else None


def _sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    messages = _system(record)
    for turn in _list(record, "conversations"):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError("each turn of 'conversations' needs a 'from' and a string 'value'")
        role = _SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise ValueError(f"'from' is {turn.get('from')!r}: it must be one of {', '.join(_SHAREGPT_ROLES)}")
        messages.append({"role": role, "content": turn["value"]})
    return _messages(messages, _tools(record))


def _alpaca(record: dict[str, Any]) -> dict[str, Any]:
    instruction, more = _text(record, "instruction"), _text(record, "input", may_be_empty=True)
    question = f"{instruction}\n\n{more}" if more else instruction
    earlier = []
    for turn in _list(record, "history") if record.get("history") else ():
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise ValueError("each turn of 'history' must be a list of a question and an answer")
        earlier += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    now = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(record, "output")}]
    return _messages([*_system(record), *earlier, *now], _tools(record))


def checked(record: Any) -> tuple[str, dict[str, Any]]:
    """The shape of a record, and the record converted to messages, prompt and completion, or text.

    Raises ValueError with the rule that the record breaks.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, not {type(record).__name__}")
    shape = _shape(record)
    if shape == "messages":
        return shape, _messages([*_system(record), *_list(record, "messages")], _tools(record))
    if shape == "conversations":
        return shape, _sharegpt(record)
    if shape == "instruction":
        return shape, _alpaca(record)
    if shape == "prompt":
        content = {"prompt": _text(record, "prompt"), "completion": _text(record, "completion")}
        tools = _without_none(_tools(record))
        more = {"system": _text(record, "system") if record.get("system") else None, "tools": tools}
        return shape, content | {key: value for key, value in more.items() if value}
    for key in ("system", "tools"):
        if record.get(key):
            raise ValueError(
                f"'{key}' beside 'text', which is learnt as it is: put it into the text, or use 'messages'"
            )
    return shape, {"text": _text(record, "text")}


# ---- files ----

# A reader yields the place of a record, with the record or the error in reading it.
_Items = Iterator[tuple[str, Any]]


def _json_lines(path: Path) -> _Items:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors too
                yield f"{path}:{number}", error


def _json(path: Path) -> _Items:
    """Reads a list of records, an object whose only list is the records, or JSON lines."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path)
            return
        raise BadRecord(f"{path}:{error.lineno}: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise BadRecord(f"{path}: {error}") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        is_record = any(key in content for key in ("messages", "conversations"))
        content = lists[0] if len(lists) == 1 and not is_record else [content]
    if not isinstance(content, list):
        raise BadRecord(f"{path}: it must contain a list of records, not {type(content).__name__}")
    for number, record in enumerate(content, start=1):
        yield f"{path}[record {number}]", record


def _csv(path: Path) -> _Items:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    csv.field_size_limit(2**31 - 1)  # a field may be a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    yield place, ValueError(f"the row must have as many fields as the header, {reader.fieldnames}")
                else:
                    yield place, {key: value for key, value in row.items() if value != ""}
        except (csv.Error, UnicodeDecodeError) as error:
            raise BadRecord(f"{path}:{reader.line_num + 1}: {error}") from error


def _parquet(path: Path) -> _Items:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(path).iter_batches()
        number = 0
        for batch in batches:
            for record in batch.to_pylist():
                number += 1
                yield f"{path}[record {number}]", record
    except (ArrowException, OSError) as error:
        raise BadRecord(f"{path} is not a readable Parquet file: {error}") from error


def _hub(name: str) -> _Items:
    """Reads a data set of the Hub: ``OWNER/NAME`` or ``OWNER/NAME:SPLIT`` (default: train)."""
    from datasets import load_dataset

    dataset, _, split = name.partition(":")
    try:
        records = load_dataset(dataset, split=split or "train")
    except (OSError, ValueError) as error:
        raise BadRecord(
            f"{name} is neither a file nor a data set of the Hub that can be loaded ({type(error).__name__}: {error})"
        ) from error
    for number, record in enumerate(records, start=1):
        yield f"{name}[record {number}]", record


_READERS = {".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}


def _items(source: str | Path) -> _Items:
    path = Path(source)
    if path.is_file():
        return _READERS.get(path.suffix.lower(), _json_lines)(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", str(source)) and path.suffix.lower() not in (*_READERS, ".jsonl"):
        return _hub(str(source))
    raise FileNotFoundError(f"{source} does not exist")


def read_records(source: str | Path, skip_bad: bool = False) -> tuple[list[Record], int]:
    """The records of a file or of a data set of the Hub, and the number of bad ones that were skipped.

    The file's extension determines its format: .json, .csv, .tsv or .parquet; .jsonl and all others have a JSON object
    on each line. Text is UTF-8, with or without a byte order mark. All records must have the same shape. Blank lines
    are ignored.

    Raises BadRecord with file and line (or the record's number) at the first bad record unless ``skip_bad``, and if no
    record is left. Raises FileNotFoundError if the source does not exist.
    """
    records: list[Record] = []
    bad, first = 0, ""
    for place, item in _items(source):
        try:
            if isinstance(item, Exception):
                raise item
            shape, content = checked(item)
            if first and shape != first:
                raise ValueError(f"a record with '{shape}' in a file whose records have '{first}'")
        except (ValueError, RecursionError) as error:
            if not skip_bad:
                raise BadRecord(f"{place}: {error}") from error
            bad += 1
            continue
        first = shape
        records.append(Record(content, place))
    if not records:
        raise BadRecord(f"{source} contains no usable record ({bad} bad ones)")
    return records, bad


def digest(records: list[Record]) -> str:
    """sha256 of the records' contents, by which a resumed run recognizes its data."""
    text = json.dumps([record.content for record in records], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
