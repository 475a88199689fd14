"""torch.compile of whole models: one graph, no recompilation for batches of equal shape, equal results."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import save_dense
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

import qlora

BATCHES = torch.randint(3, 100, (3, 2, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_dense("llama", tmp_path_factory.mktemp("compile"))


def with_peft(checkpoint, checkpointing=False):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=qlora.QLoRAConfig(), dtype=torch.float32
    )
    qlora.prepare_model(model, rank=None, gradient_checkpointing=checkpointing)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights="orthogonal"))
    model.disable_input_require_grads()  # PEFT adds transformers' hook again, which cannot be in a graph
    return model


def with_our_layers(checkpoint, checkpointing=False):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    qlora.prepare_model(model, rank=4, gradient_checkpointing=checkpointing)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(model, batch):
    model.zero_grad()
    out = model(input_ids=batch, labels=batch, use_cache=False)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [with_peft, with_our_layers])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_in_one_graph(checkpoint, build, checkpointing):
    torch.manual_seed(0)
    model = build(checkpoint, checkpointing)
    model.train()
    expected = [step(model, batch) for batch in BATCHES]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch, (loss, gradients) in zip(BATCHES, expected, strict=True):
        ours, grads = step(compiled, batch)
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
        grads = {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}
        assert grads.keys() == gradients.keys()
        for name, grad in grads.items():
            scale = gradients[name].abs().max().item()
            torch.testing.assert_close(grad, gradients[name], rtol=1e-4, atol=1e-5 * scale)
    assert counter.frame_count == 1, "compiled again for a batch of the same shape"


def test_inductor_and_generation(checkpoint):
    """Tests the code that inductor generates around the operator."""
    model = with_peft(checkpoint).eval()
    with torch.no_grad():
        expected = model(input_ids=BATCHES[0], use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)
        logits = compiled(input_ids=BATCHES[0], use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
