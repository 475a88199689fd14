"""Rotary embeddings in a GGUF file: base frequency, scaling, and tables of factors."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from qlora.export.gguf_architectures import Architecture, head_dim, rope_of

_FACTORS = {"llama3": "rope_freqs.weight"}


def write_rope(writer: Any, config: Any, architecture: Architecture) -> dict[str, Tensor]:
    """Writes the keys of the rotary embedding; returns the tensors that it needs, float32 [rotary dims / 2].

    Raises ValueError for a scaling that llama.cpp does not compute as transformers does.
    """
    from gguf import RopeScalingType

    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in architecture.rope_types:
        raise ValueError(
            f"config.json: rope_type='{kind}', but for {architecture.gguf} llama.cpp computes"
            f" {', '.join(architecture.rope_types)} as transformers does. Serve this model with transformers or vLLM"
        )
    rotary = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotary)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if architecture.full_attention_every and "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(float(rope_of(config, "sliding_attention")["rope_theta"]))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        _write_yarn(writer, rope, config)
    if kind == "longrope":
        return _write_longrope(writer, rope, config, rotary)
    if kind == "llama3":
        return {_FACTORS[kind]: _factors(config, kind)}
    return {}


def _write_yarn(writer: Any, rope: dict[str, Any], config: Any) -> None:
    from gguf import RopeScalingType

    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            raise ValueError(
                f"config.json: yarn with {key}={rope[key]}, but llama.cpp computes its own attention factor. Serve this"
                " model with transformers or vLLM"
            )
    if rope.get("truncate", True) is not True:
        raise ValueError("config.json: yarn with truncate=false, but llama.cpp truncates. Serve it with transformers")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_rope_scaling_orig_ctx_len(int(original))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def _write_longrope(writer: Any, rope: dict[str, Any], config: Any, rotary: int) -> dict[str, Tensor]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](deepcopy(config), torch.device("cpu"), seq_len=1)
    writer.add_rope_scaling_orig_ctx_len(int(original))
    writer.add_rope_scaling_attn_factors(float(attention_factor))
    tensors = {
        f"rope_factors_{size}.weight": torch.tensor(rope[f"{size}_factor"], dtype=torch.float32)
        for size in ("long", "short")
    }
    for name, factors in tensors.items():
        if factors.shape != (rotary // 2,):
            raise ValueError(f"config.json: {name} has {len(factors)} factors, needs {rotary // 2}")
    return tensors


def _factors(config: Any, kind: str) -> Tensor:
    """What each frequency is divided by: those without scaling over those that transformers computes with it."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[kind](deepcopy(config), torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float64) / (2 * len(scaled))
    plain = float(rope_of(config)["rope_theta"]) ** -exponents
    return (plain / scaled.double()).float()
