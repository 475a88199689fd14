"""``qlora export``: writes a model or an adapter in the format of another runtime: GGUF (llama.cpp, Ollama) or vLLM."""

import argparse
from pathlib import Path

HELP = "write a model and its adapter for llama.cpp, Ollama or vLLM"
_GGUF = (
    "write one GGUF file for llama.cpp and Ollama: with --adapter the fine-tuned model, which is the base in the 4-bit"
    " format of the training, dequantized, plus the adapter; without it the model in the folder as it is"
)
_VLLM = "write a folder for vLLM: the base as bitsandbytes stores it, and the adapter in PEFT's format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    gguf = targets.add_parser("gguf", help=_GGUF, description=_GGUF)
    gguf.add_argument("--model", help="folder or Hugging Face id (with --adapter-only default: the adapter's base)")
    gguf.add_argument("--adapter", type=Path, help="adapter folder, from qlora finetune or PEFT")
    part = gguf.add_mutually_exclusive_group()
    part.add_argument("--adapter-only", action="store_true", help="write the adapter alone, as a GGUF LoRA")
    part.add_argument(
        "--base-only",
        action="store_true",
        help="write the base alone, in the 4-bit format of the adapter's training, dequantized: the file for a LoRA",
    )
    gguf.add_argument("--output", type=Path, required=True, help="file to write; must not exist")
    gguf.add_argument(
        "--type", help="of matrices: f16 (default), bf16, f32 or q8_0; of an adapter alone: f32 (default), f16 or bf16"
    )
    gguf.add_argument("--pre-tokenizer", metavar="NAME", help="llama.cpp's name of it, if it is not recognized")
    gguf.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    vllm = targets.add_parser("vllm", help=_VLLM, description=_VLLM)
    vllm.add_argument("--model", required=True, help="folder or Hugging Face id of the base")
    vllm.add_argument("--adapter", type=Path, required=True, help="adapter folder, from qlora finetune or PEFT")
    vllm.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    vllm.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(arguments: argparse.Namespace) -> int:
    from qlora.models.loading import require_train_extra

    require_train_extra()
    return _run_gguf(arguments) if arguments.target == "gguf" else _run_vllm(arguments)


def _run_gguf(arguments: argparse.Namespace) -> int:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("gguf is missing: in a checkout of qlora run pip install '.[train]'") from error
    if arguments.adapter_only and arguments.adapter is None:
        raise ValueError("--adapter-only needs --adapter")
    if arguments.base_only and arguments.adapter is None:
        raise ValueError("--base-only needs --adapter: it names the 4-bit format of the base")
    if arguments.model is None and not arguments.adapter_only:
        raise ValueError("--model is missing: only --adapter-only takes the base from the adapter")
    beside = arguments.output.with_suffix(".Modelfile")
    if beside.exists():
        raise FileExistsError(f"{beside} exists: choose another output")
    return _adapter_alone(arguments, beside) if arguments.adapter_only else _model(arguments, beside)


def _model(arguments: argparse.Namespace, beside: Path) -> int:
    import sys

    from rich.progress import Progress

    from qlora.devices import choose_device
    from qlora.export.gguf_model import end_ids, export_gguf
    from qlora.export.gguf_tokenizer import load_fast_tokenizer
    from qlora.export.ollama import modelfile
    from qlora.models.loading import resolve_model
    from qlora.storage.files import atomic_write

    with Progress(transient=True) as progress:
        task = progress.add_task("tensors", total=None)
        exported = export_gguf(
            arguments.model,
            arguments.output,
            adapter=arguments.adapter,
            base_only=arguments.base_only,
            tensor_type=arguments.type or "f16",
            pre_tokenizer=arguments.pre_tokenizer,
            device=choose_device(arguments.device).value,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    folder = resolve_model(arguments.model)
    text = modelfile(load_fast_tokenizer(folder), arguments.output.name, end_ids(folder))
    atomic_write(beside, text.encode())
    for note in exported.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"model: {exported.path} ({exported.tensors} tensors, {exported.bytes / 1e6:.1f} MB)")
    print(f"for Ollama: ollama create NAME -f {beside}")
    return 0


def _adapter_alone(arguments: argparse.Namespace, beside: Path) -> int:
    from qlora.export.gguf_adapter import base_folder, export_gguf_adapter
    from qlora.export.gguf_model import end_ids
    from qlora.export.gguf_tokenizer import load_fast_tokenizer
    from qlora.export.ollama import modelfile
    from qlora.storage.files import atomic_write

    path, size, layers = export_gguf_adapter(
        arguments.adapter, arguments.output, model=arguments.model, tensor_type=arguments.type or "f32"
    )
    base = base_folder(arguments.adapter, arguments.model)
    text = "# FROM names the base's file: qlora export gguf --base-only writes it.\n"
    text += modelfile(load_fast_tokenizer(base), "base.gguf", end_ids(base), path.name)
    atomic_write(beside, text.encode())
    print(f"adapter: {path} ({layers} layers, {size / 1e6:.1f} MB)")
    print(f"its base: qlora export gguf --model {base} --adapter {arguments.adapter} --base-only --output base.gguf")
    print(f"for Ollama: ollama create NAME -f {beside}")
    return 0


def _run_vllm(arguments: argparse.Namespace) -> int:
    from qlora.devices import choose_device
    from qlora.export.vllm import export_vllm

    command = export_vllm(
        arguments.model, arguments.adapter, arguments.output, device=choose_device(arguments.device).value
    )
    print(f"folder: {arguments.output}")
    print(f"run: {command}")
    return 0
