"""Adapters on disk, in PEFT's file format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.models.files import atomic_write
from qlora.models.prepare import qlora_layers
from qlora.models.weights import open_safetensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's wrapper modules


def _keys_of(layer_name: str) -> tuple[str, str]:
    return f"{_PREFIX}{layer_name}.lora_A.weight", f"{_PREFIX}{layer_name}.lora_B.weight"


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default", base_model: str | None = None) -> Path:
    """Writes one adapter of every :class:`QLoRALinear` of ``model`` to ``folder``; PEFT reads it.

    Each file is replaced atomically: a crash or a full disk leaves the old one. ``base_model`` is recorded as
    ``base_model_name_or_path``. Layers of different rank or alpha go into PEFT's ``rank_pattern`` and
    ``alpha_pattern``. Raises ValueError if no layer has an adapter of that name.
    """
    from safetensors.torch import save

    layers = {n: layer for n, layer in qlora_layers(model).items() if name in layer.adapters}
    if not layers:
        raise ValueError(f"no layer has an adapter named '{name}'")
    tensors = {}
    for layer_name, layer in layers.items():
        key_a, key_b = _keys_of(layer_name)
        tensors[key_a] = layer.lora_a[name].detach().cpu().contiguous()
        tensors[key_b] = layer.lora_b[name].detach().cpu().contiguous()
    settings = {layer_name: layer.adapters[name] for layer_name, layer in layers.items()}
    first = next(iter(settings.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "generate") else None,
        "base_model_name_or_path": base_model or getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "rank_pattern": {n: s.rank for n, s in settings.items() if s.rank != first.rank},
        "alpha_pattern": {n: s.alpha for n, s in settings.items() if s.alpha != first.alpha},
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / CONFIG_FILE, json.dumps(config, indent=2).encode())
    atomic_write(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    return folder


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The checked ``adapter_config.json``. Raises FileNotFoundError or ValueError naming the file and the rule."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type={config.get('peft_type')!r}, only LORA adapters can be loaded")
    for option in ("use_dora", "fan_in_fan_out"):
        if config.get(option):
            raise ValueError(f"{path}: {option}=true is not supported")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ValueError(f"{path}: r={config.get('r')!r} must be an integer of at least 1")
    return config


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Loads an adapter written by :func:`save_adapter` or by PEFT into the layers of ``model`` and makes it active.

    An adapter ``name`` that exists is replaced. Nothing is changed unless every key and shape fits.
    Raises ValueError naming the keys if the file belongs to another model, or naming the file if it is damaged.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    with open_safetensors(path) as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  (not a dict)
    layers = qlora_layers(model)
    expected = {key: layer_name for layer_name in layers for key in _keys_of(layer_name)}
    foreign = sorted(set(tensors) - set(expected))
    missing = sorted(key for key in expected if key not in tensors)
    if foreign:
        raise ValueError(
            f"{path} belongs to another model: {len(foreign)} keys have no layer here, e.g. {foreign[:3]};"
            f" the layers of this model are named e.g. {sorted(layers)[:2]}"
        )
    adapted = {expected[key] for key in tensors}
    half = [key for key in missing if expected[key] in adapted]
    if half:
        raise ValueError(f"{path} lacks {half[:3]}: an adapter needs lora_A and lora_B of a layer")
    if not adapted:
        raise ValueError(f"{path} holds no adapter")
    for layer_name in adapted:
        a, b = (tensors[key] for key in _keys_of(layer_name))
        layer = layers[layer_name]
        shapes = ((a.shape[0], layer.in_features), (layer.out_features, a.shape[0]))
        if (tuple(a.shape), tuple(b.shape)) != shapes or a.shape[0] < 1:
            raise ValueError(
                f"{path}: {layer_name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}: needs {shapes}"
            )

    alpha_default, patterns = config.get("lora_alpha", config["r"]), config.get("alpha_pattern") or {}
    for layer_name, layer in layers.items():
        if name in layer.adapters:
            layer.delete_adapter(name)
        if layer_name not in adapted:
            continue
        a, b = (tensors[key] for key in _keys_of(layer_name))
        rank = a.shape[0]
        alpha = float(patterns.get(layer_name, alpha_default))
        if config.get("use_rslora"):
            alpha *= rank**0.5  # alpha / sqrt(r), as alpha' / r
        layer.add_adapter(name, rank, alpha, float(config.get("lora_dropout", 0.0)))
        with torch.no_grad():
            layer.lora_a[name].copy_(a)
            layer.lora_b[name].copy_(b)
