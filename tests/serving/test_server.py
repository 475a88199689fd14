"""The server over a real socket: the openai client, adapters at run time, bad input."""

import asyncio
import json
import shutil
import urllib.request

import openai
import pytest
from running import QUESTION, greedy_alone, post, running, save_model, text_alone
from tiny_models import WORDS

from qlora.models.loading import load_tokenizer

RANKS = {"a": 4, "b": 9, "c": 2, "d": 3}


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
