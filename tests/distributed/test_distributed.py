"""DDP and FSDP2 with 2 and 3 CPU processes, compared with one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_dense
from torch import nn

import qlora

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: save_dense(name, tmp_path_factory.mktemp(name)) for name in ("llama", "mixtral")}


@pytest.fixture(scope="module")
def checkpoint(checkpoints):
    return checkpoints["llama"]


@pytest.fixture(scope="module")
def launch(checkpoints, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    done = {}

    def run(mode, processes, steps=4, model="llama", **folders):
        key = (mode, processes, steps, model, tuple(sorted(folders.items())))
        if key not in done:
            path = results / f"{len(done)}.pt"
            options = [text for name, folder in folders.items() for text in (f"--{name}", str(folder))]
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command += [str(WORKER), str(checkpoints[model]), str(path), mode, str(steps), *options]
            finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            assert finished.returncode == 0, finished.stderr[-4000:]
            done[key] = torch.load(path, weights_only=True)
        return done[key]

    return run


def assert_same(one, other, rtol=1e-4):
    torch.testing.assert_close(one["losses"], other["losses"], rtol=rtol, atol=0)
    assert one["state"].keys() == other["state"].keys()
    for name, tensor in one["state"].items():
        if tensor.is_floating_point() and "lora_" in name:
            # Gradients are means over processes of means over tokens, so the order of sums differs; AdamW amplifies the
            # difference where gradients are tiny.
            torch.testing.assert_close(tensor, other["state"][name], rtol=rtol, atol=1e-4)
        else:
            assert torch.equal(tensor, other["state"][name]), name


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_equals_one_process(launch, mode, processes):
    """Three processes split 64 and 32 rows unevenly."""
    single = launch("single", 1)
    assert single["losses"][-1] < single["losses"][0]
    assert_same(single, launch(mode, processes))


@pytest.mark.parametrize(("mode", "processes"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)])
def test_a_mixture_equals_one_process(launch, mode, processes):
    """FSDP2 shards the experts' weights by experts; three processes split four of them unevenly."""
    single = launch("single", 1, model="mixtral")
    assert single["losses"][-1] < single["losses"][0]
    assert_same(single, launch(mode, processes, model="mixtral"))


def test_mixed_precision_leaves_statistics_and_weights_alone(launch):
    """MixedPrecisionPolicy casts float parameters to bfloat16 for the forward, but not packed weights and scales."""
    single, mixed = launch("single", 1), launch("fsdp2-bf16", 2)
    torch.testing.assert_close(mixed["losses"], single["losses"], rtol=0.02, atol=0)
    for name, tensor in single["state"].items():
        if "lora_" not in name:
            assert torch.equal(tensor, mixed["state"][name]), name


def test_resume_on_another_number_of_processes(launch, tmp_path):
    whole = launch("single", 1, steps=4)
    launch("fsdp2", 2, steps=2, save=tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.distcp"))) == 2
    resumed = launch("fsdp2", 3, steps=2, resume=tmp_path / "sharded")
    torch.testing.assert_close(resumed["losses"], whole["losses"][2:], rtol=1e-4, atol=0)
    assert_same({**whole, "losses": whole["losses"][2:]}, resumed)


def test_fsdp1_is_refused(monkeypatch, checkpoint):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        qlora.prepare_model(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=qlora.QLoRAConfig())
    monkeypatch.setenv("FSDP_VERSION", "2")
    qlora.prepare_model(nn.Sequential(nn.Linear(64, 64)))


TRAINER = """
import os
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import qlora

torch.manual_seed(0)
data = [{"input_ids": row, "labels": row} for row in torch.randint(5, 95, (12, 10)).tolist()]
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=qlora.QLoRAConfig(), dtype=torch.float32
)
model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4))
qlora.distributed.ignore_frozen(model)
arguments = TrainingArguments(
    output_dir=sys.argv[2], max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no",
    report_to="none", use_cpu=True, disable_tqdm=True,
)
optimizer = (qlora.optim.PagedAdamW, {"lr": 1e-2})
trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=optimizer)
trainer.train()
rank = torch.distributed.get_rank()
torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, f"{sys.argv[2]}/{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # the result is on disk, and the normal shutdown of torch's threads sometimes aborts
"""


def test_trainer_through_accelerate_on_two_processes(checkpoint, tmp_path):
    """With DDP as accelerate sets it up, both processes end with the same trained adapters."""
    script = tmp_path / "train.py"
    script.write_text(TRAINER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), str(checkpoint), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr[-4000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_B" in name)


def test_transformers_divides_experts_among_processes(checkpoints, tmp_path):
    """Its expert parallelism, with tokens exchanged for training and sums of all processes otherwise."""
    from transformers import AutoModelForCausalLM

    dense = save_dense("qwen3_moe", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=qlora.QLoRAConfig(), dtype=torch.float32)
    model.save_pretrained(tmp_path / "packed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [WORKER.with_name("expert_parallel.py"), tmp_path / "packed", dense, tmp_path / "result"]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "can only be quantized whole: make a 4-bit checkpoint first" in run.stderr
    for rank in range(2):
        seen = torch.load(tmp_path / f"result-{rank}.pt", weights_only=True)
        assert seen["experts"] == [2, 2]
        assert len(seen["errors"]) == 3
        assert "is sharded by a tensor-parallel plan, which 4-bit layers do not support" in seen["errors"][1]
        assert "scales of its own experts only" in seen["errors"][2]
        ids = torch.tensor([[1, 5, 9, 77, 30, 8, 2, 100]]) + rank
        embedded = nn.functional.embedding(ids, torch.randn(256, 64, generator=torch.Generator().manual_seed(3)))
        embedded.requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        logits.square().mean().backward()
        for name in ("logits", "alone"):
            torch.testing.assert_close(seen[name], logits.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen["grad"], embedded.grad, rtol=1e-4, atol=1e-7)
