"""The HTTP application: OpenAI's endpoints, adapters at run time, health and metrics."""

import asyncio
import inspect
import time
import traceback
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from qlora.serving.answers import Answerer, Ask, Formatter, Prompt, Usage, sse
from qlora.serving.engine import (
    Engine,
    EngineStoppedError,
    GenerationFailedError,
    OverloadedError,
    PromptTooLongError,
)
from qlora.serving.logs import log_event
from qlora.serving.metrics import Metrics
from qlora.serving.protocol import ChatBody, CompletionBody, LoadAdapterBody, RequestError, UnloadAdapterBody
from qlora.serving.residency import AdapterChangedError, UnknownAdapterError
from qlora.serving.text import TokenTexts

_RETRY_SECONDS = 5


@dataclass(frozen=True)
class AppSettings:
    """``served_name`` is the base's model name; adapters below ``adapter_folder`` may be loaded at run time."""

    served_name: str
    adapter_folder: Path | None = None


class _Stream(StreamingResponse):
    """Closes its iterator when the client has gone, so that the request is cancelled at once."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            pieces: Any = self.body_iterator
            await pieces.aclose()


def build_app(engine: Engine, tokenizer: Any, settings: AppSettings) -> FastAPI:
    """The application for a running engine. Its shutdown stops the engine after the requests that run."""
    metrics = Metrics(engine)
    answerer = Answerer(engine, tokenizer)
    texts = TokenTexts(tokenizer)
    chat_template = bool(getattr(tokenizer, "chat_template", None))
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(lifespan=lifespan, title="qlora", docs_url=None, redoc_url=None, openapi_url=None)

    # ---- errors ----

    def refusal(error: Exception) -> RequestError:
        if isinstance(error, RequestError):
            return error
        if isinstance(error, UnknownAdapterError):
            names = [settings.served_name, *sorted(engine.adapters.entries)]
            return RequestError(
                404, f"there is no model '{error.args[0]}': {names} are served", "model_not_found", "model"
            )
        if isinstance(error, PromptTooLongError):
            return RequestError(400, str(error), "context_length_exceeded", "messages")
        if isinstance(error, OverloadedError | EngineStoppedError):
            return RequestError(
                503, str(error), "overloaded" if isinstance(error, OverloadedError) else "engine_stopped"
            )
        if isinstance(error, AdapterChangedError):
            return RequestError(409, str(error), "adapter_changed", "model")
        if isinstance(error, ValueError | FileNotFoundError):
            return RequestError(400, str(error), "invalid_value")
        if isinstance(error, GenerationFailedError):
            return RequestError(500, str(error), "generation_failed")
        log_event("error", error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        return RequestError(500, "an internal error, which the server's log describes", "internal_error")

    def error_response(error: RequestError) -> JSONResponse:
        headers = {"Retry-After": str(_RETRY_SECONDS)} if error.status == 503 else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestError)
    async def on_refusal(request: Request, error: RequestError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_bad_body(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            return error_response(RequestError(400, f"the body is not JSON: {first['ctx']['error']}", "invalid_json"))
        field = ".".join(where) or None
        message = first["msg"].removeprefix("Value error, ")
        return error_response(RequestError(400, f"{field}: {message}" if field else message, "invalid_value", field))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(RequestError(error.status_code, str(error.detail), "http_error"))

    # ---- models ----

    @app.get("/health")
    async def health() -> Response:
        failure = engine.failure
        if failure is not None:
            return JSONResponse({"status": "unhealthy", "reason": failure}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=metrics.media_type)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        base = {"id": settings.served_name, "object": "model", "created": started, "owned_by": "qlora", "parent": None}
        served = [
            {"id": e.name, "object": "model", "created": e.created, "owned_by": "qlora", "parent": settings.served_name}
            for e in engine.adapters.entries.values()
        ]
        return {"object": "list", "data": [base, *served]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        for entry in (await models())["data"]:
            if entry["id"] == name:
                return entry
        raise refusal(UnknownAdapterError(name))

    @app.post("/v1/load_lora_adapter")
    async def load_adapter(body: LoadAdapterBody) -> Response:
        folder = _allowed_folder(settings.adapter_folder, body.lora_path)
        if body.lora_name == settings.served_name:
            raise RequestError(
                400, f"'{body.lora_name}' is the base's name: choose another", "invalid_value", "lora_name"
            )
        try:
            await engine.add_adapter(body.lora_name, folder)
        except (ValueError, FileNotFoundError) as error:
            raise refusal(error) from error
        log_event("adapter_loaded", adapter=body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_adapter(body: UnloadAdapterBody) -> Response:
        if settings.adapter_folder is None:
            raise _not_allowed()
        try:
            engine.adapters.remove(body.lora_name)
        except UnknownAdapterError as error:
            raise refusal(error) from error
        log_event("adapter_unloaded", adapter=body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    # ---- completions ----

    def adapter_of(name: str) -> str | None:
        if name == settings.served_name:
            return None
        if name not in engine.adapters.entries:
            raise UnknownAdapterError(name)
        return name

    def tokens_of_chat(body: ChatBody) -> list[int]:
        from transformers.cli.serving.utils import BaseHandler, Modality

        if not chat_template:
            raise RequestError(400, "this model has no chat template: use /v1/completions", "no_chat_template")
        options = sorted(reserved & set(body.chat_template_kwargs))
        if options:
            message = f"'{options[0]}' is not a variable of a chat template: leave it out"
            raise RequestError(400, message, "invalid_value", "chat_template_kwargs")
        try:
            messages = BaseHandler.get_processor_inputs_from_messages(body.messages, Modality.LLM)
            encoded = tokenizer.apply_chat_template(
                messages,
                tools=body.tools if body.tool_choice != "none" else None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **body.chat_template_kwargs,
            )
        except Exception as error:  # templates are programs, and raise what they like
            raise RequestError(
                400, f"messages do not fit the chat template: {error!r}", "invalid_value", "messages"
            ) from error
        return list(encoded["input_ids"])

    async def job_of(body: ChatBody | CompletionBody) -> Ask:
        adapter = adapter_of(body.model)
        count = body.n * (1 if isinstance(body, ChatBody) else len(body.prompts))
        most = engine.limits.max_waiting
        if count > most:
            raise RequestError(400, f"a request for {count} answers exceeds this server's {most}", "invalid_value", "n")
        if isinstance(body, ChatBody):
            prompts = [await asyncio.to_thread(tokens_of_chat, body)]
        else:
            prompts = await asyncio.to_thread(
                lambda: [tokenizer(p)["input_ids"] if isinstance(p, str) else p for p in body.prompts]
            )
        if not prompts or not all(prompts):
            raise RequestError(400, "a prompt has no tokens: generation needs at least one", "invalid_value", "prompt")
        size = engine.config.vocab_size
        outside = [token for prompt in prompts for token in prompt if not 0 <= token < size]
        if outside:
            message = f"the prompt holds token {outside[0]}: this model has tokens 0 to {size - 1}"
            raise RequestError(400, message, "invalid_value", "prompt")
        chat = isinstance(body, ChatBody)
        echo = isinstance(body, CompletionBody) and body.echo
        return Ask(
            f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            body.model,
            adapter,
            [Prompt(tokens, tokenizer.decode(tokens) if echo else "") for tokens in prompts],
            body.sampling(engine.generation_config, body.logprobs_of),
            body.n,
            [engine.max_new_tokens(len(tokens), body.limit) for tokens in prompts],
            body.stops,
            chat,
            body.tools if isinstance(body, ChatBody) and body.tool_choice != "none" else None,
        )

    async def answer(request: Request, body: ChatBody | CompletionBody) -> Response:
        usage, job = Usage(), None
        try:
            job = await job_of(body)
            formatter = Formatter(job, texts)
            pieces = answerer.pieces(job, usage)
            if body.stream:
                try:
                    first = await _unless_gone(request, anext(pieces))
                except BaseException:
                    await pieces.aclose()
                    raise
                return _Stream(
                    stream(job, formatter, first, pieces, usage, body.include_usage), media_type="text/event-stream"
                )
            async with aclosing(pieces):
                collected = await _unless_gone(request, _collect(pieces))
        except _ClientGoneError:
            finished(body.model, usage, 499, job)
            return Response(status_code=499)
        except Exception as error:
            refused = refusal(error)
            finished(body.model, usage, refused.status, job)
            return error_response(refused)
        finished(body.model, usage, 200, job)
        return JSONResponse(formatter.whole(collected, usage))

    async def stream(
        job: Ask, formatter: Formatter, first: Any, pieces: Any, usage: Usage, include_usage: bool
    ) -> AsyncIterator[str]:
        status = 499  # what the log says if the client goes
        try:
            async with aclosing(pieces):
                for event in [*formatter.opening(), *formatter.events(first)]:
                    yield sse(event)
                async for piece in pieces:
                    for event in formatter.events(piece):
                        yield sse(event)
            if include_usage:
                yield sse(formatter.usage_event(usage))
            yield sse("[DONE]")
            status = 200
        except Exception as error:
            refused = refusal(error)
            status = refused.status
            yield sse(refused.body())
        finally:
            finished(job.model, usage, status, job)

    def finished(model: str, usage: Usage, status: int, job: Ask | None) -> None:
        known = model == settings.served_name or model in engine.adapters.entries
        metrics.finished(model if known else "unknown", usage, status)
        log_event(
            "request",
            id=job.id if job else None,
            model=model[:256],
            status=status,
            prompt_tokens=usage.prompt,
            completion_tokens=usage.completion,
            first_token_seconds=usage.first_token,
            seconds=time.monotonic() - usage.begun,
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        return await answer(request, body)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await answer(request, body)

    return app


class _ClientGoneError(Exception):
    """The client closed its connection before the answer."""


async def _collect(pieces: Any) -> list[Any]:
    return [piece async for piece in pieces]


async def _unless_gone(request: Request, awaited: Any) -> Any:
    """The result of ``awaited``, which is cancelled if the client goes first; then raises _ClientGoneError."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.ensure_future(awaited), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _ClientGoneError
        return work.result()
    finally:
        watch.cancel()
        if not work.done():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


def _not_allowed() -> RequestError:
    return RequestError(403, "adapters can only change while running if the server has --adapter-folder", "not_allowed")


def _allowed_folder(allowed: Path | None, requested: str) -> Path:
    """The adapter folder that a client names. Raises RequestError unless it is inside the allowed folder."""
    if allowed is None:
        raise _not_allowed()
    if "\0" in requested:
        raise RequestError(400, "lora_path holds a NUL character", "invalid_value", "lora_path")
    folder = (allowed / requested).resolve()
    if not folder.is_relative_to(allowed.resolve()):
        raise RequestError(
            403, f"'{requested}' is outside of the server's --adapter-folder", "not_allowed", "lora_path"
        )
    return folder
