"""prepare_model: which layers become 4-bit, which stay as they are, and its peak memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TiedModel
from torch import nn

import qlora
from qlora.nn import Linear4bit, QLoRALinear

INNER = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")


def test_all_linear_layers_but_the_tied_head():
    model = TiedModel()
    ids = torch.arange(10)[None]
    dense = model(ids)
    report = qlora.prepare_model(model, rank=4)
    assert report.quantized == INNER
    assert report.skipped == ("lm_head",)
    assert model.lm_head.weight is model.embed.weight
    assert isinstance(model.blocks[0].up, QLoRALinear)
    assert torch.nn.functional.cosine_similarity(model(ids).flatten(), dense.flatten(), dim=0) > 0.99
    assert report.bytes_after < report.bytes_before


def test_everything_is_frozen_but_the_adapters_and_nothing_is_cast():
    model = TiedModel().bfloat16()
    report = qlora.prepare_model(model, rank=4)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora_{ab}.default" for n in INNER for ab in "ab"}
    assert report.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.blocks[0].up.bias.dtype == torch.bfloat16


def test_the_untied_head_is_skipped_unless_asked():
    for quantize_head in (False, True):
        model = TiedModel()
        model.lm_head = nn.Linear(64, 50)
        qlora.prepare_model(model, rank=2, quantize_head=quantize_head)
        assert isinstance(model.lm_head, QLoRALinear) == quantize_head


def test_a_shared_embedding_is_never_quantized():
    model = TiedModel()
    report = qlora.prepare_model(model, rank=2, quantize_head=True)
    assert report.skipped == ("lm_head",)


def test_target_modules_get_adapters_the_others_are_only_quantized():
    model = TiedModel()
    qlora.prepare_model(model, rank=2, target_modules=["up"], skip_modules=["blocks.1.down"])
    assert isinstance(model.blocks[1].up, QLoRALinear)
    assert type(model.blocks[0].down) is Linear4bit
    assert type(model.blocks[1].down) is nn.Linear


def test_options_reach_every_layer():
    model = TiedModel()
    qlora.prepare_model(
        model,
        rank=3,
        alpha=6,
        quant_type="fp4",
        block_size=32,
        double_quant=False,
        dropout=0.1,
        adapter_dtype=torch.bfloat16,
    )
    layer = model.blocks[1].down
    assert layer.adapters["default"].scaling == 2.0
    assert layer.adapters["default"].dropout == 0.1
    assert (layer.quant_type, layer.block_size, layer.double_quant) == ("fp4", 32, False)
    assert layer.lora_a["default"].dtype == torch.bfloat16


def test_training_mode_is_kept():
    model = TiedModel().eval()
    qlora.prepare_model(model, rank=2)
    assert not model.blocks[0].up.training


def test_a_sequential_can_be_prepared():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    qlora.prepare_model(model, rank=2)
    loss = model(torch.randn(8, 16)).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_weights_stream_onto_the_meta_device(tmp_path):
    reference = TiedModel()
    state = {name: t for name, t in reference.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = TiedModel()

    def tie() -> None:
        model.lm_head.weight = model.embed.weight

    model.tie_weights = tie
    torch.manual_seed(1)
    qlora.prepare_model(model, rank=4, weights=tmp_path)
    torch.manual_seed(1)
    qlora.prepare_model(reference, rank=4)
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids), reference(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.up.weight"), "lack 'blocks.1.up.weight'"),
        (lambda s: s.update({"blocks.1.up.weight": torch.zeros(3, 3)}), r"shape \(3, 3\): the model needs \(128, 64\)"),
        (lambda s: s.pop("embed.weight"), "lack .*'embed.weight'"),
    ],
)
def test_weights_that_do_not_fit(change, message):
    state = {name: t for name, t in TiedModel().state_dict().items() if name != "lm_head.weight"}
    change(state)
    with torch.device("meta"):
        model = TiedModel()
    model.tie_weights = lambda: setattr(model.lm_head, "weight", model.embed.weight)
    with pytest.raises((KeyError, ValueError), match=message):
        qlora.prepare_model(model, weights=state)


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(nn.Linear(64, 64).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        qlora.prepare_model(nn.Sequential(nn.Linear(4, 4)), weights=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["middle"]}, "target_modules: 'middle' matches no linear layer"),
        ({"skip_modules": ["nothing"]}, "skip_modules: 'nothing' matches"),
        ({"skip_modules": ["up", "down"]}, "all linear layers were skipped"),
        ({"gradient_checkpointing": True}, "no gradient_checkpointing_enable"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"dropout": 1.5}, "dropout=1.5 must be in"),
        ({"quant_type": "nf3"}, "quant_type='nf3' is unknown: use one of nf4, fp4, int4"),
        ({"block_size": 100}, "block_size=100 must be a power of two from 32 to 4096"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(options, message):
    model = TiedModel()
    with pytest.raises(ValueError, match=message):
        qlora.prepare_model(model, **options)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.blocks[0].up) is nn.Linear


def test_a_nan_names_its_layer_and_position():
    model = TiedModel()
    model.blocks[1].down.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.down: .*weight\[3, 4\] is nan or inf"):
        qlora.prepare_model(model)


def test_without_a_rank_layers_are_only_quantized():
    model = TiedModel()
    report = qlora.prepare_model(model, rank=None)
    assert type(model.blocks[0].up) is Linear4bit
    assert report.trainable_params == 0


def test_a_module_under_two_names_stays_one():
    model = TiedModel()
    model.blocks[1] = model.blocks[0]
    model.again = model.blocks[0].up
    qlora.prepare_model(model, rank=2)
    assert isinstance(model.again, QLoRALinear)
    assert model.again is model.blocks[0].up is model.blocks[1].up


@pytest.mark.parametrize("training", [False, True])
def test_torchs_own_transformer_layer(training):
    """MultiheadAttention reads out_proj.weight directly, and the inference fast path reads every weight."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 32)
    dense = layer(x)
    report = qlora.prepare_model(layer, rank=2)
    assert report.quantized == ("linear1", "linear2")
    assert report.skipped == ("self_attn.out_proj",)
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(layer(x).flatten(), dense.flatten(), dim=0) > 0.98


