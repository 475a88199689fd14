"""export_vllm: a folder for vLLM with the base as bitsandbytes stores it, and the adapter in PEFT's format."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.adapters.factors import Factors
from qlora.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from qlora.adapters.lora import check_adapter_folder
from qlora.export.lora import read_factors
from qlora.models.loading import load_for_inference, resolve_model
from qlora.nn import Linear4bit
from qlora.nn.replacing import head_names
from qlora.storage.files import complete_folder

ADAPTER_FOLDER = "adapter"
SERVED_NAME, BASE_NAME = "tuned", "base"  # the model's names in requests: with the adapter, and without
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices for --max-lora-rank
_TYPES = ("nf4", "fp4")

_README = """# A fine-tuned model for vLLM

The base is in 4 bit as bitsandbytes stores it, in the format of the adapter's training. `{adapter}` holds the adapter
in PEFT's format. Run it in the folder above this one:

```sh
pip install vllm-bnb-plugin    # with vLLM 0.28 or later; before, bitsandbytes>=0.48.1
{command}
```

Requests name the model `{served}` for the fine-tuned model, or `{base}` for the base alone. vLLM multiplies in
bfloat16. It loads such a base on one GPU only: no tensor parallelism.
"""


def export_vllm(
    model: str | Path, adapter: str | Path, output: str | Path, *, device: torch.device | str = "cpu"
) -> str:
    """Writes the folder ``output`` and returns the command that serves it.

    The 4-bit weights are those that the adapter was trained on, bit for bit; tensors that stay dense are bfloat16, or
    float16 if the checkpoint is. An adapter whose layers differ in rank or alpha is rewritten with one rank and a
    scaling of 1, because vLLM reads neither ``rank_pattern`` nor ``alpha_pattern``.

    Raises FileExistsError if ``output`` exists; ValueError for an adapter that vLLM cannot add (DoRA, trained biases,
    whole modules), a rank beyond 512, a base in int4, with 4-bit experts or with transposed layers; OSError if saving
    fails.
    """
    from transformers import AutoConfig

    from qlora.integrations.bitsandbytes.checkpoints import export_checkpoint

    adapter, output = Path(adapter), Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output")
    folder = resolve_model(model)
    facts = check_adapter_folder(adapter, folder)
    kind = facts.get("quant_type", _TYPES[0])
    if kind not in _TYPES:
        raise ValueError(
            f"{adapter} was trained on a base in {kind}: bitsandbytes, and so vLLM, has {' and '.join(_TYPES)}. Export"
            " the merged model: qlora merge, or qlora export gguf"
        )
    factors = read_factors(adapter)
    rank = max(layer.a.shape[0] for layer in factors.values())
    if rank > _RANKS[-1]:
        raise ValueError(f"{adapter} has rank {rank}: vLLM's --max-lora-rank is at most {_RANKS[-1]}; use qlora merge")
    dtype = getattr(AutoConfig.from_pretrained(folder), "dtype", None)
    dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    loaded, tokenizer = load_for_inference(folder, None, dtype, device, **facts)
    _check_layers(loaded, factors, adapter)
    command = serve_command(output, rank)
    with complete_folder(output) as staging:
        export_checkpoint(loaded, staging)
        tokenizer.save_pretrained(staging)
        (staging / ADAPTER_FOLDER).mkdir()
        _write_adapter(adapter, staging / ADAPTER_FOLDER, factors, rank)
        text = _README.format(
            adapter=ADAPTER_FOLDER, served=SERVED_NAME, base=BASE_NAME, command=serve_command(output.name, rank)
        )
        (staging / "README.md").write_text(text)
    return command


def serve_command(folder: str | Path, rank: int) -> str:
    """The command line for a folder of :func:`export_vllm` whose adapter has this rank."""
    largest = next(choice for choice in _RANKS if choice >= rank)
    return shlex.join(
        [
            *("vllm", "serve", str(folder), "--quantization", "bitsandbytes", "--load-format", "bitsandbytes"),
            *(
                "--dtype",
                "bfloat16",
                "--served-model-name",
                BASE_NAME,
                "--enable-lora",
                "--max-lora-rank",
                str(largest),
            ),
            *("--lora-modules", f"{SERVED_NAME}={Path(folder) / ADAPTER_FOLDER}"),
        ]
    )


def _check_layers(model: Any, factors: dict[str, Factors], adapter: Path) -> None:
    """Raises ValueError unless vLLM would find every linear layer in 4 bit, and every adapted layer at all."""
    modules = dict(model.named_modules())
    heads = head_names(model)
    for name, module in modules.items():
        if isinstance(module, Linear4bit):
            if module.dense_class is not nn.Linear:
                raise ValueError(
                    f"{name} is a transposed layer ({module.dense_class.__name__}), which vLLM cannot load in 4 bit:"
                    " use qlora merge"
                )
        elif isinstance(module, nn.Linear) and name not in heads:
            raise ValueError(f"{name} is dense in the 4-bit model, but vLLM expects it in 4 bit: use qlora merge")
    for name, layer in factors.items():
        if not isinstance(modules.get(name), Linear4bit):
            raise ValueError(f"{adapter} adapts {name}, which is not a 4-bit layer of the base: use qlora merge")
        found = modules[name]
        if (layer.a.shape[1], layer.b.shape[0]) != (found.in_features, found.out_features):
            raise ValueError(
                f"{adapter}: {name} has lora_A {tuple(layer.a.shape)} and lora_B {tuple(layer.b.shape)}, but the base's"
                f" weight is {(found.out_features, found.in_features)}"
            )


def _write_adapter(source: Path, target: Path, factors: dict[str, Factors], rank: int) -> None:
    from safetensors.torch import save_file

    config = json.loads((source / CONFIG_FILE).read_text())
    patterns = {key: config.get(key) for key in ("rank_pattern", "alpha_pattern")}
    if not any(patterns.values()):
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(source / name, target / name)
        return
    tensors = {}
    for name, (a, b, scaling) in factors.items():
        missing = rank - a.shape[0]  # rows and columns of zeros add nothing
        tensors[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(b * scaling, (0, missing)).contiguous()
    save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, **dict.fromkeys(patterns, {})}
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2))
