"""Reads weights one tensor at a time, so that filling a model on the meta device needs memory for only one copy."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def is_meta(tensor: Tensor) -> bool:
    return tensor.device.type == "meta"


def open_safetensors(path: Path) -> Any:
    """``safetensors.safe_open`` for untrusted files; raises ValueError with the file's name if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated or damaged): {error}") from error


def _shard_names(index: Path) -> set[str]:
    """File names in a checkpoint's index; raises ValueError unless they are plain names in its own folder."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a checkpoint index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} must be the name of a file in the same folder")
    return names


def _model_files(folder: Path) -> list[Path]:
    """The files of a folder that transformers would read: the shards of its index, or model.safetensors.

    Other files in the folder (an older copy, an adapter) do not belong to the model.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted({folder / name for name in _shard_names(index)})
    single = folder / "model.safetensors"
    if not single.exists():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        raise FileNotFoundError(
            f"{folder} holds neither model.safetensors nor {index.name}"
            + (f", but {others[:3]}: to read one of them, pass the path of that file" if others else "")
        )
    return [single]


class WeightSource:
    """Tensors by parameter name, from a mapping, a safetensors file, or a folder of shards."""

    def __init__(self, weights: str | Path | dict[str, Tensor]) -> None:
        self._mapping: dict[str, Tensor] | None = None
        self._file_of: dict[str, Path] = {}
        if isinstance(weights, dict):
            self._mapping = weights
            self.names = set(weights)
            return
        path = Path(weights)
        files = _model_files(path) if path.is_dir() else [path]
        for file in files:
            with open_safetensors(file) as handle:
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    self._file_of[name] = file
        self.names = set(self._file_of)

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file: nothing is allocated, and the pages are released with the tensor.

        Raises KeyError for an unknown name.
        """
        if name not in self.names:
            raise KeyError(f"the weights lack '{name}'; they contain e.g. {sorted(self.names)[:3]}")
        if self._mapping is not None:
            return self._mapping[name]
        with open_safetensors(self._file_of[name]) as handle:
            return handle.get_tensor(name)

    def fill(self, module: nn.Module, name: str, *, copy: bool) -> None:
        """Fills the direct parameters of ``module`` that are on the meta device; ``name`` is the module's name.

        Without ``copy`` they stay mapped from the file. Use that for a module that is replaced at once: large temporary
        copies between small permanent tensors would fragment the heap to several times the size of the result. Raises
        KeyError for a missing tensor and ValueError for a wrong shape.
        """
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if is_meta(parameter):
                key = f"{name}.{leaf}" if name else leaf
                value = self.read(key)
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"'{key}' has shape {tuple(value.shape)}: the model needs {tuple(parameter.shape)}"
                    )
                value = value.to(parameter.dtype, copy=copy)
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def _fill_buffer(self, module: nn.Module, leaf: str, key: str) -> None:
        value, buffer = self.read(key), module._buffers[leaf]
        if buffer is not None and value.shape != buffer.shape:
            raise ValueError(f"'{key}' has shape {tuple(value.shape)}: the model needs {tuple(buffer.shape)}")
        module._buffers[leaf] = value.to(value.dtype if buffer is None else buffer.dtype, copy=True)

    def fill_rest(self, model: nn.Module) -> None:
        """Fills all tensors that are still on the meta device and ties shared weights again.

        Raises KeyError with the names that the weights lack, and ValueError for a wrong shape.
        """
        tie = getattr(model, "tie_weights", None)
        for name, module in model.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                key = f"{name}.{leaf}" if name else leaf
                if is_meta(parameter) and (key in self.names or not callable(tie)):
                    self.fill(module, name, copy=True)
            for leaf in list(module._buffers):
                key = f"{name}.{leaf}" if name else leaf
                if key in self.names and leaf not in module._non_persistent_buffers_set:
                    self._fill_buffer(module, leaf, key)
        if callable(tie):
            with suppress(NotImplementedError):
                tie()
        left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if is_meta(t)]
        if left:
            raise KeyError(f"the weights lack {len(left)} tensors of the model, e.g. {left[:3]}")
