"""Fine-tunes a model on a file of records, and writes the adapter and a report to an output folder."""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.adapters.lora import restore_lora, save_base_facts, save_lora
from qlora.devices import Choice, choose_device, choose_dtype, why_not_gpu
from qlora.distributed import Processes
from qlora.models.loading import load_quantized, load_tokenizer, require_train_extra, resolve_model
from qlora.optim import PagedAdamW
from qlora.storage.files import atomic_write
from qlora.training.data import (
    Collator,
    Example,
    Examples,
    RecordCounts,
    Sequences,
    about_the_first,
    learnt_ends,
    load_examples,
    pack,
    packs_without_leaks,
    require_known_tokens,
    stop_tokens,
)
from qlora.training.memory import memory_by_kind, peak_memory, planned_memory, what_shrinks
from qlora.training.settings import (
    SETTINGS_FILE,
    FinetuneSettings,
    check_output,
    check_same_run,
    identity_of,
    with_old_limits,
)

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class FinetuneResult:
    """Result of a finished run."""

    adapter: Path
    model: Any
    tokenizer: Any
    bytes_dense: int  # of the model without adapters, if all weights were in the compute dtype
    bytes_now: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    steps: int
    records: RecordCounts
    device: Choice[torch.device]
    dtype: Choice[torch.dtype]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped the run; ``checkpoint`` is the newest complete one, None if there is none yet."""

    def __init__(self, output: Path, checkpoint: Path | None) -> None:
        saved = f"{checkpoint} is saved" if checkpoint else "no checkpoint was saved yet"
        super().__init__(f"interrupted: {saved}; continue with: qlora finetune --output {output} --resume")
        self.checkpoint = checkpoint


def _arguments(
    settings: FinetuneSettings, device: torch.device, dtype: torch.dtype, examples: Examples, world: int
) -> Any:
    """transformers' TrainingArguments for a run. With several processes, creating them starts the process group."""
    from transformers import TrainingArguments

    from qlora.training.trainer import share_of

    if settings.fsdp and world == 1:
        raise ValueError("fsdp needs several processes: launch with torchrun --nproc-per-node N -m qlora finetune …")
    if settings.offload_experts and world > 1:
        raise ValueError("offload_experts needs one process: DDP copies every weight to each GPU")
    rows, forwards = share_of(settings.batch_size, settings.gradient_accumulation, world)
    eval_steps = settings.eval_steps
    if eval_steps is None:
        steps = settings.max_steps
        if steps < 0:
            rows_of_step = settings.batch_size * settings.gradient_accumulation
            steps = math.ceil(settings.epochs * math.ceil(len(_rows(settings, examples.train)) / rows_of_step))
        eval_steps = max(50, math.ceil(steps / 10))
    on_cpu = device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=settings.output,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=forwards,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.lr_scheduler,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,  # AdapterTrainer stops at the first nan or inf
        save_steps=settings.save_steps,
        eval_strategy="steps" if examples.evaluation else "no",
        eval_steps=eval_steps,
        prediction_loss_only=True,
        seed=settings.seed,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and world > 1 else None,
        fp16=dtype == torch.float16,  # with a gradient scaler
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        include_num_input_tokens_seen="all",
        report_to="none",
    )
    if not on_cpu and world == 1:
        _pin(arguments, device)
    return arguments


def _rows(settings: FinetuneSettings, examples: list[Example]) -> Sequences:
    return pack(examples, settings.max_length) if settings.packing else Sequences([[e] for e in examples])


def _pin(arguments: Any, device: torch.device) -> None:
    """Makes a Trainer compute on ``device``; by default it uses the first GPU, and DataParallel with several GPUs."""
    _ = arguments.device  # creates the state that is changed below
    arguments._n_gpu = 1
    arguments.distributed_state.device = device
    vars(arguments)["_setup_devices"] = device
    if device.type == "cuda":
        torch.cuda.set_device(device)


