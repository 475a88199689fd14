"""A server in this process for tests: a tiny model, adapters of different ranks, a real socket."""

import asyncio
import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch
from tiny_models import save_llama, stir

from qlora.adapters.lora import load_adapter_into, save_lora
from qlora.models.loading import load_quantized, load_tokenizer
from qlora.serving.app import AppSettings, build_app
from qlora.serving.engine import Engine, Limits
from qlora.serving.http import Gate, serve

PAGE = 4
BATCHING = {"page_size": PAGE, "num_blocks": 200, "max_batch_tokens": 32, "max_requests_per_batch": 16}


def save_model(folder: Path, ranks: dict[str, int]) -> Path:
    """A model folder ``base`` and one adapter folder for each name, all of one base."""
    save_llama(folder / "base")
    for number, (name, rank) in enumerate(ranks.items()):
        model, _ = load_quantized(folder / "base", torch.float32, rank=rank, alpha=2 * rank, progress=False)
        stir(model, 0.2 + 0.1 * number)
        save_lora(model, folder / name)
    return folder


def greedy_alone(folder: Path, adapter: str | None, prompt: list[int], count: int) -> list[int]:
    """The answer of the same base and adapter by transformers' generate and PEFT."""
    model, _ = load_quantized(folder / "base", torch.float32, progress=False)
    if adapter is not None:
        model = load_adapter_into(model, folder / adapter)
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 1}
    return model.eval().generate(input_ids=ids, **options)[0, len(prompt) :].tolist()


def engine_of(folder: Path, slots: int = 4, limits: Limits | None = None, **batching: int) -> Engine:
    model, _ = load_quantized(folder / "base", torch.float32, progress=False)
    return Engine(model.eval(), folder / "base", slots, limits or Limits(), {**BATCHING, **batching})


class Running:
    """A server on a free port, in a thread with its own event loop."""

    def __init__(self, folder, adapters=(), keys=None, max_body=100_000, body_seconds=30.0, **engine_options):
        self.folder, self.adapters = folder, adapters
        self.engine = engine_of(folder, **engine_options)
        tokenizer = load_tokenizer(folder / "base")
        app = build_app(self.engine, tokenizer, AppSettings("base", folder))
        self.port = free_port()
        self.server = serve(Gate(app, keys, max_body, body_seconds), "127.0.0.1", self.port)
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._ready = threading.Event()
        self._thread.start()
        if not self._ready.wait(60):
            raise TimeoutError("the server did not start")

    async def _main(self):
        self.loop = asyncio.get_running_loop()
        await self.engine.start()
        for name in self.adapters:
            await self.engine.add_adapter(name, self.folder / name)
        serving = asyncio.create_task(self.server.serve())
        while not self.server.started:
            await asyncio.sleep(0.01)
        self._ready.set()
        await serving

    def stop(self):
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def client(self, key="none", asynchronous=False):
        import openai

        kind = openai.AsyncOpenAI if asynchronous else openai.OpenAI
        return kind(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def running(folder, *args, **options):
    server = Running(folder, *args, **options)
    try:
        yield server
    finally:
        server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


QUESTION = [{"role": "user", "content": "what is the light ?"}]


def text_alone(folder, adapter, count, messages=QUESTION):
    tokenizer = load_tokenizer(folder / "base")
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return tokenizer.decode(greedy_alone(folder, adapter, prompt, count), skip_special_tokens=True)


def post(server, path, body, headers=()):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, content, {"Content-Type": "application/json", **dict(headers)})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers
