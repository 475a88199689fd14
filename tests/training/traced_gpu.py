"""Traces training, generation and evaluation of a tiny model with torch's fake tensors on an absent GPU.

Every operator checks the devices of its arguments, so a tensor created on the CPU by mistake is an error here. So is
reading a value, which would wait for a GPU. The accelerator is torch's stand-in for devices written in Python, because
in a CPU build autograd and indexing of tensors on "cuda" ask CUDA for its stream and abort.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import save_llama
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora
from qlora.models.chunked_loss import ChunkedLoss, chunked_loss
from qlora.optim import PagedAdamW
from qlora.training.data import Collator, Example


class _Backend(_DummyBackendModule):
    """The device functions that checkpointing and autocast use."""

    def get_rng_state(self, device=0):
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state, device=0):
        pass

    def device(self, index):
        return nullcontext()

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("fakegpu", backend_module=_Backend())
GPU = torch.device("fakegpu:0")
# Scalars that torch.optim.AdamW also keeps on the CPU.
SCALARS_ON_THE_CPU = 1


class OnlyOnGpu(TorchDispatchMode):
    """Fails if an operator returns a tensor with more than SCALARS_ON_THE_CPU elements outside the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > SCALARS_ON_THE_CPU:
                assert leaf.device == GPU, f"{func} made a tensor of {tuple(leaf.shape)} on {leaf.device}"
        return result


class TensorFromNumbers(TorchFunctionMode):
    """Handles ``torch.tensor(numbers, device=…)``, which the stand-in cannot do because the numbers have data."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == GPU:
            return torch.empty(torch.Size([len(args[0])]), **kwargs)
        return func(*args, **kwargs)


@contextmanager
def on_the_gpu_only(mode):
    with mode, TensorFromNumbers(), OnlyOnGpu():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def on_gpu(tensor, mode):
    """A tensor of the same shape and dtype on the GPU, without data."""
    fake = mode.from_tensor(tensor.detach())
    with mode:
        return fake.to(GPU)


def on_fake_gpu(module, mode):
    """Replaces a module's parameters and buffers by tensors on the GPU without data, in place."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                fake = torch.nn.Parameter(on_gpu(parameter, mode), requires_grad=parameter.requires_grad)
                part._parameters[name] = fake
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = on_gpu(buffer, mode)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module


def load(folder, dtype, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=qlora.QLoRAConfig(**options)
    ).requires_grad_(False)


def rows(tokenizer):
    ids = tokenizer("the sea is a storm . the ship is a light")["input_ids"]
    return [[Example(ids, [-100, -100, *ids[2:]]), Example(ids[:5], ids[:5])], [Example(ids[:7], ids[:7])]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_training_step(folder, dtype, packed, optimizer, options):
    model = get_peft_model(load(folder, dtype), LoraConfig(r=8, target_modules="all-linear", **options)).train()
    batch = Collator(1, packed)(rows(AutoTokenizer.from_pretrained(folder)))
    del batch["records"]
    ChunkedLoss(model.get_base_model()).install()
    mode = FakeTensorMode()
    on_fake_gpu(model, mode)
    inputs = {name: on_gpu(tensor, mode) for name, tensor in batch.items()}
    with mode:
        trained = [p for p in model.parameters() if p.requires_grad]
        steps = PagedAdamW(trained, bits=8 if optimizer.endswith("8bit") else 32, min_8bit_size=1, paged=False)
        with on_the_gpu_only(mode):
            loss = model(**inputs)["loss"]
            loss.backward()
        assert loss.device == GPU
        assert all(p.grad is not None and p.grad.device == GPU for p in trained)
        with on_the_gpu_only(mode):
            steps.step()
        assert all(isinstance(t, FakeTensor) for p in trained for t in steps.state[p].values() if t.numel() > 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
def test_evaluation_and_generation(folder, dtype, quant_type):
    """Generation runs the prompt, then one token with the cache.

    transformers' own loop checks after each token whether all replies have ended, which waits for a GPU.
    """
    model = load(folder, dtype, quant_type=quant_type).eval()
    mode = FakeTensorMode()
    on_fake_gpu(model, mode)
    with mode, torch.no_grad():
        ids = torch.zeros(1, 9, dtype=torch.long, device=GPU)
        positions = torch.arange(1, 9, device=GPU)
        with on_the_gpu_only(mode):
            assert chunked_loss(model, ids, positions, 8, chunk=4, input_ids=ids).device == GPU
            first = model(input_ids=ids, use_cache=True)
            token = first.logits[:, -1:].argmax(-1)
            second = model(input_ids=token, past_key_values=first.past_key_values, use_cache=True)
        assert second.logits.shape == (1, 1, model.config.vocab_size)


def test_the_trace_finds_what_it_is_for(folder):
    """It finds planted errors: a mask created on the CPU, a value that is read, and nonzero() on the GPU."""
    with FakeTensorMode():
        x, other = torch.ones(4, device=GPU), torch.ones(4)
        with pytest.raises(RuntimeError, match="device"), OnlyOnGpu():
            x + other
        with pytest.raises(AssertionError, match="on cpu"), OnlyOnGpu():
            torch.ones(4)
        with pytest.raises(AssertionError, match="on cpu"), OnlyOnGpu():
            x.to("cpu")
        with pytest.raises(DataDependentOutputException), OnlyOnGpu():
            x.sum().item()
        with pytest.raises(DynamicOutputShapeException), OnlyOnGpu():
            torch.ones(4, device=GPU).nonzero()
