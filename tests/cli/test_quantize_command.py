"""qlora quantize, and the commands that use what it writes."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from tiny_models import WORDS, save_llama
from transformers import AutoModelForCausalLM

import qlora
from qlora.cli import main
from qlora.integrations.transformers import quantized_layers
from qlora.models.loading import load_quantized
from qlora.training.calibration_data import calibration_ids

OPTIONS = ("--block-size", "32", "--tokens", "1024")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    save_llama(folder / "model")
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (3000,), generator=generator)]
    (folder / "text.txt").write_text(" ".join(words))
    records = [{"prompt": " ".join(words[i : i + 6]), "completion": " ".join(words[i + 6 : i + 20])} for i in range(99)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return folder


def quantize(world, output, *more):
    return main(["quantize", "--model", str(world / "model"), "--output", str(output), *OPTIONS, *more])


def weights(folder):
    model, _ = load_quantized(folder, torch.float32, progress=False)
    return {n: m.dequantize() for n, m in quantized_layers(model)}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_plain_quantization_is_what_the_config_does(world, tmp_path, capsys):
    assert quantize(world, tmp_path / "plain") == 0
    assert not (tmp_path / "plain" / "calibration.json").exists()
    config = qlora.QLoRAConfig(block_size=32)
    model = AutoModelForCausalLM.from_pretrained(world / "model", quantization_config=config)
    assert_equal(weights(tmp_path / "plain"), {n: m.dequantize() for n, m in quantized_layers(model)})
    assert quantize(world, tmp_path / "plain") == 1
    assert "exists: choose another output" in capsys.readouterr().err


def test_calibrated_folders_are_read_by_every_reader(world, tmp_path, capsys):
    text = str(world / "text.txt")
    assert quantize(world, tmp_path / "ours", "--calibrate", text) == 0
    shown = capsys.readouterr().out
    assert "14 weights calibrated on 1024 tokens (feedback)" in shown
    report = json.loads((tmp_path / "ours" / "calibration.json").read_text())
    assert len(report["layers"]) == 14
    assert report["loss_before"] > 0
    assert quantize(world, tmp_path / "theirs", "--calibrate", text, "--format", "bitsandbytes") == 0
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    # bitsandbytes' checkpoint holds the same weights bit for bit, and so gives the same logits.
    assert_equal(weights(tmp_path / "ours"), weights(tmp_path / "theirs"))
    ids = torch.arange(5, 30)[None]
    logits = [
        load_quantized(tmp_path / name, torch.float32, progress=False)[0](ids).logits for name in ("ours", "theirs")
    ]
    assert torch.equal(*logits)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_bitsandbytes_itself_reads_it(world, tmp_path):
    assert quantize(world, tmp_path / "theirs", "--calibrate", str(world / "text.txt"), "--format", "bitsandbytes") == 0
    assert quantize(world, tmp_path / "ours", "--calibrate", str(world / "text.txt")) == 0
    code = (
        "import sys, torch, transformers\n"  # without qlora: bitsandbytes' own loader and layers
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "import bitsandbytes as bnb\n"
        "layers = {n: bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)"
        " for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}\n"
        "assert 'qlora' not in sys.modules\n"
        "torch.save(layers, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "theirs"), str(tmp_path / "layers.pt")]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    read = torch.load(tmp_path / "layers.pt", weights_only=True)
    assert_equal(weights(tmp_path / "ours"), {name: weight.float() for name, weight in read.items()})


def test_eval_takes_the_stored_format_and_reports_text_that_was_seen(world, tmp_path, capsys):
    assert quantize(world, tmp_path / "model", "--calibrate", str(world / "text.txt")) == 0
    evaluate = ["eval", "--model", str(tmp_path / "model"), "--text", str(world / "text.txt"), "--max-tokens", "300"]
    assert main([*evaluate, "--compute-dtype", "fp32"]) == 0
    shown = capsys.readouterr()
    assert "stored" in shown.out
    assert "100.0% of the text's runs of eight tokens were in the calibration text" in shown.err
    assert main([*evaluate, "--format", "nf4"]) == 1
    assert "is already quantized: its only format is stored" in capsys.readouterr().err
    (tmp_path / "model" / "calibration.json").write_text("{}")
    assert main(evaluate) == 1
    assert "calibration.json is damaged" in capsys.readouterr().err


def test_finetune_on_a_calibrated_base_then_merge_back(world, tmp_path, capsys):
    run = [
        *("finetune", "--model", str(world / "model"), "--data", str(world / "data.jsonl")),
        *("--output", str(tmp_path / "run"), "--rank", "4", "--max-steps", "5", "--learning-rate", "0.002"),
        *("--block-size", "32", "--max-length", "64", "--compute-dtype", "fp32", "--calibrate"),
    ]
    assert main(run) == 0
    assert "loss on other tokens" in capsys.readouterr().out
    assert main([*run, "--resume"]) == 1
    assert "a resumed run keeps its own" in capsys.readouterr().err
    base = tmp_path / "run-base"
    assert (base / "calibration.json").exists()
    assert main(run) == 1
    assert "exists" in capsys.readouterr().err
    kept = {}
    for name, more in {"plain": (), "calibrated": ("--calibrate", str(world / "data.jsonl"))}.items():
        merge = ["merge", "--model", str(base), "--adapter", str(tmp_path / "run/adapter"), "--format", "nf4"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main([*merge, "--output", str(tmp_path / name), "--tokens", "1024", *more]) == 0
        warned = [w for w in caught if "of what the adapter changes" in str(w.message)]
        assert warned or name == "calibrated"
        out = capsys.readouterr().out
        assert "layers merged to nf4" in out
        kept[name] = int(out.rpartition("% of the adapter is kept")[0].rpartition(" ")[2])
        assert weights(tmp_path / name)
    assert kept["calibrated"] > kept["plain"]
    assert main([*merge[:-1], "fp4", "--output", str(tmp_path / "no")]) == 1
    assert "--format fp4: the base is in nf4, use that" in capsys.readouterr().err


def test_a_killed_command_goes_on(world, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [
        *(sys.executable, "-m", "qlora", "quantize", "--model", str(world / "model"), *OPTIONS),
        *("--calibrate", str(world / "text.txt"), "--output", str(tmp_path / "killed")),
    ]
    first = tmp_path / ".killed.partial" / "block-00000.safetensors"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the command was faster than the kill"
    assert not (tmp_path / "killed").exists()
    assert first.exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert quantize(world, tmp_path / "whole", "--calibrate", str(world / "text.txt")) == 0
    assert_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert not (tmp_path / ".killed.partial").exists()


def test_sources_take_turns_and_bad_ones_are_named(world, tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    text, data = (calibration_ids([str(world / name)], tokenizer, 1024) for name in ("text.txt", "data.jsonl"))
    both = [str(world / "text.txt"), str(world / "data.jsonl")]
    mixed = calibration_ids(both, tokenizer, 2048)
    assert torch.equal(mixed, torch.cat((text[:512], data[:512], text[512:], data[512:])))
    (tmp_path / "some.txt").write_text("the sea " * 100)
    filled = calibration_ids([str(tmp_path / "some.txt"), *both], tokenizer, 2001)  # others make up for a short one
    assert len(filled) == 2001
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "short.txt").write_text("the sea")
    (tmp_path / "broken.jsonl").write_text("{")
    for name, message in {
        "latin1.txt": "is not UTF-8",
        "short.txt": "calibration needs at least",
        "broken.jsonl": "broken.jsonl:1",
        "missing.jsonl": "does not exist",
    }.items():
        assert quantize(world, tmp_path / "model", "--calibrate", str(tmp_path / name)) == 1
        assert message in capsys.readouterr().err
    assert quantize(world, tmp_path / "model", "--recipe", "gptq") == 1
    assert "recipe='gptq' is unknown" in capsys.readouterr().err
    assert quantize(world, tmp_path / "packed") == 0
    assert main(["quantize", "--model", str(tmp_path / "packed"), "--output", str(tmp_path / "model")]) == 1
    assert "is quantized already" in capsys.readouterr().err
    assert quantize(world, tmp_path / "model", "--format", "gguf") == 1
    assert "format 'gguf' is unknown: use one of qlora, bitsandbytes" in capsys.readouterr().err
    merge = ["merge", "--model", "x", "--adapter", "y", "--output", str(tmp_path / "m"), "--calibrate", "default"]
    assert main(merge) == 1
    assert "--calibrate needs --format" in capsys.readouterr().err
