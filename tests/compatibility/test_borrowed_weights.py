"""Model code that reads the weight of a linear layer directly: its dtype or its values."""

import torch
import transformers
from compatibility.refusals import result_or_refusal
from tiny_models import FOUR_BIT, difference, logits

import qlora

TOKENS = torch.tensor([[5, 9, 7, 3, 1, 8]])


def assert_prepared_or_refused(model, *words, **inputs):
    """The prepared model computes the same as before, within the 4-bit error, or prepare_model raises a ValueError that
    names the layer. An error in the first forward is a failure."""
    wanted = logits(model, TOKENS, **inputs)
    if result_or_refusal(lambda: qlora.prepare_model(model, rank=4), *words) is not None:
        assert difference(logits(model, TOKENS, **inputs), wanted) < FOUR_BIT


def test_activations_are_not_cast_to_the_dtype_of_a_packed_weight():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    assert_prepared_or_refused(model, "DenseReluDense", ".wo", decoder_input_ids=TOKENS)


def test_a_parent_does_not_multiply_with_packed_bytes():
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8, intermediate_size=128
    )
    assert_prepared_or_refused(transformers.MambaForCausalLM(config).eval(), "dt_proj", "mixer")
