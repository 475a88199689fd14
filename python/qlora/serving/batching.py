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
from transformers.generation.continuous_batching.model_runner import ModelRunner, infer_max_single_request_tokens
from transformers.generation.continuous_batching.utils import stream_context

from qlora.serving import attention
from qlora.serving.layers import BASE, Routing
from qlora.serving.sampling import Sampling, TokenChooser, choose_all

_SALT_SHIFT = 20  # token ids are below 2**20; of the bits above, these two tokens hold a salt
_SALT_BITS = 11  # of each of the first two tokens
MAX_SERIAL = 1 << (2 * _SALT_BITS)


@dataclass(frozen=True)
class Route:
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

    def __init__(
        self, routes: dict[str, Route], vocabulary: int, device: torch.device, rows: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._routes = routes
        self._logits = torch.empty(rows, vocabulary, device=device)

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        self._logits[: scores.shape[1]].copy_(scores[0])

    def compute_batch(self, model: Any, batch_data: dict) -> None:
        super().compute_batch(model, batch_data)
        states = [request.state for request in self.inputs_and_outputs.requests_in_batch if request.has_new_token]
        if not states:
            return
        nobody = TokenChooser(Sampling(temperature=0.0), self._logits.shape[1])  # for requests that were cancelled
        choosers = []
        for state in states:
            route = self._routes.get(state.request_id)
            # A request that lost its pages is computed again, with what it generated as a part of its prompt.
            prompt = state._true_initial_tokens or len(state.initial_tokens)
            generated = [*state.initial_tokens[prompt:], *state.generated_tokens]
            choosers.append((route.chooser if route else nobody, state.initial_tokens[:prompt], generated))
        with stream_context(self.inputs_and_outputs.compute_stream):
            tokens = choose_all(self._logits[: len(states)], choosers)
            output = self.inputs_and_outputs.get_cb_kwargs()[2]
            output[0, : len(tokens)].copy_(torch.tensor(tokens, dtype=output.dtype))


class _Nowhere:
    """A queue for outputs that nobody waits for: those of requests that were cancelled."""

    def put(self, output: Any) -> None:
        pass

    def empty(self) -> bool:
        return True


class BatchingManager(ContinuousBatchingManager):
    """The manager of :mod:`transformers` whose requests have a :class:`Route` in ``routes``, by request id.

    A request whose route is gone was cancelled. The batch that is prepared may still contain it: then it uses the base,
    and its pages are shared with nobody.
    """

    def __init__(self, model: Any, generation_config: Any, batching_config: Any) -> None:
        self.routes: dict[str, Route] = {}
        self.routing: Routing | None = None
        self.capacity = 0  # tokens of the longest request that the cache holds; known once it is prepared
        self.on_batch: Callable[[int, int], None] = lambda requests, tokens: None
        if model.config.get_text_config().vocab_size > 1 << _SALT_SHIFT:
            batching_config.allow_block_sharing = False
        batching_config.use_async_batching = False  # the routing has one buffer, not two
        packed = model.device.type == "cpu" and model.config._attn_implementation == "sdpa"
        super().__init__(model, generation_config, batching_config)
        self.output_router.output_queue = _Nowhere()
        self.logit_processor.clear()  # a chooser does its work, by each request's own settings
        if packed:
            attention.register()
            model.set_attn_implementation(attention.NAME)

    def prepare(self) -> Routing:
        """Allocates the cache before the first request, and returns the routing that served layers read."""
        self.batch_processor = self._create_batch_processor()
        cache = self.batch_processor.cache
        cache.cache_tensor.zero_()  # now, so that memory does not grow while pages are used for the first time
        self.capacity = infer_max_single_request_tokens(cache)
        assert self.routing is not None
        return self.routing

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
            self.routes,
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
            routes = [self.routes.get(request.state.request_id) for request in requests_in_batch]
            counts = [request.query_length for request in requests_in_batch]
            with stream_context(inputs.compute_stream):
                routing.set([BASE if route is None else route.slot for route in routes], counts, inputs.num_q_tokens)
            self.on_batch(len(counts), sum(counts))

        key = inputs._get_graph_key
        inputs.prepare_batch_tensors = prepare_and_route
        inputs._get_graph_key = lambda: (*key(), routing.only_base)  # a batch without adapters runs other kernels

    def _salt_prefixes(self, cache: Any) -> None:
        search = cache.search_prefix_match

        def search_salted(request_id: str, tokens: list[int]) -> int:
            route = self.routes.get(request_id)
            return 0 if route is None else search(request_id, salted(tokens, route.serial))

        cache.search_prefix_match = search_salted
        for allocator in cache.cache_allocators.values():
            mark = allocator.mark_complete_blocks

            def mark_salted(request_id: str, tokens: list[int], new_blocks: int, mark: Any = mark) -> None:
                route = self.routes.get(request_id)
                if route is not None:
                    mark(request_id, salted(tokens, route.serial), new_blocks)

            allocator.mark_complete_blocks = mark_salted
