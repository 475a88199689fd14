"""Which CUDA kernel takes a shape, and why not a faster one: decided by pure functions, so no GPU is needed."""

import pytest

from qlora import _C

A100 = {"arch": 80, "sm_count": 108, "shared_bytes_per_block": 163 * 1024}
H100 = {"arch": 90, "sm_count": 132, "shared_bytes_per_block": 227 * 1024}
RTX4090 = {"arch": 89, "sm_count": 128, "shared_bytes_per_block": 99 * 1024}
B200 = {"arch": 100, "sm_count": 148, "shared_bytes_per_block": 227 * 1024}
RTX5090 = {"arch": 120, "sm_count": 170, "shared_bytes_per_block": 99 * 1024}
T4 = {"arch": 75, "sm_count": 40, "shared_bytes_per_block": 64 * 1024}


def select(m, n=4096, k=4096, dtype="bfloat16", block_size=64, gpu=A100):
    return _C.cuda_select(m, n, k, dtype, block_size, **gpu)


@pytest.mark.parametrize(("m", "kernel"), [(1, "decode"), (16, "decode"), (17, "gemm"), (4096, "gemm")])
def test_few_tokens_decode_many_multiply(m, kernel):
    chosen = select(m)
    assert (chosen["forward"], chosen["why_not_faster"]) == (kernel, "")
    assert (chosen["backward"], chosen["why_not_faster_backward"]) == ("gemm_dx", "")


@pytest.mark.parametrize(
    ("change", "forward", "backward", "gradients"),
    [
        ({"dtype": "float32"}, "float32 tokens", "float32 tokens", "float32 tokens"),
        ({"k": 4096 + 32}, "not a multiple of 64", "", ""),
        ({"k": 4096 + 8}, "not a multiple of 64", "not a multiple of 32", ""),
        ({"k": 4096 + 4}, "not a multiple of 64", "not a multiple of 32", "in_features is not a multiple of 8"),
        ({"n": 4097}, "", "out_features is not a multiple of 8", "out_features is not a multiple of 8"),
        ({"block_size": 32}, "block_size 32", "", ""),
        ({"gpu": T4}, "no bfloat16 tensor cores", "no bfloat16 tensor cores", "no bfloat16 tensor cores"),
        ({"gpu": T4, "dtype": "float16"}, "", "", ""),
    ],
)
def test_the_general_path_gives_its_reason(change, forward, backward, gradients):
    chosen = select(64, **change)
    assert forward in chosen["why_not_faster"]
    assert backward in chosen["why_not_faster_backward"]
    assert gradients in chosen["why_not_faster_gradients"]
    assert (chosen["gradients"] == "general") == bool(gradients)
    assert (chosen["forward"] == "general") == bool(forward)
    assert (chosen["backward"] == "general") == bool(backward)


def test_tiles_grow_with_the_product_and_fit_the_gpu():
    assert select(1, n=1024)["forward_tile"] == (16, 16)  # 32 rows a block would leave SMs idle
    assert select(1, n=14336)["forward_tile"] == (32, 16)
    assert select(64)["forward_tile"] == (64, 64)
    assert select(128)["forward_tile"] == (64, 128)
    for gpu in (A100, RTX4090):
        assert select(4096, gpu=gpu)["forward_tile"] == (128, 128)
    assert select(1000, gpu=H100)["forward_tile"] == (128, 128)
    assert select(4096, gpu=T4, dtype="float16")["forward_tile"] == (64, 64)  # 64 KiB hold no larger one
    assert select(4096, gpu=T4, dtype="float16")["backward_tile"] == (128, 64)


@pytest.mark.parametrize(("gpu", "tokens"), [(H100, 1024), (B200, 512)])
def test_the_vendors_gemm_takes_many_tokens_where_mma_sync_is_slower(gpu, tokens):
    fused = select(tokens - 1, gpu=gpu)
    assert (fused["forward"], fused["backward"]) == ("gemm", "gemm_dx")
    chosen = select(tokens, gpu=gpu)
    assert (chosen["forward"], chosen["backward"]) == ("dequantize_matmul", "dequantize_matmul")
    assert select(tokens, n=256, gpu=gpu)["forward"] == "gemm"
    assert select(tokens, k=256, gpu=gpu)["backward"] == "gemm_dx"


@pytest.mark.parametrize("gpu", [A100, RTX4090, RTX5090])
def test_elsewhere_it_never_does(gpu):
    assert select(1 << 20, gpu=gpu)["forward"] == "gemm"


def test_no_panel_is_the_whole_weight():
    for m in (1024, 2048, 1 << 17):
        for n, k in ((512, 4096), (4096, 4096), (14336, 4096), (128256, 8192)):
            rows = select(m, n=n, k=k, gpu=H100)["forward_tile"][0]
            assert 0 < rows <= n // 2 + 64
            assert rows * k * 2 <= 64 << 20


@pytest.mark.parametrize("gpu", [A100, H100, RTX4090, T4])
@pytest.mark.parametrize("k", [64, 1024, 4096, 13824, 14336, 16384, 28672, 65536])
def test_decode_fits_into_shared_memory(gpu, k):
    for m in range(1, 17):
        for n in (16, 1280, 4096, 14336):
            chosen = select(m, n, k, "float16", gpu=gpu)
            assert chosen["shared_bytes"] <= gpu["shared_bytes_per_block"], (m, n)
