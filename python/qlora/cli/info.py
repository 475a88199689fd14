"""``qlora info``: shows what a bug report needs: device, instruction set, chosen kernels and versions."""

import argparse
import platform
from importlib import metadata

HELP = "show device, instruction set, chosen kernels and versions"

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    import torch

    from qlora._load import CUDA_LIBRARY, has_cuda_ops

    if torch.version.cuda is None:
        return "cpu (this torch has no CUDA)"
    if not has_cuda_ops():
        return (
            f"cpu (torch has CUDA {torch.version.cuda}, but {CUDA_LIBRARY} was not built: see QLORA_CUDA in the README)"
        )
    if not torch.cuda.is_available():
        return f"cpu; CUDA kernels are built in (torch has CUDA {torch.version.cuda}, but sees no GPU)"
    gpu = torch.cuda.get_device_properties(0)
    return f"cpu; cuda: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} SMs"


def run(arguments: argparse.Namespace) -> int:
    import torch

    import qlora
    from qlora import _C
    from qlora.devices import choose_device, choose_dtype

    build = f"built with {_C.COMPILER}, torch {_C.BUILD_TORCH}; needs torch >= {_C.TORCH_TARGET}"
    print(f"qlora          {qlora.__version__} ({build})")
    print(f"python         {platform.python_version()} on {platform.system()} {platform.machine()}")
    for library in _LIBRARIES:
        print(f"{library:<14} {_version(library)}")
    print(f"device         {_devices()}")
    device = choose_device()
    dtype = choose_dtype("auto", device.value)
    print(
        f"auto           {device.value} ({device.reason}), {str(dtype.value).removeprefix('torch.')} ({dtype.reason})"
    )
    print(f"threads        {torch.get_num_threads()}")
    print(f"isa            {_C.active_isa()} of {', '.join(_C.runnable_isas())} (set QLORA_CPU_ISA to choose another)")
    weight = qlora.quantize(torch.zeros(8, 4096))
    odd = qlora.quantize(torch.zeros(8, 100))
    for label, x, w in (
        ("1 token", torch.zeros(1, 4096), weight),
        ("1 token, k=100", torch.zeros(1, 100), odd),
        ("512 tokens", torch.zeros(512, 4096), weight),
        ("… bfloat16", torch.zeros(512, 4096, dtype=torch.bfloat16), weight),
    ):
        print(f"{label:<14} {qlora.explain(x, w)}")
    return 0
