"""export_gguf: writes a whole model, with its adapter merged, as one GGUF file for llama.cpp, Ollama and others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.adapters.files import CONFIG_FILE
from qlora.export.gguf_architectures import (
    Architecture,
    architecture_of,
    context_length,
    head_dim,
)
from qlora.export.gguf_rope import write_rope
from qlora.export.gguf_tensors import (
    TYPES,
    GgufTensor,
    interleave_rows,
    names_of,
    rotated_heads,
    type_of,
    write_gguf,
)
from qlora.export.gguf_tokenizer import GgufTokenizer, load_fast_tokenizer, read_tokenizer
from qlora.export.weights import DenseWeight, checkpoint_weights, model_weights
from qlora.models.loading import load_for_inference, load_quantized, resolve_model

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Exported(NamedTuple):
    """What :func:`export_gguf` has written."""

    path: Path
    bytes: int
    tensors: int
    notes: list[str]  # differences that a user should know, in whole sentences


def export_gguf(
    model: str | Path,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    base_only: bool = False,
    tensor_type: str = "f16",
    pre_tokenizer: str | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes the model folder or id ``model`` as a GGUF file.

    Without an adapter the file holds the model in the folder: dense weights as they are, 4-bit ones (of qlora or
    bitsandbytes) dequantized. With ``adapter`` it holds what the fine-tuned model computes: the base in the 4-bit
    format of the adapter's training, dequantized, plus the adapter, each weight in float32 before it gets its type.
    With ``base_only`` the adapter is left out, as the base for a separate file of :func:`export_gguf_adapter`.

    Args:
        tensor_type: "f16", "bf16", "f32" or "q8_0" for matrices; vectors are float32.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, if it is not recognized.

    The output appears when it is complete. Memory: the 4-bit model, if there is one, and one dense tensor.

    Raises FileExistsError if ``output`` exists, FileNotFoundError without a tokenizer, ValueError for a model that
    llama.cpp would compute differently or an adapter of another base, OSError if the disk is full.
    """
    import gguf
    from transformers import AutoConfig

    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output")
    if tensor_type not in TYPES:
        raise ValueError(f"type '{tensor_type}' is unknown: use one of {', '.join(TYPES)}")
    if base_only and adapter is None:
        raise ValueError(
            "base_only needs an adapter: it exports the base in the 4-bit format of the adapter's training"
        )
    folder = resolve_model(model)
    config = AutoConfig.from_pretrained(folder)
    architecture = architecture_of(config)
    writer = gguf.GGUFWriter(None, architecture.gguf)
    fields = read_tokenizer(load_fast_tokenizer(folder), config.vocab_size, end_ids(folder), pre_tokenizer)
    rope = write_rope(writer, config, architecture)
    weights = _weights(folder, config, adapter, base_only, device)
    tensors = gguf_tensors(weights, config, architecture, tensor_type)
    tensors += [_factors(name, tensor) for name, tensor in rope.items()]
    note = _write_keys(writer, config, architecture, _name(folder, fields), tensor_type)
    fields.write(writer)
    size = write_gguf(output, writer, tensors, on_progress)
    return Exported(output, size, len(tensors), [text for text in (note, fields.note) if text])


def _weights(
    folder: Path, config: Any, adapter: str | Path | None, base_only: bool, device: torch.device | str
) -> dict[str, DenseWeight]:
    stored = getattr(config, "quantization_config", None)
    if adapter is None and stored is None:
        return checkpoint_weights(folder)
    dtype = getattr(config, "dtype", None) or torch.float32
    if adapter is None:
        loaded, _ = load_quantized(folder, dtype, device=device, progress=False)
        return model_weights(loaded)
    # Copies of whole modules and biases are trained in float32; the model's dtype would round them.
    loaded, _ = load_for_inference(folder, adapter, torch.float32 if _trains_dense(Path(adapter)) else dtype, device)
    return model_weights(loaded.unload() if base_only else loaded)


def _trains_dense(adapter: Path) -> bool:
    """Whether an adapter has trained tensors of the base."""
    path = adapter / CONFIG_FILE
    options = json.loads(path.read_text()) if path.exists() else {}
    dense = ("modules_to_save", "trainable_token_indices")
    return options.get("bias", "none") != "none" or any(options.get(key) for key in dense)


