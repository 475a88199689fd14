"""Text from tokens as they come: whole characters only, and nothing from a stop string on."""

from typing import Any


class TextStream:
    """Decodes one answer. With ``raw`` special tokens stay in the text, for a parser that needs them."""

    def __init__(self, tokenizer: Any, raw: bool = False) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._skip = not raw
        self._decoder = DecodeStream([], skip_special_tokens=self._skip)
        self._tokens: list[int] = []
        self._emitted = ""

    def add(self, tokens: list[int]) -> str:
        """The text that these tokens complete."""
        self._tokens += tokens
        pieces = (self._decoder.step(self._tokenizer._tokenizer, token) for token in tokens)
        text = "".join(piece for piece in pieces if piece)
        self._emitted += text
        return text

    def end(self) -> str:
        """What is left: the start of a character whose other bytes never came."""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=self._skip)
        return whole[len(self._emitted) :] if whole.startswith(self._emitted) else ""


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
