"""PEFT on qlora's 4-bit layers: same results as PEFT on the dequantized model, fused operations, PEFT's files."""

import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import TOKENS, save_dense
from transformers import AutoModelForCausalLM, LlamaConfig

import qlora
from qlora.integrations import peft as ours
from qlora.nn import Embedding4bit, Linear4bit, share_inputs, shared_input

BATCH = torch.randint(3, 100, (4, 7), generator=torch.Generator().manual_seed(1))
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums of at most 128 products in another order, two layers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_dense("llama", tmp_path_factory.mktemp("peft"))


def quantized(checkpoint, **options):
    options.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=qlora.QLoRAConfig(), **options)


def dequantized(checkpoint):
    """The dense model with the same weights; plain PEFT on it is the reference."""
    return quantized(checkpoint).dequantize()


def randomize(model, seed=0):
    """Gives adapters nonzero values, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and "magnitude" not in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
    return model


def pair(checkpoint, seed=0, **options):
    """A PeftModel with fused layers and a plain one on the dense model, with the same adapters."""
    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8} | options
    fused = randomize(get_peft_model(quantized(checkpoint), LoraConfig(**options)), seed)
    plain = randomize(get_peft_model(dequantized(checkpoint), LoraConfig(**options)), seed)
    assert ours.lora_layers(fused)
    assert not ours.lora_layers(plain)
    return fused, plain


def adapter_gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(fused, plain, **inputs):
    inputs = {"input_ids": BATCH, "labels": BATCH} | inputs
    losses = []
    for model in (fused, plain):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, **TOLERANCE)
    theirs = adapter_gradients(plain)
    mine = adapter_gradients(fused)
    assert mine.keys() == theirs.keys()
    assert mine
    for name, grad in mine.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-3 * theirs[name].abs().max().item())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"r": 5, "target_modules": ["q_proj", "down_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=str,
)
def test_a_training_step_equals_plain_peft(checkpoint, options):
    fused, plain = pair(checkpoint, **options)
    assert_same_step(fused, plain)


def test_the_forward_is_one_operation(checkpoint):
    """Runs only qlora::forward, attention and the head: no dense weight and no separate matmul for the adapters."""
    fused, _ = pair(checkpoint)
    with torch.no_grad(), torch.profiler.profile() as profile:
        fused(input_ids=TOKENS)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["qlora::forward"] == 2 * 7
    assert calls.get("aten::linear", 0) == 1  # the head
    assert "qlora::dequantize" not in calls


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_is_on_the_adapters_input(checkpoint, use_dora):
    fused, plain = pair(checkpoint, lora_dropout=0.5, use_dora=use_dora)
    for model in (fused, plain):
        model.train()
    torch.manual_seed(3)
    expected = plain(input_ids=BATCH).logits
    torch.manual_seed(3)
    torch.testing.assert_close(fused(input_ids=BATCH).logits, expected, **TOLERANCE)
    for model in (fused, plain):
        model.eval()
    torch.testing.assert_close(fused(input_ids=BATCH).logits, plain(input_ids=BATCH).logits, **TOLERANCE)


def test_a_bfloat16_base_with_float32_adapters(checkpoint):
    model = quantized(checkpoint, dtype=torch.bfloat16)
    fused = randomize(get_peft_model(model, LoraConfig(target_modules="all-linear", r=4)))
    assert {p.dtype for p in fused.parameters() if p.requires_grad} == {torch.float32}
    fused(input_ids=BATCH, labels=BATCH).loss.backward()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in adapter_gradients(fused).values())


def test_dora_computes_in_the_compute_dtype(checkpoint):
    """An initial DoRA adapter computes the same as plain LoRA, in the dtype of the config."""
    config = qlora.QLoRAConfig(compute_dtype="bfloat16")

    def logits(use_dora):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=torch.float32)
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=4, use_dora=use_dora))(TOKENS).logits

    with_dora, plain = logits(True), logits(False)
    # result + scale * fused - plain: three roundings of bfloat16 numbers instead of one.
    torch.testing.assert_close(with_dora, plain, rtol=0.02, atol=0.02)


def test_dora_after_the_base_was_replaced(checkpoint):
    fused, plain = pair(checkpoint, use_dora=True)
    fused(input_ids=BATCH)  # caches the norms of the first base
    layers = ours.lora_layers(fused)
    for name, layer in layers.items():
        other = qlora.quantize(layer.quantized.dequantize(torch.float32).flip(1))
        state = layer.state_dict()
        state.update({"base_layer.weight": other.packed.view_as(layer.quantized.weight)})
        state.update({f"base_layer.{key}": getattr(other, key) for key in ("absmax", "nested_absmax", "nested_offset")})
        layer.load_state_dict(state)
        plain.get_submodule(name).base_layer.weight.data = other.dequantize()
    torch.testing.assert_close(fused(input_ids=BATCH).logits, plain(input_ids=BATCH).logits, **TOLERANCE)


class TestSeveralAdapters:
    @pytest.fixture
    def models(self, checkpoint):
        fused, plain = pair(checkpoint)
        for model in (fused, plain):
            model.add_adapter("wide", LoraConfig(target_modules="all-linear", r=8, lora_alpha=4))
            model.add_adapter("some", LoraConfig(target_modules=["q_proj"], r=2))
            randomize(model, 5)
        return fused.eval(), plain.eval()

    def test_one_after_another(self, models):
        fused, plain = models
        for name in ("default", "wide", "some"):
            fused.set_adapter(name)
            plain.set_adapter(name)
            torch.testing.assert_close(fused(input_ids=BATCH).logits, plain(input_ids=BATCH).logits, **TOLERANCE)

    def test_together(self, models):
        fused, plain = models
        for model in models:
            model.base_model.set_adapter(["default", "wide", "some"])
        assert_same_step(fused, plain)

    NAMES = ["wide", "__base__", "some", "default"]

    def test_mixed_in_a_batch(self, models):
        fused, plain = models
        mine = fused(input_ids=BATCH, adapter_names=self.NAMES).logits
        torch.testing.assert_close(mine, plain(input_ids=BATCH, adapter_names=self.NAMES).logits, **TOLERANCE)
        with torch.no_grad(), torch.profiler.profile() as profile:
            fused(input_ids=BATCH, adapter_names=self.NAMES)
        # Layers without any of the batch's adapters run only their base; all others, such as q_proj, forward.multi.
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls["qlora::forward"] == 2 * 7

    def test_mixed_in_training(self, models):
        fused, plain = models
        fused.train()
        with ours.mixed_adapters(fused, self.NAMES):
            loss = fused(input_ids=BATCH, labels=BATCH).loss
            loss.backward()
        # PEFT refuses that in training; its eval path has the same gradients without dropout.
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
        fused.zero_grad()
        with ours.mixed_adapters(fused, self.NAMES):
            fused(input_ids=BATCH, labels=BATCH).loss.backward()
        plain(input_ids=BATCH, labels=BATCH, adapter_names=self.NAMES).loss.backward()
        mine, theirs = adapter_gradients(fused), adapter_gradients(plain)
        assert mine.keys() == theirs.keys()
        for name, grad in mine.items():
            torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-3 * theirs[name].abs().max().item())
        # Leaves nothing behind.
        assert torch.equal(fused.eval()(input_ids=BATCH).logits, fused(input_ids=BATCH).logits)

    def test_unknown_names(self, models):
        fused, _ = models
        with pytest.raises(ValueError, match="no layer has the adapters"), ours.mixed_adapters(fused, ["gone"] * 4):
            pass

    def test_disable_and_delete(self, models):
        fused, plain = models
        with fused.disable_adapter(), plain.disable_adapter():
            torch.testing.assert_close(fused(input_ids=BATCH).logits, plain(input_ids=BATCH).logits, **TOLERANCE)
        for model in models:
            model.delete_adapter("wide")
        torch.testing.assert_close(fused(input_ids=BATCH).logits, plain(input_ids=BATCH).logits, **TOLERANCE)


@pytest.mark.parametrize("use_dora", [False, True])
def test_files_are_plain_pefts(checkpoint, tmp_path, use_dora):
    fused, plain = pair(checkpoint, use_dora=use_dora)
    fused.eval().save_pretrained(tmp_path / "ours")
    plain.eval().save_pretrained(tmp_path / "plain")
    mine = peft.utils.load_peft_weights(tmp_path / "ours")
    theirs = peft.utils.load_peft_weights(tmp_path / "plain")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) or "magnitude" in name for name, tensor in mine.items())
    # Works in both directions, and loaded adapters are fused automatically.
    loaded = PeftModel.from_pretrained(quantized(checkpoint), tmp_path / "plain")
    assert len(ours.lora_layers(loaded)) == 2 * 7
    torch.testing.assert_close(loaded(input_ids=BATCH).logits, plain(input_ids=BATCH).logits, **TOLERANCE)
    elsewhere = PeftModel.from_pretrained(dequantized(checkpoint), tmp_path / "ours")
    torch.testing.assert_close(elsewhere(input_ids=BATCH).logits, fused(input_ids=BATCH).logits, **TOLERANCE)


def test_load_adapter_without_peft(checkpoint, tmp_path):
    """Loads PEFT's file into a model that was loaded in 4 bit; layers with adapters in the file become QLoRALinear."""
    fused, _ = pair(checkpoint, target_modules=["q_proj", "down_proj"])
    fused.eval().save_pretrained(tmp_path)
    model = quantized(checkpoint)
    qlora.load_adapter(model, tmp_path, name="mine")
    assert len([m for m in model.modules() if isinstance(m, qlora.nn.QLoRALinear)]) == 2 * 2
    torch.testing.assert_close(model(input_ids=BATCH).logits, fused(input_ids=BATCH).logits, **TOLERANCE)
    qlora.save_adapter(model, tmp_path / "again", name="mine")
    loaded = PeftModel.from_pretrained(quantized(checkpoint), tmp_path / "again")
    torch.testing.assert_close(loaded(input_ids=BATCH).logits, fused(input_ids=BATCH).logits, **TOLERANCE)
    with pytest.raises(ValueError, match="belongs to another model"):
        qlora.load_adapter(torch.nn.Sequential(Linear4bit(64, 64)), tmp_path)


