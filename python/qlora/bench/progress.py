"""Shows on stderr what is measured, and the time left as far as it is known: a bar on a terminal, otherwise lines."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

REFRESH_S = 0.5  # seldom, because drawing takes time from a core that measures
LINE_S = 10.0  # without a terminal, a line is written when nothing has been for so long


class Progress:
    def __init__(self) -> None:
        self.console = Console(stderr=True)
        text = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        self._bar = Bar(
            BarColumn(10), MofNCompleteColumn(), text,
            console=self.console, transient=True, auto_refresh=False, redirect_stdout=False, expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)
        self._shares: Sequence[float] = ()
        self._done, self._label = 0, "starting"
        self._contender, self._phase, self._limit_s = "", "", 0.0
        self._began = self._phase_began = self._work_began = time.monotonic()
        self._shown = 0.0

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def works(self, shares: Sequence[float]) -> None:
        """The works that follow, by the time that each will presumably take, in any unit."""
        self._shares, self._began = shares, time.monotonic()
        self._bar.update(self._task, total=len(shares))

    def start(self, label: str) -> None:
        self._label, self._contender = label, ""
        self._work_began = self._phase_began = time.monotonic()
        self._show()

    def finish(self) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done)

    def begin(self, contender: str, phase: str, limit_s: float) -> None:
        if contender != self._contender or phase != self._phase:
            self._contender, self._phase, self._limit_s = contender, phase, limit_s
            self._phase_began = time.monotonic()

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def refresh(self) -> None:
        if time.monotonic() - self._shown >= (REFRESH_S if self.console.is_terminal else LINE_S):
            self._show()

    def seconds_left(self) -> float | None:
        """At the rate of the works that are done; None before the first, and when the last one takes longer."""
        if not self._done:
            return None
        rate = (self._work_began - self._began) / sum(self._shares[: self._done])
        left = rate * sum(self._shares[self._done + 1 :])
        left += max(0.0, rate * self._shares[self._done] - (time.monotonic() - self._work_began))
        return left or None

    def text(self) -> str:
        left = self.seconds_left()
        parts = [] if left is None else [f"about {left:.0f} s left"]
        parts.append(self._label)
        if self._contender:
            passed = time.monotonic() - self._phase_began
            duration = f": {passed:.0f} s of at most {self._limit_s:g} s" if passed > 1 else ""
            parts.append(f"{self._contender}, {self._phase}{duration}")
        return " · ".join(parts)

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self.console.is_terminal:
            self._bar.update(self._task, description=self.text(), refresh=True)
        else:
            number = f"{self._done + 1} of {len(self._shares)}: " if self._shares else ""
            self.note(number + self.text())
