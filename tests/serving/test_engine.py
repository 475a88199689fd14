"""The engine: answers of a mixed batch equal those of transformers and PEFT, whatever runs beside them."""

import asyncio
import time

import pytest
import torch
from running import engine_of, greedy_alone, save_model
from tiny_models import CONFIGS, SIZES, save_dense, stir

from qlora.adapters.lora import save_lora
from qlora.models.loading import load_quantized
from qlora.serving import batching
from qlora.serving.engine import Engine, EngineStoppedError, Limits, OverloadedError, PromptTooLongError
from qlora.serving.layers import BASE, Routing
from qlora.serving.residency import AdapterChangedError, UnknownAdapterError
from qlora.serving.sampling import Sampling, TokenChooser, choose_all

RANKS = {"a": 4, "b": 9, "c": 2}
# A prefix of several pages, then different ends: adapters must not share the pages of this prefix.
PREFIX = [2, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
PROMPTS = [[*PREFIX, end] for end in (5, 6, 7)] + [[2, 20, 3]]
GREEDY = Sampling(temperature=0.0)
STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served"), RANKS)


@pytest.fixture(scope="module")
def alone(folder):
    return {(a, tuple(p)): greedy_alone(folder, a, p, STEPS) for a in (None, *RANKS) for p in PROMPTS}


async def collect(engine, prompt, adapter=None, sampling=GREEDY, steps=STEPS):
    return [token async for progress in engine.generate(prompt, adapter, sampling, steps) for token in progress.tokens]


def run(engine, main, adapters=()):
    """Runs ``main`` on a started engine, and stops it."""

    async def whole():
        await engine.start()
        for name, path in adapters:
            await engine.add_adapter(name, path)
        return await main()

    try:
        return asyncio.run(whole())
    finally:
        engine.stop()


def all_answers(folder, order, **options):
    engine = engine_of(folder, **options)

    async def main():
        results = await asyncio.gather(*(collect(engine, list(p), a) for a, p in order))
        return dict(zip(order, results, strict=True))

    return run(engine, main, [(name, folder / name) for name in RANKS])


@pytest.mark.parametrize("slots", [3, 2])  # with two slots, adapters are put out and read again
def test_a_mixed_batch_answers_as_each_request_alone(folder, alone, slots):
    order = [*alone, *reversed(alone)]
    answers = all_answers(folder, order, slots=slots)
    assert answers == alone
    assert len({tuple(answer) for answer in answers.values()}) > len(PROMPTS)  # the adapters do differ


def test_the_prefix_cache_is_used_and_keeps_adapters_apart(folder, alone, monkeypatch):
    engine = engine_of(folder)

    async def one_after_another():
        found = {(a, p): await collect(engine, list(p), a) for a, p in alone}
        return found, engine.manager.batch_processor.cache

    found, cache = run(engine, one_after_another, [(name, folder / name) for name in RANKS])
    assert found == alone
    ledger = next(iter(cache.cache_allocators.values())).ledger
    assert len(ledger.hash_to_block) >= 4 * (len(PREFIX) // 4)  # base and three adapters, each with its own pages
    # Without the salt, the same requests take pages of another adapter, and answers are wrong.
    monkeypatch.setattr(batching, "salted", lambda tokens, serial: tokens)
    engine = engine_of(folder)
    wrong, _ = run(engine, one_after_another, [(name, folder / name) for name in RANKS])
    assert wrong != alone


def test_an_adapter_that_is_loaded_again_does_not_meet_old_pages(folder, alone, tmp_path):
    engine = engine_of(folder)

    async def main():
        await engine.add_adapter("x", folder / "a")
        first = await collect(engine, PROMPTS[0], "x")
        engine.adapters.remove("x")
        await engine.add_adapter("x", folder / "b")
        return first, await collect(engine, PROMPTS[0], "x")

    first, second = run(engine, main)
    assert first == alone["a", tuple(PROMPTS[0])]
    assert second == alone["b", tuple(PROMPTS[0])]


def test_a_request_that_goes_in_the_middle_of_a_batch_poisons_no_prefix(folder, alone):
    """Its route is gone when transformers records the pages that the batch has filled."""
    engine = engine_of(folder)

    async def main():
        runner = engine.manager.batch_processor.model_runner
        compute = runner.compute_batch

        def compute_and_lose_routes(*args):
            compute(*args)
            engine.manager.routes.clear()
            runner.compute_batch = compute

        stream = engine.generate(PROMPTS[0], "a", GREEDY, STEPS)
        runner.compute_batch = compute_and_lose_routes
        await anext(stream)
        await stream.aclose()
        return {a: await collect(engine, PROMPTS[0], a) for a in (None, "a")}

    answers = run(engine, main, [("a", folder / "a")])
    assert answers == {a: alone[a, tuple(PROMPTS[0])] for a in (None, "a")}


def test_salts_are_one_to_one():
    tokens, top = [7, (1 << 20) - 1, 3], batching.MAX_SERIAL - 1
    serials = [0, 1, 2, 2047, 2048, 2049, 4096, top]
    salted = [batching.salted(tokens, serial) for serial in serials]
    assert len({tuple(s) for s in salted}) == len(serials)
    assert all(0 <= token < 2**31 for s in salted for token in s)  # transformers packs them as int32
    assert salted[0] == tokens


ZOO = {
    **{name: CONFIGS[name] for name in ("llama", "gpt2", "qwen2_moe", "gpt_oss")},
    "mistral": {**SIZES, "sliding_window": 8},
    "gemma2": {**SIZES, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {**SIZES, "head_dim": 16},
    "phi3": SIZES,
}


@pytest.mark.parametrize("name", ZOO)
def test_architectures(tmp_path, monkeypatch, name):
    """Sliding windows, transposed weights, experts beside, attention sinks, fused projections, capped scores."""
    monkeypatch.setitem(CONFIGS, name, ZOO[name])
    save_dense(name, tmp_path / "base")
    linear = ("q_proj", "v_proj", "c_attn", "qkv_proj", "o_proj")
    model, _ = load_quantized(tmp_path / "base", torch.float32, progress=False)
    names = {n.rpartition(".")[2] for n, _ in model.named_modules()}
    options = {"rank": 3, "target_modules": [n for n in linear if n in names]}
    adapted, _ = load_quantized(tmp_path / "base", torch.float32, progress=False, **options)
    stir(adapted, 0.3)
    save_lora(adapted, tmp_path / "a")
    prompts = [[5, 9, 77, 30, 8, 20, 100][:n] + list(range(40, 40 + n)) for n in (1, 3, 7, 6)]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generated(which, prompt):
        ids = torch.tensor([prompt])
        return which.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]

    wanted = [generated(which, prompt).tolist() for which in (model, adapted) for prompt in prompts]
    model.generation_config.eos_token_id = None
    batching = {"page_size": 4, "num_blocks": 256, "max_batch_tokens": 16, "max_requests_per_batch": 8}
    engine = Engine(model, tmp_path / "base", 2, Limits(), batching)

    async def main():
        return await asyncio.gather(*(collect(engine, p, a, steps=12) for a in (None, "a") for p in prompts))

    assert run(engine, main, [("a", tmp_path / "a")]) == wanted


def test_a_model_that_does_not_survive_packing_is_refused(tmp_path):
    engine = engine_of_zoo(save_dense("falcon", tmp_path / "base"))
    with pytest.raises(ValueError, match="cannot be served by transformers' continuous batching"):
        run(engine, None)


def engine_of_zoo(base):
    model, _ = load_quantized(base, torch.float32, progress=False)
    return Engine(model.eval(), base, 1, Limits(), {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 16})


def test_a_model_that_answers_differently_in_a_batch_is_refused(folder, monkeypatch):
    """Here the attention forgets that requests must not see each other."""
    from qlora.serving import attention

    whole = attention.packed_attention

    def leaky(module, query, key, value, mask, **kwargs):
        keys = kwargs["cu_seq_lens_k"]
        ends = {kind: t[[0, -1]] for kind, t in keys.items()} if isinstance(keys, dict) else keys[[0, -1]]
        joined = {"cu_seq_lens_q": kwargs["cu_seq_lens_q"][[0, -1]], "cu_seq_lens_k": ends}
        return whole(module, query, key, value, mask, **{**kwargs, **joined})

    monkeypatch.setattr(attention, "packed_attention", leaky)
    with pytest.raises(ValueError, match="gives other answers in a batch"):
        run(engine_of(folder), None)


def test_sampling_settings_belong_to_each_request(folder):
    engine = engine_of(folder)
    settings = [
        GREEDY,
        Sampling(temperature=1.5, seed=1),
        Sampling(temperature=1.5, seed=2),
        Sampling(temperature=1.5, seed=1, top_k=1),  # the most probable token again
        Sampling(temperature=0.0, logit_bias={20: 100.0}),
        Sampling(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0),
    ]

    async def main():
        together = await asyncio.gather(*(collect(engine, PROMPTS[0], "a", s) for s in settings))
        one_by_one = [await collect(engine, PROMPTS[0], "a", s) for s in settings]
        return together, one_by_one

    together, one_by_one = run(engine, main, [("a", folder / "a")])
    assert together == one_by_one
    greedy, seed1, seed2, top1, biased, penalized = together
    assert greedy == top1
    assert seed1 != seed2 != greedy
    assert biased == [20] * STEPS
    assert len(set(penalized)) > len(set(greedy))


def test_log_probabilities_are_those_of_the_model(folder):
    engine = engine_of(folder)

    async def main():
        stream = engine.generate(PROMPTS[0], "a", Sampling(temperature=0.7, seed=3, logprobs=4), STEPS)
        return [entry async for progress in stream for entry in progress.logprobs]

    entries = run(engine, main, [("a", folder / "a")])
    from qlora.adapters.lora import load_adapter_into

    model, _ = load_quantized(folder / "base", torch.float32, progress=False)
    model = load_adapter_into(model, folder / "a")
    tokens = torch.tensor([[*PROMPTS[0], *(entry.token for entry in entries)]])
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits[0, len(PROMPTS[0]) - 1 :].double().log_softmax(-1)
    for entry, row in zip(entries, wanted, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
        values, _ = row.topk(4)
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def forget_cached_pages(engine):
    with engine.manager.pause():
        processor = engine.manager.batch_processor
        assert processor.scheduler.active_requests == {}
        processor.cache.evict_cached_blocks()
        processor.cache.pool.try_to_free_sectors()


def test_a_closed_request_leaves_nothing(folder):
    engine = engine_of(folder)

    async def main():
        await asyncio.to_thread(forget_cached_pages, engine)
        before = engine.free_cache_share
        stream = engine.generate(PROMPTS[0], "a", GREEDY, 100)
        await anext(stream)
        running = engine.running
        await stream.aclose()
        await collect(engine, PROMPTS[3])  # a batch later the cancelled request is gone
        await asyncio.to_thread(forget_cached_pages, engine)
        return before, running, engine.free_cache_share, engine.adapters.entries["a"].users

    before, running, after, users = run(engine, main, [("a", folder / "a")])
    assert (running, users, engine.running, engine.waiting, engine.manager.routes) == (1, 0, 0, 0, {})
    assert after == before


def test_more_requests_than_the_cache_holds_are_all_answered(folder, alone):
    """With few pages requests are put aside and computed again, or wait."""
    order = [(a, p) for a, p in alone for _ in range(3)]
    assert all_answers(folder, order, num_blocks=14) == alone


def test_penalties_survive_a_full_cache(folder):
    """A request that is computed again still knows what it has generated."""
    settings = Sampling(temperature=0.0, frequency_penalty=1.0, presence_penalty=1.0, logprobs=1)

    def answers(**options):
        engine = engine_of(folder, **options)

        async def one(prompt):
            stream = engine.generate(prompt, None, settings, 40)
            pairs = [(p.tokens, [entry.token for entry in p.logprobs]) async for p in stream]
            return [t for tokens, _ in pairs for t in tokens], [t for _, entries in pairs for t in entries]

        async def main():
            return await asyncio.gather(*(one(prompt) for prompt in PROMPTS * 3))

        return run(engine, main)

    few, many = answers(num_blocks=20), answers(num_blocks=200)
    assert few == many
    assert all(tokens == reported for tokens, reported in few)


def test_the_announced_context_can_be_used_up(tmp_path, monkeypatch):
    """Layers with a sliding window need other pages than those with full attention."""
    monkeypatch.setitem(CONFIGS, "gemma2", ZOO["gemma2"])
    model, _ = load_quantized(save_dense("gemma2", tmp_path / "base"), torch.float32, progress=False)
    model.generation_config.eos_token_id = None
    engine = Engine(model, tmp_path / "base", 1, Limits(), {"page_size": 4, "num_blocks": 32, "max_batch_tokens": 16})

    async def main():
        room = engine.max_new_tokens(3, None)
        return room, await collect(engine, [5, 6, 7], steps=room)

    room, tokens = run(engine, main)
    assert len(tokens) == room > 50


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_factors_that_depend_on_the_length_limit_the_context(tmp_path, rope):
    """Beyond the original length, one long request would change the answers of the others in its batch."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8} if rope == "longrope" else {"factor": 4.0}
    original = {"original_max_position_embeddings": 32}
    config = (Phi3Config if rope == "longrope" else LlamaConfig)(
        **SIZES | {"eos_token_id": None, "max_position_embeddings": 128} | original,
        rope_parameters={"rope_type": rope, "rope_theta": 1e4, **original, **factors},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, unserved = (load_quantized(tmp_path, torch.float32, progress=False)[0] for _ in range(2))
    engine = Engine(model, tmp_path, 1, Limits(), {"page_size": 4, "num_blocks": 200, "max_batch_tokens": 16})

    async def main():
        return await asyncio.gather(*(collect(engine, list(range(5, 5 + n)), steps=32 - n) for n in (20, 7, 3)))

    answers = run(engine, main)
    assert engine.context == 32
    with pytest.raises(PromptTooLongError, match="exceeds the context of 32 tokens"):
        engine.max_new_tokens(33, None)
    for count, answer in zip((20, 7, 3), answers, strict=True):
        ids = torch.arange(5, 5 + count).unsqueeze(0)
        alone = unserved.generate(ids, max_new_tokens=32 - count, do_sample=False, use_cache=False)
        assert answer == alone[0, count:].tolist()


def test_layers_that_do_not_get_every_token_have_no_adapters(folder):
    engine = engine_of(folder)
    stacks = engine.stacks
    name, other = list(stacks.bases)[:2]
    stacks.routing.set([BASE], [5])
    with stacks.keeping_layers_of_all_tokens():
        for rows, which in ((5, name), (3, other)):
            stacks.bases[which](torch.zeros(rows, stacks.bases[which].in_features))
    assert list(stacks.shapes()) == [name]


def test_one_request_that_fails_does_not_end_the_others():
    choosers = [TokenChooser(Sampling(temperature=t, seed=1), 6) for t in (0.0, 1.0, 0.0, 1.0)]
    logits = torch.randn(4, 6)
    logits[1, 2] = float("nan")
    logits[3] = float("-inf")
    tokens = choose_all(logits, [(chooser, [1], []) for chooser in choosers])
    assert tokens[0] == logits[0].argmax()
    assert [chooser.failure is None for chooser in choosers] == [True, False, True, False]


def test_an_adapter_of_too_large_a_rank_is_refused(folder):
    engine = engine_of(folder, limits=Limits(max_rank=4))

    async def main():
        await engine.add_adapter("a", folder / "a")
        with pytest.raises(ValueError, match="has rank 9: this server takes up to 4"):
            await engine.add_adapter("b", folder / "b")

    run(engine, main)


def test_slots_in_use_make_others_wait_and_then_refuse(folder):
    engine = engine_of(folder, slots=1, limits=Limits(queue_seconds=0.3))

    async def main():
        await engine.add_adapter("a", folder / "a")
        await engine.add_adapter("b", folder / "b")
        stream = engine.generate(PROMPTS[0], "a", GREEDY, 200)
        await anext(stream)
        with pytest.raises(OverloadedError, match="within 0.3 seconds"):
            await collect(engine, PROMPTS[0], "b")
        await stream.aclose()
        return await collect(engine, PROMPTS[0], "b")

    assert run(engine, main) == greedy_alone(folder, "b", PROMPTS[0], STEPS)


def test_without_a_free_page_a_request_waits_and_is_refused_in_time(folder):
    engine = engine_of(folder, limits=Limits(queue_seconds=0.4), num_blocks=10)  # 40 tokens

    async def main():
        runner = engine.manager.batch_processor.model_runner
        compute = runner.compute_batch
        runner.compute_batch = lambda *args: (time.sleep(0.05), compute(*args))
        first = asyncio.create_task(collect(engine, PROMPTS[0], None, Sampling(0.0, logit_bias={1: -100.0}), 20))
        await asyncio.sleep(0.2)
        with pytest.raises(OverloadedError, match="no room for this request within 0.4 seconds"):
            await collect(engine, [3] * 30, steps=5)
        assert len(await first) == 20
        return await collect(engine, [3] * 30, None, Sampling(0.0, logit_bias={1: -100.0}), 5)

    assert len(run(engine, main)) == 5


def test_refusals(folder, tmp_path):
    engine = engine_of(folder, limits=Limits(max_waiting=1, max_tokens=50))

    async def main():
        with pytest.raises(UnknownAdapterError):
            await collect(engine, PROMPTS[0], "nobody")
        with pytest.raises(PromptTooLongError, match="a prompt of 256 tokens exceeds the context of 256"):
            engine.max_new_tokens(256, None)
        with pytest.raises(PromptTooLongError, match="limit of 50"):
            engine.max_new_tokens(1, 60)
        assert engine.max_new_tokens(250, None) == 6
        first = asyncio.create_task(collect(engine, PROMPTS[0]))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="1 requests are waiting"):
            await collect(engine, PROMPTS[1])
        await first
        with pytest.raises(ValueError, match="logit_bias names token 99999"):
            await collect(engine, PROMPTS[0], None, Sampling(logit_bias={99999: 1.0}))
        return engine.waiting, engine.running, engine.rejected

    assert run(engine, main) == (0, 0, 1)
    with pytest.raises(EngineStoppedError):
        asyncio.run(collect(engine, PROMPTS[0]))


def test_an_adapter_that_changed_on_disk_is_refused_by_name(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "a", tmp_path / "mine")
    engine = engine_of(folder, slots=1)

    async def main():
        await engine.add_adapter("mine", tmp_path / "mine")
        await engine.add_adapter("b", folder / "b")
        await collect(engine, PROMPTS[0], "b")  # puts "mine" out
        shutil.copytree(folder / "b", tmp_path / "mine", dirs_exist_ok=True)
        with pytest.raises(AdapterChangedError, match="the files of 'mine' have changed since it was loaded"):
            await collect(engine, PROMPTS[0], "mine")
        return await collect(engine, PROMPTS[0], "b"), engine.adapters.evictions

    assert run(engine, main) == (greedy_alone(folder, "b", PROMPTS[0], STEPS), 1)


def test_routing_refuses_another_number_of_rows():
    routing = Routing(8, torch.device("cpu"))
    routing.set([1, BASE], [2, 3], padded=7)
    assert routing.of_rows(7).tolist() == [1, 1, -1, -1, -1, -1, -1]
    with pytest.raises(RuntimeError, match="6 rows in a batch of 7 tokens"):
        routing.of_rows(6)
    with pytest.raises(ValueError, match="9 tokens exceeds the routing's capacity of 8"):
        routing.set([0], [9])