def test_peft_is_fused_whichever_is_imported_first(checkpoint, tmp_path):
    code = """
import sys
{imports}
from transformers import AutoModelForCausalLM, LlamaConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=qlora.QLoRAConfig())
model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
print(type(model.base_model.model.model.layers[0].mlp.up_proj).__name__)
"""
    for imports in ("import qlora, peft", "import peft, qlora"):
        arguments = [sys.executable, "-c", code.format(imports=imports), str(checkpoint)]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert result.stdout.strip() == "LoraLinear4bit", result.stderr


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_merge_and_unmerge(checkpoint, options):
    # lora_bias needs a base bias, which Llama's attention has here.
    options = options | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    fused, plain = pair(checkpoint, **options)
    fused.eval()
    before = fused(input_ids=BATCH).logits
    state = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    fused.merge_adapter(safe_merge=True)
    assert all(layer.merged for layer in ours.lora_layers(fused).values())
    torch.testing.assert_close(fused(input_ids=BATCH).logits, before, rtol=1e-3, atol=1e-4)
    fused.unmerge_adapter()
    assert torch.equal(fused(input_ids=BATCH).logits, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in fused.state_dict().items())


def test_a_merge_into_4_bit_that_takes_the_adapter_back_warns(checkpoint, recwarn):
    def small(scale):
        fused, _ = pair(checkpoint)
        for name, parameter in fused.named_parameters():
            if "lora_B" in name:
                parameter.data *= scale
        return fused

    assert qlora.merge_and_unload(small(0.01)).adapter_kept == pytest.approx(1, abs=0.05)
    assert not [warning for warning in recwarn if "adapter changes" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"merged into 4 bit, the weights keep \d+% of what the adapter changes"):
        merged = qlora.merge_and_unload(small(0.01), requantize=True)
    assert merged.adapter_kept < 0.9


