"""The main job: a model, a file of records, an output folder; a fine-tuned adapter and a report at the end."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qlora.models.adapters import save_adapter
from qlora.storage.files import atomic_write
from qlora.models.loading import (
    load_quantized,
    load_tokenizer,
    require_train_extra,
    resolve_model,
    save_quantization,
)
from qlora.models.prepare import PreparedReport
from qlora.training.data import Collator, Example, Sequences, pack, packs_without_leaks, read_records, tokenize_all
from qlora.training.settings import COMPUTE_DTYPES, FinetuneSettings

SETTINGS_FILE = "settings.json"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class RecordCounts:
    """How many records the run used, and how many it did not or only in part."""

    train: int
    evaluation: int
    bad: int  # malformed, left out with skip_bad
    cut: int  # longer than max_length, their end left out
    dropped: int  # no completion within max_length


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished run can show."""

    adapter: Path
    model: Any
    tokenizer: Any
    prepared: PreparedReport
    eval_loss_before: float | None
    eval_loss_after: float | None
    steps: int
    records: RecordCounts


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C; ``checkpoint`` is the newest complete one, None if there is none yet."""

    def __init__(self, output: Path, checkpoint: Path | None) -> None:
        saved = f"{checkpoint} is saved" if checkpoint else "no checkpoint was saved yet"
        super().__init__(f"interrupted, {saved}; continue with: qlora finetune --output {output} --resume")
        self.checkpoint = checkpoint


def _sha256(path: str | None) -> str | None:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None


def _identity(settings: FinetuneSettings) -> dict[str, Any]:
    """What has to stay the same between a run and its resumption."""
    identity = asdict(settings) | {
        "data_sha256": _sha256(settings.data),
        "eval_data_sha256": _sha256(settings.eval_data),
    }
    del identity["output"]
    return json.loads(json.dumps(identity))  # tuples become lists, as in the file


def _check_output(settings: FinetuneSettings, resume: bool) -> None:
    """Raises unless a new run may write to the output folder, or the run in it may be resumed with these settings."""
    output = Path(settings.output)
    if not resume:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(
                f"{output} exists and is not empty: choose another output, or continue that run with --resume"
            )
        return
    before, now = _read_settings(output), _identity(settings)
    changed = [f"{name}: {before.get(name)!r} -> {now[name]!r}" for name in now if before.get(name) != now[name]]
    if changed:
        details = ", ".join(changed)
        raise ValueError(f"{output} was started with other settings ({details}): a resumed run must equal the first")


def _read_settings(output: Path) -> dict[str, Any]:
    stored = output / SETTINGS_FILE
    if not stored.exists():
        raise FileNotFoundError(f"{output} has no {SETTINGS_FILE}: there is no run to resume")
    try:
        values = json.loads(stored.read_text())
        assert isinstance(values, dict)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{stored} is damaged: {error}") from error
    return values


def settings_of_run(output: str | Path) -> FinetuneSettings:
    """The settings that a run in ``output`` was started with."""
    known = {field.name for field in fields(FinetuneSettings)}
    values = {name: value for name, value in _read_settings(Path(output)).items() if name in known}
    if values.get("target_modules") is not None:
        values["target_modules"] = tuple(values["target_modules"])
    return FinetuneSettings(**{**values, "output": str(output)})


def load_examples(settings: FinetuneSettings, tokenizer: Any) -> tuple[list[Example], list[Example], RecordCounts]:
    """(training, evaluation, counts); the split is drawn with the seed.

    Raises BadRecord naming file and line, and ValueError if nothing to train on or, though asked for, to evaluate on is
    left.
    """
    records, bad = read_records(settings.data, settings.skip_bad)
    if settings.eval_data is not None:
        held_out, bad_held_out = read_records(settings.eval_data, settings.skip_bad)
        bad += bad_held_out
    else:
        random.Random(settings.seed).shuffle(records)
        count = max(1, round(len(records) * settings.eval_fraction)) if settings.eval_fraction > 0 else 0
        held_out, records = records[:count], records[count:]
    if not records:
        raise ValueError(f"eval_fraction={settings.eval_fraction} leaves no record to train on")
    train = tokenize_all(records, tokenizer, settings.max_length, settings.skip_bad)
    evaluation = tokenize_all(held_out, tokenizer, settings.max_length, settings.skip_bad)
    for group, wanted in ((train, True), (evaluation, bool(held_out))):
        if wanted and not group.examples:
            raise ValueError(f"max_length={settings.max_length} cuts off every completion: nothing is left to learn")
    counts = RecordCounts(
        train=len(train.examples),
        evaluation=len(evaluation.examples),
        bad=bad + train.bad + evaluation.bad,
        cut=train.cut + evaluation.cut,
        dropped=train.dropped + evaluation.dropped,
    )
    return train.examples, evaluation.examples, counts


def finetune(settings: FinetuneSettings, *, resume: bool = False, callbacks: Sequence[Any] = ()) -> FinetuneResult:
    """Runs the job. ``callbacks`` are additional transformers TrainerCallbacks.

    With ``resume`` continues from the newest complete checkpoint in the output folder (or from the start if there is
    none); the result equals that of an uninterrupted run. Raises Interrupted after a Ctrl-C, with a checkpoint saved.
    """
    require_train_extra()
    settings.check()
    from transformers import TrainingArguments, set_seed

    from qlora.training.report import memory_by_kind, write_report
    from qlora.training.trainer import AdapterTrainer, SaveOnInterrupt, checkpoints

    output = Path(settings.output)
    folder = resolve_model(settings.model)
    tokenizer = load_tokenizer(folder)
    _check_output(settings, resume)
    # Before anything is loaded or written: errors in the data are the commonest.
    train, held_out, counts = load_examples(settings, tokenizer)
    set_seed(settings.seed)
    quantization: dict[str, Any] = {
        "quant_type": settings.quant_type,
        "block_size": settings.block_size,
        "double_quant": settings.double_quant,
    }
    model, prepared = load_quantized(
        folder,
        COMPUTE_DTYPES[settings.compute_dtype],
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        target_modules=settings.target_modules,
        gradient_checkpointing=settings.gradient_checkpointing,
        **quantization,
    )
    model.config.use_cache = False
    model.config.pad_token_id = tokenizer.pad_token_id

    if settings.packing and not packs_without_leaks(model):
        raise ValueError(
            f"{type(model).__name__} lets packed records see each other (it ignores position_ids): use --no-packing"
        )

    def rows(examples: list[Example]) -> Sequences:
        return pack(examples, settings.max_length) if settings.packing else Sequences([[e] for e in examples])

    evaluation = rows(held_out) if held_out else None
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.lr_scheduler,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.logging_steps,
        save_steps=settings.save_steps,
        eval_strategy="steps" if evaluation else "no",
        eval_steps=settings.eval_steps,
        prediction_loss_only=True,
        seed=settings.seed,
        use_cpu=True,  # this build has kernels for the CPU only
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
    )
    output.mkdir(parents=True, exist_ok=True)
    if not resume:
        atomic_write(output / SETTINGS_FILE, json.dumps(_identity(settings), indent=2).encode())
    interrupt = SaveOnInterrupt()
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=rows(train),
        eval_dataset=evaluation,
        data_collator=Collator(tokenizer.pad_token_id, settings.packing),
        callbacks=[*callbacks, interrupt],
        keep_checkpoints=settings.keep_checkpoints,
    )
    newest = checkpoints(output)[-1] if resume and checkpoints(output) else None
    before_file = output / "eval_before.json"
    try:
        if newest is not None and before_file.exists():
            before = json.loads(before_file.read_text())
        else:
            before = trainer.evaluate()["eval_loss"] if evaluation else None
            atomic_write(before_file, json.dumps(before).encode())
            set_seed(settings.seed)  # the first step of a run does not depend on the evaluation before it
        with interrupt:
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        if interrupt.interrupted:
            raise KeyboardInterrupt
        after = trainer.evaluate()["eval_loss"] if evaluation else None
    except KeyboardInterrupt:
        saved = checkpoints(output)
        raise Interrupted(output, saved[-1] if saved else None) from None
    adapter = save_adapter(model, output / ADAPTER_FOLDER, base_model=settings.model)
    save_quantization(adapter, quantization)
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    if before is not None:
        history.insert(0, {"step": 0, "eval_loss": before})
    figures = {
        "model": settings.model,
        "eval_loss_before": before,
        "eval_loss_after": after,
        "steps": trainer.state.global_step,
        "records": asdict(counts),
        "bytes_before": prepared.bytes_before,
        "bytes_after": prepared.bytes_after,
        "trainable_params": prepared.trainable_params,
        "memory_bytes": memory_by_kind(model),
    }
    write_report(output, figures, history)
    model.config.use_cache = True
    return FinetuneResult(adapter, model.eval(), tokenizer, prepared, before, after, trainer.state.global_step, counts)