def finetune(
    settings: FinetuneSettings,
    *,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    on_start: Callable[[str], None] = logger.info,
) -> FinetuneResult:
    """Runs a fine-tuning job.

    ``callbacks`` are additional transformers TrainerCallbacks. ``on_start`` receives a few lines about the device, the
    dtype and the data, only in the process that writes.

    With ``resume`` it continues from the newest complete checkpoint in the output folder, or from the start if there is
    none; the result equals that of an uninterrupted run. After Ctrl-C it saves a checkpoint and raises Interrupted. If
    memory is short it raises MemoryError with options that need less. Under torchrun every process calls it, and the
    first one writes. Raises ValueError for bad settings or data.
    """
    require_train_extra()
    settings.check()
    output, processes = Path(settings.output), Processes.of_environment()
    if processes.world > 1 and ":" in settings.device:
        raise ValueError(
            f"device='{settings.device}' is one GPU for {processes.world} processes: use cuda, one GPU for each process"
        )
    if processes.world > 1 and settings.device != "cpu" and why_not_gpu(processes.local_rank) is None:
        torch.cuda.set_device(processes.local_rank)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.compute_dtype, device.value)
    folder = resolve_model(settings.model)
    tokenizer = load_tokenizer(folder)
    check_output(output, resume)
    if resume:
        settings = with_old_limits(settings)
    # Reads the data before it loads or writes anything, because errors in the data are the most common.
    examples = load_examples(settings, tokenizer)
    require_known_tokens(examples, tokenizer, folder)
    identity = identity_of(settings, dtype.value, folder, examples.digests)
    if resume:
        check_same_run(output, identity)
    arguments = _arguments(settings, device.value, dtype.value, examples, processes.world)
    if processes.is_writer:
        on_start(f"device: {device}")
        on_start(f"compute dtype: {dtype}")
        on_start(about_the_first(examples.train[0], tokenizer))
        if examples.prompt_end:
            on_start(
                "the tokenizer has no chat template: a line break ends each prompt (qlora generate adds it; other"
                " programs that use this adapter have to)"
            )
        if not learnt_ends(examples.train, stop_tokens(tokenizer, folder)):
            on_start(
                "No record's answer ends in a token that ends generation: the model will not learn to stop. Check"
                " --show-example, and the end of turn in the chat template"
            )
    try:
        return _Run(settings, output, device, dtype, folder, tokenizer, examples, arguments).execute(
            identity, resume, callbacks
        )
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error) or "no memory"
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and "can't allocate memory" not in text and "out of memory" not in text:
            raise
        from transformers import AutoConfig

        advice = what_shrinks(settings, AutoConfig.from_pretrained(folder), dtype.value, processes.world)
        raise MemoryError(f"out of memory ({text.splitlines()[0]}). {advice}") from error


