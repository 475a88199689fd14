"""Adapters on disk, in PEFT's file format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from qlora.nn import Linear4bit, QLoRALinear
from qlora.nn.finding import bare_layers, qlora_layers
from qlora.nn.replacing import replace_module
from qlora.storage.files import atomic_write_all
from qlora.storage.weights import open_safetensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Options of PEFT that load_adapter implements, or that do not affect what the adapter computes.
_SUPPORTED = (
    *("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version", "runtime_config"),
    *(
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "ensure_weight_tying",
        "megatron_core",
        "qalora_group_size",
    ),
)
_NOTHING: tuple[Any, ...] = (None, False, "none", [], {}, "")  # values that switch any other option off
# Initializations that do not change the base.
_ADDITIVE_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
PEFT_PREFIX = "base_model.model."  # PEFT's wrapper modules


def _keys_of(layer_name: str) -> tuple[str, str]:
    return f"{PEFT_PREFIX}{layer_name}.lora_A.weight", f"{PEFT_PREFIX}{layer_name}.lora_B.weight"


def _pattern_of(layer_name: str) -> str:
    """A key for PEFT's rank_pattern and alpha_pattern that matches only this layer."""
    return "^" + re.escape(layer_name)


def _from_pattern(patterns: dict[str, Any], layer_name: str, default: Any) -> Any:
    """The value of the first matching key. As in PEFT, a key is a regular expression for the end of a layer's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer_name):
            return value
    return default


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers: torch.compile, (Distributed)DataParallel, AveragedModel.

    Raises ValueError if a part of it is compiled on its own, because that changes the names of its layers.
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    while True:
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, wrappers):
            model = cast(nn.Module, model.module)
        else:
            break
    inner = next((name for name, _ in model.named_modules() if "_orig_mod" in name), None)
    if inner is not None:
        raise ValueError(f"{inner}: a part of the model is compiled on its own: use module.compile() in place instead")
    return model


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default", base_model: str | None = None) -> Path:
    """Writes the adapter ``name`` of every :class:`QLoRALinear` of ``model`` to ``folder``, readable by PEFT.

    Both files are on disk before either is renamed, so a full disk or a crash leaves the old ones, except for a crash
    between the two renames. ``base_model`` is recorded as ``base_model_name_or_path``. Layers with a different rank or
    alpha are recorded in PEFT's ``rank_pattern`` and ``alpha_pattern``.

    Wrappers (torch.compile, DistributedDataParallel, AveragedModel) are removed first, so layer names are the model's.
    Returns the folder. Raises ValueError if no layer has an adapter of that name, or if parameters other than adapters
    require grad, because the file cannot hold them.
    """
    from safetensors.torch import save

    model = bare_model(model)
    layers = {n: layer for n, layer in qlora_layers(model).items() if name in layer.adapters}
    if not layers:
        raise ValueError(f"no layer has an adapter named '{name}'")
    ours = {id(p) for layer in qlora_layers(model).values() for p in (*layer.lora_a.values(), *layer.lora_b.values())}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        raise ValueError(
            f"save_adapter: {len(others)} parameters outside the adapters require grad and would be lost, e.g."
            f" {others[:3]}. Freeze them (requires_grad_(False)) if they were not trained. To train them, use PEFT's"
            " LoraConfig(modules_to_save=[...]) instead of the adapters of prepare_model"
        )
    tensors = {}
    for layer_name, layer in layers.items():
        key_a, key_b = _keys_of(layer_name)
        tensors[key_a] = layer.lora_a[name].detach().cpu().contiguous()
        tensors[key_b] = layer.lora_b[name].detach().cpu().contiguous()
    settings = {layer_name: layer.adapters[name] for layer_name, layer in layers.items()}
    first = next(iter(settings.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if re.search(r"(ForCausalLM|LMHeadModel)$", type(model).__name__) else None,
        "base_model_name_or_path": base_model or getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "rank_pattern": {_pattern_of(n): s.rank for n, s in settings.items() if s.rank != first.rank},
        "alpha_pattern": {_pattern_of(n): s.alpha for n, s in settings.items() if s.alpha != first.alpha},
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_all(
        {
            folder / WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
            folder / CONFIG_FILE: json.dumps(config, indent=2).encode(),
        }
    )
    return folder


_WITH_PEFT = "load this adapter with PEFT (PeftModel.from_pretrained) on a model that was loaded with qlora.QLoRAConfig"


def require_own_base(config: dict[str, Any], path: Path) -> None:
    """Raises ValueError for an adapter whose initialization changed the weights of its base (PiSSA, OLoRA, …)."""
    if config.get("init_lora_weights") not in _ADDITIVE_INITS:
        raise ValueError(
            f"{path}: init_lora_weights={config['init_lora_weights']!r} changes the base weights, so the adapter does"
            " not fit the model on disk: load it with PEFT, or convert it there"
            " (save_pretrained(path_initial_model_for_weight_conversion=...))"
        )


def read_adapter_config(folder: Path, otherwise: str = _WITH_PEFT) -> dict[str, Any]:
    """The validated ``adapter_config.json``. Raises FileNotFoundError or ValueError with the file and the rule.

    ``otherwise`` tells the user what to do with an adapter whose options are not supported.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type={config.get('peft_type')!r}, but only LORA adapters can be loaded")
    for option, value in config.items():
        if option not in _SUPPORTED and value not in _NOTHING:
            raise ValueError(f"{path}: {option}={value!r} is not supported here: {otherwise}")
    require_own_base(config, path)
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ValueError(f"{path}: r={config.get('r')!r} must be an integer of at least 1")
    config.setdefault("lora_alpha", config["r"])
    config["lora_dropout"] = config.get("lora_dropout") or 0.0
    config["alpha_pattern"] = config.get("alpha_pattern") or {}
    if not isinstance(config["alpha_pattern"], dict):
        raise ValueError(f"{path}: alpha_pattern must be an object")
    for pattern in config["alpha_pattern"]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{path}: alpha_pattern {pattern!r} is not a regular expression: {error}") from error
    for name, value in (
        ("lora_alpha", config["lora_alpha"]),
        ("lora_dropout", config["lora_dropout"]),
        *(("alpha_pattern", value) for value in config["alpha_pattern"].values()),
    ):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {name}={value!r} must be a number")
    if not 0 <= config["lora_dropout"] < 1:
        raise ValueError(f"{path}: lora_dropout={config['lora_dropout']} must be in [0, 1)")
    return config


