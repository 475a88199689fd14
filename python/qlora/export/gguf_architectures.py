"""What llama.cpp computes for each architecture that can be exported, and what a model's config must say for it.

A row of the table states how llama.cpp's graph of the architecture differs from the transformers model: which tensors
are stored in another order, which biases it reads, which activation and attention it computes. A model whose config
asks for something else is refused. Each row is verified by running llama.cpp beside transformers (tests/export).
"""

from dataclasses import dataclass
from typing import Any

SILU, GELU = "silu", "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF files, for one ``model_type`` of transformers."""

    gguf: str  # its name in GGUF files
    activation: str = SILU
    # llama.cpp rotates neighbouring rows of a head, (0, 1), (2, 3), …; transformers rows i and i + head_dim / 2. So the
    # rows of q and k are interleaved in the file.
    interleaved_rope: bool = False
    norm_offset: float = 0.0  # transformers multiplies by offset + weight, llama.cpp by the weight in the file
    biases: tuple[str, ...] = ()  # modules whose bias llama.cpp reads
    untied_head: bool = True  # llama.cpp reads a head apart from the embedding
    rope_types: tuple[str, ...] = ("default",)
    # Every so many layers one with full attention, the others with the sliding window; 0: llama.cpp computes full
    # attention everywhere, so the context is limited to the window.
    full_attention_every: int = 0
    big_model_layers: int = 0  # models with so many layers scale attention by hidden_size / heads, others by head_dim


_LLAMA_ROPE = ("default", "linear", "yarn", "llama3")
_QKV = ("q_proj", "k_proj", "v_proj")
_ALL = (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj")

ARCHITECTURES = {
    "llama": Architecture("llama", interleaved_rope=True, biases=_ALL, rope_types=_LLAMA_ROPE),
    "mistral": Architecture("llama", interleaved_rope=True, biases=_ALL, rope_types=_LLAMA_ROPE),
    "smollm3": Architecture("smollm3", interleaved_rope=True, rope_types=("default", "linear", "yarn")),
    "qwen2": Architecture("qwen2", biases=_QKV, rope_types=("default", "linear", "yarn")),
    "qwen3": Architecture("qwen3", rope_types=("default", "linear", "yarn")),
    "phi3": Architecture("phi3", rope_types=("default", "longrope")),
    "gemma": Architecture("gemma", GELU, norm_offset=1.0, untied_head=False),
    "gemma2": Architecture(
        "gemma2", GELU, norm_offset=1.0, untied_head=False, full_attention_every=2, big_model_layers=46
    ),
    "gemma3_text": Architecture(
        "gemma3",
        GELU,
        norm_offset=1.0,
        full_attention_every=6,
        big_model_layers=62,
        rope_types=("default", "linear"),
    ),
}


def architecture_of(config: Any) -> Architecture:
    """The row for a model's config. Raises ValueError for a model that llama.cpp would not compute as transformers."""
    kind = config.model_type
    classes = list(getattr(config, "architectures", None) or [])
    if kind not in ARCHITECTURES or any(not name.endswith("ForCausalLM") for name in classes):
        raise ValueError(
            f"{', '.join(classes) or kind} (model_type '{kind}') cannot be exported to GGUF: supported are causal"
            f" language models of the types {', '.join(sorted(ARCHITECTURES))}. Write a dense folder with qlora merge"
            " and convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    architecture = ARCHITECTURES[kind]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    _require(activation == architecture.activation, "hidden_act", activation, architecture.activation)
    if kind == "smollm3":
        wanted = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
        _require(list(config.no_rope_layers) == wanted, "no_rope_layers", config.no_rope_layers, "every fourth layer")
    if kind.startswith("gemma"):
        bidirectional = getattr(config, "use_bidirectional_attention", None)
        _require(not bidirectional, "use_bidirectional_attention", bidirectional, "false")
    if kind == "gemma3_text":
        _require(config.attn_logit_softcapping is None, "attn_logit_softcapping", config.attn_logit_softcapping, "null")
        swa = rope_of(config, "sliding_attention")
        _require(swa["rope_type"] == "default", "rope type of sliding layers", swa["rope_type"], "default")
    if architecture.full_attention_every:
        _check_windows(config, architecture)
    return architecture


def _check_windows(config: Any, architecture: Architecture) -> None:
    every = architecture.full_attention_every
    kinds = [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    _require(list(config.layer_types) == kinds, "layer_types", config.layer_types, f"full in every {every}th layer")
    big = config.num_hidden_layers == architecture.big_model_layers
    scale = config.hidden_size // config.num_attention_heads if big else config.head_dim
    _require(config.query_pre_attn_scalar == scale, "query_pre_attn_scalar", config.query_pre_attn_scalar, str(scale))


def _require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(
            f"config.json: {key}={value!r}, but llama.cpp computes this architecture with {rule} only: the file would"
            " answer differently. Serve this model with transformers or vLLM"
        )


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: Any, layer_type: str = "full_attention") -> dict[str, Any]:
    """The rope parameters of the layers of a type; most models have the same for all layers."""
    parameters = config.rope_parameters
    return parameters.get(layer_type, parameters)


def context_length(config: Any, architecture: Architecture) -> tuple[int, str | None]:
    """The context that the file announces, and why it is shorter than the model's, or None."""
    length: int = config.max_position_embeddings
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    if architecture.full_attention_every or window is None or not slides or window >= length:
        return length, None
    return window, (
        f"the file announces a context of {window} tokens instead of {length}: beyond its sliding window the model"
        " attends to a part of the text, and llama.cpp to all of it"
    )
