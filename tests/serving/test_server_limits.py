"""Limits of the server: keys, sizes, slow and silent clients, load, clients that go, and what it counts."""

import asyncio
import json
import socket
import time
import urllib.request

import openai
import pytest
from running import post, running, save_model

from qlora.serving import http
from qlora.serving.engine import Limits

KEYS = ["first-key", "second-key"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served"), {"a": 4, "b": 9})


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, ["a"]) as one:
        yield one


def test_keys_sizes_and_slow_bodies(folder):
    with running(folder, ["a"], keys=KEYS, max_body=2000, body_seconds=0.5) as server:
        for key in KEYS:
            assert server.client(key).models.list().data
        for key in ("wrong", "first-key2", "first-ke"):
            with pytest.raises(openai.AuthenticationError):
                server.client(key).models.list()
        assert post(server, "/v1/completions", {})[0] == 401
        assert urllib.request.urlopen(server.url + "/health").status == 200  # open, for probes of the machine
        key = [("Authorization", f"Bearer {KEYS[0]}")]
        status, text, _ = post(server, "/v1/completions", {"model": "a", "prompt": "x" * 3000}, key)
        assert (status, json.loads(text)["error"]["code"]) == (413, "body_too_large")
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
            assert b" 408 " in slow.recv(1000)
        with socket.create_connection(("127.0.0.1", server.port)) as chunked:
            chunked.sendall(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            chunked.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
            assert b" 413 " in chunked.recv(1000)


def test_an_empty_key_file_is_refused(tmp_path):
    (tmp_path / "keys").write_text("\n# a comment\n")
    with pytest.raises(ValueError, match="holds no API key"):
        http.read_keys(tmp_path / "keys")


def test_a_full_server_says_when_to_come_back(folder):
    with running(folder, ["a"], limits=Limits(max_waiting=1)) as server:

        async def main():
            many = server.client(asynchronous=True)
            calls = [many.completions.create(model="a", prompt="the light", max_tokens=60) for _ in range(12)]
            return await asyncio.gather(*calls, return_exceptions=True)

        results = asyncio.run(main())
        refused = [r for r in results if isinstance(r, openai.InternalServerError)]
        assert 0 < len(refused) < len(results)
        assert {r.status_code for r in refused} == {503}
        assert all(int(r.response.headers["retry-after"]) > 0 for r in refused)
        assert server.client().completions.create(model="a", prompt="the", max_tokens=2)


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_request(server, stream):
    body = {"model": "a", "prompt": "the light", "max_tokens": 200, "stream": stream, "ignored": None}
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + content)
    engine = server.engine
    wait_until(lambda: engine.running == 1)
    connection.close()
    wait_until(lambda: engine.running == 0 and not engine.manager.routes)
    wait_until(lambda: not engine.manager.batch_processor.scheduler.active_requests)
    assert engine.adapters.entries["a"].users == 0


def test_silent_connections_are_closed_and_do_not_stop_others(folder, monkeypatch):
    monkeypatch.setattr(http, "_SILENT_SECONDS", 1.0)
    with running(folder) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
        half = socket.create_connection(("127.0.0.1", server.port))
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        assert server.client().completions.create(model="base", prompt="the", max_tokens=2)
        for connection in [*silent, half]:
            connection.settimeout(20)
            assert connection.recv(100) == b""  # closed by the server
            connection.close()
        assert server.client().models.list().data


def test_metrics_count_what_happened(folder):
    from prometheus_client.parser import text_string_to_metric_families

    with running(folder, ["a", "b"], slots=1) as server:
        client = server.client()
        for name in ("a", "b", "a", "base"):
            client.completions.create(model=name, prompt="the light", max_tokens=3, temperature=0)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="z" * 500, prompt="x")
        text = urllib.request.urlopen(server.url + "/metrics").read().decode()
    values = {
        (sample.name, sample.labels.get("model")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["qlora_requests_total", "a"] == 2
    assert values["qlora_requests_total", "unknown"] == 1
    assert values["qlora_completion_tokens_total", "base"] == 3
    assert values["qlora_first_token_seconds_count", "a"] == 2
    assert values["qlora_adapters_in_memory", None] == 1
    assert values["qlora_adapter_evictions_total", None] == 2
    assert values["qlora_requests_running", None] == values["qlora_requests_waiting", None] == 0
