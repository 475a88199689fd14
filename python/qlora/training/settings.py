"""Settings of a fine-tuning run, and the file by which a resumed run checks that they are the same."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from qlora.devices import AUTO, DTYPES
from qlora.nn.offload import PLACES
from qlora.ops import check_format
from qlora.storage.fingerprint import checkpoint_fingerprint

SETTINGS_FILE = "settings.json"
# Settings that may differ between a run and its resumption.
FREE_SETTINGS = ("output", "device", "page_dir", "fsdp", "offload_experts")
_WITHOUT_EFFECT = ("eval_steps",)  # on the result; its default has changed
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")


@dataclass(frozen=True)
class FinetuneSettings:
    """Everything that determines the result of a run; stored in the output folder, where a resumed run checks it."""

    model: str
    data: str
    output: str
    eval_data: str | None = None
    eval_fraction: float = 0.1  # share of the records held out for evaluation, if eval_data is not given
    max_eval_records: int | None = 500  # at most so many of them; None: no limit
    rank: int = 16
    alpha: float | None = None  # None: same as rank
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None  # None: all linear layers
    adapt_experts: bool = False  # also an adapter for each expert of a mixture
    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    dora: bool = False  # weight-decomposed adapters (Liu et al. 2024)
    modules_to_save: tuple[str, ...] | None = None  # layers trained in full and saved with the adapter
    device: str = AUTO  # auto, cpu, cuda, cuda:N
    compute_dtype: str = AUTO  # auto, bf16, fp16, fp32; a resumed run keeps its first choice
    optimizer: str = "adamw"
    page_dir: str | None = None  # folder for paged optimizer state on the CPU
    offload_experts: str | None = None  # ram or disk: where the experts of a mixture stay instead of on the device
    fsdp: bool = False  # with several processes: shard the model instead of copying it to each
    epochs: float = 3.0
    max_steps: int = -1  # > 0 overrides epochs
    batch_size: int = 1  # rows per forward
    gradient_accumulation: int = 1  # forwards per step; several processes share the rows of a step
    max_length: int = 512  # tokens per row
    packing: bool = True
    learning_rate: float = 2e-4
    warmup_steps: int = 0
    lr_scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    save_steps: int = 50
    eval_steps: int | None = None  # None: ten times in a run, and not more often than every 50 steps
    logging_steps: int = 5
    keep_checkpoints: int = 2
    seed: int = 0
    skip_bad: bool = False

    @property
    def optimizer_bits(self) -> int:
        return 8 if self.optimizer.endswith("8bit") else 32

    @property
    def is_paged(self) -> bool:
        return self.optimizer.startswith("paged")

    def check(self) -> None:
        """Raises ValueError with the first value that breaks its rule."""
        rules: list[tuple[str, bool, str]] = [
            ("rank", self.rank >= 1, "at least 1"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("eval_fraction", 0 <= self.eval_fraction < 1, "in [0, 1)"),
            ("compute_dtype", self.compute_dtype in (AUTO, *DTYPES), f"one of {AUTO}, {', '.join(DTYPES)}"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("gradient_accumulation", self.gradient_accumulation >= 1, "at least 1"),
            ("max_length", self.max_length >= 2, "at least 2"),
            ("learning_rate", self.learning_rate > 0, "positive"),
            ("save_steps", self.save_steps >= 1, "at least 1"),
            ("eval_steps", self.eval_steps is None or self.eval_steps >= 1, "at least 1"),
            ("max_eval_records", self.max_eval_records is None or self.max_eval_records >= 1, "at least 1"),
            ("max_steps", self.max_steps == -1 or self.max_steps >= 1, "at least 1, or -1 for whole epochs"),
            ("alpha", self.alpha is None or self.alpha != 0, "another number: with 0 the adapter has no effect"),
            ("keep_checkpoints", self.keep_checkpoints >= 1, "at least 1"),
            ("epochs", self.epochs > 0, "positive"),
            (
                "page_dir",
                self.page_dir is None or self.is_paged,
                "left out without a paged optimizer",
            ),
            (
                "adapt_experts",
                not (self.adapt_experts and (self.dropout > 0 or self.dora)),
                "left out with dropout and dora, which adapters on experts do not have",
            ),
            ("offload_experts", self.offload_experts in (None, *PLACES), f"one of {', '.join(PLACES)}"),
            (
                "fsdp",
                not (self.fsdp and self.offload_experts),
                "left out with offload_experts: experts are on the host, and cannot be sharded",
            ),
            (
                "fsdp",
                not (self.fsdp and self.optimizer_bits == 8),
                "left out with 8-bit state, whose blocks FSDP2 would cut",
            ),
        ]
        check_format(self.quant_type, self.block_size)
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")


# ---- the file of a run ----


def identity_of(settings: FinetuneSettings, dtype: torch.dtype, base: Path, digests: dict[str, Any]) -> dict[str, Any]:
    """Everything that must be the same in a run and its resumption."""
    names = {value: name for name, value in DTYPES.items()}
    identity = (
        asdict(settings) | digests | {"compute_dtype": names[dtype], "base_fingerprint": checkpoint_fingerprint(base)}
    )
    for name in FREE_SETTINGS:
        del identity[name]
    return json.loads(json.dumps(identity))  # converts tuples to lists, as in the file


def check_output(output: Path, resume: bool) -> None:
    """Raises FileExistsError if a new run's folder is not empty, FileNotFoundError if there is no run to resume."""
    if resume:
        _read_settings(output)
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists and is not empty: choose another output, or continue that run with --resume"
        )


def check_same_run(output: Path, now: dict[str, Any]) -> None:
    """Raises ValueError with the settings that differ from those of the run in ``output``."""
    defaults = {field.name: field.default for field in fields(FinetuneSettings)}  # of settings newer than the run
    before = defaults | _read_settings(output)
    names = [name for name in now if name not in _WITHOUT_EFFECT]
    changed = [f"{name}: {before.get(name)!r} -> {now[name]!r}" for name in names if before.get(name) != now[name]]
    if changed:
        details = ", ".join(changed)
        raise ValueError(f"{output} was started with other settings ({details}): a resumed run needs the same ones")


def _read_settings(output: Path) -> dict[str, Any]:
    stored = output / SETTINGS_FILE
    if not stored.exists():
        raise FileNotFoundError(f"{output} has no {SETTINGS_FILE}: there is no run to resume")
    try:
        values = json.loads(stored.read_text())
        assert isinstance(values, dict)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{stored} is damaged: {error}") from error
    return {"max_eval_records": None} | values  # runs from before that limit have held out more records


def with_old_limits(settings: FinetuneSettings) -> FinetuneSettings:
    """The settings as the run in ``settings.output`` understood them, which may be from before a limit existed."""
    limit = _read_settings(Path(settings.output))["max_eval_records"]
    return replace(settings, max_eval_records=None) if limit is None else settings


def settings_of_run(output: str | Path) -> FinetuneSettings:
    """The settings of the run in ``output``."""
    known = {field.name for field in fields(FinetuneSettings)}
    values = {name: value for name, value in _read_settings(Path(output)).items() if name in known}
    for name in ("target_modules", "modules_to_save"):
        if values.get(name) is not None:
            values[name] = tuple(values[name])
    return FinetuneSettings(**{**values, "output": str(output)})
