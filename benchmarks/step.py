"""Times and takes apart a training step: a model of SmolLM2-135M's shape, rank-16 LoRA on all linear layers, PEFT.

Run: python benchmarks/step.py [peers] [switches] [profile] [--dtype fp32] [--unsloth PYTHON] (needs the extra [bench]).

- peers: the same user code on the layers of qlora, torch and bitsandbytes, and Unsloth's CPU path in its own Python.
- switches: what a user can change, each against the step without it.
- profile: where qlora's step spends its time, by torch.profiler.

Contenders take turns, each in a process of its own; medians, and ratios of rounds with half the distance of their
quartiles.
"""

import argparse
import collections
import contextlib
import functools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

import qlora
from qlora.bench.measure import Watch, alternate, describe, median_ratio
from qlora.bench.step import SMOLLM2
from qlora.models.chunked_loss import ChunkedLoss, learnt_positions
from qlora.optim import PagedAdamW

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class LeavesOut(Watch):
    """Prints why a contender is left out."""

    def failed(self, contender, error):
        print(f"{contender} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)


def save_model(folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig.from_dict(SMOLLM2), dtype=torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a"))  # Unsloth loads a tokenizer too
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(folder)


def adapted(folder, dtype, config=None, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, **options)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()


def stepping(model, batch, optimizer=None):
    """A call that takes one step. The optimizer is Trainer's default unless one is given."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(parameters) if optimizer else torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def run(_=0):
        loss = model(**batch)
        (loss["loss"] if isinstance(loss, dict) else loss.loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def as_finetune(model, batch):
    """The step as `qlora finetune` takes it: the loss in chunks, and its optimizer."""
    ChunkedLoss(model.get_base_model()).install()
    batch = {**batch, "loss_positions": learnt_positions(batch["labels"])}
    return stepping(model, batch, functools.partial(PagedAdamW, lr=1e-4))


def ours(folder, dtype, **options):
    return adapted(folder, dtype, qlora.QLoRAConfig(), **options)


def of_bitsandbytes(folder, dtype):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return adapted(folder, dtype, config)


def accelerated(folder, dtype):
    """bitsandbytes' layers with qlora's kernels."""
    from qlora.integrations.bitsandbytes import accelerate

    accelerate()
    return of_bitsandbytes(folder, dtype)


def compiled_layers(model):
    for layer in model.get_base_model().model.layers:
        layer.compile(dynamic=False)
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def batch_of(tokens):
    ids = torch.randint(0, SMOLLM2["vocab_size"], (1, tokens))
    return {"input_ids": ids, "labels": ids}


def packed(lengths):
    batch = batch_of(sum(lengths))
    return {**batch, "position_ids": torch.cat([torch.arange(length) for length in lengths])[None], "use_cache": False}


def padded(lengths):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, SMOLLM2["vocab_size"], mask.shape)
    return {"input_ids": ids, "labels": ids.where(mask, -100), "attention_mask": mask.long()}


LENGTHS = (192, 64, 128, 128)
# Each makes a call that takes one step, from the folder of the model, a dtype and a batch.
STEPS = {
    "qlora": lambda f, d, b: stepping(ours(f, d), b),
    "qlora, loss in chunks": lambda f, d, b: as_finetune(ours(f, d), b),
    "dense": lambda f, d, b: stepping(adapted(f, d), b),
    "bitsandbytes": lambda f, d, b: stepping(of_bitsandbytes(f, d), b),
    "bitsandbytes, accelerated": lambda f, d, b: stepping(accelerated(f, d), b),
    "attn_implementation='eager'": lambda f, d, b: stepping(ours(f, d, attn_implementation="eager"), b),
    "attn_implementation='flex_attention'": lambda f, d, b: stepping(
        ours(f, d, attn_implementation="flex_attention"), b
    ),
    "gradient checkpointing": lambda f, d, b: stepping(checkpointed(ours(f, d)), b),
    "AdamW without fused=True": lambda f, d, b: stepping(ours(f, d), b, functools.partial(torch.optim.AdamW, lr=1e-4)),
    "layer.compile() for each layer": lambda f, d, b: stepping(compiled_layers(ours(f, d)), b),
    f"records of {LENGTHS} tokens, packed": lambda f, d, b: stepping(ours(f, d), packed(LENGTHS)),
    f"records of {LENGTHS} tokens, padded": lambda f, d, b: stepping(ours(f, d), padded(LENGTHS)),
}
PEERS = ("qlora", "qlora, loss in chunks", "dense", "bitsandbytes", "bitsandbytes, accelerated")
ENVIRONMENTS = {
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
    "THP_MEM_ALLOC_ENABLE=1": {"THP_MEM_ALLOC_ENABLE": "1"},
}


class Served:
    """A step in a process of its own."""

    def __init__(self, *command, **environment):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  read when the process has ended
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )  # fmt: skip
        self.greeting = self.answer()

    def answer(self):
        if not (answer := self.process.stdout.readline()):
            self.log.seek(0)
            last = self.log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"its process ended: {' '.join(last)}")
        return answer.strip()

    def __call__(self, _=0):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.answer()


def serve(name, options):
    """The other end of Served."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    call = STEPS[name](options.folder, DTYPES[options.dtype], batch_of(options.tokens))
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        call()
        print("done", file=answers, flush=True)


def served(name, options, **environment):
    arguments = ("--serve", name, "--folder", options.folder, "--dtype", options.dtype, "--tokens", str(options.tokens))
    return Served(sys.executable, __file__, *arguments, **environment)


def unsloth(options, *arguments, **environment):
    if options.unsloth is None:
        raise ModuleNotFoundError("no --unsloth PYTHON")
    script = Path(__file__).with_name("unsloth_step.py")
    dtype = str(DTYPES[options.dtype]).removeprefix("torch.")
    made = Served(
        options.unsloth, script, options.folder, "--dtype", dtype, "--tokens", str(options.tokens), *arguments,
        **environment,
    )  # fmt: skip
    print(made.greeting, file=sys.stderr)
    return made


def peers(options):
    makers = {name: functools.partial(served, name, options) for name in PEERS}
    makers["Unsloth, NF4"] = functools.partial(unsloth, options)
    makers["Unsloth, NF4, compiled"] = functools.partial(unsloth, options, UNSLOTH_CPU_COMPILE="1")
    makers["Unsloth, dense"] = functools.partial(unsloth, options, "--dense")
    compare(options, makers, ("qlora", "qlora, loss in chunks"), "A step")


def switches(options):
    makers = {name: functools.partial(served, name, options) for name in STEPS if name not in PEERS[1:]}
    for name, environment in ENVIRONMENTS.items():
        makers[name] = functools.partial(served, "qlora", options, **environment)
    makers[PEERS[1]] = functools.partial(served, PEERS[1], options)
    compare(options, makers, ("qlora",), "What a user can change", inverse=True)


def compare(options, makers, references, title, inverse=False):
    made = {}
    for name, make in makers.items():
        if name not in references and options.only and not any(text in name for text in options.only):
            continue
        try:
            made[name] = make()
        except Exception as error:
            LeavesOut().failed(name, error)
    table = Table(title=f"{title}: {options.tokens} tokens, {options.dtype}", title_justify="left")
    for column in ("", "median s", *(f"it ÷ {name}" if inverse else f"{name} ÷ it" for name in references)):
        table.add_column(column)
    times = alternate(made, CPU, 1, options.repeats, budget_s=options.time_limit, watch=LeavesOut())
    for call in made.values():
        call.process.kill()
    for name in filter(times.get, made):
        cells, seconds = [], times[name]
        for reference in references:
            ratio, spread = median_ratio(*((seconds, times[reference]) if inverse else (times[reference], seconds)))
            cells.append(f"{ratio:.2f}" + ("" if math.isnan(spread) else f" ± {ratio * spread / 2:.2f}"))
        table.add_row(name, f"{statistics.median(seconds):.3f}", *cells)
    Console(width=120).print(table)


# ---- where the time goes ----

OUR_FORWARD, OUR_BACKWARD = "4-bit layers, forward", "4-bit layers, backward"
ATTENTION, ATTENTION_BACKWARD = "attention, forward", "attention, backward"
HEAD, NORMS, ROTARY, MLP = "head and loss", "norms", "rotary embedding", "activation and gate"
OPTIMIZER, REST, OUTSIDE = (
    "optimizer",
    "other operators (residuals, casts, …)",
    "Python and autograd, outside of operators",
)
LABELS = (HEAD, NORMS, ROTARY, MLP)


def labelled(function, label):
    @functools.wraps(function)
    def call(*arguments, **keywords):
        with record_function(label):
            return function(*arguments, **keywords)

    return call


@contextlib.contextmanager
def labels(model):
    """Marks the parts of a Llama model in a profile; those of the model itself for good."""
    base = model.get_base_model()
    base.loss_function = labelled(base.loss_function, HEAD)
    kinds = {"LlamaRMSNorm": NORMS, "LlamaRotaryEmbedding": ROTARY, "LlamaMLP": MLP}
    for module in base.modules():
        label = HEAD if module is base.lm_head else kinds.get(type(module).__name__)
        if label:
            module.forward = labelled(module.forward, label)
    functions = ((modeling_llama, "apply_rotary_pos_emb", ROTARY), (torch.nn.functional, "cross_entropy", HEAD))
    with contextlib.ExitStack() as stack:
        for owner, name, label in functions:
            stack.enter_context(mock.patch.object(owner, name, labelled(getattr(owner, name), label)))
        yield


def ancestors(event):
    while event is not None:
        yield event
        event = event.cpu_parent


def label_of_forward(event):
    for one in ancestors(event):
        if "scaled_dot_product" in one.name:
            return ATTENTION_BACKWARD if "backward" in one.name else ATTENTION
        if one.name in LABELS:
            return one.name
    return None


def kind(event, labels_by_sequence):
    names = [one.name for one in ancestors(event)]
    for name in names:
        if name.startswith("qlora::"):
            return OUR_BACKWARD if "backward" in name else OUR_FORWARD
        if name.startswith("Optimizer."):
            return OPTIMIZER
    if (label := label_of_forward(event)) is not None:
        return label
    for one in ancestors(event):  # a node of the backward has the number of its forward
        if one.name.startswith("autograd::engine::evaluate_function") and one.sequence_nr in labels_by_sequence:
            return labels_by_sequence[one.sequence_nr]
    return REST


def profiled(call, steps):
    """Seconds a step by kind of work, and of the whole step while it is profiled."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as run:
        begin = time.perf_counter()
        for _ in range(steps):
            call()
        total = (time.perf_counter() - begin) / steps
    events = run.events()
    labels_by_sequence = {}
    for event in events:
        label = label_of_forward(event)
        if label and event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            labels_by_sequence[event.sequence_nr] = label
    found = collections.Counter()
    for event in events:
        if event.name.startswith(("aten::", "qlora::")):
            found[kind(event, labels_by_sequence)] += event.self_cpu_time_total / 1e6 / steps
    found[OUTSIDE] = total - sum(found.values())
    return found, total


def takes_apart(options):
    table = Table(title=f"Where a step of qlora spends its time: {options.tokens} tokens, {options.dtype}")
    made = {"whole logits": stepping, "loss in chunks": as_finetune}
    columns = {}
    for name, make in made.items():
        model = ours(options.folder, DTYPES[options.dtype])
        call = make(model, batch_of(options.tokens))
        unprofiled = statistics.median(alternate({name: call}, CPU, 1, options.repeats)[name])
        with labels(model):
            columns[name] = (*profiled(call, options.repeats), unprofiled)
    table.add_column("ms a step")
    for name in made:
        table.add_column(name, justify="right")
    for part in (OUR_FORWARD, OUR_BACKWARD, ATTENTION, ATTENTION_BACKWARD, *LABELS, OPTIMIZER, REST, OUTSIDE):
        cells = (f"{1e3 * found[part]:.0f} ({found[part] / total:.0%})" for found, total, _ in columns.values())
        table.add_row(part, *cells)
    table.add_section()
    table.add_row("the step, profiled", *(f"{1e3 * total:.0f}" for _, total, _ in columns.values()))
    table.add_row("the step", *(f"{1e3 * unprofiled:.0f}" for *_, unprofiled in columns.values()))
    Console(width=120).print(table)


WORKS = {"peers": peers, "switches": switches, "profile": takes_apart}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", nargs="*", help=", ".join(WORKS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--time-limit", type=float, default=40.0, help="seconds a contender; slower ones: fewer rounds")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="contenders whose names have one of these texts")
    parser.add_argument("--unsloth", metavar="PYTHON", help="an interpreter that has Unsloth")
    parser.add_argument("--serve", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options)
        return
    if unknown := set(options.work) - set(WORKS):
        parser.error(f"{', '.join(unknown)} is unknown: use {', '.join(WORKS)}")
    print(", ".join(f"{key} {value}" for key, value in describe(CPU).items()))
    with tempfile.TemporaryDirectory() as options.folder:
        save_model(options.folder)
        for work in options.work or WORKS:
            WORKS[work](options)


if __name__ == "__main__":
    main()
