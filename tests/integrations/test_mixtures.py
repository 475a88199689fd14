"""Mixtures of experts through transformers and PEFT: every architecture loads, trains, saves, reloads and generates."""

import json

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import MIXTURES, TOKENS, difference, hashes, logits, reloaded, save_dense
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qlora
from qlora.integrations.transformers import mxfp4_config, quantized_layers
from qlora.models.loading import load_quantized
from qlora.nn import Experts4bit
from qlora.nn.offload import is_mapped

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def load(folder, **options):
    return reloaded(folder, quantization_config=qlora.QLoRAConfig(), **options)


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, Experts4bit)]


@pytest.mark.parametrize("name", MIXTURES)
class TestArchitectures:
    def test_experts_become_4_bit_and_are_saved(self, name, tmp_path):
        model = load(save_dense(name, tmp_path / "dense"))
        assert experts_of(model)
        left = [n for n, p in model.named_parameters() if p.ndim == 3 and p.is_floating_point()]
        assert not left
        dense = reloaded(tmp_path / "dense")
        for layer_name, layer in quantized_layers(model):
            if isinstance(layer, Experts4bit):
                for weight in layer.weight_names:
                    getattr(dense.get_submodule(layer_name), weight).data = layer.dequantize(weight)
            else:
                dense.get_submodule(layer_name).weight.data = layer.dequantize()
        # Sums of at most 128 float32 products in another order, through two layers.
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "first")
        # One tensor for all experts, as docs/concepts/format.md says, so that it is mapped, not copied, when it loads.
        saved = {n: t.shape for n, t in load_file(tmp_path / "first" / "model.safetensors").items() if t.ndim == 3}
        layers = sum(isinstance(m, Experts4bit) for m in model.modules())
        assert len(saved) == 2 * layers
        again = reloaded(tmp_path / "first")
        assert all(is_mapped(getattr(m, w)) for m in experts_of(again) for w in m.weight_names)
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / "second")
        assert hashes(tmp_path / "first") == hashes(tmp_path / "second")

    def test_adapters_of_experts_train_and_plain_peft_reads_them(self, name, tmp_path):
        base = save_dense(name, tmp_path / "dense")
        config = LoraConfig(r=4, target_modules="all-linear", target_parameters=EXPERTS)
        model = get_peft_model(load(base), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(8):
            loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        generated = model.eval().generate(input_ids=TOKENS, min_new_tokens=4, max_new_tokens=4, do_sample=False)
        assert generated.shape == (1, TOKENS.shape[1] + 4)
        model.save_pretrained(tmp_path / "adapter")
        plain = peft.PeftModel.from_pretrained(load(base).dequantize(), tmp_path / "adapter")
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-3, atol=1e-3)

    def test_one_token_is_what_it_is_in_a_sequence(self, name, tmp_path):
        """A cached token goes alone through the experts, so other kernels multiply it."""
        model = load(save_dense(name, tmp_path))
        whole = logits(model)
        cache = model(input_ids=TOKENS[:, :-1], use_cache=True).past_key_values
        last = logits(model, TOKENS[:, -1:], past_key_values=cache)
        torch.testing.assert_close(last[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


def test_a_forward_has_no_loop_over_experts(tmp_path):
    """The compiler sees one graph, with one call of the operator for each projection."""
    model = load(save_dense("qwen3_moe", tmp_path))
    experts = experts_of(model)[0]
    hidden, index, weights = torch.randn(6, 64), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    counted = []

    def backend(graph, _):
        counted.extend(node for node in graph.graph.nodes if "qlora" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend=backend)
    assert torch.equal(compiled(hidden, index, weights), experts(hidden, index, weights))
    assert len(counted) == 2
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True)
    assert difference(logits(whole), logits(model)) < 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant, tmp_path):
    folder = save_dense("mixtral", tmp_path)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(
            load(folder), LoraConfig(r=4, target_parameters=EXPERTS, target_modules=["q_proj"])
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[1][n], grad) for n, grad in gradients[0].items())


def test_dora_on_experts_is_refused(tmp_path):
    model = load(save_dense("mixtral", tmp_path))
    with pytest.raises(ValueError, match=r"gate_up_proj: DoRA .*use_dora=False"):
        get_peft_model(model, LoraConfig(target_parameters=EXPERTS, target_modules=[], use_dora=True))


def test_an_empty_batch_and_no_choices(tmp_path):
    experts = experts_of(load(save_dense("mixtral", tmp_path)))[0]
    empty = experts(torch.empty(0, 64), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert empty.shape == (0, 64)


def test_experts_of_another_process_contribute_nothing(tmp_path):
    """transformers' expert parallelism gives them the number num_experts and the weight 0."""
    experts = experts_of(load(save_dense("mixtral", tmp_path)))[0]
    hidden, index, weights = torch.randn(5, 64), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    elsewhere = torch.tensor([[True, False]]).expand_as(index)
    mine = experts(hidden, index.masked_fill(elsewhere, 4), weights.masked_fill(elsewhere, 0.0))
    torch.testing.assert_close(mine, experts(hidden, index, weights.masked_fill(elsewhere, 0.0)), rtol=1e-5, atol=1e-6)
    assert torch.count_nonzero(experts(hidden, torch.full_like(index, 4), torch.zeros_like(weights))) == 0


# ---- gpt-oss in MXFP4 ----


def save_mxfp4(folder):
    """A gpt-oss model in bfloat16, and the same with experts in MXFP4; both hold equal values."""
    dense = save_dense("gpt_oss", folder / "dense", torch.bfloat16)
    state = load_file(dense / "model.safetensors")
    packed = {}
    for name in list(state):
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, k, n = state[name].shape
        blocks = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, n, k // 32), dtype=torch.uint8)
        state[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    coded = folder / "mxfp4"
    coded.mkdir()
    rest = {name: tensor for name, tensor in state.items() if f"{name}_blocks" not in packed}
    save_file(rest | packed, coded / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (coded / "config.json").write_text(json.dumps(config))
    return dense, coded


def test_mxfp4_experts_are_quantized_while_they_load(tmp_path):
    dense, coded = save_mxfp4(tmp_path)
    expected = load(dense, dtype=torch.bfloat16)
    options = {"config": mxfp4_config(coded), "quantization_config": qlora.QLoRAConfig(checkpoint_format="mxfp4")}
    by_hand = AutoModelForCausalLM.from_pretrained(coded, dtype=torch.bfloat16, **options).eval()
    by_command, _ = load_quantized(coded, torch.bfloat16, progress=False)
    for model in (by_hand, by_command):
        assert len(experts_of(model)) == 2
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    by_hand.save_pretrained(tmp_path / "saved")
    again = reloaded(tmp_path / "saved", dtype=torch.bfloat16)
    assert again.config.quantization_config.checkpoint_format == "qlora"
    assert torch.equal(logits(again), logits(expected))


def test_mxfp4_without_its_config_is_an_error_with_a_way_out(tmp_path):
    dense, coded = save_mxfp4(tmp_path)
    with pytest.raises(ValueError, match=r'lacks 16 tensors.*checkpoint_format="mxfp4"'):
        AutoModelForCausalLM.from_pretrained(
            coded, config=mxfp4_config(coded), quantization_config=qlora.QLoRAConfig(), dtype=torch.bfloat16
        )
    with pytest.raises(ValueError, match="is not an MXFP4 checkpoint"):
        mxfp4_config(dense)