def test_merge_and_unload_to_16_bit_and_to_4_bit(checkpoint, tmp_path):
    fused, _ = pair(checkpoint)
    expected = fused.eval()(input_ids=BATCH).logits
    dense, reports = qlora.merge_and_unload(fused, dtype=torch.bfloat16)
    assert not [m for m in dense.modules() if isinstance(m, Linear4bit)]
    assert len(reports) == 2 * 7
    assert all(report.format == "bfloat16" and 0 < report.relative_error < 2.0**-8 for report in reports.values())
    dense.float().save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(input_ids=BATCH).logits, expected, rtol=0.05, atol=0.05)

    assert all(report.adapter_kept == pytest.approx(1, abs=0.02) for report in reports.values())

    errors = {}
    for search in (False, True):
        fused, _ = pair(checkpoint)
        model, reports = qlora.merge_and_unload(fused, requantize=True, search_scales=search)
        assert len([m for m in model.modules() if isinstance(m, Linear4bit)]) == 2 * 7
        errors[search] = {name: report.relative_error for name, report in reports.items()}
        model.save_pretrained(tmp_path / f"search-{search}")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"search-{search}")
        assert torch.equal(again(input_ids=BATCH).logits, model(input_ids=BATCH).logits)
    assert all(errors[True][name] <= error for name, error in errors[False].items())
    # On Gaussian weights the search reduces the error by 6 to 7 %.
    assert sum(errors[True].values()) < 0.98 * sum(errors[False].values())
    with pytest.raises(ValueError, match="search_scales"):
        qlora.merge_and_unload(fused, search_scales=True)