def test_persistent_buffers_are_loaded_too():
    dense = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    dense[1].running_mean.fill_(3.0)
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        model[0].to("meta")
        qlora.prepare_model(model, rank=2, weights=dense.state_dict())
        assert torch.equal(model[1].running_mean, dense[1].running_mean)


def test_an_index_that_leaves_its_folder_is_refused(tmp_path):
    for content, message in (
        ('{"weight_map": {"x": "../secret.safetensors"}}', "must be the name of a file in the same folder"),
        ("{}", "is not a checkpoint index"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            qlora.prepare_model(TiedModel(), weights=tmp_path)


def test_models_that_cannot_be_prepared():
    with pytest.raises(ValueError, match="has no nn.Linear"):
        qlora.prepare_model(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="use QLoRALinear"):
        qlora.prepare_model(nn.Linear(4, 4))
    with torch.device("meta"):
        model = TiedModel()
    with pytest.raises(ValueError, match="meta device: pass weights="):
        qlora.prepare_model(model)


MEASURE_PEAK = """
import json, sys, threading, time
import torch
from torch import nn
import qlora
import safetensors.torch, rich.progress

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024 + int(fields["RssFile"].split()[0]) * 1024

qlora.quantize(torch.randn(1024, 2048))  # starts threads and loads libraries before the baseline is read
with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(24)])
baseline = peak = resident()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
report = qlora.prepare_model(model, rank=4, weights=sys.argv[1])
done = True
thread.join()
print(json.dumps({"extra": peak - baseline, "result": report.bytes_after}))
"""


def test_peak_memory_is_the_result_and_one_layer(tmp_path):
    """24 layers of 16 MiB, streamed: the peak stays under 1.15 x the result + the largest layer (dense: 384 MiB)."""
    state = {f"{i}.weight": torch.randn(2048, 2048) for i in range(24)}
    save_file(state, tmp_path / "model.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE_PEAK, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    largest = 2048 * 2048 * 4
    assert figures["extra"] <= 1.15 * figures["result"] + largest, figures


def test_the_progress_bar_is_optional(capsys):
    qlora.prepare_model(TiedModel(), rank=2, progress=True)
    assert "Quantizing" in capsys.readouterr().out
    qlora.prepare_model(TiedModel(), rank=2)
    assert capsys.readouterr().out == ""
