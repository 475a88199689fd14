"""The chunked loss: same value and gradients as the model's own loss; not used for models where it would differ."""

import pytest
import torch
import transformers

from qlora.models import chunked_loss as chunked_loss_module
from qlora.models.chunked_loss import ChunkedLoss, backbone_of, chunked_loss, learnt_positions, why_not_chunked

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
# Models with softcapping, scales, a transform before the head, a bias, or another order of tensors.
MODELS = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 0.7},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.5},
    "ModernBertDecoder": {},
    "GPTNeoX": {},
}


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    with torch.no_grad():  # makes logits large enough that a cap or a scale matters
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch(width=11):
    ids = torch.randint(1, 97, (3, width), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = labels[2, 5:] = -100
    return ids, labels


def freeze_head(model):
    """Leaves only what is below the head to train."""
    inside = {id(p) for p in backbone_of(model).parameters()} - {
        id(p) for p in model.get_input_embeddings().parameters()
    }
    for p in model.parameters():
        p.requires_grad_(id(p) in inside)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 7, 256])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name, chunk, frozen):
    """In float64, where another order of sums changes only the last digits."""
    ids, labels = batch()
    results = []
    for in_chunks in (False, True):
        model = build(name, torch.float64)
        if frozen:
            freeze_head(model)
        if in_chunks:
            positions = learnt_positions(labels)
            loss = chunked_loss(model, labels, positions, len(positions), chunk, input_ids=ids)
        else:
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        (3 * loss).backward()
        results.append((loss.double(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (own, own_gradients), (ours, gradients) = results
    # Both losses round the logits to float32 before the cross entropy.
    torch.testing.assert_close(ours, own, rtol=1e-6, atol=0)
    assert gradients.keys() == own_gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, own_gradients[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("trains", "calls"), [("head", 2), ("embeddings", 2), ("backbone", 1), ("float16", 2)])
def test_a_frozen_head_runs_once_for_each_chunk(trains, calls):
    """Again in the backward only if something other than its input needs a gradient, or float16 needs a scaled loss."""
    model = build("Llama", torch.float16 if trains == "float16" else torch.float32)
    freeze_head(model)
    if trains == "head":
        model.lm_head.weight.requires_grad_(True)
    if trains == "embeddings":
        model.get_input_embeddings().weight.requires_grad_(True)
    ids, labels = batch()
    positions = learnt_positions(labels)
    count = []
    model.lm_head.register_forward_hook(lambda *args: count.append(1))
    chunked_loss(model, labels, positions, len(positions), 5, input_ids=ids).backward()
    assert len(count) == calls * -(-len(positions) // 5)
    with torch.no_grad():
        chunked_loss(model, labels, positions, len(positions), 5, input_ids=ids)
    assert len(count) == (calls + 1) * -(-len(positions) // 5)


@pytest.mark.parametrize("name", MODELS)
def test_the_probe_lets_these_models_pass(name):
    assert why_not_chunked(build(name)) is None
    assert why_not_chunked(build(name, torch.bfloat16)) is None


class Scaled(transformers.LlamaForCausalLM):
    """A model whose own loss is not the cross entropy of its logits."""

    def forward(self, *args, labels=None, **kwargs):
        result = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            result.loss = 1.1 * result.loss
        return result


def test_the_probe_finds_a_loss_that_is_more_than_cross_entropy():
    torch.manual_seed(0)
    assert "but computed in chunks" in why_not_chunked(Scaled(transformers.LlamaConfig(**SIZES)))


def test_a_model_without_a_backbone_is_found():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    assert "no backbone" in why_not_chunked(transformers.T5ForConditionalGeneration(config))


def test_the_probe_asks_for_the_embeddings():
    model = build("Llama")
    model.get_input_embeddings = lambda: (_ for _ in ()).throw(NotImplementedError("no embeddings here"))
    assert "no embeddings here" in why_not_chunked(model)


@pytest.mark.parametrize("float16_is", ["the head's", "autocast's"])
def test_gradients_in_float16_keep_the_scale_of_the_loss(float16_is):
    """A gradient that is computed before the loss is scaled has zeros where float16 is too coarse."""
    model = build("Llama")
    freeze_head(model)
    hidden = torch.randn(4, 32)
    assert chunked_loss_module._is_frozen(model, hidden)
    if float16_is == "the head's":
        model.lm_head.half()
        assert not chunked_loss_module._is_frozen(model, hidden)
    else:
        with torch.autocast("cpu", torch.float16):
            assert not chunked_loss_module._is_frozen(model, hidden)


def test_installed_and_removed():
    model, (ids, labels) = build("Llama"), batch()
    wanted = model(input_ids=ids, labels=labels)
    loss = ChunkedLoss(model)
    loss.install()
    positions = learnt_positions(labels)
    ours = model(input_ids=ids, labels=labels, loss_positions=positions)["loss"]
    torch.testing.assert_close(ours, wanted.loss, rtol=1e-5, atol=0)
    double = model(input_ids=ids, labels=labels, loss_positions=positions, num_items_in_batch=2 * len(positions))
    torch.testing.assert_close(double["loss"], wanted.loss / 2, rtol=1e-5, atol=0)
    assert torch.equal(model(input_ids=ids).logits, wanted.logits)
    loss.remove()
    assert "forward" not in vars(model)


def test_no_tensor_of_all_logits_exists():
    """The largest tensor that an operator creates in forward and backward is a chunk of the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            largest = max([largest, *sizes])
            return result

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "vocab_size": 5000}))
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    ids = torch.randint(1, 5000, (1, 64))
    with Watch():
        chunked_loss(model, ids, learnt_positions(ids), 63, 4, input_ids=ids).backward()
    assert largest <= max(4 * 5000, 5000 * 32)  # a chunk, or the head's transposed weight
    assert largest < 64 * 5000


def test_positions():
    labels = torch.tensor([[1, -100, 3], [-100, 5, 6]])
    assert learnt_positions(labels).tolist() == [2, 4, 5]
    assert learnt_positions(torch.full((2, 3), -100)).tolist() == []
