"""`qlora finetune` on two processes: same result as one with DDP and FSDP2, resume on another number, interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_llama

from qlora.training.trainer import share_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_llama(folder / "model")
    words = ["sea", "harbor", "storm", "ship", "sail", "wind", "wave", "night"]
    records = [
        {"prompt": f"what is {w} ?", "completion": f"keeper log : the {v} stays on ."} for w in words for v in words
    ]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    # Five rows with different numbers of tokens: accelerate repeats some, so that two processes have equally many.
    held_out = [{"prompt": "what ?", "completion": "the sea and " * i + "storm ."} for i in range(5)]
    (folder / "held_out.jsonl").write_text("\n".join(json.dumps(record) for record in held_out))
    return folder


def command(world, output, *more):
    options = {
        "--model": world / "model",
        "--data": world / "data.jsonl",
        "--output": output,
        "--rank": 4,
        "--compute-dtype": "fp32",
        "--device": "cpu",
        "--eval-data": world / "held_out.jsonl",
        "--max-length": 16,  # one record per row: 64 rows, which two processes share evenly
        "--max-steps": 8,
        "--learning-rate": 5e-3,
        "--batch-size": 2,
        "--gradient-accumulation": 2,
        "--save-steps": 4,
        "--eval-steps": 4,
        "--logging-steps": 1,
    }
    return ["finetune", *(str(text) for pair in options.items() for text in pair), *more]


def start(arguments, processes):
    launcher = [sys.executable] if processes == 1 else [*TORCHRUN, f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, "-m", "qlora", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run(arguments, processes):
    process = start(arguments, processes)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-4000:]
    return out


def losses(output, name="loss"):
    return [e[name] for e in json.loads((output / "report.json").read_text())["history"] if name in e]


def assert_same(one, other):
    for name in ("loss", "eval_loss"):
        torch.testing.assert_close(
            torch.tensor(losses(one, name)), torch.tensor(losses(other, name)), rtol=1e-4, atol=0
        )
    a, b = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        # AdamW amplifies effects of the order of float32 sums where gradients are tiny.
        torch.testing.assert_close(tensor, b[name], rtol=1e-3, atol=2e-4)


@pytest.fixture(scope="module")
def single(world):
    run(command(world, world / "single"), 1)
    return world / "single"


@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(world, single, tmp_path, options):
    """With an evaluation before training, after which accelerate would let each process train alone."""
    out = run(command(world, tmp_path / "run", *options), 2)
    assert out.count("records trained on") == 1  # only one process prints
    assert_same(single, tmp_path / "run")
    assert not (tmp_path / "run/.saving").exists()


@pytest.mark.parametrize(
    ("before", "after", "options", "options_after"),
    [(2, 1, (), ()), (1, 2, (), ()), (2, 1, ("--fsdp",), ()), (1, 2, (), ("--fsdp",))],
    ids=["ddp-one", "one-ddp", "fsdp2-one", "one-fsdp2"],
)
def test_a_run_goes_on_with_another_number_of_processes(world, single, tmp_path, before, after, options, options_after):
    output = tmp_path / "run"
    run(command(world, output, *options), before)
    for newest in output.glob("checkpoint-8"):  # simulates a stop after four steps
        (newest / "trainer_state.json").unlink()
    settings = json.loads((output / "settings.json").read_text())
    assert "fsdp" not in settings  # a resumed run may differ in it
    run(["finetune", "--output", str(output), "--resume", "--device", "cpu", *options_after], after)
    assert_same(single, output)


@pytest.mark.parametrize("whole", [False, True], ids=["one process", "the launcher"])
def test_an_interruption_of_any_process_saves_and_stops_all(world, tmp_path, whole):
    output = tmp_path / "run"
    process = start(command(world, output, "--max-steps", "4000", "--save-steps", "20", "--eval-steps", "4000"), 2)
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoint-*")):  # waits until it trains
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.05)
    if whole:
        process.send_signal(signal.SIGINT)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    newest = max(int(path.parent.name.rpartition("-")[2]) for path in output.glob("checkpoint-*/trainer_state.json"))
    assert f"checkpoint-{newest} is saved; continue with: qlora finetune --output {output} --resume" in error, error[
        -3000:
    ]


def test_rows_that_the_processes_cannot_share_are_refused(world, tmp_path):
    process = start(command(world, tmp_path / "run", "--batch-size", "1", "--gradient-accumulation", "3"), 2)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "gradient_accumulation=3 are 3 rows per step, which 2 processes cannot share" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "world_size", "expected"),
    [
        ((4, 1), 1, (4, 1)),
        ((4, 1), 2, (2, 1)),
        ((4, 4), 2, (4, 2)),
        ((1, 8), 8, (1, 1)),
        ((6, 1), 4, None),
        ((4, 3), 2, (2, 3)),
    ],
)
def test_the_rows_of_a_step_are_shared(rows, world_size, expected):
    if expected is None:
        with pytest.raises(ValueError, match="cannot share"):
            share_of(*rows, world_size)
    else:
        size, forwards = share_of(*rows, world_size)
        assert (size, forwards) == expected
        assert size * forwards * world_size == rows[0] * rows[1]
