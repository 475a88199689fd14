"""calibrate on whole models: its streams are the models' own, and its weights lose less."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, TiedModel, reloaded, save_dense, save_llama, stir
from torch import nn

import qlora
from qlora.calibration.blocks import find_blocks
from qlora.calibration.moments import Moments
from qlora.calibration.overlap import from_text, run_hashes, share_seen, to_text
from qlora.calibration.texts import default_texts, windows_of
from qlora.calibration.weights import Solver
from qlora.integrations.transformers import quantized_layers
from qlora.nn import Experts4bit, Linear4bit

OPTIONS = {"tokens": 2048, "window": 64}


def text_ids(count=2304, vocabulary=200, seed=0):
    """Tokens in which each makes some others likely, so that activations are correlated."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randint(3, vocabulary, (vocabulary, 3), generator=generator)
    ids = [3]
    for choice in torch.randint(3, (count - 1,), generator=generator).tolist():
        ids.append(follows[ids[-1], choice].item())
    return torch.tensor(ids)


def load(folder, **options):
    return reloaded(folder, quantization_config=qlora.QLoRAConfig(block_size=32, **options), dtype=torch.float32)


def packed(model):
    return {n: {k: t.clone() for k, t in m.state_dict().items()} for n, m in quantized_layers(model)}


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for key in a[name]:
            assert torch.equal(a[name][key], b[name][key]), (name, key)


@torch.no_grad()
def loss_of(model, ids, length=64):
    """Nats per token of windows, each by itself."""
    losses = []
    for window in ids.view(-1, length):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, window[1:]))
    return torch.stack(losses).mean().item()


@pytest.fixture
def llama(tmp_path):
    return save_dense("llama", tmp_path / "dense")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(tmp_path, name, double_quant):
    folder = save_dense(name, tmp_path / "dense")
    ids = text_ids()
    model, dense = load(folder, double_quant=double_quant), reloaded(folder, dtype=torch.float32)
    before, trainable = packed(model), {n: p.requires_grad for n, p in model.named_parameters()}
    report = qlora.calibrate(model, ids, **OPTIONS)
    # The two streams are what the dense and the calibrated model compute.
    unseen = ids[report.tokens :]
    assert (report.tokens, report.unseen_tokens) == (2048, 256)
    assert report.loss_before == pytest.approx(loss_of(dense, unseen), abs=1e-4)
    assert report.loss_after == pytest.approx(loss_of(model, unseen), abs=1e-4)
    # Every 4-bit weight of the blocks has a report, and the format is the same.
    layers = {layer.name for layer in report.layers}
    expected = set()
    for layer_name, module in quantized_layers(model):
        if isinstance(module, Experts4bit):
            expected |= {f"{layer_name}.{w}.{e}" for w in module.weight_names for e in range(module.num_experts)}
        else:
            expected.add(layer_name)
    assert layers == expected
    assert report.error_ratio < 1
    after = packed(model)
    assert before.keys() == after.keys()
    for layer_name, tensors in before.items():
        for key, tensor in tensors.items():
            assert (tensor.shape, tensor.dtype) == (after[layer_name][key].shape, after[layer_name][key].dtype)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable


def test_error_feedback_needs_enough_tokens_and_says_so(llama):
    model = load(llama)
    report = qlora.calibrate(model, text_ids(), tokens=192, window=64)
    methods = {layer.name.rpartition(".")[2]: layer for layer in report.layers}
    assert methods["q_proj"].method == "feedback"  # 192 tokens for 64 inputs
    assert methods["down_proj"].method in ("scales", "plain")  # for 128 inputs
    assert methods["down_proj"].note.startswith("192 tokens: feedback needs 256 for 128 inputs")


def test_the_scales_recipe_searches_scales_only(llama):
    model = load(llama)
    report = qlora.calibrate(model, text_ids(), recipe="scales", **OPTIONS)
    assert {layer.method for layer in report.layers} <= {"scales", "plain"}
    assert report.error_ratio < 1


def test_saved_and_reloaded_it_computes_the_same(llama, tmp_path):
    model = load(llama)
    qlora.calibrate(model, text_ids(), **OPTIONS)
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(packed(model), packed(reloaded(tmp_path / "saved", dtype=torch.float32)))


