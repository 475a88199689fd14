"""Chooses the next token of each request by that request's own settings."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # a smaller temperature would divide logits to infinity


@dataclass(frozen=True)
class Sampling:
    """Settings of one request, by OpenAI's names. ``temperature`` 0 takes the most probable token.

    ``logprobs`` is the number of most probable tokens to report beside each chosen one; None reports nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities by the model, before temperature and penalties."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class TokenChooser:
    """The state of one request's sampling: its random numbers and its processors of logits.

    ``failure`` is set if a token could not be chosen; the request then ends, and others go on.
    """

    def __init__(self, settings: Sampling, vocabulary: int, device: torch.device | str = "cpu") -> None:
        from transformers import (
            LogitsProcessorList,
            MinPLogitsWarper,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.settings = settings
        outside = [token for token in settings.logit_bias if not 0 <= token < vocabulary]
        if outside:
            raise ValueError(f"logit_bias names token {outside[0]}: this model has tokens 0 to {vocabulary - 1}")
        self.logprobs: list[TokenLogprobs] = []
        self.failure: str | None = None
        self._greedy = settings.temperature < GREEDY_BELOW
        self._biased = torch.tensor(list(settings.logit_bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(settings.logit_bias.values()), dtype=torch.float32, device=device)
        self._processors = LogitsProcessorList()
        if settings.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if not self._greedy:
            if settings.temperature != 1:
                self._processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k > 0:
                self._processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self._processors.append(TopPLogitsWarper(settings.top_p))
            if settings.min_p > 0:
                self._processors.append(MinPLogitsWarper(settings.min_p))
        self._generator = torch.Generator()  # on the CPU, so that a seed gives the same tokens on every device
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the choice is the largest logit and nothing else is to be computed."""
        settings = self.settings
        penalties = settings.presence_penalty or settings.frequency_penalty or settings.repetition_penalty != 1
        return self._greedy and not (penalties or settings.logit_bias) and settings.logprobs is None

    def choose(self, logits: Tensor, prompt: list[int], generated: list[int]) -> int:
        """The next token for logits [vocabulary], float32. ``prompt`` and ``generated`` are the tokens so far."""
        settings = self.settings
        scores = logits
        if settings.logit_bias:
            scores = scores.index_add(0, self._biased, self._bias)
        if generated and (settings.presence_penalty or settings.frequency_penalty):
            counts = torch.bincount(torch.tensor(generated), minlength=len(logits)).to(scores)
            scores = scores - settings.frequency_penalty * counts - settings.presence_penalty * (counts > 0)
        if self._processors:
            history = torch.tensor([[*prompt, *generated]], device=scores.device)
            scores = self._processors(history, scores.unsqueeze(0)).squeeze(0)
        if self._greedy:
            token = int(scores.argmax())
        else:
            # On the CPU: torch.multinomial draws one random number for each call and so is the same for the same seed.
            probabilities = scores.softmax(-1).cpu()
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        if settings.logprobs is not None:
            self.logprobs.append(_logprobs(logits, token, settings.logprobs))
        return token


def choose_all(logits: Tensor, choosers: list[tuple[TokenChooser, list[int], list[int]]]) -> list[int]:
    """The next token of each row of logits [rows, vocabulary]; rows that only need the largest are done together."""
    largest, best = logits.max(-1)
    tokens = best.tolist()
    finite = largest.isfinite().tolist()  # the largest of a row with nan is nan
    for row, (chooser, prompt, generated) in enumerate(choosers):
        if not finite[row]:
            chooser.failure = "the model computed numbers that are not finite"
        elif not chooser.is_plain_greedy:
            try:
                tokens[row] = chooser.choose(logits[row], prompt, generated)
            except Exception as error:  # one request's settings must not end the thread that serves all
                chooser.failure = f"no token could be chosen: {error}"
    return tokens


def _logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    normalized = logits.log_softmax(-1)
    values, indices = normalized.topk(min(count, len(logits)))
    top = [(i, _finite(value)) for value, i in zip(values.tolist(), indices.tolist(), strict=True)]
    return TokenLogprobs(token, _finite(normalized[token].item()), top)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else -9999.0  # JSON has no infinity; OpenAI sends this number
