"""Fine-tuning a random Llama: it learns, resumes bit for bit, and loses nothing on errors."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY_JOB, save_llama
from transformers import TrainerCallback

from qlora.models.loading import chat_reply, load_for_inference
from qlora.training import finetune as module
from qlora.training.data import Example, Examples, RecordCounts
from qlora.training.finetune import FinetuneSettings, Interrupted, finetune
from qlora.training.trainer import AdapterTrainer, checkpoints


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    words = ["sea", "harbor", "storm", "ship", "sail", "wind", "wave", "night", "day"]
    records = [
        {"prompt": f"what is {w} ?", "completion": f"keeper log : the {v} stays on ."} for w in words for v in words
    ]
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.fixture
def settings(model_folder, data_file, tmp_path):
    return FinetuneSettings(
        model=str(model_folder),
        data=str(data_file),
        output=str(tmp_path / "run"),
        rank=4,
        compute_dtype="fp32",
        **TINY_JOB,
        dropout=0.1,
    )


def weights_of(settings):
    return load_file(f"{settings.output}/adapter/adapter_model.safetensors")


def assert_same_adapter(first, second):
    a, b = weights_of(first), weights_of(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


class StopAt(TrainerCallback):
    """Runs ``action`` at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def test_the_loss_falls_and_everything_is_written(settings):
    result = finetune(dataclasses.replace(settings, max_steps=100, learning_rate=2e-2))
    assert result.eval_loss_after < 0.7 * result.eval_loss_before
    output = result.adapter.parent
    assert {"adapter", "report.png", "report.json", "settings.json", "checkpoint-100"} <= set(os.listdir(output))
    report = json.loads((output / "report.json").read_text())
    assert report["eval_loss_after"] == result.eval_loss_after
    assert report["memory_bytes"]["linear_layers_4bit"] * 4 == report["memory_bytes"]["linear_layers_16bit"]
    assert len(checkpoints(output)) == settings.keep_checkpoints
    # The saved adapter produces the trained model's answers.
    model, tokenizer = load_for_inference(settings.model, result.adapter, torch.float32)
    prompt = "what is sea ?"
    assert chat_reply(model, tokenizer, prompt, 8) == chat_reply(result.model, result.tokenizer, prompt, 8)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"packing": False, "batch_size": 3, "gradient_accumulation": 2},
        {"gradient_checkpointing": True, "compute_dtype": "bf16"},
        {"quant_type": "int4", "double_quant": False, "block_size": 32, "target_modules": ("q_proj", "v_proj")},
    ],
    ids=["packed", "padded", "checkpointing-bf16", "int4"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(settings, tmp_path, change):
    settings = dataclasses.replace(settings, **change)
    finetune(settings)
    stopped = dataclasses.replace(settings, output=str(tmp_path / "stopped"))
    with pytest.raises(Interrupted) as stop:
        finetune(stopped, callbacks=[StopAt(5, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert stop.value.checkpoint.name == "checkpoint-5"
    finetune(stopped, resume=True)
    assert_same_adapter(settings, stopped)


def test_a_wrong_setting_leaves_nothing_that_blocks_the_corrected_run(settings):
    for change in ({"quant_type": "nf3"}, {"target_modules": ("nowhere",)}, {"lr_scheduler": "sideways"}):
        with pytest.raises(ValueError):
            finetune(dataclasses.replace(settings, **change))
        assert not (module.Path(settings.output) / "settings.json").exists()
    finetune(dataclasses.replace(settings, max_steps=1))


def test_ctrl_c_during_the_first_evaluation_says_how_to_go_on(settings, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterTrainer, "evaluate", interrupted)
    with pytest.raises(
        Interrupted, match="no checkpoint was saved yet; continue with: qlora finetune --output .* --resume"
    ):
        finetune(settings)
    monkeypatch.undo()
    finetune(settings, resume=True)
    uninterrupted = dataclasses.replace(settings, output=settings.output + "-again")
    finetune(uninterrupted)
    assert_same_adapter(settings, uninterrupted)


def test_a_resume_notices_that_the_data_changed(settings, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(module.Path(settings.data).read_bytes())
    settings = dataclasses.replace(settings, data=str(data), max_steps=2)
    finetune(settings)
    data.write_bytes(data.read_bytes() + b'\n{"prompt": "more", "completion": "light"}\n')
    with pytest.raises(ValueError, match="data_sha256"):
        finetune(settings, resume=True)


def test_ctrl_c_restores_the_signal_handler(settings):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        finetune(settings, callbacks=[StopAt(1, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_leaves_the_previous_checkpoint(settings, monkeypatch, error):
    """The second checkpoint fails after its adapter was written; the run resumes from the first.

    torch.save reports a full disk as RuntimeError.
    """
    original = AdapterTrainer._save_optimizer_and_scheduler

    def full_at_step_8(self, output_dir):
        if self.state.global_step == 8:
            raise error
        original(self, output_dir)

    monkeypatch.setattr(AdapterTrainer, "_save_optimizer_and_scheduler", full_at_step_8)
    with pytest.raises(OSError, match="No space left|newest complete checkpoint is .*checkpoint-4"):
        finetune(settings)
    monkeypatch.undo()
    output = checkpoints(module.Path(settings.output))
    assert [path.name for path in output] == ["checkpoint-4"]
    assert not (module.Path(settings.output) / ".saving").exists()
    finetune(settings, resume=True)
    uninterrupted = dataclasses.replace(settings, output=settings.output + "-again")
    finetune(uninterrupted)
    assert_same_adapter(settings, uninterrupted)


def test_a_half_written_checkpoint_is_ignored(settings):
    finetune(dataclasses.replace(settings, max_steps=4))
    half = module.Path(settings.output) / "checkpoint-9"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert [p.name for p in checkpoints(half.parent)] == ["checkpoint-4"]


def test_an_output_folder_that_exists_is_not_touched(settings):
    folder = module.Path(settings.output)
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        finetune(settings)
    assert os.listdir(folder) == ["thesis.txt"]


def test_resume_needs_a_run_with_the_same_settings(settings):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        finetune(settings, resume=True)
    finetune(dataclasses.replace(settings, max_steps=2))
    with pytest.raises(ValueError, match="max_steps: 2 -> 12"):
        finetune(settings, resume=True)


def test_the_evaluation_does_not_grow_with_the_data(settings):
    result = finetune(dataclasses.replace(settings, eval_fraction=0.5, max_eval_records=7, max_steps=1))
    assert (result.records.train, result.records.evaluation) == (74, 7)


def test_a_run_from_before_the_limit_of_the_evaluation_is_resumed(settings):
    """It has held out a tenth of all records, and its settings say nothing of a limit."""
    settings = dataclasses.replace(settings, eval_fraction=0.5)
    first = finetune(dataclasses.replace(settings, max_eval_records=None))
    path = first.adapter.parent / "settings.json"
    stored = json.loads(path.read_text())
    del stored["max_eval_records"]
    path.write_text(json.dumps(stored))
    again = finetune(dataclasses.replace(settings, max_eval_records=7, eval_steps=None), resume=True)
    assert again.records == first.records


@pytest.mark.parametrize(
    ("change", "records", "expected"),
    [
        ({"max_steps": 20}, 10, 50),
        ({"max_steps": 6000}, 10, 600),
        ({"epochs": 3.0, "batch_size": 2, "gradient_accumulation": 2}, 4000, 300),
        ({"eval_steps": 7}, 4000, 7),
    ],
)
def test_evaluations_are_a_tenth_of_a_run_apart(settings, change, records, expected):
    example = Example([5] * 10, [5] * 10)
    counts = RecordCounts(records, 1, 0, 0, 0)
    examples = Examples([example] * records, [example], counts, {}, "")
    settings = dataclasses.replace(settings, **{"eval_steps": None, "max_steps": -1, "packing": False} | change)
    arguments = module._arguments(settings, torch.device("cpu"), torch.float32, examples, 1)
    assert arguments.eval_steps == expected


def test_the_evaluation_loss_is_a_mean_over_tokens(settings, tmp_path, data_file):
    """So it does not depend on how records share rows and batches. Answers have different lengths."""
    words = ["sea", "the light stays on and on .", "storm ship", "sail sail sail wind wave night day ."]
    records = [{"prompt": "what ?", "completion": word} for word in words * 3]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, records)))
    losses = []
    for i, (batch, packing) in enumerate([(1, False), (4, False), (1, True), (3, True)]):
        run = dataclasses.replace(settings, eval_data=str(held_out), batch_size=batch, packing=packing, max_steps=1)
        losses.append(finetune(dataclasses.replace(run, output=str(tmp_path / f"run{i}"))).eval_loss_before)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_tokens_that_the_model_does_not_know(settings, tmp_path):
    from transformers import AutoTokenizer

    folder = save_llama(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    settings = dataclasses.replace(settings, model=str(folder), max_steps=2, packing=False, batch_size=2)
    result = finetune(settings)  # a token that only pads is replaced
    assert result.tokenizer.pad_token_id == result.tokenizer.eos_token_id
    tokenizer.add_tokens(["lantern"])
    tokenizer.save_pretrained(folder)
    data = tmp_path / "lantern.jsonl"
    data.write_text("\n".join([json.dumps({"prompt": "what ?", "completion": "the lantern ."})] * 9))
    with pytest.raises(ValueError, match=r"lantern\.jsonl:\d: token \d+ \('lantern'\) is outside of the vocabulary"):
        finetune(dataclasses.replace(settings, data=str(data), output=str(tmp_path / "other")))


def test_a_prompt_ends_as_in_training_without_a_chat_template(settings, tmp_path, capsys):
    from qlora.adapters.lora import prompt_end
    from qlora.cli import main

    folder = save_llama(tmp_path / "model", chat=False)
    data = tmp_path / "alpaca.jsonl"
    data.write_text("\n".join([json.dumps({"instruction": "what is the sea ?", "output": "the light ."})] * 20))
    lines = []
    settings = dataclasses.replace(settings, model=str(folder), data=str(data), max_steps=2)
    result = finetune(settings, on_start=lines.append)
    assert any("a line break ends each prompt" in line for line in lines)
    assert prompt_end(result.adapter) == "\n"
    prompts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qlora.models.loading.chat_reply", lambda model, tokenizer, prompt, *_, **__: prompts.append(prompt)
        )
        command = ["generate", "--model", str(folder), "--adapter", str(result.adapter), "--prompt", "what ?"]
        assert main([*command, "--compute-dtype", "fp32"]) == 0
    assert prompts == ["what ?\n"]


def test_bad_data_stops_the_job_before_anything_is_written(settings, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "what", "completion": "sea"}\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
        finetune(dataclasses.replace(settings, data=str(bad)))
    assert not module.Path(settings.output).exists()
    result = finetune(dataclasses.replace(settings, data=str(bad), skip_bad=True, max_steps=1, eval_fraction=0.0))
    assert (result.records.bad, result.records.train, result.records.evaluation) == (1, 1, 0)
    assert result.eval_loss_after is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"compute_dtype": "int8"}, "compute_dtype='int8' must be one of auto, bf16, fp16, fp32"),
        ({"max_length": 4}, "max_length=4 cuts off every completion"),
        ({"quant_type": "nf3"}, "quant_type='nf3' is unknown"),
        ({"block_size": 65}, "block_size=65"),
        ({"target_modules": ("nowhere",)}, "target_modules: .* has no layer 'nowhere'"),
        ({"target_modules": ("q_proj", "v_porj")}, "no layer 'v_porj': did you mean v_proj"),
        ({"modules_to_save": ("lm_haed",)}, "modules_to_save: .* no layer 'lm_haed': did you mean lm_head"),
        ({"modules_to_save": ("gate_proj",)}, "'gate_proj' is in 4 bit"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1, or -1"),
        ({"alpha": 0.0}, "alpha=0.0 must be another number"),
        ({"max_eval_records": 0}, "max_eval_records=0 must be at least 1"),
        ({"model": "./no/such/model"}, "is not a model folder"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be positive"),
    ],
)
def test_bad_settings_name_value_and_rule(settings, change, message):
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=message):
        finetune(dataclasses.replace(settings, **change))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_every_optimizer_trains_and_resumes(settings, tmp_path, optimizer):
    page_dir = str(tmp_path / "pages") if optimizer.startswith("paged") else None
    settings = dataclasses.replace(settings, optimizer=optimizer, page_dir=page_dir, max_steps=8, rank=64)
    result = finetune(settings)
    assert result.eval_loss_after < result.eval_loss_before
    state = torch.load(f"{settings.output}/checkpoint-8/optimizer.pt", weights_only=True)["state"]
    moments = {t.dtype for s in state.values() for name, t in s.items() if name == "exp_avg"}
    assert (torch.uint8 in moments) == optimizer.endswith("8bit")
    stopped = dataclasses.replace(settings, output=str(tmp_path / "stopped"))
    with pytest.raises(Interrupted):
        finetune(stopped, callbacks=[StopAt(3, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    finetune(stopped, resume=True)
    assert_same_adapter(settings, stopped)


@pytest.fixture
def untied(tmp_path, model_folder):
    """The tiny model with a head that shares no weight."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "untied"
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((module.Path(model_folder) / name).read_bytes())
    return str(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"dora": True},
        {"modules_to_save": ("lm_head",)},
        {"modules_to_save": ("lm_head", "norm", "embed_tokens"), "compute_dtype": "bf16"},
    ],
    ids=str,
)
def test_what_peft_adds_is_resumed_and_loaded_too(settings, tmp_path, change, untied):
    settings = dataclasses.replace(settings, **{"model": untied, **change})
    result = finetune(settings)
    stopped = dataclasses.replace(settings, output=str(tmp_path / "stopped"))
    with pytest.raises(Interrupted):
        finetune(stopped, callbacks=[StopAt(5, lambda: os.kill(os.getpid(), signal.SIGINT))])
    finetune(stopped, resume=True)
    assert_same_adapter(settings, stopped)
    again, _ = load_for_inference(settings.model, result.adapter, result.dtype.value)
    ids = torch.arange(8)[None]
    assert torch.equal(again(input_ids=ids).logits, result.model(input_ids=ids).logits)


@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
def test_all_that_is_trained_is_float32(settings, untied, compute_dtype):
    """Updates of 1e-4 of a bf16 weight would be lost, and gradient scalers reject fp16 gradients."""
    change = {"modules_to_save": ("lm_head", "norm", "embed_tokens"), "dora": True, "compute_dtype": compute_dtype}
    result = finetune(dataclasses.replace(settings, model=untied, max_steps=4, learning_rate=1e-5, **change))
    trained = {name: p for name, p in result.model.named_parameters() if p.requires_grad}
    for module_name in ("lm_head", "norm", "embed_tokens"):
        assert any(module_name in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    head = result.model.base_model.model.lm_head
    assert not torch.equal(head.modules_to_save.default.weight, head.original_module.weight.float())
    out = result.model(input_ids=torch.arange(8)[None], output_hidden_states=True)
    assert {h.dtype for h in (*out.hidden_states, out.logits)} == {result.dtype.value}


def test_a_loss_that_is_nan_stops_at_its_step_and_names_the_records(settings):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    with pytest.raises(ValueError, match=r"the loss is nan in step 6, on the records .*data\.jsonl:\d+.*checkpoint-4"):
        finetune(settings, callbacks=[Poison()])
    assert [path.name for path in checkpoints(module.Path(settings.output))] == ["checkpoint-4"]


def test_of_a_step_of_many_forwards_the_one_that_is_nan_is_named(settings, monkeypatch):
    """The losses are read once per step."""
    calls = []
    own = AdapterTrainer._forbid_nan

    def poisoned(self, loss, records):
        calls.append(records)
        own(self, loss * float("nan") if len(calls) == 6 else loss, records)

    monkeypatch.setattr(AdapterTrainer, "_forbid_nan", poisoned)
    settings = dataclasses.replace(settings, gradient_accumulation=4, eval_fraction=0.0, packing=False)
    with pytest.raises(ValueError, match="the loss is nan in step 2") as raised:
        finetune(settings)
    assert len(calls) == 8
    assert all(record in str(raised.value) for record in calls[5])
    assert not any(record in str(raised.value) for record in calls[6])


@pytest.mark.parametrize(("step", "kept"), [(8, ["checkpoint-4"]), (12, ["checkpoint-4", "checkpoint-8"])])
def test_weights_that_are_nan_are_not_saved(settings, step, kept):
    """The update just before a save made them nan, and no loss was computed with them yet."""

    class Poison(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == step - 1:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    settings = dataclasses.replace(settings, eval_fraction=0.0)
    with pytest.raises(ValueError, match=rf"after step {step} 1 trained parameters are not finite.*{kept[-1]}"):
        finetune(settings, callbacks=[Poison()])
    assert [path.name for path in checkpoints(module.Path(settings.output))] == kept
    assert not (module.Path(settings.output) / "adapter").exists()


def test_an_evaluation_that_is_nan_says_so(settings):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    settings = dataclasses.replace(settings, max_steps=6, save_steps=100, eval_steps=6)
    with pytest.raises(ValueError, match=r"the loss is nan evaluated after step 6, on the records .*data\.jsonl:\d+"):
        finetune(settings, callbacks=[Poison()])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("can't allocate memory: you tried")]
)
def test_out_of_memory_says_what_would_shrink_the_run(settings, monkeypatch, error):
    def full(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(AdapterTrainer, "training_step", full)
    with pytest.raises(MemoryError) as raised:
        finetune(dataclasses.replace(settings, batch_size=4))
    for words in (
        "--gradient-checkpointing",
        "--batch-size 2",
        "--max-length below 64",
        "paged-adamw-8bit",
        "(qlora plan) it needs 0.",
    ):
        assert words in str(raised.value)


def test_a_report_says_where_and_how_the_run_was_made(settings):
    result = finetune(dataclasses.replace(settings, device="auto", compute_dtype="auto"))
    report = json.loads((result.adapter.parent / "report.json").read_text())
    assert report["device"].startswith("cpu (") or report["device"].startswith("cuda")
    assert report["compute_dtype"].split()[0] == str(result.dtype.value).removeprefix("torch.")
    assert report["loss"] == "in chunks of the tokens"
    assert 0 < report["planned_memory_bytes"] < report["peak_memory_bytes"]
    steps = [entry for entry in report["history"] if "loss" in entry]
    assert all({"learning_rate", "seconds", "num_input_tokens_seen"} <= entry.keys() for entry in steps)
    stored = json.loads((result.adapter.parent / "settings.json").read_text())
    assert stored["compute_dtype"] in ("bf16", "fp32", "fp16")  # the choice of auto, which a resumed run keeps


def test_a_resume_notices_that_the_model_changed(settings, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(settings.model, model)
    settings = dataclasses.replace(settings, model=str(model), max_steps=2)
    finetune(settings)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    from safetensors.torch import save_file

    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="base_fingerprint"):
        finetune(settings, resume=True)


def test_a_model_that_is_in_4_bit_already_is_trained_as_it_is(settings, tmp_path):
    from transformers import AutoModelForCausalLM

    import qlora

    config = qlora.QLoRAConfig(quant_type="fp4", double_quant=False)
    packed = AutoModelForCausalLM.from_pretrained(settings.model, quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "packed" / name).write_bytes((module.Path(settings.model) / name).read_bytes())
    result = finetune(dataclasses.replace(settings, model=str(tmp_path / "packed"), max_steps=4))
    layers = [m for m in result.model.modules() if isinstance(m, qlora.nn.Linear4bit)]
    assert {layer.quant_type for layer in layers} == {"fp4"}
    assert result.eval_loss_after < result.eval_loss_before
    facts = json.loads((result.adapter / "qlora_config.json").read_text())
    assert (facts["quant_type"], facts["double_quant"]) == ("fp4", False)  # the base's format, not that of the settings


def test_a_trainer_computes_on_the_device_that_was_chosen(tmp_path):
    """Not on the first device; "meta" replaces a second GPU."""
    from accelerate import Accelerator
    from transformers import TrainingArguments

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    module._pin(arguments, torch.device("meta"))
    assert arguments.device == torch.device("meta")
    assert arguments.n_gpu == 1
    assert Accelerator().device == torch.device("meta")
    assert (
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none").device.type == "cpu"
    )  # resets accelerate's state
