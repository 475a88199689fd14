"""The tokenizer of a model folder as the fields of a GGUF file: byte-level BPE, or SentencePiece's BPE.

Everything is read from the fast tokenizer's JSON, so a tokenizer.model is not needed. llama.cpp merges SentencePiece
tokens by the highest score of the result; here a token's score is the negative rank of the merges that create it, which
gives the merges in the order of the JSON.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

# How a pre-tokenizer splits text, by llama.cpp's name for it: the steps before the byte alphabet, as they stand in
# tokenizer.json. The second name is for vocabularies in which a whole token wins over merges (ignore_merges).
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SPLITS: dict[tuple[str, ...], tuple[str | None, str | None]] = {
    ("gpt2",): ("gpt-2", None),
    ("digits", "gpt2"): ("smollm", None),
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",): ("dbrx", "llama-bpe"),
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",): ("qwen2", None),
    (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_SLASH}",): (None, "tekken"),
    (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_SLASH}",): ("gpt-4o", None),
}


@dataclass
class GgufTokenizer:
    """The fields ``tokenizer.ggml.*`` of a file."""

    model: str  # "gpt2" is byte-level BPE, "llama" SentencePiece's
    pre: str
    tokens: list[str]  # one for each row of the embedding
    types: list[int]  # gguf.TokenType
    scores: list[float] | None = None
    merges: list[str] | None = None
    ids: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, eom, unk, pad
    flags: dict[str, bool] = field(default_factory=dict)  # add_bos_token, add_eos_token, add_space_prefix
    chat_template: Any = None  # a string, or a list of {"name", "template"}
    strips_after_special: bool = False  # special tokens swallow the spaces that follow them, as in Phi-3
    note: str | None = None  # texts that llama.cpp splits differently

    def write(self, writer: Any) -> None:
        """Adds the fields to a GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(token)
        for name, value in self.flags.items():
            getattr(writer, f"add_{name}")(value)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def load_fast_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises FileNotFoundError if it has none, ValueError if it is not a fast one."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).exists() for name in names):
        raise FileNotFoundError(
            f"{folder} has no tokenizer ({', '.join(names)}): a GGUF file contains one; copy the tokenizer's files of"
            " the original model there"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{folder}: {type(tokenizer).__name__} has no tokenizer.json: save it as a fast tokenizer")
    return tokenizer


def read_tokenizer(tokenizer: Any, rows: int, end_ids: list[int], pre: str | None = None) -> GgufTokenizer:
    """The fields for a tokenizer of transformers.

    Args:
        rows: rows of the model's embedding; rows without a token are filled with unused ones.
        end_ids: tokens that end an answer, from the model's generation config.
        pre: llama.cpp's name of the pre-tokenizer (default: recognized from its rules).

    Raises ValueError for a kind of tokenizer or pre-tokenizer that llama.cpp does not have.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    if model.get("type") != "BPE":
        raise ValueError(
            f"the tokenizer is a {model.get('type')} model: GGUF files are written for BPE tokenizers, byte-level ones"
            " (Llama 3, Qwen, SmolLM) and SentencePiece's (Llama 2, Mistral, Gemma, Phi-3)"
        )
    names = {id_: token for token, id_ in model["vocab"].items()}
    added = {entry["id"]: entry for entry in data.get("added_tokens", ())}
    names |= {id_: entry["content"] for id_, entry in added.items()}
    if max(names) >= rows:
        raise ValueError(
            f"the tokenizer has the token {max(names)} ('{names[max(names)]}'), but the model's embedding has {rows}"
            " rows: this is the tokenizer of another model"
        )
    steps = _steps(data)
    sentencepiece = bool(model.get("byte_fallback")) and "bytes" not in steps
    if not sentencepiece and "bytes" not in steps:
        raise ValueError(
            "the tokenizer's BPE is neither byte-level nor SentencePiece's (byte_fallback): llama.cpp has no such"
            " tokenizer"
        )
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    tokens, types = _tokens(names, added, rows, model.get("unk_token"), sentencepiece)
    fields = GgufTokenizer(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else pre or _pre(steps, bool(model.get("ignore_merges"))),
        tokens=tokens,
        types=types,
        ids=_special_ids(tokenizer, end_ids),
        flags=_flags(tokenizer),
        chat_template=_chat_template(tokenizer),
        strips_after_special=any(entry.get("rstrip") and entry.get("special") for entry in added.values()),
    )
    if sentencepiece:
        _check_bytes(model["vocab"])
        fields.scores = _scores(tokens, types, merges)
        fields.flags["add_space_prefix"] = "prefix" in steps
        if "metaspace" in steps:
            fields.note = (
                "llama.cpp puts a space before every text after a special token; this tokenizer does so only where the"
                " text has none (and some only at the beginning): spaces there can become other tokens"
            )
    else:
        fields.merges = [" ".join(pair) for pair in merges]
    return fields


def _steps(data: dict[str, Any]) -> list[str]:
    """What a tokenizer does to text before its merges: "prefix", "digits", "gpt2", "bytes", or a regular expression."""
    steps = []
    for part in (data.get("normalizer"), data.get("pre_tokenizer")):
        items = [part] if part and part["type"] != "Sequence" else (part or {})
        nested = items if isinstance(items, list) else items.get("pretokenizers", items.get("normalizers", []))
        for item in nested:
            kind = item["type"]
            if (kind == "Prepend" and item["prepend"] == _SPACE) or (
                kind == "Metaspace" and item.get("prepend_scheme", "always") != "never"
            ):
                steps += ["prefix"] if kind == "Prepend" else ["prefix", "metaspace"]
            elif kind == "Digits" and item.get("individual_digits"):
                steps.append("digits")
            elif kind == "ByteLevel":
                if item.get("add_prefix_space"):
                    steps.append("prefix")
                steps += ["gpt2", "bytes"] if item.get("use_regex", True) else ["bytes"]
            elif kind == "Split" and "Regex" in item["pattern"] and not item.get("invert"):
                steps.append(item["pattern"]["Regex"])
            elif kind not in ("NFC", "Replace", "Metaspace", "Split"):
                steps.append(kind)
    return steps


def _pre(steps: list[str], ignore_merges: bool) -> str:
    key = tuple(step for step in steps if step != "bytes")
    name = _SPLITS.get(key, (None, None))[ignore_merges]
    if name is None:
        known = sorted({n for pair in _SPLITS.values() for n in pair if n})
        raise ValueError(
            f"the pre-tokenizer {list(key)}{' with ignore_merges' if ignore_merges else ''} is not one of those known"
            f" here ({', '.join(known)}): if you know llama.cpp's name for it, pass --pre-tokenizer NAME"
        )
    return name


def _tokens(
    names: dict[int, str], added: dict[int, dict[str, Any]], rows: int, unknown: str | None, sentencepiece: bool
) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokens, types = [], []
    for row in range(rows):
        token, kind = names.get(row), TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{row}]", TokenType.UNUSED
        elif row in added:
            kind = TokenType.CONTROL if added[row].get("special") else TokenType.USER_DEFINED
            if kind == TokenType.USER_DEFINED and sentencepiece:
                token = token.replace(_SPACE, " ")  # llama.cpp finds these in the text as it is written
        if sentencepiece and token == unknown:
            kind = TokenType.UNKNOWN
        elif sentencepiece and _BYTE.fullmatch(token):
            kind = TokenType.BYTE
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """The score of each token: the negative rank of its first merge, and less than all of them for a token without one.

    The merges that make a token must follow each other, or the order needs more than one score for it. The exception
    are runs of one character (Gemma's line breaks and spaces): their merges alternate by length, the longest first, and
    with either order a run grows from its left end.
    """
    rank: dict[str, int] = {}
    last = None
    for pair in merges:
        result = "".join(pair)
        if result in rank and result != last and len(set(result)) > 1:
            raise ValueError(
                f"the tokenizer merges into '{result}' at two places of its order: it does not come from SentencePiece,"
                " and llama.cpp would split text differently"
            )
        rank.setdefault(result, len(rank))
        last = result
    lowest = -float(len(rank))
    return [
        -float(rank[t]) if t in rank else 0.0 if kind != 1 else lowest for t, kind in zip(tokens, types, strict=True)
    ]


def _check_bytes(vocabulary: dict[str, int]) -> None:
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer falls back to bytes, but has no token {missing[0]}: llama.cpp needs all 256")


def _special_ids(tokenizer: Any, end_ids: list[int]) -> dict[str, int]:
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    if ids["eos"] is None and end_ids:
        ids["eos"] = end_ids[0]
    more = [id_ for id_ in end_ids if id_ != ids["eos"]]
    ids |= dict(zip(("eot", "eom"), more, strict=False))
    return {name: int(id_) for name, id_ in ids.items() if id_ is not None}


def _flags(tokenizer: Any) -> dict[str, bool]:
    """What the tokenizer adds around a text, found by trying it."""
    whole, bare = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (True, False))
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    return {
        "add_bos_token": whole[: len(bare) + 1] == bos + bare,
        "add_eos_token": whole[-len(bare) - 1 :] == bare + eos,
    }


def _chat_template(tokenizer: Any) -> Any:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
