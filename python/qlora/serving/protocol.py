"""Bodies of requests and of errors, as the OpenAI API defines them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qlora.serving.sampling import Sampling

# Fields of the OpenAI API that do not change an answer.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
_MAX_ANSWERS = 64
_MAX_STOPS = 16


class RequestError(Exception):
    """A refusal: HTTP status, a message for people, and OpenAI's code for programs."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Body(BaseModel):
    """Fields that both kinds of completions have. Sampling fields that are missing come from the model's folder."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=_MAX_ANSWERS)
    max_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _no_unknown_fields(self) -> "_Body":
        # Clients send null for what they do not use.
        unknown = [
            name for name, value in (self.model_extra or {}).items() if name not in _IGNORED and value is not None
        ]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is not supported by this server: leave it out")
        if len(self.stops) > _MAX_STOPS:
            raise ValueError(f"stop has {len(self.stops)} strings: {_MAX_STOPS} at most")
        if not all(abs(bias) <= 100 for bias in (self.logit_bias or {}).values()):  # nan compares false
            raise ValueError("logit_bias values must be in [-100, 100]")
        return self

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, defaults: Any, logprobs: int | None) -> Sampling:
        """The settings of this request; ``defaults`` is the model's GenerationConfig."""

        def given(name: str, neutral: Any) -> Any:
            own = getattr(self, name)
            if own is None:
                # A model that is greedy by default lists sampling settings without meaning them.
                own = getattr(defaults, name, None) if defaults.do_sample or name == "repetition_penalty" else None
            return neutral if own is None else own

        greedy_by_default = self.temperature is None and not defaults.do_sample
        return Sampling(
            temperature=0.0 if greedy_by_default else float(given("temperature", 1.0)),
            top_p=float(given("top_p", 1.0)),
            top_k=max(int(given("top_k", 0)), 0),
            min_p=float(given("min_p", 0.0)),
            repetition_penalty=float(given("repetition_penalty", 1.0)),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            logprobs=logprobs,
        )


class ChatBody(_Body):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.tool_choice not in (None, "auto", "none"):
            raise ValueError(f"tool_choice='{self.tool_choice}' is not supported: use 'auto' or 'none'")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprobs_of(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(_Body):
    """The body of ``POST /v1/completions``. A prompt is text or token ids; several prompts are a list of them."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        return [prompt] if is_one else prompt

    @model_validator(mode="after")
    def _possible(self) -> "CompletionBody":
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "echo with logprobs is not supported: the log-probabilities of the prompt are not computed"
            )
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def logprobs_of(self) -> int | None:
        return self.logprobs


class LoadAdapterBody(BaseModel):
    """The body of ``POST /v1/load_lora_adapter``, by vLLM's names."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1)


class UnloadAdapterBody(BaseModel):
    """The body of ``POST /v1/unload_lora_adapter``, by vLLM's names."""

    lora_name: str
