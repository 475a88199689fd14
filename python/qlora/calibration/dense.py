"""The dense weights of a model whose layers are already in 4 bit: from memory, or read from its checkpoint."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora.storage.weights import WeightSource

# Gives the dense tensor of a parameter by its name in the model.
ReadDense = Callable[[str], Tensor]


def dense_weights(weights: str | Path | dict[str, Tensor], model: nn.Module) -> ReadDense:
    """A reader of the dense weights ``weights``: a mapping, a safetensors file, a model folder or id.

    The checkpoint of a transformers model is read through transformers, because names and layouts in the files may
    differ from those in the model. It maps tensors from the files and holds none. Raises ValueError for a checkpoint
    that is itself quantized.
    """
    if not isinstance(weights, dict) and not Path(weights).is_file() and hasattr(model, "config"):
        return _checkpoint(str(weights), type(model), revision_of(model, str(weights)))
    return WeightSource(weights).read


def revision_of(model: Any, path: str) -> str:
    """The revision of a repository that a model was loaded from; "main" for another repository or a folder."""
    if Path(path).exists() or path != getattr(model, "name_or_path", ""):
        return "main"
    return getattr(model.config, "_commit_hash", None) or "main"


def _checkpoint(folder: str, model_class: Any, revision: str) -> ReadDense:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, revision=revision)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        raise ValueError(f"{folder} is quantized by '{stored.get('quant_method')}': calibration needs dense weights")
    # Files whose layout differs from the model's are converted into this folder, which is deleted with the reader.
    scratch = tempfile.TemporaryDirectory(prefix="qlora-dense-")
    with _quiet():
        skeleton = model_class.from_pretrained(
            folder, config=config, revision=revision, dtype="auto", device_map={"": "disk"}, offload_folder=scratch.name
        )

    def read(name: str, scratch: Any = scratch) -> Tensor:
        module, _, leaf = name.rpartition(".")
        return skeleton.get_submodule(module)._hf_hook.weights_map[leaf]

    return read


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no warning that the weights are on the disk."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    accelerate = getLogger("accelerate.big_modeling")
    level = accelerate.level
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    accelerate.setLevel(ERROR)
    try:
        yield
    finally:
        accelerate.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