class TestInitializations:
    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
    def test_base_and_adapter_together_are_the_weight(self, checkpoint, init):
        model = quantized(checkpoint)
        weights = {name: m.dequantize(torch.float32) for name, m in model.named_modules() if isinstance(m, Linear4bit)}
        config = LoraConfig(target_modules="all-linear", r=8, lora_alpha=16, init_lora_weights=init)
        fused = get_peft_model(model, config)
        for name, layer in ours.lora_layers(fused).items():
            weight = weights[name.removeprefix("base_model.model.")]
            left = layer.exact_weight(["default"]) - weight
            # What remains is the quantization error of weight - adapter: at most half of NF4's widest gap (0.30) times
            # the scale, plus the error of the scale's code (1/127 of a range below it).
            scale = (weight - layer.get_delta_weight("default")).abs().max()
            assert left.abs().max() <= 0.17 * scale
            assert layer.lora_B["default"].weight.abs().max() > 0
            assert layer.lora_A["default"].weight.dtype == torch.float32
        if init == "pissa":  # the adapter contains the principal part
            name, layer = next(iter(ours.lora_layers(fused).items()))
            weight = weights[name.removeprefix("base_model.model.")]
            expected = torch.linalg.svdvals(weight)[:8].square().sum().sqrt()
            torch.testing.assert_close(layer.get_delta_weight("default").norm(), expected, rtol=1e-4, atol=0)

    def test_orthogonal_changes_nothing_yet(self, checkpoint):
        model = quantized(checkpoint)
        before = model(TOKENS).logits
        config = LoraConfig(target_modules="all-linear", r=8, init_lora_weights="orthogonal")
        torch.testing.assert_close(get_peft_model(model, config)(TOKENS).logits, before, rtol=1e-3, atol=1e-3)

    def test_loftq_lowers_the_error_of_quantization(self, checkpoint):
        fused = get_peft_model(quantized(checkpoint), LoraConfig(target_modules="all-linear", r=16, lora_alpha=32))
        once = ours.initialize_loftq(fused, checkpoint)
        assert len(once) == 2 * 7
        assert all(ratio < 0.95 for ratio in once.values()), once
        more = ours.initialize_loftq(fused, checkpoint, iterations=5)
        assert sum(more.values()) < sum(once.values())
        layer = next(iter(ours.lora_layers(fused).values()))
        assert layer.lora_B["default"].weight.abs().max() > 0
        with pytest.raises(ValueError, match="initialize_loftq"):
            layer.loftq_init("default", None)  # what LoraConfig(init_lora_weights="loftq") calls, if scipy is installed
        with pytest.raises(KeyError, match="lack"):
            ours.initialize_loftq(fused, {"other": torch.zeros(1)})

    def test_eva(self, checkpoint):
        from peft import EvaConfig, initialize_lora_eva_weights

        config = LoraConfig(
            target_modules="all-linear",
            r=4,
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=1.0),
            task_type="CAUSAL_LM",
        )
        fused = get_peft_model(quantized(checkpoint), config, low_cpu_mem_usage=True)
        batches = [{"input_ids": BATCH, "attention_mask": torch.ones_like(BATCH)} for _ in range(2)]
        initialize_lora_eva_weights(fused, batches)
        layers = ours.lora_layers(fused)
        assert len(layers) == 2 * 7
        for layer in layers.values():
            a = layer.lora_A["default"].weight
            torch.testing.assert_close(a @ a.t(), torch.eye(len(a)), rtol=0, atol=1e-4)
        fused(input_ids=BATCH, labels=BATCH).loss.backward()


