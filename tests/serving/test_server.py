"""The server over a real socket: the openai client, adapters at run time, bad input, clients that misbehave."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest
from running import Running, free_port, greedy_alone, running, save_model
from tiny_models import WORDS

from qlora.models.loading import load_tokenizer
from qlora.serving import http
from qlora.serving.engine import Limits

RANKS = {"a": 4, "b": 9, "c": 2, "d": 3}
QUESTION = [{"role": "user", "content": "what is the light ?"}]
KEYS = ["first-key", "second-key"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served"), RANKS)


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, ["a", "b"]) as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    return server.client()


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


# ---- the openai client's session ----


def test_models(client):
    assert [model.id for model in client.models.list()] == ["base", "a", "b"]
    assert client.models.retrieve("a").id == "a"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("z")


@pytest.mark.parametrize("model", ["base", "a", "b"])
def test_chat_answers_as_transformers_and_peft_do(folder, client, model):
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=8)
    assert answer.model == model
    assert answer.choices[0].message.content == text_alone(folder, None if model == "base" else model, 8)
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens <= 8


def test_a_stream_holds_the_same_text_and_counts(client):
    options = {"model": "a", "messages": QUESTION, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**options)
    events = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events[:-1]) == whole.choices[0].message.content
    assert [e.choices[0].finish_reason for e in events[:-1]][-1] == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage
    assert len({event.id for event in events}) == 1
    plain = list(client.chat.completions.create(**options, stream=True))
    assert all(event.choices and event.usage is None for event in plain)


def test_several_answers_seeds_and_temperatures(client):
    options = {"model": "a", "messages": QUESTION, "max_tokens": 12, "temperature": 2.0}
    first = client.chat.completions.create(**options, n=3, seed=5)
    again = client.chat.completions.create(**options, n=3, seed=5)
    other = client.chat.completions.create(**options, n=3, seed=50)
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for event in client.chat.completions.create(**options, n=3, seed=5, stream=True):
        streamed[event.choices[0].index] += event.choices[0].delta.content or ""
    assert streamed == texts[0]


def test_stop_strings_and_lengths(folder, client):
    whole = text_alone(folder, "a", 8)
    word = whole.split()[2]
    options = {"model": "a", "messages": QUESTION, "temperature": 0, "max_tokens": 8}
    answer = client.chat.completions.create(**options, stop=[word, "never"])
    assert answer.choices[0].message.content == whole[: whole.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    assert client.chat.completions.create(**{**options, "max_tokens": 1}).choices[0].finish_reason == "length"


def test_log_probabilities(client):
    options = {"model": "a", "messages": QUESTION, "temperature": 0, "max_tokens": 4}
    content = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs))
        assert len(entry.top_logprobs) == 3
        assert entry.token in WORDS or entry.token.startswith("<|") or entry.token in ".,?"


def test_text_completions(folder, client):
    tokenizer = load_tokenizer(folder / "base")
    prompts = ["the light stays on", "keeper log"]
    options = {"model": "b", "prompt": prompts, "temperature": 0, "max_tokens": 5}
    answer = client.completions.create(**options, logprobs=2)
    echoed = client.completions.create(**options, echo=True)
    for prompt, choice, echo in zip(prompts, answer.choices, echoed.choices, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        tokens = greedy_alone(folder, "b", ids, 5)
        assert echo.text == tokenizer.decode(ids + tokens, skip_special_tokens=True)
        assert prompt + choice.text == echo.text
        assert choice.logprobs.tokens == [tokenizer.decode([token]) for token in tokens]
        for logprob, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
            assert logprob == pytest.approx(max(top.values()))
    with pytest.raises(openai.BadRequestError, match="echo with logprobs is not supported"):
        client.completions.create(**options, echo=True, logprobs=1)
    ids = tokenizer(prompts[0])["input_ids"]
    by_ids = client.completions.create(model="b", prompt=ids, temperature=0, max_tokens=5)
    by_text = client.completions.create(model="b", prompt=prompts[0], temperature=0, max_tokens=5)
    assert by_ids.choices[0].text == by_text.choices[0].text


def test_many_clients_at_a_time_get_what_each_gets_alone(server, client):
    words = ["the light", "keeper of the sea", "storm", "what is a harbor", "ship and sail and wind", "night"]
    asked = [(model, [{"role": "user", "content": word}]) for model in ("base", "a", "b") for word in words]
    options = {"temperature": 0, "max_tokens": 10}
    alone = [
        client.chat.completions.create(model=m, messages=q, **options).choices[0].message.content for m, q in asked
    ]

    async def together():
        many = server.client(asynchronous=True)
        calls = [many.chat.completions.create(model=m, messages=q, **options) for m, q in asked * 3]
        return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    assert asyncio.run(together()) == alone * 3


# ---- adapters at run time ----


def test_adapters_come_and_go_while_requests_run(folder, server, client):
    path = "/v1/load_lora_adapter"
    stream = client.chat.completions.create(model="a", messages=QUESTION, temperature=0, max_tokens=150, stream=True)
    events = iter(stream)
    next(events)
    for _ in range(2):
        assert post(server, path, {"lora_name": "late", "lora_path": "c"})[0] == 200
        answer = client.chat.completions.create(model="late", messages=QUESTION, temperature=0, max_tokens=8)
        assert answer.choices[0].message.content == text_alone(folder, "c", 8)
        assert post(server, "/v1/unload_lora_adapter", {"lora_name": "late"})[0] == 200
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="late", messages=QUESTION)
    streamed = "".join(event.choices[0].delta.content or "" for event in events)
    assert streamed == text_alone(folder, "a", 150)
    status, body, _ = post(server, path, {"lora_name": "a", "lora_path": "c"})
    assert (status, "'a' is served already" in body) == (400, True)
    assert post(server, "/v1/unload_lora_adapter", {"lora_name": "nobody"})[0] == 404
    assert post(server, path, {"lora_name": "base", "lora_path": "c"})[0] == 400


def test_bad_adapters_are_refused_by_name(folder, server, tmp_path_factory):
    other = save_model(tmp_path_factory.mktemp("other"), {"foreign": 4})
    bad = folder / "bad"
    shutil.copytree(folder / "a", bad)
    weights = bad / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    for name, change in {"dora": {"use_dora": True}, "experts": {"target_parameters": ["gate_up_proj"]}}.items():
        shutil.copytree(folder / "a", folder / name)
        (folder / name / "adapter_config.json").write_text(json.dumps({**config, **change}))
    shutil.copytree(other / "foreign", folder / "foreign")
    facts = {"quant_type": "nf4", "block_size": 64, "double_quant": True, "base_fingerprint": "0" * 64}
    (folder / "foreign" / "qlora_config.json").write_text(json.dumps(facts))
    wanted = {
        "bad": (400, "truncated or damaged"),
        "dora": (400, "use_dora=True is not supported here: only plain LoRA"),
        "experts": (400, "target_parameters"),
        "foreign": (400, "was trained on another base"),
        "missing": (400, "not an adapter folder"),
        "../": (403, "outside of the server's --adapter-folder"),
        "/etc": (403, "outside of the server's --adapter-folder"),
    }
    for name, (status, text) in wanted.items():
        found = post(server, "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": name})
        assert (found[0], text in found[1]) == (status, True), found


def test_without_an_adapter_folder_nothing_is_loaded(folder):
    from fastapi.testclient import TestClient
    from running import engine_of

    from qlora.serving.app import AppSettings, build_app

    engine = engine_of(folder)
    app = build_app(engine, load_tokenizer(folder / "base"), AppSettings("base"))
    with TestClient(app) as local:
        for path in ("load", "unload"):
            body = {"lora_name": "x", "lora_path": "a"}
            assert local.post(f"/v1/{path}_lora_adapter", json=body).status_code == 403
        assert local.get("/health").status_code == 503  # the engine has not started
        answer = local.post("/v1/completions", json={"model": "base", "prompt": "the"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stopped")


# ---- bad requests ----


def test_refusals_name_the_value_and_the_rule(client):
    def refused(error, **options):
        with pytest.raises(error) as caught:
            client.chat.completions.create(**{"model": "a", "messages": QUESTION, **options})
        return caught.value.body

    body = refused(openai.NotFoundError, model="nobody")
    assert body["code"] == "model_not_found"
    assert "['base', 'a', 'b']" in body["message"]
    long = [{"role": "user", "content": "light " * 300}]
    body = refused(openai.BadRequestError, messages=long)
    assert (body["code"], "exceeds the context of 256 tokens" in body["message"]) == ("context_length_exceeded", True)
    assert refused(openai.BadRequestError, max_tokens=250)["code"] == "context_length_exceeded"
    assert "temperature" in refused(openai.BadRequestError, temperature=-1)["message"]
    assert (
        "'response_format' is not supported"
        in refused(openai.BadRequestError, response_format={"type": "json_object"})["message"]
    )
    assert refused(openai.BadRequestError, messages=[])["param"] == "messages"
    assert "chat template" in refused(openai.BadRequestError, messages=[{"content": "no role"}])["message"]
    assert "logit_bias" in refused(openai.BadRequestError, logit_bias={"99999": 1})["message"]
    assert "n:" in refused(openai.BadRequestError, n=1000)["message"]
    for name, value in {"return_tensors": "pt", "padding": "max_length", "chat_template": "{{ 1 }}"}.items():
        body = refused(openai.BadRequestError, extra_body={"chat_template_kwargs": {name: value}})
        assert f"'{name}' is not a variable of a chat template" in body["message"]
    with pytest.raises(openai.BadRequestError, match="a request for 320 answers exceeds this server's 256"):
        client.completions.create(model="a", prompt=["the"] * 5, n=64)
    with pytest.raises(openai.BadRequestError, match="the prompt holds token 99"):
        client.completions.create(model="a", prompt=[1, 99])


def test_numbers_that_would_overflow_end_no_server(server, client):
    options = {"model": "a", "messages": QUESTION, "max_tokens": 4}
    greedy = client.chat.completions.create(**options, temperature=0).choices[0].message.content
    assert client.chat.completions.create(**options, temperature=1e-40).choices[0].message.content == greedy
    body = {"model": "a", "prompt": "the", "max_tokens": 3}
    for field, value in {"repetition_penalty": "1e-40", "temperature": "NaN", "logit_bias": '{"3": NaN}'}.items():
        content = json.dumps(body)[:-1] + f', "{field}": {value}}}'
        assert post(server, "/v1/completions", content.encode())[0] == 400
    assert post(server, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "a\0b"})[0] == 400
    assert urllib.request.urlopen(server.url + "/health").status == 200


def test_tokens_beyond_the_embedding_are_refused(folder):
    """A tokenizer may have more tokens than the model."""
    from fastapi.testclient import TestClient
    from running import engine_of

    from qlora.serving.app import AppSettings, build_app

    tokenizer = load_tokenizer(folder / "base")
    tokenizer.add_tokens(["zzz"])
    with TestClient(build_app(engine_of(folder), tokenizer, AppSettings("base"))) as local:
        for path, body in {
            "/v1/completions": {"prompt": "the zzz"},
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "zzz"}]},
        }.items():
            answer = local.post(path, json={"model": "base", **body})
            assert answer.status_code == 400
            assert "the prompt holds token" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"{", b"", b"[1]", b'"x"', b"\xff\xfe", b'{"model": "a"}', b'{"model": 3, "messages": [{}]}']
)
def test_malformed_bodies(server, body):
    status, text, _ = post(server, "/v1/chat/completions", body)
    assert status == 400
    assert json.loads(text)["error"]["type"] == "invalid_request_error"


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


# ---- load and clients that go ----


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


# ---- the command ----


def start_command(folder, port, *options):
    command = [sys.executable, "-m", "qlora", "serve", "--model", str(folder / "base"), "--served-name", "base"]
    command += ["--adapter", f"a={folder / 'a'}", "--port", str(port), "--compute-dtype", "fp32", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if '"ready"' in line:
            return process
    raise AssertionError("".join(lines))


def test_the_command_serves_stops_gently_and_survives_a_kill(folder):
    port = free_port()
    process = start_command(folder, port, "--cache-tokens", "1024")
    address = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none", "max_retries": 0}
    client = openai.OpenAI(**address)
    options = {"model": "a", "messages": QUESTION, "temperature": 0}
    assert client.chat.completions.create(**options, max_tokens=8).choices[0].message.content == text_alone(
        folder, "a", 8
    )
    events = iter(client.chat.completions.create(**options, max_tokens=150, stream=True))
    next(events)
    process.send_signal(signal.SIGTERM)
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == text_alone(folder, "a", 150)  # what runs is finished
    assert process.wait(30) in (0, -signal.SIGTERM)  # uvicorn raises the signal again when it is done
    log = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]
    assert [entry["status"] for entry in log if entry["event"] == "request"] == [200, 200]
    process = start_command(folder, port)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process = start_command(folder, port)
    try:
        assert openai.OpenAI(**address).models.list().data
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130, -signal.SIGINT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "a"], "must be NAME=FOLDER"),
        (["--adapter", "x=nowhere"], "is not an adapter folder"),
        (["--adapter", "base={a}", "--served-name", "base"], "must differ"),
        (["--slots", "0"], "--slots 0 must be positive"),
    ],
)
def test_wrong_options(folder, options, message, capsys):
    from qlora.cli import main

    given = [option.format(a=folder / "a") for option in options]
    assert main(["serve", "--model", str(folder / "base"), "--compute-dtype", "fp32", *given]) == 1
    assert message in capsys.readouterr().err


# ---- the guide ----


def test_curl_lines_of_the_guide_run_as_they_stand(folder, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "serve.md").read_text()
    blocks = [block.split("```")[0] for block in guide.split("```sh\n")[1:]]
    lines = [block.strip() for block in blocks if block.startswith("curl")]
    assert len(lines) >= 4
    adapters = tmp_path / "runs"
    for run in ("support", "legal"):
        shutil.copytree(folder / "a", adapters / run / "adapter")
    (tmp_path / "base").symlink_to(folder / "base")
    for run in ("support", "legal"):
        (tmp_path / run).symlink_to(adapters / run / "adapter")
    (tmp_path / "keys").mkdir()
    server = Running(tmp_path, ["support"], keys=["my-key"])
    try:
        for line in lines:
            line = line.replace("http://localhost:8000", server.url)
            result = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, cwd=tmp_path, check=False)
            assert result.returncode == 0, f"{line}\n{result.stderr}"
            assert result.stdout, line
            assert '"error"' not in result.stdout, f"{line}\n{result.stdout}"
    finally:
        server.stop()
