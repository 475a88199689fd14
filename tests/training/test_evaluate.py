"""Perplexity: equal to its definition, and the order of weight formats on a real model."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_llama

from qlora.adapters.lora import save_base_facts
from qlora.cli import main
from qlora.demo.smollm2 import smollm2_folder
from qlora.evaluation.perplexity import STORED, TRAINED, default_format, load_in_format, perplexity, tokens_of
from qlora.models.loading import load_quantized

TEXT = Path(__file__).parent.parent / "data" / "english.txt"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    save_llama(folder)
    return folder


def scored_one_by_one(model, ids, context, stride):
    """The definition, token by token: each is scored given the earlier tokens of its window."""
    total, scored, start = 0.0, 1, 0
    while scored < len(ids):
        end = min(start + context, len(ids))
        for i in range(scored, end):
            logits = model(input_ids=ids[start:i].unsqueeze(0)).logits[0, -1].double()
            total -= logits.log_softmax(-1)[ids[i]].item()
        scored, start = end, start + stride
    return total / (len(ids) - 1)


@pytest.mark.parametrize(("context", "stride", "count"), [(8, None, 30), (8, 3, 17), (64, None, 20), (5, 4, 2)])
def test_each_token_is_scored_once(toy, context, stride, count):
    model = load_in_format(toy, "fp32", torch.float32)
    ids = torch.randint(5, 25, (count,), generator=torch.Generator().manual_seed(0))
    seen = []
    result = perplexity(model, ids, context, stride, lambda done, total: seen.append((done, total)))
    assert result.tokens == count - 1
    with torch.no_grad():
        expected = scored_one_by_one(model, ids, context, context // 2 if stride is None else stride)
    assert result.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert seen[-1] == (count, count)


def test_bad_requests(toy, tmp_path, capsys):
    model = load_in_format(toy, "fp32", torch.float32)
    with pytest.raises(ValueError, match="at least two are needed"):
        perplexity(model, torch.tensor([1]))
    with pytest.raises(ValueError, match="stride=8 in 1 … 7"):
        perplexity(model, torch.arange(9), context=8, stride=8)
    assert main(["eval", "--model", str(toy), "--text", str(TEXT), "--format", "nf3"]) == 1
    assert "'nf3' is unknown: use one of fp32, bf16, nf4" in capsys.readouterr().err
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    assert main(["eval", "--model", str(toy), "--text", str(tmp_path / "latin1.txt")]) == 1
    assert "is not UTF-8" in capsys.readouterr().err


def test_the_command(toy, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the light stays on keeper log sea harbor storm " * 8)
    record = tmp_path / "record.json"
    command = ["eval", "--model", str(toy), "--text", str(text), "--context", "16", "--json", str(record)]
    assert main([*command, "--format", "fp32", "int4-dq", "--max-tokens", "40", "--compute-dtype", "fp32"]) == 0
    figures = json.loads(record.read_text())
    assert figures["tokens"] == 39
    assert f"{figures['formats']['fp32']['perplexity']:.3f}" in capsys.readouterr().out
    ids = tokens_of(toy, text.read_text())[0][:40]
    expected = perplexity(load_in_format(toy, "int4-dq", torch.float32), ids, 16)
    assert figures["formats"]["int4-dq"]["nats_per_token"] == expected.nats_per_token


def test_an_adapter_counts(toy, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_in_format(toy, "nf4", torch.float32), LoraConfig(target_modules="all-linear", r=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    ids = torch.arange(5, 25)
    adapted = perplexity(load_in_format(toy, "nf4", torch.float32, tmp_path), ids, 16)
    assert adapted.nats_per_token == pytest.approx(perplexity(model.eval(), ids, 16).nats_per_token, rel=1e-6)
    plain = perplexity(load_in_format(toy, "nf4", torch.float32), ids, 16)
    assert abs(adapted.nats_per_token - plain.nats_per_token) > 0.01


def test_an_adapter_is_evaluated_on_the_format_of_its_training(toy, tmp_path):
    options = {"quant_type": "int4", "block_size": 32, "double_quant": False}
    model, _ = load_quantized(toy, torch.float32, rank=4, progress=False, **options)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    assert default_format(toy, tmp_path / "adapter") == "nf4-dq"  # it does not say
    with pytest.raises(ValueError, match="format 'trained': no adapter"):
        load_in_format(toy, TRAINED, torch.float32, tmp_path / "adapter")
    save_base_facts(tmp_path / "adapter", model, toy)
    assert default_format(toy, tmp_path / "adapter") == TRAINED
    ids = torch.arange(5, 25)
    adapted = perplexity(load_in_format(toy, TRAINED, torch.float32, tmp_path / "adapter"), ids, 16)
    assert adapted.nats_per_token == pytest.approx(perplexity(model.eval(), ids, 16).nats_per_token, rel=1e-6)

    load_quantized(toy, torch.float32, progress=False)[0].save_pretrained(tmp_path / "packed")
    assert default_format(tmp_path / "packed") == STORED


@pytest.mark.parametrize("chunked", [True, False])
def test_each_window_begins_with_the_first_token_of_every_text(toy, tmp_path, monkeypatch, chunked):
    if not chunked:
        monkeypatch.setattr("qlora.evaluation.perplexity.why_not_chunked", lambda model: "for the test")
    model = load_in_format(toy, "fp32", torch.float32)
    ids, first = torch.arange(5, 25), 3
    total = 0.0
    with torch.no_grad():
        for i in range(1, len(ids)):
            start = max(0, -(-(i - 6) // 4) * 4)  # windows of 7 tokens, and the first one, that advance by 4
            window = torch.cat((torch.tensor([first]), ids[start:i])).unsqueeze(0)
            total -= model(input_ids=window).logits[0, -1].double().log_softmax(-1)[ids[i]].item()
    result = perplexity(model, ids, 8, 4, first_token=first)
    assert result.nats_per_token == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_the_first_token_is_that_of_the_tokenizer(tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = save_llama(tmp_path)
    assert tokens_of(folder, "sea")[1] is None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    ids, first = tokens_of(folder, "sea")
    assert (len(ids), first) == (1, tokenizer.bos_token_id)


def test_the_order_of_formats_on_the_real_model():
    """SmolLM2 on 300 tokens: dense is best, then NF4, then FP4 and INT4; double quantization costs little."""
    try:
        folder = smollm2_folder()
    except OSError as error:
        pytest.skip(f"SmolLM2 is not in the cache and cannot be downloaded: {error}")
    ids = tokens_of(folder, TEXT.read_text())[0][:301]
    nats = {
        name: perplexity(load_in_format(folder, name, torch.float32), ids, 301, 300).nats_per_token
        for name in ("fp32", "bf16", "nf4", "nf4-dq", "fp4", "int4")
    }
    assert abs(nats["bf16"] - nats["fp32"]) < 0.02
    assert nats["fp32"] < nats["nf4"] < min(nats["fp4"], nats["int4"])
    assert abs(nats["nf4-dq"] - nats["nf4"]) < 0.25 * (nats["nf4"] - nats["fp32"])
