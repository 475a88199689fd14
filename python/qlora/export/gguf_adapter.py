"""export_gguf_adapter: writes an adapter alone as a GGUF file, which llama.cpp adds to the file of its base."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.adapters.factors import Factors
from qlora.adapters.files import CONFIG_FILE
from qlora.adapters.lora import check_adapter_folder
from qlora.export.gguf_architectures import Architecture, architecture_of
from qlora.export.gguf_tensors import TYPES, GgufTensor, interleave_rows, names_of, rotated_heads, write_gguf
from qlora.export.lora import read_factors
from qlora.models.loading import resolve_model


def export_gguf_adapter(
    adapter: str | Path, output: str | Path, *, model: str | Path | None = None, tensor_type: str = "f32"
) -> tuple[Path, int, int]:
    """Writes the LoRA adapter of a folder as a GGUF file; returns (path, bytes, adapted layers).

    llama.cpp adds ``alpha / rank * B A`` to a weight, with one alpha for the file. Where layers have another scaling,
    the rest of it is multiplied into their B. The file belongs on the base in the 4-bit format of the training
    (``export_gguf(..., adapter=adapter, base_only=True)``).

    Args:
        model: folder or id of the base (default: the one that the adapter's config names). Its config determines the
            architecture and the order of rows; its weights are not read.
        tensor_type: "f32", "f16" or "bf16".

    Raises FileExistsError if ``output`` exists, ValueError for an adapter that is more than LoRA on linear layers or
    belongs to another base, OSError if the disk is full.
    """
    import gguf
    from transformers import AutoConfig

    adapter, output = Path(adapter), Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output")
    allowed = [name for name in TYPES if name != "q8_0"]
    if tensor_type not in allowed:
        raise ValueError(f"type '{tensor_type}' is not for adapters: use one of {', '.join(allowed)}")
    folder = base_folder(adapter, model)
    check_adapter_folder(adapter, folder)
    config = AutoConfig.from_pretrained(folder)
    architecture = architecture_of(config)
    factors = read_factors(adapter)
    _check_shapes(factors, config, adapter)
    first = next(iter(factors.values()))
    alpha = first.scaling * first.a.shape[0]
    writer = gguf.GGUFWriter(None, architecture.gguf)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(adapter.resolve().name)
    tensors = _tensors(factors, alpha, config, architecture, tensor_type)
    return output, write_gguf(output, writer, tensors), len(factors)


def base_folder(adapter: Path, model: str | Path | None) -> Path:
    """The folder of the base, given or named by the adapter. Raises ValueError if neither names one."""
    if model is None:
        path = adapter / CONFIG_FILE
        if not path.exists():
            raise FileNotFoundError(f"{adapter} has no {CONFIG_FILE}: it is not an adapter folder")
        model = json.loads(path.read_text()).get("base_model_name_or_path")
        if not model:
            raise ValueError(f"{path} names no base: pass --model")
    return resolve_model(model)


def _check_shapes(factors: dict[str, Factors], config: Any, adapter: Path) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    modules = dict(base.named_modules())
    for name, (a, b, _) in factors.items():
        if name not in modules:
            raise ValueError(f"{adapter} has an adapter for {name}, which the base does not have")
        if name == "lm_head" and config.tie_word_embeddings:
            raise ValueError(
                f"{adapter} adapts the head, which shares the embedding's weight: llama.cpp would adapt neither. Export"
                " the merged model, without --adapter-only"
            )
        out, into = modules[name].weight.shape
        if (a.shape[1], b.shape[0], a.shape[0]) != (into, out, b.shape[1]):
            raise ValueError(
                f"{adapter}: {name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, but the base's weight is"
                f" {(out, into)}"
            )


def _tensors(
    factors: dict[str, Factors], alpha: float, config: Any, architecture: Architecture, wanted: str
) -> list[GgufTensor]:
    to_gguf = names_of(architecture, config.num_hidden_layers)
    tensors = []
    for name, (a, b, scaling) in factors.items():
        target = to_gguf(f"{name}.weight")
        if target is None:
            raise ValueError(f"{name} has no place in a GGUF file of the architecture {architecture.gguf}")
        scaled = b.float() * (scaling * a.shape[0] / alpha)
        heads = rotated_heads(name, config) if architecture.interleaved_rope else None
        if heads is not None:  # the rows of B are rows of the weight
            scaled = interleave_rows(scaled, heads)
        tensors += [_stored(f"{target}.lora_a", a, wanted), _stored(f"{target}.lora_b", scaled, wanted)]
    return tensors


def _stored(name: str, tensor: Tensor, wanted: str) -> GgufTensor:
    return GgufTensor(name, tuple(tensor.shape), wanted, lambda: tensor)
