"""Experts whose weights stay on the host: same results, two weights at a time, and files instead of memory."""

import copy
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import TOKENS, logits, reloaded, save_dense, save_llama
from transformers import AutoConfig, AutoModelForCausalLM

import qlora
from qlora.cli import main
from qlora.models.loading import load_quantized
from qlora.nn import Experts4bit
from qlora.nn.offload import Stage, is_mapped, mapped_copy, offload_experts

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def load(folder, adapters=True):
    torch.manual_seed(0)
    model = reloaded(folder, quantization_config=qlora.QLoRAConfig())
    return (
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS)).train()
        if adapters
        else model
    )


def step(model):
    loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.item(), gradients


@pytest.fixture
def copying(monkeypatch):
    """Copies weights as for a GPU although the products run on the CPU, and counts the copies that are alive."""
    alive, most = set(), [0]
    copy = Stage._copy

    def counted(self, weight, device):
        result, event = copy(self, weight, device)
        number = object()
        alive.add(number)
        most[0] = max(most[0], len(alive))
        weakref.finalize(result.untyped_storage(), alive.discard, number)
        return result, event

    monkeypatch.setattr(Stage, "is_needed", lambda *_: True)
    monkeypatch.setattr(Stage, "_copy", counted)
    return most


@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_steps_are_those_of_a_model_on_the_device(name, where, checkpointing, copying, tmp_path):
    folder = save_dense(name, tmp_path / "model")
    plain, offloaded = load(folder), load(folder)
    bytes_of_experts = sum(p.nbytes for p in offloaded.parameters() if p.ndim == 3 and p.dtype == torch.uint8)
    assert offload_experts(offloaded, where, tmp_path / "weights") == bytes_of_experts
    if checkpointing:
        for model in (plain, offloaded):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    stage = next(m.stage for m in offloaded.modules() if isinstance(m, Experts4bit))
    for _ in range(3):
        expected, gradients = step(plain)
        before, ahead = stage.copies, stage.ahead
        loss, mine = step(offloaded)
        assert loss == expected
        assert all(torch.equal(mine[n], grad) for n, grad in gradients.items())
    # Two layers have two weights each. The forward begins with the weight with which the last step ended. So does the
    # backward without checkpoints; with them it runs a layer's forward, and needs one of the two weights once more.
    copies = 3 + (2 * 3 if checkpointing else 3)
    assert stage.copies - before == copies
    assert stage.ahead - ahead == copies  # after the first steps they have begun before they are needed
    assert copying[0] <= 3  # in use, its successor, and one that is about to be freed


def test_the_weight_stays_on_the_host_when_the_model_moves(tmp_path):
    model = load(save_dense("mixtral", tmp_path), adapters=False)
    expected = logits(model)
    offload_experts(model, "ram")
    on_meta = model.to("meta")
    weights = [getattr(m, name) for m in on_meta.modules() if isinstance(m, Experts4bit) for name in m.weight_names]
    assert {weight.device.type for weight in weights} == {"cpu"}
    assert all(b.device.type == "meta" for m in on_meta.modules() if isinstance(m, Experts4bit) for b in m.buffers())
    again = load(tmp_path, adapters=False)
    offload_experts(again, "ram")
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(reloaded(tmp_path / "saved")), expected)


def test_a_weight_that_changes_is_copied_again(copying, tmp_path):
    """Loading, set_expert (calibration) and a new parameter, although the next copy has begun by then."""
    folder = save_dense("mixtral", tmp_path)
    plain, offloaded = load(folder, adapters=False), load(folder, adapters=False)
    offload_experts(offloaded, "ram")
    for _ in range(2):
        logits(offloaded)
    other = {n: t.flip(0) if "proj" in n and t.ndim == 3 else t for n, t in plain.state_dict().items()}
    for model in (plain, offloaded):
        model.load_state_dict(other)
    assert torch.equal(logits(offloaded), logits(plain))
    for model in (plain, offloaded):
        for experts in (m for m in model.modules() if isinstance(m, Experts4bit)):
            experts.set_expert("down_proj", 0, experts.expert("down_proj", 2))
    assert torch.equal(logits(offloaded), logits(plain))


def test_a_copy_that_runs_out_of_memory_is_made_again(copying, tmp_path, monkeypatch):
    folder = save_dense("mixtral", tmp_path)
    expected = logits(load(folder, adapters=False))
    model = load(folder, adapters=False)
    offload_experts(model, "ram")
    for _ in range(3):  # so that it knows what follows what
        logits(model)
    copy_once, calls = Stage._copy, []

    def fails_ahead(self, weight, device):
        calls.append(weight)
        if len(calls) % 2 == 0:
            raise torch.OutOfMemoryError("no room now")
        return copy_once(self, weight, device)

    monkeypatch.setattr(Stage, "_copy", fails_ahead)
    assert torch.equal(logits(model), expected)
    assert len(calls) > 2
    monkeypatch.setattr(Stage, "_copy", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("never")))
    with pytest.raises(torch.OutOfMemoryError, match="never"):
        logits(model)


def test_a_move_that_fails_keeps_the_weights(tmp_path):
    model = load(save_dense("mixtral", tmp_path), adapters=False)
    expected = logits(model)
    offload_experts(model, "ram")
    calls = []

    def runs_out(tensor):
        calls.append(tensor)
        if len(calls) == 20:
            raise torch.OutOfMemoryError("full")
        return tensor

    with pytest.raises(torch.OutOfMemoryError):
        model._apply(runs_out)
    assert torch.equal(logits(model), expected)