def test_the_config_calibrates_while_loading(tmp_path):
    folder = save_llama(tmp_path / "model")
    texts = ["the light stays on keeper log sea harbor storm wind wave night day"] * 40
    config = qlora.QLoRAConfig(block_size=32, calibration=texts, calibration_tokens=256)
    model = reloaded(folder, quantization_config=config, dtype=torch.float32)
    expected = load(folder)
    qlora.calibrate(expected, texts, tokens=256)
    assert_same_weights(packed(model), packed(expected))
    model.save_pretrained(tmp_path / "saved")
    assert "calibration" not in (tmp_path / "saved" / "config.json").read_text()
    again = reloaded(folder, quantization_config=config, dtype=torch.float32)  # the caller's config is as it was
    assert_same_weights(packed(again), packed(expected))
    with pytest.raises(ValueError, match="must be 'default' or a list of texts"):
        qlora.QLoRAConfig(calibration="some text")


def test_a_plain_module_with_its_weights_in_memory():
    model = TiedModel(width=64)
    dense = copy.deepcopy(model)
    qlora.prepare_model(model, rank=None)
    report = qlora.calibrate(model, text_ids(vocabulary=50), weights=dense.state_dict(), **OPTIONS)
    assert {layer.name for layer in report.layers} == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("up", "down")}
    ids = text_ids(vocabulary=50)[2048:].view(-1, 64)
    losses = [nn.functional.cross_entropy(m(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for m in (dense, model)]
    assert (report.loss_before, report.loss_after) == pytest.approx([x.item() for x in losses], abs=1e-4)


def test_bfloat16_models_keep_their_dtype(tmp_path):
    folder = save_dense("llama", tmp_path / "dense", torch.bfloat16)
    model = reloaded(folder, quantization_config=qlora.QLoRAConfig(block_size=32), dtype=torch.bfloat16)
    dtypes = {n: t.dtype for n, t in model.state_dict().items()}
    assert qlora.calibrate(model, text_ids(), **OPTIONS).error_ratio < 1
    assert {n: t.dtype for n, t in model.state_dict().items()} == dtypes


def test_a_killed_run_goes_on_and_ends_equal(llama, tmp_path):
    whole, killed = load(llama), load(llama)
    expected = qlora.calibrate(whole, text_ids(), **OPTIONS)

    def kill(done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qlora.calibrate(killed, text_ids(), partial=tmp_path / "partial", on_progress=kill, **OPTIONS)
    assert sorted(p.name for p in (tmp_path / "partial").iterdir()) == ["block-00000.safetensors", "calibration.json"]
    resumed = load(llama)
    report = qlora.calibrate(resumed, text_ids(), partial=tmp_path / "partial", **OPTIONS)
    assert_same_weights(packed(resumed), packed(whole))
    assert report.layers == expected.layers
    assert (report.loss_before, report.loss_after) == (expected.loss_before, expected.loss_after)
    with pytest.raises(ValueError, match="other settings or other text: delete it"):
        qlora.calibrate(load(llama), text_ids(seed=1), partial=tmp_path / "partial", **OPTIONS)
    with pytest.raises(ValueError, match="other settings or other text"):
        qlora.calibrate(load(llama, quant_type="fp4"), text_ids(), partial=tmp_path / "partial", **OPTIONS)
    block = tmp_path / "partial" / "block-00001.safetensors"
    block.write_bytes(block.read_bytes()[:-100])
    with pytest.raises(ValueError, match="block-00001.safetensors is not a readable safetensors file"):
        qlora.calibrate(load(llama), text_ids(), partial=tmp_path / "partial", **OPTIONS)


@pytest.mark.parametrize("story", ["prepared", "peft"])
def test_a_calibrated_merge_keeps_what_the_adapter_does(llama, story):
    correlated = reloaded(llama, dtype=torch.float32)
    correlated.model.embed_tokens.weight.data = torch.randn(256, 8) @ torch.randn(8, 64) * 0.1
    correlated.save_pretrained(llama)
    results = {}
    for calibration in (None, text_ids()):
        model = load(llama)
        if story == "prepared":
            qlora.prepare_model(model, rank=4)
        else:
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
        stir(model, std=0.02)
        wanted = model.eval()(input_ids=text_ids()[None, :64]).logits
        base = load(llama)(input_ids=text_ids()[None, :64]).logits
        untouched = packed(load(llama))
        with pytest.warns(UserWarning, match="of what the adapter changes"):
            merged = qlora.merge_and_unload(model, requantize=True, calibration=calibration, tokens=2048)
        change = merged.model(input_ids=text_ids()[None, :64]).logits - base
        kept = (change * (wanted - base)).sum() / (wanted - base).square().sum()
        results[calibration is not None] = kept.item(), merged.adapter_kept
        layers = dict(quantized_layers(merged.model))
        assert all(type(m) is Linear4bit for m in layers.values())
        if story == "peft":  # layers without an adapter keep their weights
            others = {n: t for n, t in packed(merged.model).items() if n not in merged.reports}
            assert len(others) == len(layers) - 4
            assert_same_weights(others, {n: untouched[n] for n in others})
        assert set(merged.reports) == {n for n in layers if story == "prepared" or n.endswith(("q_proj", "down_proj"))}
    assert results[True][0] > results[False][0] + 0.1
    assert results[True][1] > results[False][1] + 0.1


def test_calibrating_a_merge_needs_requantize(llama):
    model = load(llama)
    qlora.prepare_model(model, rank=4)
    with pytest.raises(ValueError, match="calibration needs requantize=True"):
        qlora.merge_and_unload(model, calibration=text_ids())


def test_what_cannot_be_calibrated_is_refused(llama, tmp_path):
    model = load(llama)
    cases = {
        "recipe='gptq' is unknown": {"recipe": "gptq"},
        "token 255 is outside of the model's vocabulary of 200": {},
        "calibration needs at least": {"texts": torch.arange(20)},
        "texts='some text' must be 'default' or a list": {"texts": "some text"},
        "window=8 must be at least 16": {"window": 8},
    }
    for message, options in cases.items():
        if "vocabulary" in message:
            model.config.vocab_size, options = 200, {"texts": torch.arange(56, 256).repeat(10)}
        with pytest.raises(ValueError, match=message):
            qlora.calibrate(model, **{"texts": text_ids(), **OPTIONS, **options})
        model.config.vocab_size = 256
    with pytest.raises(ValueError, match="no list of blocks with 4-bit layers"):
        qlora.calibrate(reloaded(llama), text_ids())
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="is quantized by 'qlora': calibration needs dense weights"):
        qlora.calibrate(model, text_ids(), weights=tmp_path / "packed", **OPTIONS)
    state = reloaded(llama).state_dict()
    state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 64)
    with pytest.raises(ValueError, match=r"q_proj.weight has shape \(32, 64\): the 4-bit layer has \(64, 64\)"):
        qlora.calibrate(model, text_ids(), weights=state, **OPTIONS)
    adapted = load(llama)
    qlora.prepare_model(adapted, rank=4)
    with pytest.raises(ValueError, match="has an adapter: calibrate a model before"):
        qlora.calibrate(adapted, text_ids(), **OPTIONS)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("model.layers.1.self_attn.k_proj.weight", r"model.layers.1.self_attn.k_proj: .*weight\[3, 5\] is nan or inf"),
        ("model.layers.1.input_layernorm.weight", "the inputs of model.layers.1.self_attn.q_proj are nan or inf"),
    ],
)
def test_nan_is_refused_with_the_layers_name(llama, broken, named):
    model = load(llama)
    state = reloaded(llama).state_dict()
    if state[broken].ndim == 2:
        state[broken][3, 5] = torch.nan
    else:
        model.get_parameter(broken).data[5] = torch.nan
    with pytest.raises(ValueError, match=named):
        qlora.calibrate(model, text_ids(), weights=state, **OPTIONS)


