"""Trainer, SFTTrainer and DPOTrainer on a model loaded with QLoRAConfig; everything else is their own code."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import qlora
from qlora.integrations import peft as ours
from qlora.optim import PagedAdamW

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LORA = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    save_llama(folder)
    return folder


def load(checkpoint):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=qlora.QLoRAConfig(), dtype=torch.float32
    )


TEXTS = [{"text": "the light stays on keeper log sea"}, {"text": "harbor storm wind"}] * 6


def arguments(kind, folder, **options):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
    }
    return kind(**(defaults | options))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows():
    return [{"input_ids": row, "labels": row} for row in torch.randint(5, 25, (12, 10)).tolist()]


@pytest.mark.parametrize("bits", [32, 8])
def test_trainer_with_the_paged_optimizer_resumes(checkpoint, tmp_path, bits):
    torch.manual_seed(0)
    data = rows()

    def trainer(**options):
        torch.manual_seed(1)
        model = get_peft_model(load(checkpoint), LORA)
        optimizer = (PagedAdamW, {"lr": 1e-2, "bits": bits, "min_8bit_size": 0, "page_dir": tmp_path / "pages"})
        training = arguments(TrainingArguments, tmp_path / "run", **options)
        return Trainer(model, training, train_dataset=data, optimizer_cls_and_kwargs=optimizer)

    whole = trainer()
    whole.train()
    assert isinstance(whole.optimizer.optimizer, PagedAdamW)
    assert losses(whole)[-1] < losses(whole)[0]
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses(resumed)[3:] == losses(whole)[3:]
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_sft_trainer(checkpoint, tmp_path):
    data = datasets.Dataset.from_list(TEXTS)
    model = load(checkpoint)
    trainer = trl.SFTTrainer(
        model,
        args=arguments(trl.SFTConfig, tmp_path / "sft", max_length=16, gradient_checkpointing=True, bf16=False),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=LORA,
    )
    assert len(ours.lora_layers(trainer.model)) == 2 * 7
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter").eval()
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_sft_resumes(checkpoint, tmp_path):
    data = datasets.Dataset.from_list(TEXTS)

    def trainer():
        torch.manual_seed(1)
        return trl.SFTTrainer(
            load(checkpoint),
            args=arguments(trl.SFTConfig, tmp_path / "sft", max_length=16, bf16=False),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            peft_config=LORA,
        )

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "sft" / "checkpoint-3"))
    assert losses(resumed)[3:] == losses(whole)[3:]


def test_dpo_trainer(checkpoint, tmp_path):
    pairs = [{"prompt": "the light ", "chosen": "stays on", "rejected": "storm day"}] * 12
    trainer = trl.DPOTrainer(
        load(checkpoint),
        args=arguments(trl.DPOConfig, tmp_path / "dpo", max_length=24, bf16=False),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=LORA,
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert history[-1]["rewards/margins"] > history[0]["rewards/margins"]
    assert losses(trainer)[-1] < losses(trainer)[0]


KILLED = """
import os, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import qlora

checkpoint, folder, kill_at, resume = sys.argv[1:]

class Killed(Trainer):
    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == int(kill_at):
            os._exit(9)  # the checkpoint has its adapter, but no optimizer or trainer state
        super()._save_optimizer_and_scheduler(output_dir)

torch.manual_seed(0)
data = [{"input_ids": row, "labels": row} for row in torch.randint(5, 25, (12, 10)).tolist()]
torch.manual_seed(1)
model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=qlora.QLoRAConfig(), dtype=torch.float32)
model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, lora_alpha=8))
arguments = TrainingArguments(
    output_dir=folder, max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_steps=2,
    report_to="none", use_cpu=True, seed=3, disable_tqdm=True,
)
optimizer = (qlora.optim.PagedAdamW, {"lr": 1e-2, "bits": 8, "min_8bit_size": 0})
trainer = Killed(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=optimizer)
trainer.train(resume_from_checkpoint=resume or None)
print([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
"""


def test_a_process_killed_in_the_middle_of_a_save(checkpoint, tmp_path):
    """The previous checkpoint loads, and the resumed run equals an uninterrupted one."""

    def run(folder, kill_at=-1, resume=""):
        command = [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path / folder), str(kill_at), str(resume)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = run("whole")
    assert whole.returncode == 0, whole.stderr
    killed = run("killed", kill_at=4)
    assert killed.returncode == 9
    assert (tmp_path / "killed" / "checkpoint-4" / "adapter_model.safetensors").exists()
    resumed = run("killed", resume=tmp_path / "killed" / "checkpoint-2")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]
