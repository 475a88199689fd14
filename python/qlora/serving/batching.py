"""transformers' continuous batching with an adapter, a prefix cache and sampling settings for each request.

transformers schedules requests and pages their keys and values. This module adds three things between its steps: it
tells the layers which adapter each token uses, keeps cached prefixes of different adapters apart, and chooses each
request's next token by that request's own settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.model_runner import ModelRunner

from qlora.serving import attention
from qlora.serving.layers import BASE, Routing
from qlora.serving.sampling import TokenChooser, choose_all

_SALT_SHIFT = 20  # token ids are below 2**20; of the bits above, these two tokens hold a salt
_SALT_BITS = 11  # of each of the first two tokens
MAX_SERIAL = 1 << (2 * _SALT_BITS)


@dataclass(frozen=True)
class Job:
    """What a request needs during its batches: the adapter's slot and serial number (-1 and 0: base), and sampling."""

    slot: int
    serial: int
    chooser: TokenChooser


def salted(tokens: list[int], serial: int) -> list[int]:
    """The tokens with ``serial`` in unused bits of the first two, so that prefixes only match under one serial.

    transformers hashes tokens as int32, so ``serial`` is below :data:`MAX_SERIAL`.
    """
    if serial == 0 or len(tokens) < 2:
        return tokens
    low, high = serial & ((1 << _SALT_BITS) - 1), serial >> _SALT_BITS
    return [tokens[0] | low << _SALT_SHIFT, tokens[1] | high << _SALT_SHIFT, *tokens[2:]]


class _Runner(ModelRunner):
    """Runs a batch, then chooses tokens outside of what a CUDA graph captures."""

    def __init__(self, jobs: dict[str, Job], vocabulary: int, device: torch.device, rows: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._jobs = jobs
        self._logits = torch.empty(rows, vocabulary, device=device)

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        self._logits[: scores.shape[1]].copy_(scores[0])

    def compute_batch(self, model: Any, batch_data: dict) -> None:
        super().compute_batch(model, batch_data)
        states = [request.state for request in self.inputs_and_outputs.requests_in_batch if request.has_new_token]
        if not states:
            return
        jobs = [self._jobs.get(state.request_id, _NOBODY) for state in states]
        choosers = [
            (job.chooser, state.initial_tokens, state.generated_tokens) for job, state in zip(jobs, states, strict=True)
        ]
        tokens = choose_all(self._logits[: len(states)], choosers)
        output = self.inputs_and_outputs.get_cb_kwargs()[2]
        output[0, : len(tokens)].copy_(torch.tensor(tokens, dtype=output.dtype))


class _Greedy(TokenChooser):
    is_plain_greedy = True

    def __init__(self) -> None:
        pass


_NOBODY = Job(BASE, 0, _Greedy())  # a request that was cancelled while its last batch was prepared


class BatchingManager(ContinuousBatchingManager):
    """The manager of :mod:`transformers` whose requests have a :class:`Job` in ``jobs``, by request id."""

    def __init__(self, model: Any, generation_config: Any, batching_config: Any) -> None:
        self.jobs: dict[str, Job] = {}
        self.routing: Routing | None = None
        self.on_batch: Callable[[int, int], None] = lambda requests, tokens: None
        if model.config.get_text_config().vocab_size > 1 << _SALT_SHIFT:
            batching_config.allow_block_sharing = False
        batching_config.use_async_batching = False  # the routing has one buffer, not two
        packed = model.device.type == "cpu" and model.config._attn_implementation == "sdpa"
        super().__init__(model, generation_config, batching_config)
        self.logit_processor.clear()  # a chooser does its work, by each request's own settings
        if packed:
            attention.register()
            model.set_attn_implementation(attention.NAME)

    def prepare(self) -> Routing:
        """Allocates the cache before the first request, and returns the routing that served layers read."""
        self.batch_processor = self._create_batch_processor()
        assert self.routing is not None
        return self.routing

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds; one request may not be longer."""
        processor = self.batch_processor
        assert processor is not None
        return processor.cache.max_tokens_read

    def forget_graphs(self) -> None:
        """Drops captured CUDA graphs, after a layer's tensors have been replaced."""
        processor = self.batch_processor
        assert processor is not None
        processor.inputs_and_outputs.graphs = type(processor.inputs_and_outputs.graphs)()

    def _create_batch_processor(self) -> Any:
        is_new = self.batch_processor is None
        processor = super()._create_batch_processor()
        if not is_new:
            return processor
        config, cache = self.continuous_batching_config, processor.cache
        self.routing = Routing(cache.max_batch_tokens, self.model.device)
        processor.model_runner = _Runner(
            self.jobs,
            self.model.config.get_text_config().vocab_size,
            self.model.device,
            max(config.max_requests_per_batch, 1),
            logit_processor=self.logit_processor,
            cb_config=config,
            inputs_and_outputs=processor.inputs_and_outputs,
            cache=cache,
            do_sample=False,
            return_logprobs=False,
        )
        self._route_batches(processor.inputs_and_outputs)
        self._salt_prefixes(cache)
        return processor

    def _route_batches(self, inputs: Any) -> None:
        prepare = inputs.prepare_batch_tensors
        routing = self.routing
        assert routing is not None

        def prepare_and_route(requests_in_batch: list[Any], **kwargs: Any) -> None:
            prepare(requests_in_batch=requests_in_batch, **kwargs)
            slots = [self.jobs.get(request.state.request_id, _NOBODY).slot for request in requests_in_batch]
            counts = [request.query_length for request in requests_in_batch]
            routing.set(slots, counts, inputs.num_q_tokens)
            self.on_batch(len(counts), sum(counts))

        key = inputs._get_graph_key
        inputs.prepare_batch_tensors = prepare_and_route
        inputs._get_graph_key = lambda: (*key(), routing.only_base)  # a batch without adapters runs other kernels

    def _serial_of(self, request_id: str) -> int:
        return self.jobs.get(request_id, _NOBODY).serial

    def _salt_prefixes(self, cache: Any) -> None:
        search = cache.search_prefix_match
        cache.search_prefix_match = lambda request_id, tokens: search(
            request_id, salted(tokens, self._serial_of(request_id))
        )
        for allocator in cache.cache_allocators.values():
            mark = allocator.mark_complete_blocks

            def mark_salted(request_id: str, tokens: list[int], new_blocks: int, mark: Any = mark) -> None:
                mark(request_id, salted(tokens, self._serial_of(request_id)), new_blocks)

            allocator.mark_complete_blocks = mark_salted
