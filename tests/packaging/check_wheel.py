"""Tries an installed wheel where there is no compiler: run by tools/build_wheels.sh, with an empty PATH."""

import importlib.metadata
import os
import shutil
from pathlib import Path

import torch

import qlora
from qlora import _C
from qlora.cli import main

assert not any(map(shutil.which, ("cc", "gcc", "g++", "c++", "clang", "nvcc"))), "there is a compiler on PATH"
assert "site-packages" in qlora.__file__, qlora.__file__
libraries = {path.name.split(".")[0] for path in Path(qlora.__file__).parent.glob("*.so")}
expected = {"_C", "libqlora_cpu"} | ({"libqlora_cuda"} if os.environ["VARIANT"] == "cuda" else set())
assert libraries == expected, libraries
if os.environ["VARIANT"] == "cuda":
    assert set(_C.CUDA_ARCHS) == {75, 80, 86, 89, 90, 100, 120}, _C.CUDA_ARCHS
tags = importlib.metadata.distribution("fused-qlora").read_text("WHEEL") or ""
assert "manylinux_2_28" in tags, tags

torch.manual_seed(0)
weight = qlora.quantize(torch.randn(256, 512))
x = torch.randn(3, 512, requires_grad=True)
y = qlora.ops.forward(x, *weight.arguments)
torch.testing.assert_close(y, x @ weight.dequantize().T, rtol=1e-4, atol=1e-3)
y.sum().backward()
torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, -1), rtol=1e-4, atol=1e-3)

# Errors cross the libraries as exceptions: from the operators through torch, from the bound functions through pybind11.
for wrong, error in (
    (lambda: qlora.quantize(torch.ones(2, 64), "nf5"), RuntimeError),
    (lambda: _C.codebook("nf5"), ValueError),
):
    message = ""
    try:
        wrong()
    except error as raised:
        message = str(raised)
    assert "nf5" in message, message
assert main(["info"]) == 0
print("1 passed, 0 failed")