def test_the_base_of_another_model_is_refused(checkpoint, tmp_path):
    fused, _ = pair(checkpoint)
    fused.save_pretrained(tmp_path / "adapter")
    other = AutoModelForCausalLM.from_config(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    )
    qlora.prepare_model(other, rank=None)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")


class TestEmbedding4bit:
    def test_equals_the_dequantized_table(self):
        torch.manual_seed(0)
        for double_quant in (True, False):
            table = torch.nn.Embedding(500, 128, padding_idx=0)
            layer = Embedding4bit.from_embedding(table, double_quant=double_quant)
            ids = torch.randint(0, 500, (3, 9))
            assert torch.equal(layer(ids), layer.dequantize()[ids])
            moved = layer.to(torch.bfloat16)
            assert torch.equal(moved(ids), layer.dequantize()[ids])
        with pytest.raises(ValueError, match="must be a multiple of block_size=64"):
            Embedding4bit.from_embedding(torch.nn.Embedding(10, 48))
        with pytest.raises(ValueError, match="max_norm"):
            Embedding4bit.from_embedding(torch.nn.Embedding(10, 64, max_norm=1.0))

    def test_lora_on_it(self, checkpoint):
        model, reference = dequantized(checkpoint), dequantized(checkpoint)
        layer = Embedding4bit.from_embedding(model.model.embed_tokens)
        model.model.embed_tokens = layer
        reference.model.embed_tokens.weight.data = layer.dequantize()
        config = {"target_modules": ["embed_tokens"], "r": 4}
        fused = randomize(get_peft_model(model, LoraConfig(**config)))
        plain = randomize(get_peft_model(reference, LoraConfig(**config)))
        assert isinstance(fused.base_model.model.model.embed_tokens, ours.LoraEmbedding4bit)
        assert_same_step(fused, plain)
        before = fused.eval()(input_ids=BATCH).logits
        fused.merge_adapter()
        torch.testing.assert_close(fused(input_ids=BATCH).logits, before, **TOLERANCE)
        fused.unmerge_adapter()
        assert torch.equal(fused(input_ids=BATCH).logits, before)


def test_offloaded_activations_and_checkpointing(checkpoint):
    """torch's offloading and transformers' checkpointing work with these layers and do not change results."""
    fused, plain = pair(checkpoint)
    fused.train()
    plain.train()
    assert_same_step(fused, plain)
    expected = {name: grad.clone() for name, grad in adapter_gradients(fused).items()}
    with torch.autograd.graph.save_on_cpu():
        assert_same_step(fused, plain)
    fused.enable_input_require_grads()
    fused.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(fused, plain)
    for name, grad in adapter_gradients(fused).items():
        assert torch.equal(grad, expected[name])


