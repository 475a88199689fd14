"""Tiny random transformers models, one for each way in which a model stores its weights."""

import hashlib
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES, attention_bias=True),
    "gpt2": GPT2Config(  # Conv1D: weights are stored as (in, out); the head shares the embedding
        n_embd=64, n_layer=2, n_head=4, vocab_size=100, bos_token_id=1, eos_token_id=2
    ),
    "falcon": FalconConfig(  # its own subclass of nn.Linear; queries, keys and values in one weight
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16, decoder_sparse_step=1
    ),
    "gpt_oss": GptOssConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16),  # transposed, biased
}
TOKENS = torch.arange(3, 15)[None]


def save_dense(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Saves a random model of this architecture as a checkpoint folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """The hash of each file, by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}
