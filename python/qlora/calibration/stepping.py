"""Runs a block on all batches in step: every run waits before a module until that module has been calibrated."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora.calibration.blocks import Call, detached_inputs, inputs_noted


class _Cancelled(Exception):
    """Ends a run whose result nobody needs."""


class _Run(threading.Thread):
    """One run, in a thread of its own, because only a thread can wait in the middle of a forward pass.

    Threads take turns: the caller waits while one of them runs, so at most one computes at any time.
    """

    def __init__(self, block: nn.Module, call: Call, hidden: Tensor) -> None:
        super().__init__(daemon=True)
        self.block, self.call, self.hidden = block, call, hidden
        self.stopped_at: str | None = None  # the module before which it waits
        self.inputs: tuple[Any, ...] = ()  # of that module
        self.output: Tensor | None = None
        self.error: BaseException | None = None
        self.is_cancelled = False
        # A new thread would otherwise use the default stream of the default device.
        self.stream = torch.cuda.current_stream(hidden.device) if hidden.is_cuda else None
        self._turn, self._reply = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        self._turn.acquire()
        try:
            if not self.is_cancelled:
                with torch.no_grad(), torch.cuda.stream(self.stream):
                    self.output = self.call.run(self.block, self.hidden)
        except _Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001  (raised again by the caller)
            self.error = error
        self._reply.release()

    def wait_at(self, name: str, inputs: tuple[Any, ...]) -> None:
        """Called inside the run: gives the turn back until the caller goes on."""
        self.stopped_at, self.inputs = name, inputs
        self._reply.release()
        self._turn.acquire()
        self.stopped_at, self.inputs = None, ()
        if self.is_cancelled:
            raise _Cancelled

    def proceed(self) -> None:
        """Called by the caller: runs to the next stop or to the end. Raises what the run raised."""
        self._turn.release()
        self._reply.acquire()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        if self.is_alive() and self.output is None and self.error is None:
            self.is_cancelled = True
            self._turn.release()
        self.join()


class SteppedRuns:
    """All runs of a block; use in a ``with`` block, which ends the runs that are not complete."""

    def __init__(self, block: nn.Module, calls: Sequence[Call], hidden: Sequence[Tensor], stops: Sequence[str]) -> None:
        self._runs = [_Run(block, call, states) for call, states in zip(calls, hidden, strict=True)]
        self._stops = set(stops)
        self._hooks = inputs_noted(block, list(stops), self._note)

    def __enter__(self) -> "SteppedRuns":
        self._hooks.__enter__()
        try:
            for run in self._runs:
                run.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for run in self._runs:
            run.cancel()
        self._hooks.__exit__(None, None, None)

    def _note(self, name: str, inputs: tuple[Any, ...]) -> None:
        run = threading.current_thread()
        if name in self._stops:
            assert isinstance(run, _Run)
            run.wait_at(name, detached_inputs(inputs))

    def inputs(self, name: str) -> list[tuple[Any, ...] | None]:
        """The positional inputs of the module ``name`` by batch; None for a batch that does not call it.

        Each module can be named once, in the order of their calls. From then on runs no longer wait before it.
        """
        found: list[tuple[Any, ...] | None] = []
        for run in self._runs:
            if run.stopped_at is None and run.output is None:
                run.proceed()
            found.append(run.inputs if run.stopped_at == name else None)
        self._stops.discard(name)
        for run in self._runs:
            if run.stopped_at == name:
                run.stopped_at = None  # the next turn takes it past the module
        return found

    def outputs(self) -> list[Tensor]:
        """The block's new hidden states by batch."""
        self._stops.clear()
        outputs = []
        for run in self._runs:
            if run.output is None:
                run.proceed()
            assert run.output is not None
            outputs.append(run.output)
        return outputs
