"""The examples run, with a tiny model if they take one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_dense, save_llama

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*command):
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_every_example_is_run_here():
    tested = {"textbook_walk.py", "finetune_trl.py", "train_fsdp2.py", "train_grpo.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_textbook_walk():
    assert "largest difference" in run(EXAMPLES / "textbook_walk.py")


@pytest.mark.parametrize("quantizer", ["qlora", "bitsandbytes", "accelerated"])
def test_finetune_trl(tmp_path, quantizer):
    save_llama(tmp_path / "model")
    options = ("--model", tmp_path / "model", "--steps", 10, "--limit", 16, "--output", tmp_path / "adapter")
    out = run(EXAMPLES / "finetune_trl.py", *options, "--quantizer", quantizer)
    first, last = out.split("loss ")[-1].split(",")[0].split(" -> ")
    assert float(last) < float(first)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_train_grpo(tmp_path):
    save_llama(tmp_path / "model")
    options = ("--model", tmp_path / "model", "--steps", 6, "--words", 3, "--max-tokens", 8, "--learning-rate", 1e-2)
    out = run(EXAMPLES / "train_grpo.py", *options, "--output", tmp_path / "adapter")
    assert "steps 1 to 5: reward" in out
    rewards = json.loads((tmp_path / "adapter" / "rewards.json").read_text())
    assert len(rewards) == 6
    assert all(0 <= reward <= 1 for reward in rewards)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)  # it was trained
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}  # and not cast by the rollouts


def test_train_fsdp2(tmp_path):
    model = save_dense("llama", tmp_path / "model")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    out = run(*launcher, EXAMPLES / "train_fsdp2.py", "--model", model, "--save", tmp_path / "saved")
    losses = [float(line.rsplit(" ", 1)[1]) for line in out.splitlines() if line.startswith("step")]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert len(list((tmp_path / "saved").glob("*.distcp"))) == 2
