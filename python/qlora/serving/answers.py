"""Answers in OpenAI's format, whole or as a stream of events, from the engine's tokens."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from qlora.serving.engine import Engine, answers
from qlora.serving.sampling import Sampling, TokenLogprobs
from qlora.serving.text import StopFilter, TextStream, TokenTexts


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request: its tokens, and its text if the answer is to repeat it."""

    tokens: list[int]
    echo: str = ""


@dataclass(frozen=True)
class Ask:
    """A validated request."""

    id: str
    model: str  # as the client named it
    adapter: str | None
    prompts: list[Prompt]
    sampling: Sampling
    count: int  # answers to each prompt
    max_tokens: list[int]  # for each prompt
    stops: list[str]
    chat: bool
    tools: list[dict[str, Any]] | None = None


@dataclass
class Usage:
    """Token counts of a request, filled while it runs."""

    prompt: int = 0
    completion: int = 0
    first_token: float | None = None  # seconds since the request began
    begun: float = field(default_factory=time.monotonic)

    def body(self) -> dict[str, int]:
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


@dataclass(frozen=True)
class Piece:
    """A part of one answer: text, or a reasoning text or a tool call that the model's template marks."""

    index: int
    text: str = ""
    reasoning: str = ""
    tool_call: dict[str, Any] | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None


class _Parser:
    """Splits a chat answer into text, reasoning and tool calls by transformers' response templates."""

    def __init__(self, model: Any, tokenizer: Any, prompt: list[int], tools: Any) -> None:
        from transformers.cli.serving.utils import build_response_parser, response_events_to_chunks

        self._parser = build_response_parser(tokenizer, model, prompt, tools=tools)
        self._chunks = response_events_to_chunks

    @property
    def exists(self) -> bool:
        return self._parser is not None

    def begin(self) -> list[Any]:
        return self._chunks(self._parser.initial_events)

    def feed(self, text: str) -> list[Any]:
        return self._chunks(self._parser.feed(text))

    def end(self) -> list[Any]:
        try:
            return self._chunks(self._parser.finalize()[1])
        except (ValueError, RuntimeError):
            return []  # the answer ended inside a tool call


class Answerer:
    """Runs requests on an engine."""

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer

    async def pieces(self, job: Ask, usage: Usage) -> AsyncGenerator[Piece, None]:
        """All answers of a job, interleaved as they come. Closing it early cancels what still runs."""
        queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

        async def run(index: int, prompt: Prompt, sampling: Sampling, limit: int) -> None:
            try:
                async with aclosing(self._one(job, index, prompt, sampling, limit, usage)) as stream:
                    async for piece in stream:
                        queue.put_nowait(piece)
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [
            asyncio.create_task(run(at * job.count + number, prompt, sampling, limit))
            for at, (prompt, limit) in enumerate(zip(job.prompts, job.max_tokens, strict=True))
            for number, sampling in enumerate(answers(job.sampling, job.count))
        ]
        try:
            left = len(tasks)
            while left:
                piece = await queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                if piece is None:
                    left -= 1
                else:
                    yield piece
        finally:
            for task in tasks:
                task.cancel()

    async def _one(
        self, job: Ask, index: int, prompt: Prompt, sampling: Sampling, limit: int, usage: Usage
    ) -> AsyncGenerator[Piece, None]:
        parser = _Parser(self.engine.model, self.tokenizer, prompt.tokens, job.tools) if job.chat else None
        if parser is not None and not parser.exists:
            parser = None
        before = None if job.chat else prompt.tokens
        text, stop = TextStream(self.tokenizer, parser is not None, before), StopFilter(job.stops)
        called = False

        def split(items: list[Any]) -> list[Piece]:
            nonlocal called
            found = []
            for item in items:
                kind = type(item).__name__
                if kind == "ToolCall":
                    called = True
                    call = {"name": item.name, "arguments": item.arguments}
                    found.append(Piece(index, tool_call=call))
                elif kind == "ReasoningText":
                    found.append(Piece(index, reasoning=str(item)))
                else:
                    found.append(Piece(index, text=stop.add(item)))
            return found

        if prompt.echo:
            yield Piece(index, text=prompt.echo)
        for piece in split(parser.begin()) if parser else []:
            yield piece
        async with aclosing(self.engine.generate(prompt.tokens, job.adapter, sampling, limit)) as stream:
            async for progress in stream:
                if usage.first_token is None:
                    usage.first_token = time.monotonic() - usage.begun
                    usage.prompt = sum(len(prompt.tokens) for prompt in job.prompts)
                usage.completion += len(progress.tokens)
                if progress.logprobs:
                    yield Piece(index, logprobs=progress.logprobs)
                new = text.add(progress.tokens)
                if progress.finish is not None:
                    new += text.end()
                for piece in split(parser.feed(new)) if parser else [Piece(index, text=stop.add(new))]:
                    yield piece
                if progress.finish is not None and not stop.stopped:
                    for piece in split(parser.end()) if parser else []:
                        yield piece
                    yield Piece(index, text=stop.end())
                if stop.stopped or progress.finish is not None:
                    finish = "stop" if stop.stopped else progress.finish
                    yield Piece(index, finish="tool_calls" if called and finish == "stop" else finish)
                    return