def test_a_singular_second_moment_gets_more_damping():
    square = torch.eye(8) * 1e-6
    square[0, 1] = square[1, 0] = -5e-6  # not what a sum of squares gives: rounding of huge inputs can
    solver = Solver.of(Moments(square, None, tokens=16384))
    assert solver.note == "damping raised from 0.1 to 10: the inputs' second moment is singular"
    assert solver.feedback.isfinite().all()
    with pytest.raises(ValueError, match="all inputs are zero, or some are nan or inf"):
        Solver.of(Moments(torch.zeros(8, 8), None, tokens=16384))


def test_feedback_is_the_best_linear_correction():
    """The factors equal the coefficients of regression: what later inputs make up for an earlier column's error."""
    x = torch.randn(4096, 6) @ torch.randn(6, 6)
    moments = Moments.zeros(6, torch.device("cpu"), "feedback")
    moments.add(x, x, False)
    solver = Solver.of(moments)
    damped = moments.square.double() + 0.2 * moments.square.diagonal().double().mean() * torch.eye(6)
    damped = damped[solver.order][:, solver.order]
    for step in range(1, 6):
        # The errors of columns before `step` are best made up for by the columns from `step` on; its own share of it.
        best = torch.linalg.solve(damped[step:, step:], damped[step:, :step])[0]
        assert torch.allclose(solver.feedback[step, :step].double(), best, atol=1e-5)
    assert torch.equal(solver.correction, torch.zeros(6, 6))


