"""Loads causal language models by path or Hugging Face id: in 4 bit through transformers, with adapters through PEFT.

Every command loads its model here.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from qlora.adapters.lora import add_lora, check_adapter_folder, load_adapter_into

logger = logging.getLogger(__name__)

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_OTHER_COPIES = ("*/*", "consolidated*")  # of the weights, in subfolders or in the form of the model's authors


def require_train_extra() -> None:
    """Raises ImportError with the install command if a library for training is missing."""
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
        import rich  # noqa: F401
        import safetensors  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: in a checkout of qlora run pip install '.[train]'") from error


def resolve_model(model: str | Path) -> Path:
    """The local folder of a model; an id is looked up in the Hugging Face cache or downloaded.

    Raises FileNotFoundError if there is no such model folder.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path} has no config.json: it is not a model folder")
        return path
    if path.exists() or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{model} is not a model folder")
    from huggingface_hub import snapshot_download

    def download(*patterns: str) -> Path:
        return Path(snapshot_download(str(model), allow_patterns=list(patterns), ignore_patterns=list(_OTHER_COPIES)))

    folder = download(*_MODEL_FILES)
    if not any(folder.glob("*.safetensors")):
        folder = download(*_MODEL_FILES, "pytorch_model*.bin")
    return folder


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. If it has no padding token, it pads with the end-of-sequence token.

    Raises ValueError if it has neither token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer in {folder} has neither a padding nor an end-of-sequence token: set one of them, e.g."
                ' tokenizer.add_special_tokens({"eos_token": "</s>"}), and save it there'
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_quantized(
    folder: str | Path,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: tuple[str, ...] | list[str] | str | None = None,
    adapt_experts: bool = False,
    progress: bool = True,
    offload_experts: str | None = None,
    offload_folder: str | Path | None = None,
    **lora_options: Any,
) -> tuple[Any, dict[str, int]]:
    """Loads a causal language model with 4-bit layers on ``device``; returns it with the result of :func:`model_bytes`.

    transformers reads one tensor at a time, moves it to the device and quantizes it there, so peak memory is the 4-bit
    model plus the largest tensor. ``dtype`` is the dtype of activations and of tensors that stay dense. A checkpoint
    that is already 4-bit, written by qlora or by bitsandbytes, keeps its format. Experts in MXFP4 (gpt-oss) are
    quantized anew.

    ``offload_experts`` "ram" or "disk" keeps the experts of a mixture off the device (:mod:`qlora.nn.offload`), "disk"
    in files in ``offload_folder``. Then the model is quantized on the CPU.

    With ``rank`` the model is a PeftModel with trainable LoRA on ``target_modules`` (default: all linear layers except
    the head), with ``adapt_experts`` also on every expert of a mixture; ``lora_options`` go to PEFT's LoraConfig.
    Raises ValueError with the value and the rule.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from qlora.integrations import bitsandbytes
    from qlora.integrations.transformers import QLoRAConfig, is_mxfp4
    from qlora.nn.offload import offload_experts as offload

    folder, device = Path(folder), torch.device(device)
    if offload_experts == "ram" and device.type == "cpu":
        raise ValueError("offload_experts='ram': on the CPU the experts are in RAM anyway; use disk")
    on_disk = offload_experts == "disk"
    if on_disk and offload_folder is None:
        raise ValueError("offload_experts='disk' needs an offload_folder")
    config = AutoConfig.from_pretrained(folder)
    options: dict[str, Any] = {}
    stored = getattr(config, "quantization_config", None)
    if bitsandbytes.is_checkpoint(folder):
        config = bitsandbytes.checkpoint_config(folder)
    elif is_mxfp4(config):
        del config.quantization_config
        options["quantization_config"] = QLoRAConfig(quant_type, double_quant, block_size, checkpoint_format="mxfp4")
    elif stored is None:
        options["quantization_config"] = QLoRAConfig(quant_type, double_quant, block_size)
    elif stored.get("quant_method") != "qlora":
        raise ValueError(f"{folder} is quantized by '{stored.get('quant_method')}': qlora needs a 16- or 32-bit model")
    if on_disk and "quantization_config" in options:
        options["quantization_config"].offload_folder = str(offload_folder)
    bars = transformers_logging.is_progress_bar_enabled()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": torch.device("cpu") if offload_experts is not None else device},
            **options,
        )
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    sizes = model_bytes(model, dtype)
    if offload_experts is not None:
        offload(model, offload_experts, offload_folder)
        model.to(device)
        model.hf_device_map = {"": device}
    if rank is None:
        return model.requires_grad_(False), sizes
    return add_lora(model, rank, alpha, dropout, target_modules, adapt_experts, **lora_options), sizes


def model_bytes(model: Any, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a model's weights: ``dense`` if all were in ``dtype``, and ``now``."""
    from qlora.integrations.counting import hidden_parameters
    from qlora.nn.replacing import tensor_bytes

    count = sum(p.numel() for p in model.parameters()) + hidden_parameters(model)
    return {"dense": count * dtype.itemsize, "now": tensor_bytes(model)}


def load_for_inference(
    model: str | Path,
    adapter: str | Path | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[Any, Any]:
    """(model, tokenizer) for generation: the base in the 4-bit format of the adapter's training, the adapter active.

    ``options`` as in :func:`load_quantized`.
    """
    folder = resolve_model(model)
    if adapter is not None:
        options = {**check_adapter_folder(Path(adapter), folder), **options}
    tokenizer = load_tokenizer(folder)
    loaded, _ = load_quantized(folder, dtype, device=device, progress=False, **options)
    loaded.generation_config.eos_token_id = end_tokens(tokenizer, loaded.generation_config.eos_token_id) or None
    if adapter is not None:
        loaded = load_adapter_into(loaded, Path(adapter))
    return loaded.eval(), tokenizer


def end_tokens(tokenizer: Any, of_model: int | list[int] | None) -> list[int]:
    """Ids of the tokens that end generation: the model's, and the tokenizer's, which may be another one."""
    ids = of_model if isinstance(of_model, list) else [of_model]
    return sorted({tokenizer.eos_token_id, *ids} - {None})


def chat_reply(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 64, **sampling: Any) -> str:
    """The model's answer to one prompt, through its chat template if it has one. Greedy by default.

    ``sampling`` goes to ``generate``. Raises ValueError if the prompt has no tokens.
    """
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = prompt
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    device = next(model.parameters()).device
    # Only inputs that every causal model accepts: some tokenizers add token types.
    inputs = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask") if name in encoded}
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError(f"prompt={prompt!r} has no tokens: generation needs at least one")
    sampling.setdefault("do_sample", False)
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
