"""The engine: one 4-bit base, its adapters, and requests that arrive and leave at any time, for one event loop."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora.serving.adapter_files import AdapterFile, read_adapter
from qlora.serving.layers import AdapterStacks
from qlora.serving.probe import Probe
from qlora.serving.residency import Entry, Residency, routing_of
from qlora.serving.sampling import Sampling, TokenChooser, TokenLogprobs


class OverloadedError(RuntimeError):
    """The server has no room for another request at the moment."""


class PromptTooLongError(ValueError):
    """A prompt and its answer exceed the model's context or the cache."""


class GenerationFailedError(RuntimeError):
    """One request could not go on; the others do."""


class EngineStoppedError(RuntimeError):
    """The thread that generates has ended."""


@dataclass(frozen=True)
class Limits:
    """What a server accepts. ``queue_seconds`` is how long a request may wait for its first token."""

    max_waiting: int = 256
    queue_seconds: float = 60.0
    max_tokens: int = 4096
    max_rank: int = 256


@dataclass(frozen=True)
class Progress:
    """New tokens of a request. ``finish`` is None until the last one: "stop" (an end token) or "length"."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish: str | None


def _positions(config: Any) -> int | None:
    """Most positions that a model can be served with; None without a limit.

    Where the rotary embedding's factors depend on the largest position in a batch (rope types longrope and dynamic),
    a request beyond the original length would change what the others beside it compute, and pieces of one long prompt
    would get different factors. So these models are served up to the original length.
    """
    longest = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            of_config = getattr(config, "original_max_position_embeddings", None)
            original = rope.get("original_max_position_embeddings") or of_config or longest
            longest = original if longest is None else min(longest, original)
    return longest


class Engine:
    """Generates for many requests at a time from one base and many adapters.

    Args:
        model: a transformers model with 4-bit layers, in eval mode.
        folder: its folder, against which adapters are checked.
        slots: adapters in memory at a time.
        batching: options of transformers' ContinuousBatchingConfig.
    """

    def __init__(self, model: Any, folder: Path, slots: int, limits: Limits, batching: dict[str, Any]) -> None:
        from transformers import ContinuousBatchingConfig

        from qlora.serving.batching import MAX_SERIAL, BatchingManager

        self.limits = limits
        self.model = model
        self._probe = Probe(model)
        self.config = model.config.get_text_config()
        self.generation_config = model.generation_config
        settings = type(self.generation_config)(eos_token_id=self.generation_config.eos_token_id, do_sample=False)
        self.manager = BatchingManager(model, settings, ContinuousBatchingConfig(**batching))
        self.stacks = AdapterStacks(model, self.manager.prepare(), slots)
        self.adapters = Residency(slots, MAX_SERIAL, self._read, self._put)
        self._folder = folder
        self._started = False
        self.waiting = 0  # requests without a first token
        self.running = 0
        self.rejected = 0

    # ---- life ----

    async def start(self) -> None:
        """Starts the thread, and compares answers of a mixed batch with the model's own.

        Raises ValueError if the model computes something else in a packed batch, or nothing.
        """
        self.manager.start()
        limits, self.limits = self.limits, Limits(queue_seconds=3600.0)  # those of the user are for requests
        try:
            with self.stacks.keeping_layers_of_all_tokens():
                await self._probe.compare(self)
            self._started = True
        except BaseException:
            await asyncio.to_thread(self.manager.stop, block=True, timeout=5, hard_stop=True)
            raise
        finally:
            self.limits = limits

    def stop(self) -> None:
        """Finishes what runs, then ends the thread."""
        if self.manager.is_running():
            self.manager.stop(block=True, timeout=30)

    @property
    def failure(self) -> str | None:
        """Why the engine no longer generates; None while it does."""
        fatal = self.manager.background_thread_status.fatal_error
        if fatal is not None:
            return f"{type(fatal).__name__}: {fatal}"
        return None if self.manager.is_running() else "it is not running"

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return min(_positions(self.config) or self.manager.capacity, self.manager.capacity)

    @property
    def free_cache_share(self) -> float:
        """The share of the key-value cache that no request uses."""
        processor = self.manager.batch_processor
        return processor.cache.compute_free_capacity() if processor is not None else 0.0

    # ---- adapters ----

    async def add_adapter(self, name: str, folder: Path) -> Entry:
        """Serves the adapter of a folder under a name. Raises ValueError and FileNotFoundError for bad files."""
        if not self._started:
            raise EngineStoppedError("start() must come first: it finds out which layers can have adapters")
        return await self.adapters.add(name, folder, int(time.time()))

    def _read(self, folder: Path) -> AdapterFile:
        return read_adapter(folder, self._folder, self.stacks.shapes(), self.limits.max_rank)

    def _put(self, slot: int, file: AdapterFile) -> None:
        with self.manager.pause():
            try:
                self.stacks.put(slot, file.layers)
            finally:
                self.manager.forget_graphs()
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)

    # ---- requests ----

    def max_new_tokens(self, prompt: int, requested: int | None) -> int:
        """How many tokens an answer may have. Raises PromptTooLongError with the numbers."""
        room = self.context - prompt
        if room < 1 or (requested is not None and requested > room):
            answer = f" and an answer of {requested}" if requested is not None else ""
            raise PromptTooLongError(
                f"a prompt of {prompt} tokens{answer} exceeds the context of {self.context} tokens"
            )
        if requested is not None and requested > self.limits.max_tokens:
            raise PromptTooLongError(f"max_tokens={requested} exceeds this server's limit of {self.limits.max_tokens}")
        return min(room, self.limits.max_tokens) if requested is None else requested

    async def generate(
        self, prompt: list[int], adapter: str | None, sampling: Sampling, max_new_tokens: int
    ) -> AsyncGenerator[Progress, None]:
        """Yields an answer's tokens as they come. Closing the generator early cancels the request.

        Raises OverloadedError if too many requests wait or the first token takes too long, UnknownAdapterError, and
        EngineStoppedError.
        """
        if self.failure is not None:
            raise EngineStoppedError(f"the engine stopped: {self.failure}")
        if self.waiting >= self.limits.max_waiting:
            self.rejected += 1
            raise OverloadedError(f"{self.waiting} requests are waiting, the most that this server lets wait")
        deadline = time.monotonic() + self.limits.queue_seconds
        self.waiting += 1
        is_waiting = True
        entry: Entry | None = None
        try:
            if adapter is not None:
                entry = await self._before(deadline, self.adapters.acquire(adapter))
            chooser = TokenChooser(sampling, self.config.vocab_size, self.model.device)
            request = _Request(self.manager, prompt, entry, chooser)
            try:
                request.submit(max_new_tokens)
                progress = await self._before(deadline, request.next())
                self.waiting -= 1
                self.running += 1
                is_waiting = False
                while True:
                    yield progress
                    if progress.finish is not None:
                        return
                    progress = await request.next()
            finally:
                request.close()
        finally:
            if is_waiting:
                self.waiting -= 1
            else:
                self.running -= 1
            if entry is not None:
                self.adapters.release(entry)

    async def _before(self, deadline: float, waited: Any) -> Any:
        try:
            return await asyncio.wait_for(waited, deadline - time.monotonic())
        except asyncio.TimeoutError:
            self.rejected += 1
            raise OverloadedError(
                f"there was no room for this request within {self.limits.queue_seconds:g} seconds"
            ) from None


class _Request:
    """One request inside the manager."""

    def __init__(self, manager: Any, prompt: list[int], entry: Entry | None, chooser: TokenChooser) -> None:
        from qlora.serving.batching import Route

        self._manager, self._prompt, self._chooser = manager, prompt, chooser
        self._id = f"qlora-{uuid.uuid4().hex}"
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._seen = 0
        self._done = False
        slot, serial = routing_of(entry)
        manager.routes[self._id] = Route(slot, serial, chooser)

    def submit(self, max_new_tokens: int) -> None:
        self._manager.register_result_handler(self._id, self._outputs.put_nowait)
        accepted = self._manager.add_request(
            self._prompt, request_id=self._id, max_new_tokens=max_new_tokens, streaming=True
        )
        if accepted is None:
            raise EngineStoppedError("the engine is stopping")

    async def next(self) -> Progress:
        """Waits for new tokens; several steps that came meanwhile are one progress."""
        output = await self._outputs.get()
        while not self._outputs.empty():
            output = self._outputs.get_nowait()
        if output.error is not None:
            self._done = True
            raise EngineStoppedError(f"generation failed: {output.error}")
        if self._chooser.failure is not None:
            raise GenerationFailedError(self._chooser.failure)
        first, self._seen = self._seen, len(output.generated_tokens)
        finish = None
        if output.is_finished():
            self._done = True
            finish = "stop" if output.generated_tokens[-1] in self._ends() else "length"
        return Progress(output.generated_tokens[first:], self._chooser.logprobs[first : self._seen], finish)

    def _ends(self) -> set[int]:
        ends = self._manager.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list | tuple) else {ends}

    def close(self) -> None:
        """Cancels the request unless it is done, and forgets it."""
        if not self._done:
            with self._manager.output_router._lock:
                self._manager.output_router.result_handlers.pop(self._id, None)
            self._manager.cancel_request(self._id)
        self._manager.routes.pop(self._id, None)


def answers(sampling: Sampling, count: int) -> list[Sampling]:
    """Settings of ``count`` answers to one prompt: a seed gives each its own random numbers."""
    if sampling.seed is None:
        return [sampling] * count
    return [replace(sampling, seed=sampling.seed + index) for index in range(count)]
