"""Measures works in a child process, which is killed when a contender overruns its time or crashes.

A call of a library cannot be interrupted in the process that makes it. The child measures all contenders of a work in
alternation. When it has to be killed, a new one measures the work again without the contender that was running.
"""

import contextlib
import math
import multiprocessing
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import torch

from qlora.bench import left_out
from qlora.bench.left_out import LeftOut
from qlora.bench.measure import Watch, alternate
from qlora.bench.progress import REFRESH_S, Progress
from qlora.bench.works import Work

PREPARE_SECONDS = 60.0  # a contender may take at least this long to prepare (imports, its form of the weights)
PREPARATION = "preparation"
EXIT_SECONDS = 5.0  # for a child that has closed its pipe


@dataclass
class Measured:
    """What is known of a work. It is filled while the work is measured, so an interrupted work has figures too."""

    work: Work
    flops: float = 0.0
    size_bytes: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)  # per call, by contender
    left_out: dict[str, LeftOut] = field(default_factory=dict)

    def interrupt(self) -> None:
        for name in self.work.contenders:
            if name not in self.seconds:
                self.left_out.setdefault(name, LeftOut(left_out.INTERRUPTED))


class _Sender(Watch):
    """Reports a measurement to the parent."""

    def __init__(self, connection: Connection):
        self.send = connection.send

    def begin(self, contender: str, phase: str, calls: int) -> None:
        self.send(("begin", contender, phase, calls))

    def measured(self, contender: str, seconds: float) -> None:
        self.send(("measured", contender, seconds))

    def failed(self, contender: str, error: Exception) -> None:
        self.send(("left out", contender, left_out.of_error(error)))

    def note(self, text: str) -> None:
        self.send(("note", text))


def _measure(watch: _Sender, work: Work, device: torch.device, repeats: int, limit_s: float, names: list[str]) -> None:
    case = work.build()
    watch.send(("cost", case.flops, case.size_bytes))
    ready = {}
    for name in names:
        if name not in case.prepare:
            watch.send(("left out", name, LeftOut(left_out.NO_SUCH_OPERATION)))
            continue
        watch.begin(name, PREPARATION, 0)
        try:
            ready[name] = case.prepare[name]()
        except Exception as error:
            watch.failed(name, error)
    alternate(ready, device, case.copies, repeats, work.graphs, limit_s, watch)