def test_the_correction_gives_the_dense_models_outputs():
    inputs = torch.randn(5000, 8)
    exact = inputs + 0.1 * torch.randn(5000, 8) + 0.2 * inputs.roll(1, 1)
    moments = Moments.zeros(8, torch.device("cpu"), "feedback")
    moments.add(inputs, exact, False)
    weight = torch.randn(4, 8)
    target = Solver.of(moments).target(weight)
    wanted = exact @ weight.T
    assert (inputs @ target.T - wanted).norm() < 0.7 * (inputs @ weight.T - wanted).norm()


class Odd(TiedModel):
    """Variants of a model that are not a chain of blocks."""

    def __init__(self, how):
        super().__init__(width=64)
        self.how = how
        if how == "shared":
            self.blocks[1].up = self.blocks[0].up
        if how == "twice":
            self.blocks = nn.ModuleList([self.blocks[0], self.blocks[0]])

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(2 if self.how == "loop" else 1):
            for block in self.blocks:
                x = block(x)
                if self.how == "between":
                    x = 2 * x
        return self.lm_head(x)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shared", "blocks.1 shares weights with blocks.0"),
        ("twice", "blocks.1 shares weights with blocks.0"),
        ("loop", r"calls the blocks of blocks in the order \[0, 1, 0, 1\]"),
        ("between", "blocks.1 does not get what blocks.0 returns"),
    ],
)
def test_models_that_are_no_chain_of_blocks_are_refused(how, message):
    model = Odd(how)
    state = copy.deepcopy(model).state_dict()
    qlora.prepare_model(model, rank=None)
    with pytest.raises(ValueError, match=message):
        qlora.calibrate(model, text_ids(vocabulary=50), weights=state, **OPTIONS)