class TestSharedInput:
    """q, k and v of the two layers, and gate and up, are computed together where each is one fused operation."""

    @pytest.fixture
    def together(self, monkeypatch):
        groups = []
        compute = shared_input._compute
        monkeypatch.setattr(shared_input, "_compute", lambda products, x: groups.append(x) or compute(products, x))
        return groups

    def fused(self, checkpoint, **options):
        options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8} | options
        return randomize(get_peft_model(quantized(checkpoint), LoraConfig(**options)))

    def compare(self, model, count, together, **inputs):
        """A step with groups, ``count`` of them, and one without."""
        inputs = {"input_ids": BATCH, "labels": BATCH} | inputs
        outcomes = []
        for enabled in (True, False):
            share_inputs(model, enabled)
            torch.manual_seed(3)
            model.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            outcomes.append((loss.detach(), adapter_gradients(model)))
        assert len(together) == count
        assert torch.equal(outcomes[0][0], outcomes[1][0])
        mine, theirs = outcomes[0][1], outcomes[1][1]
        assert mine.keys() == theirs.keys()
        for name, grad in mine.items():  # float32 sums of at most 320 products in another order, through two layers
            torch.testing.assert_close(grad, theirs[name], rtol=0, atol=1e-5 * theirs[name].abs().max().item())

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"target_modules": ["q_proj", "v_proj"]},  # k_proj, gate_proj and up_proj are layers without adapters
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
            {"lora_dropout": 0.0},
        ],
    )
    def test_a_training_step(self, checkpoint, together, options):
        self.compare(self.fused(checkpoint, **options), 4, together)

    def test_checkpointing_runs_groups_twice(self, checkpoint, together):
        model = self.fused(checkpoint)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        self.compare(model.train(), 8, together)

    @pytest.mark.parametrize("options", [{"lora_dropout": 0.2}, {"use_dora": True}])
    def test_layers_that_do_more_in_training(self, checkpoint, together, options):
        self.compare(self.fused(checkpoint, **options).train(), 0, together)

    def test_dropout_in_evaluation(self, checkpoint, together):
        self.compare(self.fused(checkpoint, lora_dropout=0.2).eval(), 4, together)

    def test_states_of_adapters(self, checkpoint, together):
        model = self.fused(checkpoint).eval()
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        randomize(model, 2)
        tokens = {"input_ids": BATCH}
        with torch.no_grad():
            outputs = []
            for enabled in (True, False):
                share_inputs(model, enabled)
                model.set_adapter("default")
                mine = [model(**tokens).logits]
                model.set_adapter("other")
                mine.append(model(**tokens).logits)
                if enabled:
                    assert len(together) == 8
                model.base_model.set_adapter(["default", "other"])
                mine.append(model(**tokens).logits)
                with model.disable_adapter():
                    mine.append(model(**tokens).logits)
                names = ["default", "other", "__base__", "default"]
                mine.append(model(**tokens, adapter_names=names).logits)
                model.set_adapter("default")
                model.merge_adapter()
                mine.append(model(**tokens).logits)
                model.unmerge_adapter()
                outputs.append(mine)
        assert len(together) == 8 + 2  # gate_proj and up_proj, which only q_proj's adapter leaves with one
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True))

    def test_groups_of_a_loaded_model_stay_when_it_gets_adapters(self, checkpoint, together):
        model = quantized(checkpoint)
        assert share_inputs(model) == 4
        model = randomize(get_peft_model(model, LoraConfig(target_modules="all-linear", r=4)))
        with torch.no_grad():
            model(input_ids=BATCH)
        assert len(together) == 4
        assert share_inputs(model) == share_inputs(model, enabled=False) == 4
        with torch.no_grad():
            model(input_ids=BATCH)
        assert len(together) == 4