def _portable(error: Exception) -> Exception:
    """The error itself, or its text if it does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)).strip())
    return error


def _serve(connection: Connection, device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    if device.type == "cuda":
        # CUDA graphs cannot be captured on the default stream, nor backward passes whose forward ran on it.
        torch.cuda.set_stream(torch.cuda.Stream(device))
    watch = _Sender(connection)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has ended
        while True:
            function, arguments = connection.recv()
            try:
                result = function(watch, *arguments) if function is _measure else function(*arguments)
                connection.send(("result", result))
            except Exception as error:
                connection.send(("error", _portable(error)))


class _Lost(Exception):
    """The child has been killed or has died while this contender ran ("": none did)."""

    def __init__(self, contender: str, reason: LeftOut, slow: bool = False):
        super().__init__(f"the measuring process ended: {reason.detail}")
        self.contender, self.reason, self.slow = contender, reason, slow


class Session:
    def __init__(self, device: torch.device, repeats: int, limit_s: float, progress: Progress):
        self.device, self.repeats, self.limit_s, self.progress = device, repeats, limit_s, progress
        self._child: Any = None
        self._slow: list[tuple[str, Work, LeftOut]] = []

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """The result of a function in the child. Both the function and its result can be pickled."""
        try:
            for _ in self._events(function, arguments):
                pass
        except _Lost as lost:
            raise ChildProcessError(str(lost)) from None
        return self._result

    def measure(self, measured: Measured) -> None:
        """Measures a work into ``measured``."""
        work, reasons = measured.work, measured.left_out
        for name in work.contenders:
            if (estimate := self._estimate(name, work)) is not None:
                reasons[name] = estimate
        while names := [name for name in work.contenders if name not in reasons]:
            measured.seconds.clear()
            try:
                self._follow(measured, names)
                return
            except _Lost as lost:
                if not lost.contender:
                    raise ChildProcessError(f"{work.label()}: {lost}") from None
                measured.seconds.clear()
                reasons[lost.contender] = lost.reason
                if lost.slow:
                    self._slow.append((lost.contender, work, lost.reason))

    def _follow(self, measured: Measured, names: list[str]) -> None:
        arguments = (measured.work, self.device, self.repeats, self.limit_s, names)
        for kind, *fields in self._events(_measure, arguments):
            if kind == "cost":
                measured.flops, measured.size_bytes = fields
            elif kind == "measured":
                name, seconds = fields
                measured.seconds.setdefault(name, []).append(seconds)
            elif kind == "left out":
                name, reason = fields
                measured.left_out[name] = reason
                measured.seconds.pop(name, None)

    def _estimate(self, name: str, work: Work) -> LeftOut | None:
        """A reason not to begin a work that is at least as large as one that was too slow."""
        for slow, smaller, reason in self._slow:
            similar = smaller.name == work.name or reason.more_than_s is None  # works share what is prepared
            if slow == name and similar and all(work.extents[key] >= smaller.extents[key] for key in smaller.extents):
                return LeftOut(f"{reason.why} (estimated)", f"not begun, because of {smaller.label()}")
        return None

    def _events(self, function: Callable[..., Any], arguments: tuple) -> Iterator[tuple]:
        """Messages of the child until it has the function's result. Raises the function's error, or _Lost."""
        connection, process = self._started()
        contender, phase, calls, deadline, limit_s = "", "", 0, math.inf, math.inf
        with contextlib.suppress(BrokenPipeError):  # recv() tells that the child has died
            connection.send((function, arguments))
        while True:
            self.progress.refresh()
            try:
                if not connection.poll(max(0.0, min(REFRESH_S, deadline - time.monotonic()))):
                    if time.monotonic() >= deadline:
                        self._kill()
                        raise _Lost(contender, left_out.too_slow(limit_s, phase, calls), slow=calls <= 1)
                    continue
                message = connection.recv()
            except (EOFError, ConnectionResetError):
                process.join(EXIT_SECONDS)
                code = process.exitcode
                self._kill()
                how = "no status" if code is None else signal.Signals(-code).name if code < 0 else f"status {code}"
                raise _Lost(contender, LeftOut("crashed", f"its process ended with {how}")) from None
            if message[0] == "begin":
                _, contender, phase, calls = message
                limit_s = max(self.limit_s, PREPARE_SECONDS) if phase == PREPARATION else self.limit_s
                deadline = time.monotonic() + limit_s
                self.progress.begin(contender, phase, limit_s)
            elif message[0] == "note":
                self.progress.note(message[1])
            elif message[0] == "error":
                raise message[1]
            elif message[0] == "result":
                self._result = message[1]
                return
            else:
                yield message

    def _started(self) -> tuple[Connection, Any]:
        if self._child is not None and not self._child[1].is_alive():  # it died after its last result
            self._kill()
        if self._child is None:
            context = multiprocessing.get_context("spawn")  # a fork inherits threads' locks and the CUDA context
            ours, theirs = context.Pipe()
            arguments = (theirs, self.device, torch.get_num_threads())
            process = context.Process(target=_serve, args=arguments, daemon=True)
            # Ctrl-C is for this process only: the child inherits the mask, and is killed. The resource tracker would
            # otherwise be started by the first start(), and it unblocks the signal.
            resource_tracker.ensure_running()
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            self._child = ours, process
        return self._child

    def _kill(self) -> None:
        if self._child is not None:
            connection, process = self._child
            self._child = None
            process.kill()
            process.join()
            connection.close()
