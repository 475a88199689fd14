"""Extends transformers' Trainer: atomic checkpoints of PEFT adapters, the chunked loss, FSDP2 on every device, and
interruption that saves a checkpoint on all processes."""

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qlora.adapters.lora import save_lora
from qlora.distributed import ignore_frozen, largest_list
from qlora.models.chunked_loss import ChunkedLoss, learnt_positions
from qlora.training.data import IGNORED

_STAGING = ".saving"


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / TRAINER_STATE_NAME).exists()]  # written last
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


class NoFiniteLoss(ValueError):
    """The loss or a parameter is nan or inf; the message gives the step, and for a loss the records of its batch."""


class AdapterTrainer(Trainer):
    """Trains and saves a PeftModel's adapter.

    A checkpoint is written to a staging folder and renamed when it is complete, so after a crash or on a full disk the
    previous one is still the newest. It includes all random states, so a resumed run equals an uninterrupted one.

    Args:
        chunked: compute the loss in chunks (batches have ``loss_positions``) instead of by the model itself.
        fsdp: :func:`shard` has sharded the model.
    """

    def __init__(
        self,
        *args: Any,
        keep_checkpoints: int = 2,
        chunked: bool = True,
        fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._keep = keep_checkpoints
        self._started = time.perf_counter()
        self._staging: Path | None = None
        self._fsdp = fsdp
        self._evaluated = torch.zeros(2)  # of an evaluation: sum of losses, learnt tokens
        self._unread: list[tuple[Tensor, Sequence[str]]] = []  # losses of this step's forwards, and their records
        # Trainer's flag for a model that is already sharded, which it then does not wrap in DDP.
        self.is_distributed_loading_by_transformers = fsdp
        ignore_frozen(self._model)
        self._loss = ChunkedLoss(self._model.get_base_model()).install() if chunked else None

    @property
    def _model(self) -> Any:
        assert self.model is not None
        return self.model

    @property
    def _is_writer(self) -> bool:
        return bool(self.args.should_save)

    def release(self) -> None:
        """Restores the model's own forward after training."""
        if self._loss is not None:
            self._loss.remove()

    # ---- a step ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._started = time.perf_counter()
        # The evaluation before training has marked the model as prepared. accelerate would then not wrap it in DDP, and
        # each process would train alone.
        vars(self._model).pop("_is_accelerate_prepared", None)
        self.accelerator._models.clear()
        return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        if self.args.world_size > 1 and not self._fsdp and not isinstance(model, DistributedDataParallel):
            raise RuntimeError(f"{type(model).__name__} is not wrapped in DDP: each process would train alone")
        return model, loader

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate would count all parameters at every step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "seconds": round(time.perf_counter() - self._started, 3)}, start_time)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        records = inputs.pop("records", ())
        labels = inputs["labels"]
        if not self._model.training:
            kwargs["num_items_in_batch"] = None  # which would make the loss a share of that of all processes
            labels = self._ignore_repeats(inputs)
        if self._loss is None:
            inputs.pop("loss_positions", None)
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        self._forbid_nan(loss, records)
        if not self._model.training:
            learnt = (labels[:, 1:] != IGNORED).sum()
            self._evaluated += torch.stack((loss.detach().double() * learnt, learnt.double()))
        return result

    def _ignore_repeats(self, inputs: dict[str, Any]) -> Tensor:
        """The labels of an evaluation batch without those of repeated rows, which leave the loss, too.

        accelerate repeats rows at the end, so that all processes have batches of the same size. A batch of nothing else
        keeps its labels for the model, because its mean over no token would be nan.
        """
        labels, state = inputs["labels"], self.accelerator.gradient_state
        if self.args.world_size <= 1 or not state.end_of_dataloader or state.remainder <= 0:
            return labels
        own = max(0, state.remainder - self.args.process_index * self.args.eval_batch_size)
        if own >= len(labels):
            return labels
        labels = labels.clone()
        labels[own:] = IGNORED
        if own > 0:
            inputs["labels"] = labels
            if "loss_positions" in inputs:
                inputs["loss_positions"] = learnt_positions(labels, IGNORED)
        return labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates; the loss is the mean over tokens, as in training. Trainer's is the mean of the batches' means."""
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        if dist.is_initialized():
            dist.all_reduce(self._evaluated)
        total, tokens = self._evaluated.tolist()
        assert output.metrics is not None
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = total / tokens
        return output

    def _forbid_nan(self, loss: Tensor, records: Sequence[str]) -> None:
        """Raises NoFiniteLoss, on all processes together, if a loss is nan or inf.

        It reads the losses of a step's forwards together after the last one, because a read waits for the GPU.
        """
        training = self._model.training
        self._unread.append((loss.detach(), records))
        if training and not self.accelerator.sync_gradients:
            return
        unread, self._unread = self._unread, []
        losses = torch.stack([loss for loss, _ in unread])
        here = losses.isfinite().all()
        if _on_all(here):
            return
        place = (
            f"in step {self.state.global_step + 1}" if training else f"evaluated after step {self.state.global_step}"
        )
        if here.item():
            raise NoFiniteLoss(f"the loss is not finite on another process {place}")
        first = int(losses.isfinite().to(torch.int32).argmin())
        records = unread[first][1]
        raise NoFiniteLoss(
            f"the loss is {losses[first].float().item()} {place}, on the records"
            f" {', '.join(records[:5])}{' …' if len(records) > 5 else ''}. {self._newest()}: check these records,"
            " or lower --learning-rate"
        )

    def forbid_nan_weights(self) -> None:
        """Raises NoFiniteLoss if a trained parameter is not finite.

        Called before saving, because the last step's loss does not yet reflect its update.
        """
        trained = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        checks = [getattr(p.detach(), "_local_tensor", p.detach()).isfinite().all() for _, p in trained]
        if not checks or _on_all(torch.stack(checks).all()):
            return
        bad = [name for (name, _), check in zip(trained, checks, strict=True) if not check.item()]
        raise NoFiniteLoss(
            f"after step {self.state.global_step} {len(bad)} trained parameters are not finite, e.g. {bad[:2]}."
            f" {self._newest()}: lower --learning-rate"
        )

    def _newest(self) -> str:
        saved = checkpoints(Path(str(self.args.output_dir)))
        return f"The newest checkpoint is {saved[-1] if saved else 'none'}"

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.forbid_nan_weights()
        output = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = output / _STAGING
        if self._is_writer:
            shutil.rmtree(self._staging, ignore_errors=True)
        _barrier()
        try:
            super()._save_checkpoint(model, trial)
            _barrier()  # waits until each process has written its random state
            if self._is_writer:
                _flush_to_disk(self._staging / name)
                self._remove(output / name)
                (self._staging / name).replace(output / name)
                for old in checkpoints(output)[: -self._keep]:
                    self._remove(old)
        except (RuntimeError, SafetensorError) as error:  # a full disk, as torch.save and safetensors report it
            kept = checkpoints(output)
            raise OSError(
                f"saving {output / name} failed ({error}); the newest complete checkpoint is"
                f" {kept[-1] if kept else 'none'}: make room and continue with --resume"
            ) from error
        finally:
            if self._is_writer:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _remove(self, checkpoint: Path) -> None:
        """Deletes a checkpoint. Moves it to the staging folder first, so that no partial checkpoint is visible."""
        assert self._staging is not None
        if checkpoint.exists():
            checkpoint.replace(self._staging / f"removed-{checkpoint.name}")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_lora(self._model, Path(output_dir or str(self.args.output_dir)), self._is_writer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._fsdp:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        state = get_optimizer_state_dict(
            self._model, _bare(self.optimizer), options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if self._is_writer:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._fsdp or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        folder = Path(checkpoint)
        state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        if any(isinstance(key, int) for key in state["state"]):  # saved by a run without --fsdp
            state = self._by_name(state)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self._model, _bare(self.optimizer), state, options=options)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _by_name(self, state: dict[str, Any]) -> dict[str, Any]:
        """Converts an optimizer's state dict from parameter indices to parameter names."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        result: dict[str, Any] = {"state": {}, "param_groups": []}
        for stored, group in zip(state["param_groups"], _bare(self.optimizer).param_groups, strict=True):
            here = [names[id(parameter)] for parameter in group["params"]]
            for place, name, parameter in zip(stored["params"], here, group["params"], strict=True):
                # A parameter that never had a gradient has no state yet.
                moments = {moment: torch.zeros(parameter.shape) for moment in ("exp_avg", "exp_avg_sq")}
                result["state"][name] = state["state"].get(place, {"step": torch.tensor(0.0), **moments})
            result["param_groups"].append({**stored, "params": here})
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass  # the adapter is loaded before the model is sharded or wrapped: qlora.adapters.lora.restore_lora

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # With more processes than at saving, a new process has no state: it seeds from seed, step and rank.
        if checkpoint is not None:
            world, rank = self.args.world_size, self.args.process_index
            name = "rng_state.pth" if world <= 1 else f"rng_state_{rank}.pth"
            if not (Path(checkpoint) / name).exists():
                torch.manual_seed(self.args.seed + self.state.global_step * max(1, world) + rank)
                return
        super()._load_rng_state(checkpoint)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _on_all(here: Tensor) -> bool:
    """Whether ``here`` is true on all processes."""
    everywhere = here.to(torch.int32)
    if dist.is_initialized():
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    return bool(everywhere.item())


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _flush_to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


