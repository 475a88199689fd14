"""Tiny random models with real tokenizers, one for each architecture that GGUF files are written for."""

from pathlib import Path

import torch
from tiny_models import stir

TEXT = """The light stays on through the night, and the keeper writes the log: wind west 7, sea rough, 3 ships seen.
It's 1024 steps to the lamp. We'll climb them twice a day; they don't get fewer! What is a storm? A storm is weather.
Über den Wogen — ΑΒΓ, привет, 你好 — the horn sounds every 30 seconds… I'M NOT AFRAID, said the KeeperOfLogs at 12:45.

    for i in range(10):
        print(i ** 2)
"""
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "head_dim": 16,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 2.5, 3.0],
    "original_max_position_embeddings": 128,
    "partial_rotary_factor": 0.5,
}
# name: (model_type, kind of tokenizer, changes of the config)
MODELS = {
    "llama": ("llama", "sentencepiece", {}),
    "llama-biased-tied": ("llama", "llama3", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-3": ("llama", "llama3", {"rope_parameters": _LLAMA3}),
    "llama-linear": (
        "llama",
        "gpt2",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-yarn": ("llama", "smollm", {"rope_parameters": YARN}),
    "mistral": ("mistral", "sentencepiece", {"head_dim": 32, "sliding_window": None}),
    "smollm3": ("smollm3", "llama3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", "qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "qwen2", {"head_dim": 32}),
    "phi3": ("phi3", "sentencepiece", {}),
    "phi3-longrope": ("phi3", "gpt4o", {"rope_parameters": _LONG, "tie_word_embeddings": True}),
    "gemma": ("gemma", "sentencepiece-bare", {"head_dim": 32}),
    "gemma2": ("gemma2", "sentencepiece-bare", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        "sentencepiece-bare",
        {
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 2.0},
            },
        },
    ),
}


def byte_level(kind: str):
    """A byte-level BPE tokenizer that splits text as the models of a family do."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    contraction, first = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    spaces = r"\s*[\r\n]+|\s+(?!\S)|\s+"
    marks, slashed = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    small, big = f"{first}{upper}*{lower}+", f"{first}{upper}+{lower}*"
    split = {
        "llama3": rf"{contraction}|{first}\p{{L}}+|\p{{N}}{{1,3}}|{marks}|{spaces}",
        "dbrx": rf"{contraction}|{first}\p{{L}}+|\p{{N}}{{1,3}}|{marks}|{spaces}",
        "qwen2": rf"{contraction}|{first}\p{{L}}+|\p{{N}}|{marks}|{spaces}",
        "tekken": rf"{small}|{big}|\p{{N}}|{slashed}|{spaces}",
        "gpt4o": rf"{small}{contraction}?|{big}{contraction}?|\p{{N}}{{1,3}}|{slashed}|{spaces}",
    }
    core = Tokenizer(models.BPE(ignore_merges=kind in ("llama3", "tekken")))
    if kind in split:
        steps = [pre_tokenizers.Split(Regex(split[kind]), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    elif kind == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    else:
        steps = [pre_tokenizers.ByteLevel(False)]
    core.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEXT], trainer)
    return core


def sentencepiece(prefix: bool):
    """A BPE tokenizer as transformers converts one from SentencePiece; ``prefix``: texts begin with a space."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers.tokenization_utils_base import generate_merges

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=220, show_progress=False))
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().get)
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    scores = {token: -float(i) for i, token in enumerate(learned)}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, {**dict.fromkeys(tokens, 0.0), **scores})
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(SPECIAL)
    return core


def tokenizer(kind: str, add_bos: bool = False):
    """A fast tokenizer of transformers; "sentencepiece" and "sentencepiece-bare" begin every text with ``<s>``."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    spm = kind.startswith("sentencepiece")
    core = sentencepiece(prefix=kind == "sentencepiece") if spm else byte_level(kind)
    if spm or add_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def save(name: str, folder: Path, rows_without_token: int = 3) -> Path:
    """Saves the model of that name as a folder; its embedding has some rows more than the tokenizer has tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, kind, changes = MODELS[name]
    made = tokenizer(kind)
    made.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{**_SIZES, "vocab_size": len(made) + rows_without_token, "tie_word_embeddings": False, **changes}
    )
    if model_type.startswith("gemma"):
        config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for weight_name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:  # norms and biases that differ from their neutral values
            torch.nn.init.normal_(
                parameter, mean=1.0 if "norm" in weight_name and "gemma" not in name else 0.0, std=0.2
            )
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, **options) -> Path:
    """Saves a random adapter of ``base`` with what qlora records of the base, as qlora finetune does."""
    from qlora.adapters.lora import save_base_facts, save_lora
    from qlora.models.loading import load_quantized

    options = {"rank": 4, "alpha": 12.0, **options}
    model, _ = load_quantized(base, torch.float32, block_size=32, progress=False, **options)
    stir(model, std=0.1)
    save_lora(model, folder)
    save_base_facts(folder, model, base)
    return folder
