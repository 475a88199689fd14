"""Fine-tuning on a GPU: same losses as on the CPU, resume, every optimizer, evaluation and generation afterwards."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY_JOB, save_llama
from training.test_finetune import StopAt

from qlora.devices import choose_device, why_not_gpu
from qlora.evaluation.perplexity import load_in_format, perplexity
from qlora.models.loading import chat_reply, load_for_inference
from qlora.training.finetune import Interrupted, finetune
from qlora.training.settings import OPTIMIZERS, FinetuneSettings

pytestmark = pytest.mark.skipif(why_not_gpu() is not None, reason=why_not_gpu() or "")


@pytest.fixture
def settings(tmp_path):
    save_llama(tmp_path / "model")
    words = ["sea", "harbor", "storm", "ship", "sail", "wind", "wave", "night"]
    records = [{"prompt": f"what is {w} ?", "completion": f"the {v} stays on ."} for w in words for v in words]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return FinetuneSettings(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "data.jsonl"),
        output=str(tmp_path / "run"),
        device="cuda",
        compute_dtype="fp32",
        rank=8,
        **TINY_JOB,
    )


def losses(output):
    history = json.loads((Path(output) / "report.json").read_text())["history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def test_the_losses_are_the_cpus(settings):
    finetune(settings)
    on_cpu = dataclasses.replace(settings, device="cpu", output=settings.output + "-cpu")
    finetune(on_cpu)
    # Both in float32; products on the GPU may use TF32, with a relative error of 2^-10.
    torch.testing.assert_close(losses(settings.output), losses(on_cpu.output), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_16_bit_learns_too(settings, dtype):
    """fp16 uses the gradient scaler."""
    result = finetune(dataclasses.replace(settings, compute_dtype=dtype, max_steps=60))
    assert result.eval_loss_after < 0.8 * result.eval_loss_before


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_resumes(settings, optimizer):
    settings = dataclasses.replace(settings, optimizer=optimizer, rank=64)
    finetune(settings)
    stopped = dataclasses.replace(settings, output=settings.output + "-stopped")
    with pytest.raises(Interrupted):
        finetune(stopped, callbacks=[StopAt(5, lambda: os.kill(os.getpid(), signal.SIGINT))])
    finetune(stopped, resume=True)
    whole, resumed = (
        load_file(f"{output}/adapter/adapter_model.safetensors") for output in (settings.output, stopped.output)
    )
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, resumed[name], rtol=1e-4, atol=1e-5)


def test_what_was_saved_is_evaluated_and_answers(settings):
    result = finetune(dataclasses.replace(settings, max_steps=60))
    device = choose_device("cuda").value
    model, tokenizer = load_for_inference(settings.model, result.adapter, torch.float32, device)
    assert next(model.parameters()).device == device
    prompt = "what is sea ?"
    assert chat_reply(model, tokenizer, prompt, 8) == chat_reply(result.model, result.tokenizer, prompt, 8)
    ids = torch.arange(5, 30).repeat(4)
    scores = [
        perplexity(load_in_format(settings.model, "nf4-dq", torch.float32, result.adapter, place), ids, 16)
        for place in ("cpu", device)
    ]
    assert scores[0].nats_per_token == pytest.approx(scores[1].nats_per_token, rel=2e-3)
