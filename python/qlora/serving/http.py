"""What stands between the network and the application: keys, sizes, slow and silent clients, the server's life."""

import asyncio
import hashlib
import hmac
import json
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qlora.serving.protocol import RequestError

_SILENT_SECONDS = 10.0  # a connection without a whole request head is closed after this time
_SHUTDOWN_SECONDS = 60


def read_keys(path: Path) -> list[str]:
    """The API keys of a file, one on each line. Raises ValueError if it has none."""
    keys = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path} holds no API key: write one on each line")
    return keys


class Gate:
    """ASGI middleware: refuses requests without a key, bodies beyond a size, and bodies that do not arrive."""

    def __init__(self, app: Any, keys: list[str] | None, max_body: int, body_seconds: float = 30.0) -> None:
        self._app, self._max_body, self._body_seconds = app, max_body, body_seconds
        self._digests = None if keys is None else [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] != "/health" and not self._has_key(headers.get(b"authorization", b"")):
            await _refuse(
                send, RequestError(401, "a valid API key is missing (Authorization: Bearer …)", "invalid_api_key")
            )
            return
        if (declared := headers.get(b"content-length", b"0")).isdigit() and int(declared) > self._max_body:
            await _refuse(send, _too_large(self._max_body))
            return
        body = _LimitedBody(receive, self._max_body, self._body_seconds)

        async def send_unless_refused(message: Any) -> None:
            if body.problem is None:  # else the application answers to the error that it got instead of a body
                await send(message)

        with suppress(_BodyError):
            await self._app(scope, body.receive, send_unless_refused)
        if body.problem is not None:
            await _refuse(send, body.problem)

    def _has_key(self, header: bytes) -> bool:
        if self._digests is None:
            return True
        kind, _, key = header.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # all, so that time tells nothing
        return kind.lower() == b"bearer" and any(matches)


class _LimitedBody:
    """The messages of a request's body. ``problem`` is set when there are too many bytes, or none come."""

    def __init__(self, receive: Any, max_bytes: int, seconds: float) -> None:
        self._receive, self._max_bytes, self._seconds = receive, max_bytes, seconds
        self._size = 0
        self._complete = False
        self._deadline = time.monotonic() + seconds  # for the whole body, so that a byte now and then is not enough
        self.problem: RequestError | None = None

    async def receive(self) -> Any:
        if self._complete:
            return await self._receive()  # waits for the client to go
        try:
            message = await asyncio.wait_for(self._receive(), self._deadline - time.monotonic())
        except asyncio.TimeoutError:
            self.problem = RequestError(408, f"the body did not arrive in {self._seconds:g} s", "timeout")
            raise _BodyError from None
        self._size += len(message.get("body", b""))
        if self._size > self._max_bytes:
            self.problem = _too_large(self._max_bytes)
            raise _BodyError
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message


class _BodyError(Exception):
    """Ends an application that reads a body which is refused."""


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(413, f"the body exceeds {max_bytes} bytes", "body_too_large")


async def _refuse(send: Any, error: RequestError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _ImpatientProtocol(H11Protocol):
    """Closes connections on which no request comes: uvicorn only does so after a first answer."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        self.loop.call_later(_SILENT_SECONDS, self._close_if_silent, self.cycle)

    def _close_if_silent(self, cycle_then: Any) -> None:
        if self.cycle is cycle_then and not self.transport.is_closing():
            self.transport.close()


def serve(app: Any, host: str, port: int) -> uvicorn.Server:
    """A server that has not started; ``run()`` serves until SIGINT or SIGTERM and lets running requests finish."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 65536, hard))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_ImpatientProtocol,
        ws="none",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=int(_SILENT_SECONDS),
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)
