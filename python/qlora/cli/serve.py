"""``qlora serve``: an OpenAI-compatible server for one 4-bit base and many adapters."""

import argparse
from pathlib import Path
from typing import Any

from qlora.cli import choices

HELP = "serve a 4-bit model and many adapters by OpenAI's HTTP interface"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hugging Face id")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=FOLDER", help="serve an adapter under a name; repeat"
    )
    parser.add_argument("--served-name", help="the base's model name (default: what --model says)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key-file", type=Path, help="file with one API key on each line; without it, no key")
    parser.add_argument("--adapter-folder", type=Path, help="let clients load adapters from below this folder")
    parser.add_argument("--slots", type=int, default=16, help="adapters in memory at a time; others wait on disk")
    parser.add_argument("--cache-tokens", type=int, help="tokens in the key-value cache (default: 16384 on a CPU)")
    parser.add_argument("--max-requests", type=int, default=64, help="requests in one batch")
    parser.add_argument("--max-batch-tokens", type=int, help="tokens in one batch (default: 512 on a CPU)")
    parser.add_argument("--max-waiting", type=int, default=256, help="requests that may wait; others get status 503")
    parser.add_argument("--queue-seconds", type=float, default=60.0, help="longest wait for a first token")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longest answer, in tokens")
    parser.add_argument("--max-rank", type=int, default=256, help="largest rank of an adapter")
    parser.add_argument("--max-body-mib", type=float, default=8.0, help="largest body of a request")
    choices.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from qlora.models.loading import load_for_inference, require_train_extra, resolve_model

    _share_arenas()
    require_train_extra()
    _require_serve_extra()
    _check(arguments)
    adapters = dict(_named(text) for text in arguments.adapter)
    served_name = arguments.served_name or arguments.model
    if len(adapters) < len(arguments.adapter) or served_name in adapters:
        raise ValueError(f"--adapter: names must differ from each other and from the base's '{served_name}'")

    import asyncio

    from qlora.serving.app import AppSettings, build_app
    from qlora.serving.engine import Engine, Limits
    from qlora.serving.http import Gate, read_keys, serve
    from qlora.serving.logs import configure_logs, log_event

    keys = None if arguments.api_key_file is None else read_keys(arguments.api_key_file)
    folder = resolve_model(arguments.model)
    device, dtype = choices.chosen(arguments)
    model, tokenizer = load_for_inference(folder, None, dtype, device)
    configure_logs()
    limits = Limits(arguments.max_waiting, arguments.queue_seconds, arguments.max_tokens, arguments.max_rank)
    engine = Engine(model, folder, arguments.slots, limits, _batching(arguments, str(device)))

    async def main() -> None:
        await engine.start()
        for name, path in adapters.items():
            await engine.add_adapter(name, path)
        app = build_app(engine, tokenizer, AppSettings(served_name, arguments.adapter_folder))
        server = serve(Gate(app, keys, int(arguments.max_body_mib * 2**20)), arguments.host, arguments.port)
        log_event("ready", url=f"http://{arguments.host}:{arguments.port}/v1", models=[served_name, *adapters])
        await server.serve()

    try:
        asyncio.run(main())
    finally:
        engine.stop()
    return 0


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ValueError(f"--adapter '{text}' must be NAME=FOLDER")
    return name, Path(folder)


def _check(arguments: argparse.Namespace) -> None:
    for option in ("slots", "max_requests", "max_waiting", "queue_seconds", "max_tokens", "max_rank", "max_body_mib"):
        value = getattr(arguments, option)
        if value <= 0:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be positive")


def _batching(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Options of transformers' continuous batching; on a GPU it measures the free memory for what is not given."""
    page = 32
    on_cpu = device == "cpu"
    cache_tokens = arguments.cache_tokens or (16384 if on_cpu else None)
    options = {
        "page_size": page,
        "max_requests_per_batch": arguments.max_requests,
        "max_batch_tokens": arguments.max_batch_tokens or (512 if on_cpu else None),
        "num_blocks": None if cache_tokens is None else -(-cache_tokens // page),
    }
    return {name: value for name, value in options.items() if value is not None}


def _share_arenas() -> None:
    """Lets all threads allocate from two arenas of glibc.

    By default each thread has its own, where freed blocks of many sizes pile up: the server grew by 40 MB a minute.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-8, 2)  # M_ARENA_MAX


def _require_serve_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: in a checkout of qlora run pip install '.[serve]'") from error
