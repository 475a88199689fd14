"""The command line: exit statuses, one-line errors, and the path from records to an answer."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_models import save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.cli import demo, main
from qlora.models.loading import chat_reply


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_llama(folder / "model")
    records = [{"prompt": "what is the sea ?", "completion": "the light stays on ."}] * 20
    (folder / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return folder


def finetune_command(world, output, *more):
    return [
        *("finetune", "--model", str(world / "model"), "--data", str(world / "data.jsonl"), "--output", str(output)),
        *("--rank", "2", "--max-length", "64", "--compute-dtype", "fp32", *more),
    ]


def test_finetune_then_generate(world, tmp_path, capsys):
    options = ("--max-steps", "60", "--learning-rate", "0.02", "--eval-steps", "60", "--save-steps", "60")
    assert main(finetune_command(world, tmp_path / "run", *options)) == 0
    out = capsys.readouterr().out
    assert "evaluation loss" in out
    assert "report.png" in out
    command = ["generate", "--model", str(world / "model"), "--adapter", str(tmp_path / "run/adapter")]
    assert main([*command, "--prompt", "what is the sea ?", "--max-new-tokens", "8", "--compute-dtype", "fp32"]) == 0
    assert capsys.readouterr().out.strip().endswith("the light stays on .")

    merged = tmp_path / "merged"
    merge = ["merge", "--model", str(world / "model"), "--adapter", str(tmp_path / "run/adapter"), "--output"]
    assert main([*merge, str(merged)]) == 0
    assert "layers merged" in capsys.readouterr().out
    dense = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert chat_reply(dense, tokenizer, "what is the sea ?", 8).endswith("the light stays on .")
    assert main([*merge, str(merged)]) == 1
    assert "exists: choose another output" in capsys.readouterr().err


def test_merge_of_an_adapter_on_some_layers_is_a_dense_model(world, tmp_path, capsys):
    options = ("--max-steps", "1", "--target-modules", "q_proj", "--eval-fraction", "0")
    assert main(finetune_command(world, tmp_path / "run", *options)) == 0
    merge = ["merge", "--model", str(world / "model"), "--adapter", str(tmp_path / "run/adapter")]
    assert main([*merge, "--output", str(tmp_path / "merged")]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in dense.parameters())
    assert dense(torch.arange(6)[None]).logits.isfinite().all()


def test_info_names_isa_kernels_and_versions(capsys, monkeypatch):
    monkeypatch.setenv("QLORA_CPU_ISA", "scalar")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch " in out
    assert "cpu/scalar: gemv_words" in out
    assert "not a multiple of 32" in out


NOWHERE = ("--model", "x", "--data", "x", "--output", "y")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["finetune", "--output", "x"], "--model is required unless --resume"),
        (["finetune", "--output", "no-such-run", "--resume"], "there is no run to resume"),
        (["generate", "--model", "./nowhere", "--prompt", "x"], "./nowhere is not a model folder"),
        (["finetune", *NOWHERE, "--quant-type", "nf3"], "quant_type='nf3' is unknown"),
        (["generate", "--model", "x", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must not be negative"),
    ],
)
def test_errors_are_one_line_and_status_1(command, message, capsys):
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_data_and_foreign_adapters_are_one_line(world, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    command = finetune_command(world, tmp_path / "run")
    command[4] = str(bad)
    assert main(command) == 1
    assert "bad.jsonl:1:" in capsys.readouterr().err
    assert main(["generate", "--model", str(world / "model"), "--adapter", str(tmp_path), "--prompt", "x"]) == 1
    assert "is not an adapter folder" in capsys.readouterr().err


def test_ctrl_c_saves_and_says_how_to_resume(world, tmp_path):
    """Sends a real signal to a real process; then the printed command finishes the run."""
    output = tmp_path / "run"
    options = ("--max-steps", "800", "--save-steps", "100", "--eval-steps", "800", "--keep-checkpoints", "20")
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora", *finetune_command(world, output, *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-100").exists():  # 700 steps remain then
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    newest = max(int(name.rpartition("-")[2]) for name in os.listdir(output) if name.startswith("checkpoint-"))
    assert 100 <= newest < 800
    assert f"checkpoint-{newest} is saved; continue with: qlora finetune --output {output} --resume" in error
    assert main(["finetune", "--output", str(output), "--resume", "--rank", "3"]) == 1  # another setting
    assert main(["finetune", "--output", str(output), "--resume"]) == 0
    assert (output / "adapter" / "adapter_model.safetensors").exists()


def test_the_demo_replaces_only_an_older_demo(tmp_path):
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an older demo"):
        demo._replace_older_demo(folder)
    assert (folder / "thesis.txt").exists()
    (folder / "settings.json").write_text("{}")  # a user's fine-tuning run
    with pytest.raises(FileExistsError, match="is not an older demo"):
        demo._replace_older_demo(folder)
    older = tmp_path / "older"
    demo._replace_older_demo(older)
    (older / "run").mkdir()
    demo._replace_older_demo(older)
    assert [path.name for path in older.iterdir()] == [demo.MARKER]


def test_the_demo_data_set_is_what_it_says():
    records = [json.loads(line) for line in demo.DATA.read_text().splitlines()]
    assert len(records) == 240
    assert len({record["prompt"] for record in records}) == 240
    assert all(record["completion"].startswith("Keeper's log:") for record in records)
    assert all(record["completion"].endswith("The light stays on.") for record in records)
    assert not set(demo.PROMPTS) & {record["prompt"] for record in records}


def test_a_killed_run_goes_on_from_a_complete_checkpoint(world, tmp_path):
    """After SIGKILL at any moment every checkpoint on disk is complete."""
    output = tmp_path / "run"
    options = ("--max-steps", "100", "--save-steps", "1", "--eval-fraction", "0", "--keep-checkpoints", "3")
    command = [sys.executable, "-m", "qlora", *finetune_command(world, output, *options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(output.glob("checkpoint-*"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    for folder in output.glob("checkpoint-*"):
        assert {"trainer_state.json", "optimizer.pt", "adapter_model.safetensors"} <= {p.name for p in folder.iterdir()}
    newest = max(int(folder.name.rpartition("-")[2]) for folder in output.glob("checkpoint-*"))
    assert newest < 100
    assert main(["finetune", "--output", str(output), "--resume"]) == 0
    assert (output / "checkpoint-100").exists()
    assert not (output / ".saving").exists()
