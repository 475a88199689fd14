"""Small models for tests, plain ones and random ones of transformers, and the comparison of what they compute."""

import hashlib
from pathlib import Path

import torch
from torch import nn

WORDS = (  # noqa: SIM905
    "the light stays on keeper log sea harbor storm what is how do you ship sail wind wave night day a of to and"
).split()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class TiedModel(nn.Module):
    """A model with an embedding, blocks, and a head that shares the embedding's weight."""

    def __init__(self, width: int = 64, blocks: int = 2, vocabulary: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK = {
    **SIZES,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# By transformers' model_type: one for each way in which a model stores its weights.
CONFIGS = {
    "llama": {**SIZES, "attention_bias": True},
    # Conv1D: weights are stored as (in, out); the head shares the embedding
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2},
    # its own subclass of nn.Linear; queries, keys and values in one weight
    "falcon": {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads", "pad_token_id")},
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    # a shared expert, which gets the same inputs as the router's
    "qwen2_moe": {
        **SIZES,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "gpt_oss": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},  # transposed, biased
    "olmoe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "granitemoe": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    # groups of experts, a shared expert, a first block without experts, low-rank attention
    "deepseek_v2": {**_DEEPSEEK, "head_dim": 8},
    "deepseek_v3": _DEEPSEEK,
}
MIXTURES = tuple(name for name, config in CONFIGS.items() if any("experts" in key for key in config))
TOKENS = torch.tensor([[1, 5, 9, 77, 30, 8, 2, 100]])  # for models of these sizes


def llama(seed=0, **changes):
    """A random 2-layer Llama in float32, always the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def save_dense(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Saves a random model of this architecture as a checkpoint folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CONFIGS[name])).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def reloaded(folder, **options):
    """Loads the causal language model in a folder, as users do."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def hashes(folder: Path) -> dict[str, str]:
    """The hash of each file, by name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def stir(model, std=0.05):
    """Gives every adapter's lora_b nonzero values, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_b" in name.lower():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@torch.no_grad()
def logits(model, tokens=TOKENS, **inputs):
    return model.eval()(input_ids=tokens, **inputs).logits.float()


def difference(result, wanted):
    """Norm of the difference, relative to the norm of ``wanted``."""
    return ((result.float() - wanted.float()).norm() / wanted.float().norm()).item()


# Quantization to 4 bit changes the logits of ``llama`` by 0.1 to 0.25; a lost adapter or layer by 0.4 or more.
FOUR_BIT = 0.35
SAME = 1e-4


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def save_llama(folder, chat: bool = True):
    """Saves a random 2-layer Llama with a word-level tokenizer as a model folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *".,?"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>", pad_token="<|end|>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # large, so that a frozen head can give distinct logits
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Settings for a fine-tuning run of a few seconds on that Llama.
TINY_JOB = {
    "max_steps": 12,
    "max_length": 64,
    "learning_rate": 5e-3,
    "save_steps": 4,
    "eval_steps": 4,
    "logging_steps": 1,
}