# ---- several processes ----


def shard(model: Any, device: torch.device) -> None:
    """Shards a PeftModel over all processes with FSDP2, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in largest_list(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def share_of(batch_size: int, accumulation: int, world: int) -> tuple[int, int]:
    """(rows per forward, forwards per step) for each of ``world`` processes, with the rows of a step shared among them.

    Raises ValueError if the rows of a step cannot be shared evenly.
    """
    rows = batch_size * accumulation
    if rows % world:
        raise ValueError(
            f"batch_size={batch_size} times gradient_accumulation={accumulation} are {rows} rows per step, which"
            f" {world} processes cannot share: the product must be a multiple of {world}"
        )
    mine = rows // world
    size = math.gcd(mine, batch_size) if batch_size <= mine else mine
    return size, mine // size


# ---- interruptions ----


class SaveOnInterrupt(TrainerCallback):
    """On the first Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; on the second stops at once.

    A signal to one process stops all of them.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.interrupted = False  # this process got a signal
        self.stopped = False  # all processes stop because of a signal
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SaveOnInterrupt":
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            self._previous = {number: signal.signal(number, self._on_signal) for number in self._SIGNALS}
        return self

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        # Not with print, which raises an error if the signal arrives during another print.
        os.write(2, b"\nInterrupted: finishing this step, then saving a checkpoint (Ctrl-C again stops now).\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Read once: a signal that arrives after the processes have agreed counts for the next step.
        stop = self.interrupted
        if dist.is_initialized():
            flag = torch.tensor([stop], dtype=torch.int32, device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            stop = bool(flag.item())
        if stop:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