class Formatter:
    """Bodies and events of one job."""

    def __init__(self, job: Ask, texts: TokenTexts) -> None:
        self._job, self._texts = job, texts
        self._created = int(time.time())
        self._calls: dict[int, int] = {}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._job.id, "object": kind, "created": self._created, "model": self._job.model}

    # ---- streams ----

    def events(self, piece: Piece) -> list[dict[str, Any]]:
        """The events for a piece; none for a piece without content."""
        logprobs = self._logprobs(piece.logprobs)
        if not self._job.chat:
            if not (piece.text or piece.finish or logprobs):
                return []
            choice = {"index": piece.index, "text": piece.text, "finish_reason": piece.finish, "logprobs": logprobs}
            return [{**self._head("text_completion"), "choices": [choice]}]
        delta: dict[str, Any] = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.tool_call:
            number = self._calls.get(piece.index, 0)
            self._calls[piece.index] = number + 1
            delta["tool_calls"] = [{"index": number, **self._tool_call(piece.index, number, piece.tool_call)}]
        if not (delta or piece.finish or logprobs):
            return []
        choice = {"index": piece.index, "delta": delta, "finish_reason": piece.finish, "logprobs": logprobs}
        return [{**self._head("chat.completion.chunk"), "choices": [choice]}]

    def opening(self) -> list[dict[str, Any]]:
        """The first event of each chat answer, which names the role."""
        if not self._job.chat:
            return []
        count = len(self._job.prompts) * self._job.count
        return [
            {
                **self._head("chat.completion.chunk"),
                "choices": [{"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
            }
            for i in range(count)
        ]

    def usage_event(self, usage: Usage) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._job.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage.body()}

    # ---- whole answers ----

    def whole(self, pieces: list[Piece], usage: Usage) -> dict[str, Any]:
        choices = []
        of_answer: list[list[Piece]] = [[] for _ in range(len(self._job.prompts) * self._job.count)]
        for piece in pieces:
            of_answer[piece.index].append(piece)
        for index, own in enumerate(of_answer):
            text = "".join(piece.text for piece in own)
            finish = next(piece.finish for piece in reversed(own) if piece.finish)
            logprobs = self._logprobs([entry for piece in own for entry in piece.logprobs])
            choice: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": logprobs}
            if self._job.chat:
                calls = [piece.tool_call for piece in own if piece.tool_call]
                message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
                reasoning = "".join(piece.reasoning for piece in own)
                if reasoning:
                    message["reasoning_content"] = reasoning
                if calls:
                    message["tool_calls"] = [self._tool_call(index, i, call) for i, call in enumerate(calls)]
                choices.append({**choice, "message": message})
            else:
                choices.append({**choice, "text": text})
        kind = "chat.completion" if self._job.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage.body()}

    def _tool_call(self, index: int, number: int, call: dict[str, Any]) -> dict[str, Any]:
        return {"id": f"call_{self._job.id}_{index}_{number}", "type": "function", "function": call}

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not entries:
            return None
        if self._job.chat:
            content = [
                {**self._token(entry.token, entry.logprob), "top_logprobs": [self._token(*top) for top in entry.top]}
                for entry in entries
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._texts.of(entry.token)[0] for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._most_probable(entry) for entry in entries],
        }

    def _most_probable(self, entry: TokenLogprobs) -> dict[str, float]:
        """By text, as OpenAI has it; of tokens with the same text the most probable, and always the chosen one."""
        found: dict[str, float] = {}
        for token, value in [*entry.top, (entry.token, entry.logprob)]:
            found.setdefault(self._texts.of(token)[0], value)
        return found

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, content = self._texts.of(token)
        return {"token": text, "logprob": logprob, "bytes": content}


def sse(event: dict[str, Any] | str) -> str:
    """One server-sent event."""
    return f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n"