class Routed(nn.Module):
    """A block whose experts are linear layers in a list: each gets other tokens, in another order for each batch."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.twice = nn.Linear(64, 64)

    def forward(self, x):
        flat = x.flatten(0, 1)
        out = torch.zeros_like(flat)
        chosen = flat[:, :4].argmax(-1)
        for index in chosen.unique(sorted=True).roll(int(chosen[0])).tolist():
            out[chosen == index] = self.experts[index](flat[chosen == index])
        return x + self.twice(self.twice(out)).view_as(x)


def test_routed_linear_layers_are_calibrated_on_all_their_tokens():
    model = TiedModel(width=64)
    model.blocks = nn.ModuleList(Routed() for _ in range(2))
    state = copy.deepcopy(model).state_dict()
    qlora.prepare_model(model, rank=None)
    report = qlora.calibrate(model, text_ids(vocabulary=50), weights=state, **OPTIONS)
    assert len(report.layers) == 2 * 5
    assert all(layer.error == layer.error for layer in report.layers)
    ids = text_ids(vocabulary=50)[2048:].view(-1, 64)
    loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert report.loss_after == pytest.approx(loss.item(), abs=1e-4)


def test_a_backbone_without_logits_has_no_loss(llama):
    from transformers import AutoModel

    config = qlora.QLoRAConfig(block_size=32)
    model = AutoModel.from_pretrained(llama, quantization_config=config, dtype=torch.float32)
    report = qlora.calibrate(model, text_ids().int(), **OPTIONS)
    assert report.error_ratio < 1
    assert report.loss_before != report.loss_before


def test_a_merged_model_and_other_weights_are_refused(llama):
    model = load(llama)
    qlora.prepare_model(model, rank=4)
    stir(model)
    with pytest.warns(UserWarning, match="of what the adapter changes"):
        merged = qlora.merge_and_unload(model, requantize=True).model
    with pytest.raises(ValueError, match="adapters were merged into the model"):
        qlora.calibrate(merged, text_ids(), **OPTIONS)
    state = reloaded(llama).state_dict()
    state["model.layers.1.mlp.up_proj.weight"] = torch.randn(128, 64)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight is not the dense weight of the 4-bit layer"):
        qlora.calibrate(load(llama), text_ids(), weights=state, **OPTIONS)


def test_a_merge_with_too_little_text_changes_nothing(llama):
    model = load(llama)
    qlora.prepare_model(model, rank=4)
    stir(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="calibration needs at least"):
        qlora.merge_and_unload(model, requantize=True, calibration=torch.arange(20))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_partial_runs_of_other_weights_are_refused(llama, tmp_path):
    state = reloaded(llama).state_dict()
    qlora.calibrate(load(llama), text_ids(), weights=state, partial=tmp_path / "partial", **OPTIONS)
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"] * 1.01
    with pytest.raises(ValueError, match="other settings or other text"):
        qlora.calibrate(load(llama), text_ids(), weights=state, partial=tmp_path / "partial", **OPTIONS)


def test_windows_begin_with_the_token_that_begins_every_text(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_llama(tmp_path / "model"))
    texts = ["the light stays on keeper log sea harbor storm wind wave night day"] * 40
    plain = windows_of(texts, tokenizer, None, 256, 32)
    assert not (plain.ids[:, 0] == plain.ids[0, 0]).all()
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|user|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", tokenizer.bos_token_id)]
    )
    first = windows_of(texts, tokenizer, None, 256, 32).ids
    assert (first[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(first[:, 1:], plain.ids[:, 1:])


def test_blocks_inside_blocks_are_not_taken_for_the_models_own():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            for part in self.parts:
                x = x + part(x)
            return x

    model = TiedModel(width=64)
    model.blocks = nn.ModuleList(Outer() for _ in range(2))
    qlora.prepare_model(model, rank=None)
    name, blocks = find_blocks(model)
    assert (name, len(blocks)) == ("blocks", 2)


def test_windows_split_text_into_seen_and_unseen():
    ids = torch.arange(10_000)
    windows = windows_of(ids, None, None, 4096, 512)
    assert (windows.tokens, windows.unseen_tokens) == (4096, 512)
    assert torch.equal(windows.ids.flatten(), ids[: 4096 + 512])
    assert windows_of(ids, None, None, 9000, 512).tokens == 17 * 512  # as many as asked, if the text has them
    short = windows_of(ids[:1500], None, None, 4096, 512)  # too little: all of it
    assert (short.tokens, short.unseen_tokens) == (512, 512)
    tiny = windows_of(ids[:100], None, None, 4096, 512)  # shorter than a window
    assert tiny.ids.shape == (2, 32) or tiny.ids.shape[1] <= 50
    assert windows_of(ids.view(100, 100), None, None, 4096, 512).ids.shape[1] == 100


def test_the_default_text_has_passages_with_sources():
    texts = default_texts()
    assert len(texts) > 100
    assert all(500 < len(text) < 4000 for text in texts)
    sources = (Path(qlora.calibration.__file__).parent / "SOURCES.md").read_text()
    assert "public domain" in sources


def test_runs_that_a_calibration_has_seen_are_found():
    seen = run_hashes(torch.arange(1000))
    assert torch.equal(from_text(to_text(seen)), seen)
    assert share_seen(torch.arange(100, 300), seen) == 1
    assert share_seen(torch.arange(2000, 3000), seen) == 0
    half = torch.cat((torch.arange(500), torch.arange(5000, 5500)))
    assert share_seen(half, seen) == pytest.approx(0.5, abs=0.01)
    assert share_seen(torch.arange(3), seen) == 0
