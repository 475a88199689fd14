"""Shapes of known models, so that planning needs no model files."""

from typing import Any

_LLAMA = {"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "tie_word_embeddings": False}

# Values of the models' config.json.
PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-7b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-65b": _LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "vocab_size": 32000,
    },
    "llama3-8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "tie_word_embeddings": False,
    },
    "llama3-70b": _LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def config_of(model: str) -> Any:
    """The config of a preset or of a model folder. Raises ValueError with the list of presets."""
    from pathlib import Path

    from transformers import AutoConfig

    if model in PRESETS:
        options = dict(PRESETS[model])
        return AutoConfig.for_model(options.pop("model_type"), **options)
    if not Path(model).exists():
        raise ValueError(f"'{model}' is neither a folder nor one of {', '.join(sorted(PRESETS))}")
    return AutoConfig.from_pretrained(model)
