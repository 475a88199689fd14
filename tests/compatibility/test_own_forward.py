"""Layers that compute more than their base class: embeddings that scale, subclasses of nn.Linear, hooks."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.utils.prune
from compatibility.refusals import result_or_refusal
from tiny_models import difference, llama, logits
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import qlora


def test_4bit_embedding_keeps_the_scale_of_a_scaled_embedding():
    """Expects the scaled rows, within the 4-bit error, or an error that names the class, its scale or its forward."""
    torch.manual_seed(0)
    dense = Gemma3TextScaledWordEmbedding(50, 64, 0, embed_scale=8.0)
    packed = result_or_refusal(lambda: qlora.nn.Embedding4bit.from_embedding(dense), "Gemma3", "scale", "forward")
    if packed is not None:
        ids = torch.arange(1, 9)
        assert difference(packed(ids), dense(ids)) < 0.2


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-0.05, 0.05)


def test_prepare_model_keeps_what_a_subclass_of_linear_computes():
    """Expects the same function, within the 4-bit error, or a ValueError that names the layer or its class.

    The layer may stay as it is and be listed in ``skipped``, or get an adapter around its own forward.
    """
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(plain=nn.Linear(64, 64), clipped=Clipped(64, 64)))
    x = torch.randn(4, 64)
    wanted = model(x)
    if result_or_refusal(lambda: qlora.prepare_model(model, rank=4), "clipped") is not None:
        assert difference(model(x), wanted) < 0.35
        assert model(x).abs().max() <= 0.05


def test_prepare_model_keeps_forward_hooks_of_the_layers_that_it_replaces():
    """Expects the hook to run once per forward, or a ValueError that names the layer or its hooks."""
    model, calls = llama(), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *arguments: calls.append(arguments[0]))
    if result_or_refusal(lambda: qlora.prepare_model(model, rank=4), "hook", "up_proj") is not None:
        logits(model)
        assert len(calls) == 1


def with_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, arguments: None)
    return layer


def with_backward_hook(layer):
    layer.register_full_backward_hook(lambda *arguments: None)
    return layer


def with_forward_of_its_own(layer):
    layer.forward = lambda x: x
    return layer


CHANGES = {
    "pre-hook": with_pre_hook,
    "backward hook": with_backward_hook,
    "instance": with_forward_of_its_own,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "old weight norm": nn.utils.weight_norm,
    "pruning": lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5),
    "subclass": lambda layer: Clipped(64, 64),
}
WAYS = {
    "Linear4bit": qlora.nn.Linear4bit.from_linear,
    "QLoRALinear": lambda layer: qlora.nn.QLoRALinear(layer, 4),
    "QLoRALinear, trained base": lambda layer: qlora.nn.QLoRALinear(layer, 4, freeze_base=False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_no_way_of_making_a_4bit_layer_loses_what_a_layer_does_besides(change, way):
    with pytest.raises(ValueError, match="cannot be put into 4 bit"):
        WAYS[way](CHANGES[change](nn.Linear(64, 64)))


@pytest.mark.parametrize("change", CHANGES)
def test_prepare_model_leaves_such_a_layer_and_reports_it(change):
    model = nn.Sequential(OrderedDict(plain=nn.Linear(64, 64), other=CHANGES[change](nn.Linear(64, 64))))
    report = qlora.prepare_model(model, rank=2)
    assert (report.quantized, report.skipped) == (("plain",), ("other",))
    with pytest.raises(ValueError, match="other cannot have an adapter"):
        qlora.prepare_model(
            nn.Sequential(OrderedDict(plain=nn.Linear(64, 64), other=CHANGES[change](nn.Linear(64, 64)))),
            rank=2,
            target_modules=["other"],
        )


@pytest.mark.parametrize("change", ["pre-hook", "backward hook", "instance"])
def test_embeddings_with_hooks_are_refused(change):
    with pytest.raises(ValueError, match="cannot be put into 4 bit"):
        qlora.nn.Embedding4bit.from_embedding(CHANGES[change](nn.Embedding(10, 64)))
