"""Adapters by PEFT on a 4-bit base: added, saved beside what they know of that base, checked against it, loaded."""

import difflib
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qlora.adapters.files import CONFIG_FILE
from qlora.adapters.masters import train_in_float32
from qlora.nn import Experts4bit, Linear4bit
from qlora.nn.experts4bit import holds_experts
from qlora.nn.replacing import head_names
from qlora.storage.files import atomic_write, atomic_write_all
from qlora.storage.fingerprint import checkpoint_fingerprint

logger = logging.getLogger(__name__)

BASE_FILE = "qlora_config.json"  # beside PEFT's two files; holds the base's quantization format and fingerprint
_FORMAT = {"quant_type": str, "block_size": int, "double_quant": bool}


def add_lora(
    model: Any,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: tuple[str, ...] | list[str] | str | None = None,
    adapt_experts: bool = False,
    **options: Any,
) -> Any:
    """A PeftModel with a trainable adapter; ``alpha`` defaults to ``rank``.

    ``target_modules`` defaults to all linear layers but the head; a string is a regular expression, as in PEFT. With
    ``adapt_experts`` each expert of a mixture gets an adapter too. Raises ValueError if a name of ``target_modules`` or
    ``modules_to_save`` is that of no layer, and for dropout on experts, which PEFT does not have.
    """
    from peft import LoraConfig, get_peft_model

    from qlora.nn.qlora_linear import check_adapter

    check_adapter(rank, dropout)
    if target_modules is not None and not isinstance(target_modules, str):
        target_modules = list(target_modules)
        if target_modules != ["all-linear"]:
            _check_names(model, "target_modules", target_modules)
    if target_modules in ("all-linear", ["all-linear"]):  # PEFT's name for the default
        target_modules = None
    _check_names(model, "modules_to_save", options.get("modules_to_save"))
    if adapt_experts:
        options["target_parameters"] = _expert_parameters(model)
        if dropout > 0:
            raise ValueError(f"dropout={dropout}: PEFT has no dropout for adapters on experts, so it must be 0")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=linear_targets(model) if target_modules is None else target_modules,
        task_type="CAUSAL_LM",
        **options,
    )
    adapted = get_peft_model(model, config)
    train_in_float32(adapted)
    return adapted


def _check_names(model: Any, option: str, names: Sequence[str] | None) -> None:
    """Raises ValueError if one of the names, which PEFT compares with the ends of layers' names, is that of no layer.

    PEFT ignores such a name if another one matches. A layer in 4 bit cannot be trained in full.
    """
    modules = dict(model.named_modules())
    for given in names or ():
        found = [module for name, module in modules.items() if name == given or name.endswith(f".{given}")]
        if not found:
            leaves = {name.rpartition(".")[2] for name in modules if name}
            near = difflib.get_close_matches(given.rpartition(".")[2], sorted(leaves))
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(leaves))}"
            raise ValueError(f"{option}: {type(model).__name__} has no layer '{given}': {hint}")
        if option == "modules_to_save" and any(isinstance(m, Linear4bit | Experts4bit) for m in found):
            raise ValueError(f"{option}: '{given}' is in 4 bit, and cannot be trained in full: use target_modules")


