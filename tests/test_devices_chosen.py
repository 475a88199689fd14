"""Choices of a job's device and dtype, tested for machines that are not present."""

import pytest
import torch

from qlora import _C, devices
from qlora.devices import choose_device, choose_dtype, why_not_arch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_auto_on_a_gpu(capability, expected):
    assert choose_dtype("auto", GPU, capability).value == expected


@pytest.mark.parametrize("isa", _C.runnable_isas())
def test_auto_on_a_cpu(monkeypatch, isa):
    monkeypatch.setenv("QLORA_CPU_ISA", isa)
    choice = choose_dtype("auto", CPU)
    assert choice.value == (torch.bfloat16 if isa in ("avx512bf16", "amx", "neonbf16") else torch.float32)
    assert isa in choice.reason


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_named_dtype_is_taken(name, dtype):
    assert choose_dtype(name, CPU).value == choose_dtype(name, GPU).value == dtype
    assert choose_dtype("fp16", GPU).value == torch.float16


def test_bad_names_and_what_a_device_cannot():
    with pytest.raises(ValueError, match="'fp8' must be one of auto, bf16, fp16, fp32"):
        choose_dtype("fp8", CPU)
    with pytest.raises(ValueError, match="'fp16' is for GPUs"):
        choose_dtype("fp16", CPU)
    for name in ("tpu", "cuda:x", "cuda:", "gpu"):
        with pytest.raises(ValueError, match="use auto, cpu, cuda or cuda:N"):
            choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_says_why_and_cuda_is_an_error():
    choice = choose_device("auto")
    assert choice.value == CPU
    assert "no CUDA" in choice.reason or "no GPU" in choice.reason
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"device='{name}' cannot be used: "):
            choose_device(name)


def test_a_gpu_that_is_there(monkeypatch):
    monkeypatch.setattr(devices, "why_not_gpu", lambda index: None if index in (None, 1) else "there are 2 GPUs")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert choose_device("auto").value == choose_device("cuda").value == torch.device("cuda", 0)
    assert choose_device("cuda:1").value == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device='cuda:7' cannot be used: there are 2 GPUs"):
        choose_device("cuda:7")


@pytest.mark.parametrize(
    ("archs", "gpu", "runs"),
    [
        ((75, 80, 86, 90), (8, 9), True),  # machine code of 8.6 runs on 8.9
        ((80,), (8, 0), True),
        ((86,), (8, 0), False),  # machine code runs on newer minor versions only
        ((90,), (10, 0), True),  # PTX of the newest arch
        ((75, 90), (8, 0), False),
        ((75, 80), (7, 0), False),  # older than any kernel
        ((), (9, 0), True),  # a build without the list excludes no GPU
    ],
)
def test_compiled_code_and_the_gpu_at_hand(archs, gpu, runs):
    assert (why_not_arch(*gpu, archs) is None) == runs


def test_training_in_bf16_on_a_slow_cpu_is_told_once(monkeypatch, recwarn):
    """With a model loaded by QLoRAConfig, whose dtype the user chooses."""
    import peft
    import transformers

    import qlora

    monkeypatch.setenv("QLORA_CPU_ISA", "scalar")
    monkeypatch.setattr(devices, "_hinted", False)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

    def adapted(dtype, **options):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).to(dtype)
        qlora.prepare_model(model, rank=None)
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", **options))
        return [str(w.message) for w in recwarn if "training in bfloat16" in str(w.message)]

    assert adapted(torch.float32) == []
    assert adapted(torch.bfloat16, inference_mode=True) == []
    (hint,) = adapted(torch.bfloat16)
    assert "dtype=torch.float32" in hint
    assert adapted(torch.bfloat16) == [hint]