def scaling_of(config: dict[str, Any], layer_name: str, rank: int) -> float:
    """The factor of a layer's product B A in a config of :func:`read_adapter_config`: alpha / r, or alpha / sqrt(r)."""
    alpha = float(_from_pattern(config["alpha_pattern"], layer_name, config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Loads an adapter written by :func:`save_adapter` or by PEFT into the layers of ``model`` and makes it active.

    If the model was loaded with QLoRAConfig, its 4-bit layers that have an adapter in the file become QLoRALinear, and
    the rest of the model is frozen. An existing adapter ``name`` is replaced. Nothing changes unless every key and
    shape fits. Wrappers are removed first, as in :func:`save_adapter`.
    Raises FileNotFoundError if a file is missing, ValueError if the file belongs to another model (with the keys) or is
    damaged, and RuntimeError if an adapter is merged.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    model = bare_model(model)
    with open_safetensors(path) as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  (not a dict)
    layers = qlora_layers(model)
    bare = bare_layers(model)
    every: dict[str, QLoRALinear | Linear4bit] = {**layers, **bare}
    expected = {key: layer_name for layer_name in every for key in _keys_of(layer_name)}
    foreign = sorted(set(tensors) - set(expected))
    missing = sorted(key for key in expected if key not in tensors)
    if foreign:
        raise ValueError(
            f"{path} belongs to another model: {len(foreign)} keys have no layer here, e.g. {foreign[:3]};"
            f" the layers of this model are named e.g. {sorted(every)[:2]}"
        )
    adapted = {expected[key] for key in tensors}
    half = [key for key in missing if expected[key] in adapted]
    if half:
        raise ValueError(f"{path} lacks {half[:3]}: an adapter needs both lora_A and lora_B of each layer")
    if not adapted:
        raise ValueError(f"{path} contains no adapter")
    for layer_name in adapted:
        a, b = (tensors[key] for key in _keys_of(layer_name))
        target = every[layer_name]
        shapes = ((a.shape[0], target.in_features), (target.out_features, a.shape[0]))
        if (tuple(a.shape), tuple(b.shape)) != shapes or a.shape[0] < 1:
            raise ValueError(
                f"{path}: {layer_name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}: needs {shapes}"
            )

    merged = [layer_name for layer_name, layer in layers.items() if layer.merged_adapter is not None]
    if merged:
        raise RuntimeError(f"load_adapter: {merged[0]} is merged; call unmerge() first")

    if adapted & bare.keys():
        model.requires_grad_(False)  # as in prepare_model, only the adapter is trained
    for layer_name in adapted & bare.keys():
        layer = QLoRALinear(bare[layer_name], rank=1)
        layer.delete_adapter("default")
        layer.train(bare[layer_name].training)
        replace_module(model, bare[layer_name], layer)
        layers[layer_name] = layer
    for layer_name, layer in layers.items():
        if name in layer.adapters:
            layer.delete_adapter(name)
        if layer_name not in adapted:
            layer.deactivate()
            continue
        a, b = (tensors[key] for key in _keys_of(layer_name))
        rank = a.shape[0]
        alpha = scaling_of(config, layer_name, rank) * rank
        layer.add_adapter(name, rank, alpha, float(config["lora_dropout"]))
        with torch.no_grad():
            layer.lora_a[name].copy_(a)
            layer.lora_b[name].copy_(b)


def forbid_saving(model: nn.Module) -> None:
    """Makes ``save_pretrained`` of a transformers model an error: ``from_pretrained`` could not read the result."""
    if callable(getattr(type(model), "save_pretrained", None)):
        model.save_pretrained = _refuse_to_save  # type: ignore[assignment]  # only on this instance


def allow_saving(model: nn.Module) -> None:
    """Undoes :func:`forbid_saving`."""
    vars(model).pop("save_pretrained", None)


def _refuse_to_save(*args: object, **kwargs: object) -> None:
    raise ValueError(
        "save_pretrained: this model has 4-bit layers and adapters from prepare_model; from_pretrained could not read"
        " the result. Save the adapter with qlora.save_adapter(model, folder), or merge it first with"
        " qlora.merge_and_unload(model). To save a 4-bit model, load it with quantization_config=qlora.QLoRAConfig()."
        " With a Trainer, use PEFT's adapters (get_peft_model), or save_strategy='no'"
    )