def linear_targets(model: Any) -> str | list[str]:
    """PEFT's target_modules for all linear layers of a model except its head, without experts.

    For most mixtures PEFT reads "all-linear", and names that experts had in older versions of transformers (also those
    of shared experts), as the experts and the router. Such names are left out.
    """
    if not any(isinstance(module, Experts4bit) or holds_experts(module) for module in model.modules()):
        return "all-linear"
    heads = head_names(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - heads
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    targets = [name for name in leaves if not _means_experts(name, model)]
    if targets != leaves:
        logger.info("no adapter on %s: PEFT takes these names for experts", sorted(set(leaves) - set(targets)))
    return targets


def _means_experts(name: str, model: Any) -> bool:
    """Whether PEFT turns the target ``name`` into one of experts."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it stands for a part of a fused weight
        return True
    return bool(config.target_parameters)


def _expert_parameters(model: Any) -> list[str]:
    """The weights of a model's 4-bit experts as PEFT's target_parameters, which match the ends of names."""
    names = {
        f"{name.rpartition('.')[2]}.{weight}"
        for name, module in model.named_modules()
        if isinstance(module, Experts4bit)
        for weight in module.weight_names
    }
    if not names:
        raise ValueError(f"adapt_experts: {type(model).__name__} has no experts in 4 bit")
    return sorted(names)


def save_base_facts(adapter: Path, model: Any, base: Path, prompt_end: str = "") -> None:
    """Records beside an adapter how its base ``model`` is quantized, and the fingerprint of the base's files.

    ``prompt_end`` is what ended the prompts in training without a chat template; it is recorded if it is not empty.
    """
    config = model.config.quantization_config
    facts = {key: getattr(config, key) for key in _FORMAT} | {"base_fingerprint": checkpoint_fingerprint(base)}
    if prompt_end:
        facts["prompt_end"] = prompt_end
    atomic_write(adapter / BASE_FILE, json.dumps(facts, indent=2).encode())


def _read_base_facts(adapter: Path) -> dict[str, Any]:
    """Reads what :func:`save_base_facts` wrote; empty for an adapter that another tool saved."""
    path = adapter / BASE_FILE
    if not path.exists():
        return {}
    kinds = {**_FORMAT, "base_fingerprint": str, "prompt_end": str}
    try:
        stored = json.loads(path.read_text())
        if not set(_FORMAT) <= set(stored) <= set(kinds) or any(
            type(stored[name]) is not kinds[name] for name in stored
        ):
            raise ValueError(f"it must hold {sorted(_FORMAT)}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return stored


def prompt_end(adapter: Path) -> str:
    """What ended the prompts on which an adapter was trained without a chat template; empty if nothing did."""
    return _read_base_facts(adapter).get("prompt_end", "")


def check_adapter_folder(adapter: Path, base: Path) -> dict[str, Any]:
    """Checks that ``base`` is the base of ``adapter``, and returns how that base was quantized.

    Raises FileNotFoundError if it is not an adapter folder, and ValueError if the adapter is not a LoRA adapter of PEFT
    or belongs to another task or another base.
    """
    path = adapter / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{adapter} has no {CONFIG_FILE}: it is not an adapter folder")
    try:
        config = json.loads(path.read_text())
        kind, task = config.get("peft_type"), config.get("task_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not an adapter's JSON file: {error}") from error
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type={kind!r}, but only LORA adapters can be loaded")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"{path}: task_type={task!r}, but only adapters of causal language models can be loaded")
    facts = _read_base_facts(adapter)
    facts.pop("prompt_end", None)
    known = facts.pop("base_fingerprint", None)
    if known is not None and known != checkpoint_fingerprint(base):
        raise ValueError(f"{adapter} was trained on another base than {base}: the weight files there differ")
    return facts


def load_adapter_into(model: Any, adapter: Path) -> Any:
    """A PeftModel with the adapter of a folder, for inference, on the device of ``model``.

    Raises ValueError if names or shapes of its tensors do not fit this model, or if its file is damaged.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    try:
        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode = True
        adapted = PeftModel(model, config)
        device = str(next(model.parameters()).device)
        result = adapted.load_adapter(adapter, "default", torch_device=device)
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"{adapter} is not readable (truncated or damaged): {error}") from error
    except (RuntimeError, TypeError) as error:  # shapes that differ, or options unknown to this version of PEFT
        raise ValueError(f"{adapter} does not fit this model: {error}") from error
    wrong = {"has no tensor for": result.missing_keys, "has tensors for no layer of": result.unexpected_keys}
    for what, keys in wrong.items():
        if keys:
            raise ValueError(f"{adapter} {what} this model: {len(keys)}, e.g. {sorted(keys)[:2]}")
    return adapted.eval()


def save_lora(model: Any, folder: Path, is_writer: bool = True) -> None:
    """Writes the adapter of a PeftModel as PEFT does; existing files are replaced together once all are on disk.

    It gathers parameters that FSDP2 has sharded, so all processes must call it; only the one with is_writer writes.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            if is_writer:
                state[name] = value.cpu()
    if not is_writer:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        model.save_pretrained(staging, state_dict=state, save_embedding_layers=False)
        atomic_write_all({folder / path.name: path.read_bytes() for path in Path(staging).iterdir()})


def restore_lora(model: Any, folder: Path) -> None:
    """Reads what :func:`save_lora` wrote into the existing parameters of a PeftModel.

    Raises ValueError if the file holds another adapter, or is damaged.
    """
    from peft import load_peft_weights, set_peft_model_state_dict
    from safetensors import SafetensorError

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        tensors = load_peft_weights(str(folder), device="cpu")
        result = set_peft_model_state_dict(model, tensors)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{folder} contains no adapter of this model, or a damaged one: {error}") from error
    lost = [*(set(result.missing_keys) & trained), *result.unexpected_keys]
    if lost:
        raise ValueError(f"{folder} contains another adapter: {len(lost)} names differ, e.g. {sorted(lost)[:2]}")
