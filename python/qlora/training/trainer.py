"""transformers' Trainer with adapter checkpoints that are complete or absent, and a Ctrl-C that saves."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qlora.models.adapters import load_adapter, save_adapter
from qlora.models.prepare import qlora_layers

_STATE_FILE = "trainer_state.json"  # written last by the Trainer: its presence means a complete checkpoint
_STAGING = ".saving"


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / _STATE_FILE).exists()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


class AdapterTrainer(Trainer):
    """Saves and loads only adapters. A checkpoint is written in a staging folder and renamed when it is complete, so a
    crash or a full disk in the middle leaves the previous one as the newest."""

    def __init__(self, *args: Any, keep_checkpoints: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keep = keep_checkpoints
        self._staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = output / _STAGING
        shutil.rmtree(self._staging, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)
            _flush_to_disk(self._staging / name)
            shutil.rmtree(output / name, ignore_errors=True)
            (self._staging / name).replace(output / name)
        except RuntimeError as error:  # torch.save reports a full disk as one
            kept = checkpoints(output)
            raise OSError(
                f"saving {output / name} failed ({error}); the newest complete checkpoint is"
                f" {kept[-1] if kept else 'none'}: make room and continue with --resume"
            ) from error
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        for old in checkpoints(output)[: -self._keep]:
            shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_adapter(self._model, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Into the existing parameters: the optimizer holds references to them.
        before = {name: (layer.lora_a["default"], layer.lora_b["default"]) for name, layer in self._layers()}
        load_adapter(self._model, resume_from_checkpoint)
        for name, layer in self._layers():
            for holder, parameter in zip((layer.lora_a, layer.lora_b), before[name], strict=True):
                parameter.data.copy_(holder["default"].data)
                holder["default"] = parameter

    @property
    def _model(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _layers(self) -> Any:
        return qlora_layers(self._model).items()


def _flush_to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


class SaveOnInterrupt(TrainerCallback):
    """The first Ctrl-C finishes the step, saves a checkpoint and stops; the second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def __enter__(self) -> "SaveOnInterrupt":
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *unused: Any) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nInterrupted: finishing this step, then saving a checkpoint (again Ctrl-C: stop now).", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
