"""Causal language models by path or Hugging Face id, straight into 4 bit: one dense tensor in memory at a time."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from qlora.models.adapters import CONFIG_FILE, load_adapter, read_adapter_config
from qlora.storage.files import atomic_write
from qlora.models.prepare import PreparedReport, prepare_model
from qlora.storage.weights import WeightSource

logger = logging.getLogger(__name__)

QUANTIZATION_FILE = "qlora_config.json"  # beside PEFT's two files: how the base was quantized
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def require_train_extra() -> None:
    """Raises ImportError saying what to install, unless the libraries for training are here."""
    try:
        import accelerate  # noqa: F401
        import rich  # noqa: F401
        import safetensors  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install 'qlora[train]'") from error


def resolve_model(model: str | Path) -> Path:
    """A local folder with the model's files; an id is looked up in the Hugging Face cache or downloaded."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path} has no config.json: it is not a model folder")
        return path
    if path.exists() or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{model} is not a model folder")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(model), allow_patterns=list(_MODEL_FILES)))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; without a padding token, the end-of-sequence token pads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_quantized(
    folder: Path, dtype: torch.dtype, *, progress: bool = True, **prepare_options: Any
) -> tuple[Any, PreparedReport]:
    """A causal language model with 4-bit linear layers and adapters; ``dtype`` is the compute dtype.

    Streams from safetensors where the file's names are the model's; otherwise loads the dense model first and says so.
    ``prepare_options`` go to :func:`qlora.prepare_model`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{folder} is quantized already: qlora finetune starts from a 16- or 32-bit model")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = {name for name, _ in model.named_parameters()}
    if any(folder.glob("*.safetensors")) and names <= WeightSource(folder).names | _tied_names(model):
        model.tie_weights()
        report = prepare_model(model, weights=folder, progress=progress, **prepare_options)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    else:
        logger.warning("%s: no safetensors with the model's own names, loading the dense model first", folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        report = prepare_model(model, progress=progress, **prepare_options)
    model.config._name_or_path = str(folder)
    return model, report


def _tied_names(model: Any) -> set[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ()
    return set(tied)


def save_quantization(folder: Path, options: dict[str, Any]) -> None:
    """Records how the base under an adapter was quantized."""
    kept = {key: options[key] for key in ("quant_type", "block_size", "double_quant")}
    atomic_write(folder / QUANTIZATION_FILE, json.dumps(kept, indent=2).encode())


def _read_quantization(adapter: Path) -> dict[str, Any]:
    """What :func:`save_quantization` wrote; nothing for an adapter from elsewhere."""
    path = adapter / QUANTIZATION_FILE
    if not path.exists():
        return {}
    kinds = {"quant_type": str, "block_size": int, "double_quant": bool}
    try:
        stored = json.loads(path.read_text())
        if set(stored) != set(kinds) or any(type(stored[name]) is not kind for name, kind in kinds.items()):
            raise ValueError(f"it must hold exactly {sorted(kinds)}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return stored


def load_for_inference(model: str | Path, adapter: Path | None, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) for generation: 4-bit base as the adapter knew it, adapter active."""
    folder = resolve_model(model)
    options.setdefault("rank", None)
    if adapter is not None:
        if not (adapter / CONFIG_FILE).exists():
            raise FileNotFoundError(f"{adapter} has no {CONFIG_FILE}: it is not an adapter folder")
        options["rank"] = read_adapter_config(adapter)["r"]
        options = {**_read_quantization(adapter), **options}
    tokenizer = load_tokenizer(folder)
    loaded, _ = load_quantized(folder, dtype, progress=False, **options)
    if adapter is not None:
        load_adapter(loaded, adapter)
    return loaded.eval(), tokenizer


def chat_reply(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 64, **sampling: Any) -> str:
    """The model's answer to one prompt, through its chat template if it has one; greedy unless told otherwise."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = prompt
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError(f"prompt={prompt!r} gives no token to begin with")
    sampling.setdefault("do_sample", False)
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
