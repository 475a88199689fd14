"""Error of the tensor-core forward from rounding levels to 16 bit, compared with torch's rounding of weights."""

import pytest
import torch

import qlora
from qlora import _C


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", _C.QUANT_TYPES)
def test_rounded_levels_are_closer_than_rounded_weights(quant_type, dtype):
    weight = qlora.quantize(torch.randn(2000, 64), quant_type, double_quant=False)
    exact = weight.dequantize(torch.float32).double()
    codes = torch.stack((weight.packed.flatten() >> 4, weight.packed.flatten() & 15), 1).view(exact.shape).long()
    factor = _C.level_multiplier(quant_type, str(dtype).removeprefix("torch."))
    levels = torch.tensor(_C.codebook(quant_type), dtype=torch.float32)
    rounded = (levels * factor).to(dtype).double() / factor
    ours = (rounded[codes] * weight.absmax.double()[:, None] - exact).square().mean().sqrt()
    theirs = (exact.to(dtype).double() - exact).square().mean().sqrt()
    assert ours <= (0.5 if quant_type == "nf4" else 1e-3) * theirs