def gguf_tensors(
    weights: dict[str, DenseWeight], config: Any, architecture: Architecture, wanted: str
) -> list[GgufTensor]:
    """The tensors of a file of type ``wanted`` for a model's weights, in the order of the layers.

    Raises ValueError for a weight that llama.cpp does not read, or one that is missing.
    """
    to_gguf = names_of(architecture, config.num_hidden_layers)
    if config.tie_word_embeddings and _HEAD in weights:
        weights = _without_tied_head(weights)
    if not config.tie_word_embeddings and _HEAD not in weights:
        raise ValueError(f"the weights lack {_HEAD}, and the config does not tie it to the embedding")
    if _HEAD in weights and not architecture.untied_head:
        raise ValueError(
            f"the model's head differs from its embedding, but llama.cpp reads no head for {architecture.gguf}: merge"
            " into a dense folder with qlora merge and serve that"
        )
    found = {}
    for name, weight in weights.items():
        if name.endswith("rotary_emb.inv_freq"):  # in old checkpoints; computed from the config today
            continue
        target = to_gguf(name)
        module = name.rpartition(".")[0].rpartition(".")[2]
        if target is None or (name.endswith(".bias") and module not in architecture.biases):
            raise ValueError(f"{name} has no place in a GGUF file of the architecture {architecture.gguf}")
        read = _read_for(name, weight.read, config, architecture)
        found[target] = GgufTensor(target, weight.shape, type_of(target, weight.shape, wanted), read)
    lost = [f"blk.{i}" for i in range(config.num_hidden_layers) if not any(n.startswith(f"blk.{i}.") for n in found)]
    lost += [name for name in ("token_embd.weight", "output_norm.weight") if name not in found]
    if lost:
        raise ValueError(f"the weights lack {', '.join(lost[:3])}")
    return sorted(found.values(), key=lambda tensor: _order(tensor.name))


def _without_tied_head(weights: dict[str, DenseWeight]) -> dict[str, DenseWeight]:
    """Drops a head that is the embedding itself; an adapter may have made it another one."""
    head, embedding = weights[_HEAD].read(), weights[_EMBEDDING].read()
    same = head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)
    return {name: weight for name, weight in weights.items() if name != _HEAD} if same else weights


def _read_for(name: str, read: Callable[[], Tensor], config: Any, architecture: Architecture) -> Callable[[], Tensor]:
    heads = rotated_heads(name, config) if architecture.interleaved_rope else None
    if heads is not None:
        return lambda: interleave_rows(read(), heads)
    if architecture.norm_offset and name.endswith("norm.weight"):
        return lambda: read().float() + architecture.norm_offset
    return read


def _order(name: str) -> tuple[int, int, str]:
    parts = name.split(".")
    return (1, int(parts[1]), name) if parts[0] == "blk" else (0 if parts[0] == "token_embd" else 2, 0, name)


def _factors(name: str, tensor: Tensor) -> GgufTensor:
    return GgufTensor(name, tuple(tensor.shape), "f32", lambda: tensor)


def _write_keys(writer: Any, config: Any, architecture: Architecture, name: str, wanted: str) -> str | None:
    """The keys of the architecture; returns a note about the context, or None."""
    import gguf

    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    length, note = context_length(config, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[file_types[wanted]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture.full_attention_every:
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None) is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    return note


def _name(folder: Path, fields: GgufTokenizer) -> str:
    """The model's name. llama.cpp strips spaces after special tokens if, and only if, it contains "phi-3" or "phi3"."""
    name = folder.resolve().name
    says = "phi-3" in name.lower() or "phi3" in name.lower()
    strips = fields.strips_after_special and {"<s>", "</s>", "<unk>", "<|endoftext|>"} <= set(fields.tokens)
    if strips and not says:
        return f"Phi-3 {name}"
    return name.lower().replace("phi-3", "phi").replace("phi3", "phi") if says and not strips else name


def end_ids(folder: Path) -> list[int]:
    """The tokens that end an answer, from the generation config of a model folder, else from its config."""
    from transformers import AutoConfig, GenerationConfig

    ends = None
    if (folder / "generation_config.json").exists():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if ends is None:
        ends = AutoConfig.from_pretrained(folder).eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())