def test_copies_of_a_model_are_in_memory_and_can_be_moved_to_disk(tmp_path):
    model = load(save_dense("mixtral", tmp_path / "model"), adapters=False)
    expected = logits(model)
    offload_experts(model, "disk", tmp_path / "weights")
    weights = [(m, name) for m in model.modules() if isinstance(m, Experts4bit) for name in m.weight_names]
    assert all(is_mapped(getattr(m, name)) for m, name in weights)
    twin = copy.deepcopy(model)
    of_twin = [(m, name) for m in twin.modules() if isinstance(m, Experts4bit) for name in m.weight_names]
    assert not any(is_mapped(getattr(m, name)) for m, name in of_twin)
    offload_experts(twin, "disk", tmp_path / "weights")
    assert all(is_mapped(getattr(m, name)) for m, name in of_twin)
    offload_experts(model, "ram")
    assert not any(is_mapped(getattr(m, name)) for m, name in weights)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(twin), expected)


def test_files_have_no_name_and_a_full_disk_is_an_error(tmp_path, monkeypatch):
    weight = torch.randint(0, 256, (3, 1000), dtype=torch.uint8)
    mapped = mapped_copy(weight, tmp_path / "new")
    assert torch.equal(mapped, weight)
    assert list((tmp_path / "new").iterdir()) == []

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        mapped_copy(weight, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


# Prints the anonymous memory that a model with its experts in files needs, and the bytes of these experts.
SCRIPT = """
import gc, json, sys, torch
from qlora.models.loading import load_quantized

def anonymous():
    gc.collect()
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

warm, _ = load_quantized(sys.argv[1], torch.bfloat16, progress=False)
warm(input_ids=torch.arange(8).view(1, -1))
del warm
before = anonymous()
options = {"offload_experts": sys.argv[4] or None, "offload_folder": sys.argv[3]}
model, _ = load_quantized(sys.argv[2], torch.bfloat16, progress=False, **options)
model(input_ids=torch.arange(64).view(1, -1))
experts = sum(p.nbytes for p in model.parameters() if p.ndim == 3)
print(json.dumps([anonymous() - before, experts]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("packed", [False, True])
def test_on_the_cpu_experts_in_files_take_no_memory(packed, tmp_path):
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=256, hidden_size=256, intermediate_size=256, moe_intermediate_size=512,
        num_hidden_layers=16, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=32,
        num_experts_per_tok=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    folder = tmp_path / "dense"
    if packed:
        load_quantized(folder, torch.bfloat16, progress=False)[0].save_pretrained(tmp_path / "packed")
        folder = tmp_path / "packed"
    small = save_dense("qwen3_moe", tmp_path / "small", torch.bfloat16)

    def measure(where):
        command = [sys.executable, "-c", SCRIPT, small, folder, tmp_path / "experts", where]
        run = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
        return json.loads(run.stdout.splitlines()[-1])

    used, experts = measure("disk")
    assert experts == 16 * 32 * 3 * 512 * 256 // 2
    assert used < 0.6 * experts
    if not packed:  # as a contrast; a packed checkpoint is a mapped file anyway
        assert measure("")[0] > 0.9 * experts


def test_the_command_trains_with_experts_on_disk(tmp_path, capsys):
    save_llama(tmp_path / "words")  # its tokenizer
    model = save_dense("mixtral", tmp_path / "model")
    for file in (tmp_path / "words").glob("tokenizer*"):
        (model / file.name).write_bytes(file.read_bytes())
    records = [{"prompt": "what is the sea ?", "completion": "the light stays on ."}] * 12
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = [
        "--rank",
        "4",
        "--max-steps",
        "3",
        "--logging-steps",
        "1",
        "--max-length",
        "32",
        "--compute-dtype",
        "fp32",
        "--adapt-experts",
    ]
    losses = []
    for name, more in (("plain", []), ("disk", ["--offload-experts", "disk"])):
        command = ["finetune", "--model", model, "--data", tmp_path / "data.jsonl", "--output", tmp_path / name]
        assert main([str(part) for part in [*command, *options, *more]]) == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        losses.append([entry["loss"] for entry in report["history"] if "loss" in entry])
    assert losses[0] == losses[1] != []
    assert not list((tmp_path / "disk").glob("experts/*"))
    command = ["finetune", "--model", str(model), "--data", str(tmp_path / "data.jsonl"), "--output"]
    assert main([*command, str(tmp_path / "ram"), *options, "--offload-experts", "ram"]) == 1
    assert "on the CPU the experts are in RAM anyway" in capsys.readouterr().err


def test_requests_that_make_no_sense(tmp_path):
    model = load(save_dense("mixtral", tmp_path / "model"), adapters=False)
    with pytest.raises(ValueError, match="where='gpu' must be one of ram, disk"):
        offload_experts(model, "gpu")
    with pytest.raises(ValueError, match="needs a folder"):
        offload_experts(model, "disk")
    with pytest.raises(ValueError, match="no experts in 4 bit"):
        offload_experts(load(save_dense("llama", tmp_path / "llama"), adapters=False), "ram")
