"""qlora plan: its sizes compared with real models, its activations with the allocator of a real step."""

import json
import subprocess
import sys

import pytest
import torch
from torch.profiler import profile

import qlora
from qlora.cli import main
from qlora.models.chunked_loss import chunked_loss, learnt_positions
from qlora.models.loading import load_quantized
from qlora.nn.replacing import tensor_bytes
from qlora.optim import PagedAdamW
from qlora.planning.estimate import Settings, estimate
from qlora.planning.presets import PRESETS, config_of

# SmolLM2's shape and vocabulary with four layers, so that a step takes a second.
SHALLOW = {"num_hidden_layers": 4}


def config(**changes):
    result = config_of("smollm2-135m")
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def real_model(shape, settings):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, settings.dtype))
    qlora.prepare_model(model, settings.rank, gradient_checkpointing=settings.checkpointing)
    return model.train()


def peak_of_a_real_step(model, settings):
    """Peak bytes of torch's allocator in a forward and backward, without the model."""
    ids = torch.randint(0, 1000, (settings.batch, settings.sequence))

    def step():
        chunked_loss(model, ids, learnt_positions(ids), ids.numel(), input_ids=ids).backward()

    step()
    model.zero_grad()
    with profile(profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "settings",
    [
        Settings(rank=16, sequence=512, checkpointing=False),
        Settings(rank=16, sequence=512, checkpointing=True),
        Settings(rank=64, batch=3, sequence=200, checkpointing=False),
        Settings(rank=8, batch=2, sequence=256, dtype="float32", checkpointing=True),
    ],
    ids=str,
)
def test_within_5_percent_of_a_real_step(settings):
    shape = config(**SHALLOW)
    plan = estimate(config(**SHALLOW), settings)
    model = real_model(shape, settings)
    assert plan.packed + plan.statistics + plan.dense + plan.adapters == tensor_bytes(model)
    assert plan.adapters == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    planned = plan.gradients + plan.activations + plan.workspace
    measured = peak_of_a_real_step(model, settings)
    assert abs(planned - measured) <= 0.05 * (measured + tensor_bytes(model)), (planned, measured)
    # The whole step, with its optimizer.
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for name, t in s.items() if name != "step")
    assert plan.optimizer == state


@pytest.mark.parametrize("adapt_experts", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mixture_within_5_percent_of_a_real_step(adapt_experts, checkpointing, tmp_path):
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    shape = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=4,
    )
    settings = Settings(rank=4, sequence=256, adapt_experts=adapt_experts, checkpointing=checkpointing)
    plan = estimate(shape, settings)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model, _ = load_quantized(tmp_path, torch.bfloat16, rank=4, adapt_experts=adapt_experts, progress=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert plan.packed + plan.statistics + plan.dense + plan.adapters == tensor_bytes(model)
    assert plan.adapters == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    planned = plan.gradients + plan.activations + plan.workspace
    measured = peak_of_a_real_step(model.get_base_model(), settings)
    assert abs(planned - measured) <= 0.05 * (measured + tensor_bytes(model)), (planned, measured)


def test_the_distribution_of_a_mixture_is_told(capsys):
    assert main(["plan", "gpt-oss-20b", "--seq", "256", "--checkpointing", "on"]) == 0
    out = capsys.readouterr().out
    assert "32 experts, 4 for each token: of 256 tokens an expert gets 32 on average and 256 at most." in out


def test_checkpointing_and_8_bit_and_devices_need_less():
    def bytes_of(**changes):
        return estimate(config(**SHALLOW), Settings(**changes))

    kept, computed = bytes_of(checkpointing=False), bytes_of(checkpointing=True)
    assert computed.activations < kept.activations
    assert computed.packed == kept.packed
    wide, eight = bytes_of(rank=64), bytes_of(rank=64, optimizer_bits=8)  # no parameter is below min_8bit_size
    assert eight.optimizer == pytest.approx(wide.optimizer * (2 + 8 / 256) / 8, rel=1e-3)
    paged = bytes_of(paged=True)
    assert paged.resident == computed.resident - computed.optimizer
    four = bytes_of(devices=4)
    assert four.packed == -(-computed.packed // 4)
    assert four.activations == computed.activations


def test_llama_65b_on_one_card_of_48_gb(tmp_path, capsys):
    """QLoRA's best-known claim, with the paper's rank of 64 on all linear layers."""
    path = tmp_path / "plan.json"
    command = ["plan", "llama-65b", "--budget", "48", "--rank", "64", "--seq", "512", "--optimizer-bits", "32", "8"]
    assert main([*command, "--paged", "--json", str(path), "--png", str(tmp_path / "plan.png")]) == 0
    plans = json.loads(path.read_text())["plans"]
    fits = {(p["settings"]["checkpointing"], p["settings"]["optimizer_bits"]): p["fits"] for p in plans}
    assert fits == {(True, 32): True, (True, 8): True, (False, 32): False, (False, 8): False}
    # 64.5e9 weights at 4.127 bits; their number follows from the shapes: 80 (4 h² + 3 h i).
    weights = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    assert plans[0]["bytes"]["packed"] == weights // 2
    assert plans[0]["bytes"]["statistics"] == pytest.approx(weights / 64 * (1 + 4 / 256), rel=1e-3)
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "fits 48 GB" in out
    assert "is paged" in out


def test_presets_have_the_known_number_of_parameters():
    from transformers import AutoModelForCausalLM

    known = {"smollm2-135m": 134.5e6, "llama-7b": 6.738e9, "llama-65b": 65.286e9, "llama3-8b": 8.030e9}
    known |= {"llama3-70b": 70.554e9, "qwen3-30b-a3b": 30.532e9, "gpt-oss-20b": 20.915e9}
    assert known.keys() == PRESETS.keys()
    for name, count in known.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(name))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=1e-3), name


def test_experts_of_nested_configs_are_counted():
    from transformers import AutoConfig

    from qlora.planning.estimate import choices

    assert choices(AutoConfig.for_model("qwen3_vl_moe")) == 4
    assert choices(AutoConfig.for_model("mixtral")) == 2
    assert choices(AutoConfig.for_model("llama")) is None


def test_bad_requests(capsys):
    for option in ("adapt-experts", "offload-experts"):
        assert main(["plan", "smollm2-135m", f"--{option}"]) == 1
        assert "is no mixture whose experts become 4-bit" in capsys.readouterr().err
    assert main(["plan", "gpt-9"]) == 1
    assert "neither a folder nor one of" in capsys.readouterr().err
    assert main(["plan", "smollm2-135m", "--rank", "0"]) == 1
    assert "rank=0 must be at least 1" in capsys.readouterr().err


def test_planning_needs_no_weights_and_little_memory():
    """Plans 65B's shapes in less memory than one dense layer of it (0.4 GB in bfloat16)."""
    code = """
import resource
from qlora.planning.estimate import Settings, estimate
from qlora.planning.presets import config_of
import transformers.models.llama.modeling_llama
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shape = config_of("llama-65b")
shape.num_hidden_layers = 8
estimate(shape, Settings())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 300
