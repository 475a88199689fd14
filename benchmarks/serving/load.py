"""Load generator for an OpenAI-compatible server: a closed loop of clients over several adapters.

Each client sends its next request when the last one is answered. Reports tokens per second and the time to the first
token. ``--verify`` asks for each answer alone first, and compares every later answer with it. ``--churn`` loads and
unloads adapters meanwhile (qlora serve with --adapter-folder).

    python benchmarks/serving/load.py --url http://127.0.0.1:8000 --models a0 a1 a2 a3 --clients 1 16 64 --seconds 20
"""

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

SUBJECTS = ["the sea", "a bridge", "winter", "bread", "a lighthouse", "maps", "a violin", "rain", "glass", "ants"]
QUESTIONS = ["Describe {} in two sentences.", "Why is {} useful?", "Write a short poem about {}.", "Who studies {}?"]
PROMPTS = [question.format(subject) for question, subject in itertools.product(QUESTIONS, SUBJECTS)]


@dataclass
class Totals:
    """What the clients saw."""

    tokens: int = 0
    requests: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # seconds between two events of a stream
    wrong: list[str] = field(default_factory=list)


class Client:
    """Requests over one TCP connection each, with the standard library alone."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80

    @asynccontextmanager
    async def post(self, path: str, body: dict) -> AsyncIterator[asyncio.StreamReader]:
        """Sends a request and gives the reader of the answer's body. Raises RuntimeError unless the status is 200."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        try:
            writer.write(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
            await writer.drain()
            status = (await reader.readline()).decode()
            while (await reader.readline()).strip():
                pass
            if " 200 " not in status:
                raise RuntimeError(f"{path}: {status.strip()} {(await reader.read()).decode()[:500]}")
            yield reader
        finally:
            writer.close()

    async def call(self, path: str, body: dict) -> None:
        async with self.post(path, body) as reader:
            await reader.read()

    async def chat(self, model: str, prompt: str, max_tokens: int, totals: Totals | None = None) -> str:
        """The text of a greedy answer, read as a stream."""
        begun = last = time.perf_counter()
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
        body |= {"temperature": 0, "stream": True}
        text, first, events = [], None, 0
        async with self.post("/v1/chat/completions", body) as reader:
            while line := await reader.readline():
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"{model}: {event['error']}")
                for choice in event["choices"]:
                    piece = choice["delta"].get("content")
                    if piece:
                        now = time.perf_counter()
                        if first is None:
                            first = now - begun
                        elif totals is not None:
                            totals.gaps.append(now - last)
                        last = now
                        events += 1
                        text.append(piece)
        if totals is not None:
            totals.requests += 1
            totals.tokens += events  # one event for each token that ends a character
            totals.first.append(time.perf_counter() - begun if first is None else first)
        return "".join(text)


async def churn(client: Client, names: list[str], folders: list[str], stop: asyncio.Event) -> int:
    """Loads and unloads adapters until ``stop``; returns how often."""
    count = 0
    while not stop.is_set():
        for name, folder in zip(names, folders, strict=True):
            await client.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
            await client.chat(name, PROMPTS[count % len(PROMPTS)], 4)
            await client.call("/v1/unload_lora_adapter", {"lora_name": name})
            count += 1
        await asyncio.sleep(1)
    return count


async def run(arguments: argparse.Namespace, clients: int, models: list[str], expected: dict) -> Totals:
    client, totals = Client(arguments.url), Totals()
    stop = asyncio.Event()
    churning = (
        asyncio.create_task(churn(client, ["churn-a", "churn-b"], arguments.churn, stop)) if arguments.churn else None
    )
    end = time.perf_counter() + arguments.seconds

    async def loop(number: int) -> None:
        for turn in itertools.count():
            if time.perf_counter() > end:
                return
            model = models[(number + turn) % len(models)]
            prompt = PROMPTS[(7 * number + turn) % arguments.prompts]
            text = await client.chat(model, prompt, arguments.max_tokens, totals)
            if expected and text != expected[model, prompt]:
                totals.wrong.append(f"{model}, {prompt}: {text!r} alone was {expected[model, prompt]!r}")

    await asyncio.gather(*(loop(number) for number in range(clients)))
    stop.set()
    if churning is not None:
        print(f"adapters loaded and unloaded {await churning} times meanwhile")
    return totals


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


async def main(arguments: argparse.Namespace) -> int:
    expected = {}
    if arguments.verify:
        client = Client(arguments.url)
        for model in arguments.models:
            for prompt in PROMPTS[: arguments.prompts]:
                expected[model, prompt] = await client.chat(model, prompt, arguments.max_tokens)
    wrong = 0
    print("| clients | adapters | requests | tokens/s | first token, median s | 95 % s | between tokens, median ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for count in arguments.adapters or [len(arguments.models)]:
        for clients in arguments.clients:
            before = resident(arguments.pid) if arguments.pid else None
            begun = time.perf_counter()
            totals = await run(arguments, clients, arguments.models[:count], expected)
            seconds = time.perf_counter() - begun
            first = sorted(totals.first)
            gap = statistics.median(totals.gaps) * 1e3 if totals.gaps else float("nan")
            print(
                f"| {clients} | {count} | {totals.requests} | {totals.tokens / seconds:.1f} |"
                f" {statistics.median(first):.2f} | {first[int(0.95 * (len(first) - 1))]:.2f} | {gap:.0f} |",
                flush=True,
            )
            if before is not None:
                print(f"memory of the server: {before:.0f} MiB before, {resident(arguments.pid):.0f} MiB after")
            wrong += len(totals.wrong)
            for text in totals.wrong[:3]:
                print("differs:", text)
    if arguments.verify:
        print(f"answers that differ from the same request alone: {wrong}")
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--models", nargs="+", required=True, help="model names to ask for")
    parser.add_argument("--adapters", nargs="+", type=int, help="how many of the models to use, one run for each")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the prompts to use")
    parser.add_argument("--verify", action="store_true", help="compare with answers to each request alone")
    parser.add_argument("--churn", nargs=2, metavar="FOLDER", help="two adapter folders to load and unload meanwhile")
    parser.add_argument("--pid", type=int, help="process whose memory to report")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main(parse())))
