"""A check at the start of a server: a packed batch gives the answers that the model gives alone.

Some models compute positions, masks or states that do not survive packing. They must not be served silently wrong.
"""

import asyncio
from typing import Any

import torch

from qlora.serving.sampling import Sampling

_STEPS = 3
_TOP = 5
_LENGTHS = (7, 3, 5)  # of the prompts, all in one batch
# Differences of log-probabilities: rounding stays far below, a mask that is missing lies far above.
_TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.1}


class Probe:
    """Greedy continuations of short prompts by the model's own forward, without a cache, made before packing."""

    def __init__(self, model: Any) -> None:
        size = model.config.get_text_config().vocab_size
        self._name = type(model).__name__
        self._tolerance = _TOLERANCE.get(model.dtype, 0.3)
        self._prompts = [[(17 * at + 29 * length) % size for at in range(length)] for length in _LENGTHS]
        self._wanted = [_continuation(model, prompt) for prompt in self._prompts]

    async def compare(self, engine: Any) -> None:
        """Generates the same by ``engine``. Raises ValueError if log-probabilities differ by more than rounding."""

        async def generated(prompt: list[int]) -> list[Any]:
            stream = engine.generate(prompt, None, Sampling(temperature=0.0, logprobs=_TOP), _STEPS)
            return [entry async for progress in stream for entry in progress.logprobs]

        try:
            answers = await asyncio.gather(*(generated(prompt) for prompt in self._prompts))
        except RuntimeError as error:
            raise ValueError(f"{self._name} cannot be served by transformers' continuous batching: {error}") from error
        for answer, wanted in zip(answers, self._wanted, strict=True):
            for entry, (token, top) in zip(answer, wanted, strict=False):
                worst = max(abs(value - want) for (_, value), want in zip(entry.top, top, strict=True))
                if worst > self._tolerance:
                    raise ValueError(
                        f"{self._name} gives other answers in a batch of several requests (log-probabilities differ by"
                        f" {worst:.3g}): it cannot be served"
                    )
                if entry.token != token:
                    break  # two tokens are equally probable, and what follows differs


@torch.no_grad()
def _continuation(model: Any, prompt: list[int]) -> list[tuple[int, list[float]]]:
    tokens, found = list(prompt), []
    for _ in range(_STEPS):
        ids = torch.tensor([tokens], device=model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].float()
        tokens.append(int(logits.argmax()))
        found.append((tokens[-1], logits.log_softmax(-1).topk(_TOP).values.tolist()))
    return found