class _Run:
    """One run, with settings and data that have been checked."""

    def __init__(
        self,
        settings: FinetuneSettings,
        output: Path,
        device: Choice[torch.device],
        dtype: Choice[torch.dtype],
        folder: Path,
        tokenizer: Any,
        examples: Examples,
        arguments: Any,
    ) -> None:
        self.settings, self.output, self.device, self.dtype = settings, output, device, dtype
        self.folder, self.tokenizer, self.examples, self.arguments = folder, tokenizer, examples, arguments
        self.format: dict[str, Any] = {
            name: getattr(settings, name) for name in ("quant_type", "block_size", "double_quant")
        }

    def execute(self, identity: dict[str, Any], resume: bool, callbacks: Sequence[Any]) -> FinetuneResult:
        from transformers import set_seed

        from qlora.training.trainer import SaveOnInterrupt, checkpoints

        settings, output, is_writer = self.settings, self.output, self.arguments.should_save
        set_seed(settings.seed)
        started = time.perf_counter()
        if self.device.value.type == "cuda":  # so that the report has the peak of this run only
            torch.cuda.reset_peak_memory_stats(self.device.value)
        model, sizes = self._load()
        self.why_whole_logits = self._probe(model)
        newest = checkpoints(output)[-1] if resume and checkpoints(output) else None
        if newest is not None:
            restore_lora(model, newest)
        if is_writer:
            output.mkdir(parents=True, exist_ok=True)
            if not resume:
                atomic_write(output / SETTINGS_FILE, json.dumps(identity, indent=2).encode())
        interrupt = SaveOnInterrupt()
        trainer = self._trainer(model, [*callbacks, interrupt])
        try:
            before = self._loss_before(trainer, newest is not None)
            set_seed(settings.seed)  # again, so that training does not depend on the evaluation before it
            with interrupt:
                trainer.train(resume_from_checkpoint=str(newest) if newest else None)
            if interrupt.stopped:
                raise KeyboardInterrupt
            after = trainer.evaluate()["eval_loss"] if self.examples.evaluation else None
        except KeyboardInterrupt:
            saved = checkpoints(output)
            raise Interrupted(output, saved[-1] if saved else None) from None
        trainer.forbid_nan_weights()
        adapter = output / ADAPTER_FOLDER
        save_lora(model, adapter, is_writer)
        if is_writer:
            save_base_facts(adapter, model, self.folder, self.examples.prompt_end)
            self._report(trainer, model, sizes, before, after, time.perf_counter() - started)
        model.config.use_cache = True
        trainer.release()
        return FinetuneResult(
            adapter,
            model.eval(),
            self.tokenizer,
            sizes["dense"],
            sizes["now"],
            before,
            after,
            trainer.state.global_step,
            self.examples.counts,
            self.device,
            self.dtype,
        )

    def _load(self) -> tuple[Any, dict[str, int]]:
        settings = self.settings
        model, sizes = load_quantized(
            self.folder,
            self.dtype.value,
            device=self.device.value,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            target_modules=settings.target_modules,
            adapt_experts=settings.adapt_experts,
            use_dora=settings.dora,
            modules_to_save=None if settings.modules_to_save is None else list(settings.modules_to_save),
            progress=self.arguments.should_save,
            offload_experts=settings.offload_experts,
            offload_folder=Path(settings.output) / "experts",
            **self.format,
        )
        model.config.use_cache = False
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model, sizes

    def _probe(self, model: Any) -> str | None:
        """Why the loss cannot be computed in chunks, or None. Raises ValueError if packed records are not isolated."""
        from qlora.models.chunked_loss import why_not_chunked

        if self.settings.packing and not packs_without_leaks(model):
            raise ValueError(
                f"{type(model.get_base_model()).__name__} lets packed records attend to each other (it ignores"
                " position_ids): use --no-packing"
            )
        return why_not_chunked(model.get_base_model())

    def _trainer(self, model: Any, callbacks: list[Any]) -> Any:
        from qlora.training.trainer import AdapterTrainer, shard

        settings = self.settings
        if settings.fsdp:
            shard(model, self.device.value)
        evaluation = _rows(settings, self.examples.evaluation) if self.examples.evaluation else None
        optimizer = {
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "bits": settings.optimizer_bits,
            "paged": settings.is_paged,
            "page_dir": settings.page_dir,
        }
        return AdapterTrainer(
            model=model,
            args=self.arguments,
            train_dataset=_rows(settings, self.examples.train),
            eval_dataset=evaluation,
            data_collator=Collator(self.tokenizer.pad_token_id, settings.packing),
            callbacks=callbacks,
            optimizer_cls_and_kwargs=(PagedAdamW, optimizer),
            keep_checkpoints=settings.keep_checkpoints,
            chunked=self.why_whole_logits is None,
            fsdp=settings.fsdp,
        )

    def _loss_before(self, trainer: Any, is_resumed: bool) -> float | None:
        file = self.output / "eval_before.json"
        if is_resumed and file.exists():
            return json.loads(file.read_text())
        before = trainer.evaluate()["eval_loss"] if self.examples.evaluation else None
        if self.arguments.should_save:
            atomic_write(file, json.dumps(before).encode())
        return before

    def _report(
        self, trainer: Any, model: Any, sizes: dict[str, int], before: float | None, after: float | None, seconds: float
    ) -> None:
        from qlora.training.report import write_report

        history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        if before is not None:
            history.insert(0, {"step": 0, "eval_loss": before})
        config, world = model.config, self.arguments.world_size
        figures = {
            "model": self.settings.model,
            "device": str(self.device),
            "compute_dtype": str(self.dtype),
            "loss": f"whole logits: {self.why_whole_logits}" if self.why_whole_logits else "in chunks of the tokens",
            "optimizer": self.settings.optimizer,
            "processes": self.arguments.world_size,
            "eval_loss_before": before,
            "eval_loss_after": after,
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "records": asdict(self.examples.counts),
            "bytes_dense": sizes["dense"],
            "bytes_now": sizes["now"],
            "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "memory_bytes": memory_by_kind(model, self.settings.optimizer_bits),
            "planned_memory_bytes": planned_memory(config, self.settings, self.dtype.value, world),
            "peak_memory_bytes": peak_memory(self.device.value),
        }
        write_report(self.output, figures, history)
