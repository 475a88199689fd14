"""Benchmarks one training step of a whole language model with adapters on every linear layer."""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from qlora.bench.measure import Contender
from qlora.bench.works import Case, Work
from qlora.models.prepare import prepare_model
from qlora.nn.replacing import head_names, shared_names

# SmolLM2-135M with random weights, which does not affect the time.
SMOLLM2: dict[str, int] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def _with_peft(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))


def _with_bitsandbytes(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Replaces every linear layer except the head by bitsandbytes' NF4 layer with double quantization."""
    import bitsandbytes as bnb

    left_alone = head_names(model) | shared_names(model)
    for name, module in list(model.named_modules()):
        for leaf, child in list(module.named_children()):
            if type(child) is not nn.Linear or (f"{name}.{leaf}" if name else leaf) in left_alone:
                continue
            layer = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=child.bias is not None, compute_dtype=dtype,
                compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
            layer.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
            setattr(module, leaf, layer.to(device))
    return model


def _step(model: nn.Module, ids: torch.Tensor) -> Contender:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run(_: int) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def step_case(config: dict, tokens: int, rank: int, dtype: torch.dtype, device: torch.device) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dense: nn.Module = LlamaForCausalLM(LlamaConfig.from_dict(config))
    dense = dense.to(device=device, dtype=dtype)
    ids = torch.randint(0, config["vocab_size"], (1, tokens), device=device)
    ours = copy.deepcopy(dense)
    report = prepare_model(ours, rank=rank)
    flops = 4.0 * tokens * sum(p.numel() for p in dense.parameters())  # frozen weights: forward and dx
    flops += 6.0 * tokens * report.trainable_params
    prepare: dict[str, Callable[[], Contender]] = {
        "qlora": lambda: _step(ours, ids),
        "torch": lambda: _step(_with_peft(copy.deepcopy(dense), rank), ids),
        "bitsandbytes": lambda: _step(_with_peft(_with_bitsandbytes(copy.deepcopy(dense), dtype, device), rank), ids),
    }
    return Case(flops, 3.0 * report.bytes_after, prepare)


def step_work(tokens: int, rank: int, dtype: torch.dtype, device: torch.device, peers: Sequence[str]) -> Work:
    """A training step over ``tokens`` tokens: forward, backward, AdamW."""
    width, inner, heads = (SMOLLM2[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    of_attention = 2 * width * width * (1 + SMOLLM2["num_key_value_heads"] / heads)
    weights = SMOLLM2["num_hidden_layers"] * (of_attention + 3 * width * inner) + SMOLLM2["vocab_size"] * width
    extents = {"m": tokens, "n": 0, "k": 0, "r": rank}
    build = functools.partial(step_case, SMOLLM2, tokens, rank, dtype, device)
    return Work("step", extents, ("qlora", *peers), 4.0 * tokens * weights, build, graphs=False)
