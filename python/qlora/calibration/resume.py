"""Keeps the finished blocks of a calibration on disk, so that a killed run goes on where it stopped."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora.calibration.report import LayerReport
from qlora.storage.files import atomic_write
from qlora.storage.weights import open_safetensors


class PartialRun:
    """A folder with one safetensors file for each finished block, whose metadata holds the reports of its layers."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Raises ValueError if the folder belongs to a run with other settings."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / "calibration.json"
        text = json.dumps(identity, indent=2, sort_keys=True)
        if settings.exists() and settings.read_text() != text:
            raise ValueError(f"{folder} holds a calibration with other settings or other text: delete it to start anew")
        atomic_write(settings, text.encode())

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def load(self, index: int) -> tuple[dict[str, Tensor], list[LayerReport]] | None:
        """Tensors and reports of a block; None if it is not finished. Raises ValueError for a damaged file."""
        path = self._path(index)
        if not path.exists():
            return None
        with open_safetensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            reports = [LayerReport(**entry) for entry in json.loads(file.metadata()["layers"])]
        return tensors, reports

    def save(self, index: int, tensors: dict[str, Tensor], reports: list[LayerReport]) -> None:
        """Writes a finished block, whole or not at all."""
        from safetensors.torch import save

        layers = json.dumps([asdict(report) for report in reports])
        content = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        atomic_write(self._path(index), save(content, {"layers": layers}))
