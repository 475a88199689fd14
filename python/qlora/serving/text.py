"""Text of tokens: of an answer as it comes, of a single token, and up to the first stop string."""

import re
from functools import cache
from typing import Any

_CONTEXT = 8  # tokens: more than a character has bytes
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TextStream:
    """Decodes one answer, in whole characters. With ``raw`` special tokens stay in the text, for a parser.

    Tokens are decoded together with those before them, and the text that is known already is cut off, because a
    tokenizer treats the beginning of a text differently. ``before``: the tokens of a text that this one continues.
    """

    def __init__(self, tokenizer: Any, raw: bool = False, before: list[int] | None = None) -> None:
        self._tokenizer = tokenizer
        self._skip = not raw
        self._tokens = list(before or [])
        self._begin = max(0, len(self._tokens) - _CONTEXT)  # where decoding begins
        self._known = len(self._tokens)  # tokens whose text was given

    def add(self, tokens: list[int]) -> str:
        """The text that these tokens complete."""
        self._tokens += tokens
        text = self._new_text()
        if not text or text.endswith("\ufffd"):  # in the middle of a character
            return ""
        self._begin, self._known = self._known, len(self._tokens)
        return text

    def end(self) -> str:
        """What is left: the start of a character whose other bytes never came."""
        return self._new_text()

    def _new_text(self) -> str:
        before = self._decode(self._tokens[self._begin : self._known])
        return self._decode(self._tokens[self._begin :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)


class TokenTexts:
    """The text and the bytes of single tokens, which may be parts of characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._is_byte_level = backend is not None and "ByteLevel" in str(getattr(backend, "decoder", None))

    def of(self, token: int) -> tuple[str, list[int] | None]:
        """Text and UTF-8 bytes of a token; no bytes if the tokenizer does not tell them."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return "", None
        if self._is_byte_level and all(character in _bytes_of_characters() for character in piece):
            content = bytes(_bytes_of_characters()[character] for character in piece)
            return content.decode(errors="replace"), list(content)
        byte = _BYTE_TOKEN.fullmatch(piece)
        if byte:
            content = bytes([int(byte[1], 16)])
            return content.decode(errors="replace"), list(content)
        text = piece.replace("▁", " ") if "▁" in piece else self._tokenizer.decode([token])
        return text, list(text.encode())


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class StopFilter:
    """Passes text on up to the first stop string, and holds back what could be the beginning of one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that is certainly before any stop string. After one, ``stopped`` is True and all else is dropped."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._possible_start())

    def end(self) -> str:
        """What was held back, if no stop string followed."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _possible_start(self) -> int:
        """The length of the longest end of the held text with which a stop string begins."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