class TestPrepareModel:
    """prepare_model replaces prepare_model_for_kbit_training, without its casts."""

    def test_before_get_peft_model(self, checkpoint):
        model = quantized(checkpoint, dtype=torch.bfloat16)
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        report = qlora.prepare_model(model, rank=None, gradient_checkpointing=True)
        assert len(report.quantized) == 2 * 7
        assert report.trainable_params == 0
        assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
        assert model.is_gradient_checkpointing
        fused = randomize(get_peft_model(model, LoraConfig(target_modules="all-linear", r=4)))
        fused.train()
        fused(input_ids=BATCH, labels=BATCH).loss.backward()
        missing = [name for name, p in fused.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, "a checkpointed block whose input requires no grad has no gradients"

    def test_with_adapters_of_ours(self, checkpoint):
        model = quantized(checkpoint)
        before = model(TOKENS).logits
        report = qlora.prepare_model(model, rank=4, target_modules=["q_proj", "v_proj"])
        assert torch.equal(model(TOKENS).logits, before)
        assert report.trainable_params == 2 * 4 * ((64 + 64) + (64 + 32))
        assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)
        assert type(model.lm_head) is torch.nn.Linear
        with pytest.raises(ValueError, match="skipped"):
            qlora.prepare_model(model, rank=4, skip_modules=["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


class TestExperts:
    """LoRA on 3-D experts: PEFT's target_parameters."""

    CONFIG = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"], "r": 3}

    @pytest.fixture(params=["mixtral", "gpt_oss"])
    def models(self, request, tmp_path):
        folder = save_dense(request.param, tmp_path)
        fused = randomize(get_peft_model(quantized(folder), LoraConfig(**self.CONFIG)))
        plain = randomize(get_peft_model(dequantized(folder), LoraConfig(**self.CONFIG)))
        return fused, plain

    def test_a_training_step_equals_plain_peft(self, models):
        fused, plain = models
        wrapped = [m for m in fused.modules() if isinstance(m, ours.LoraExperts4bit)]
        assert len(wrapped) == 2 * 2
        assert_same_step(fused, plain)
        assert all(not m.get_base_layer().low_rank for m in wrapped), "an adapter is left behind"

    def test_files_and_several_adapters(self, models, tmp_path):
        fused, plain = models
        plain.save_pretrained(tmp_path / "plain")
        state = peft.utils.load_peft_weights(tmp_path / "plain")
        assert {n: t.shape for n, t in state.items()} == {
            n: t.shape for n, t in peft.get_peft_model_state_dict(fused).items()
        }
        for model in models:
            model.add_adapter("second", LoraConfig(**(self.CONFIG | {"lora_alpha": 2})))
            randomize(model, 9)
            model.base_model.set_adapter(["default", "second"])
        assert_same_step(fused, plain)
        with fused.disable_adapter(), plain.disable_adapter():
            torch.testing.assert_close(fused(input_ids=BATCH).logits, plain(input_ids=BATCH).logits, **TOLERANCE)

    def test_merging(self, models):
        fused, _ = models
        expected = fused.eval()(input_ids=BATCH).logits
        with pytest.raises(ValueError, match="merge_and_unload"):
            fused.merge_adapter()
        fused.unmerge_adapter()
        dense, _ = qlora.merge_and_unload(fused)
        assert not [m for m in dense.modules() if "4bit" in type(m).__name__]
        torch.testing.assert_close(dense(input_ids=BATCH).logits, expected, rtol=1e-3, atol=1e-4)

    def test_merging_back_into_4_bit(self, models):
        fused, _ = models
        expected = fused.eval()(input_ids=BATCH).logits
        merged, _ = qlora.merge_and_unload(fused, requantize=True)
        assert [m for m in merged.modules() if type(m).__name__ == "Experts4bit"]
        # A coarse bound for requantized random weights, given by the format.
        assert (merged(input_ids=BATCH).logits - expected).norm() < 0.5 * expected.norm()

    def test_parameters_of_linear_layers_are_named(self, checkpoint):
        with pytest.raises(ValueError, match="target_modules instead"):
            get_peft_model(quantized(checkpoint), LoraConfig(target_parameters=["q_proj.weight"], target_modules=[]))
