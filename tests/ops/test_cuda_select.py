"""Selection of the CUDA kernel for a shape, and reasons against faster ones; pure functions that need no GPU."""

import pytest

from qlora import _C

A100 = {"arch": 80, "sm_count": 108, "shared_bytes_per_block": 163 * 1024}
H100 = {"arch": 90, "sm_count": 132, "shared_bytes_per_block": 227 * 1024}
RTX4090 = {"arch": 89, "sm_count": 128, "shared_bytes_per_block": 99 * 1024}
B200 = {"arch": 100, "sm_count": 148, "shared_bytes_per_block": 227 * 1024}
RTX5090 = {"arch": 120, "sm_count": 170, "shared_bytes_per_block": 99 * 1024}
T4 = {"arch": 75, "sm_count": 40, "shared_bytes_per_block": 64 * 1024}


def select(m, n=4096, k=4096, dtype="bfloat16", block_size=64, gpu=A100, rank=16, experts=1):
    return _C.cuda_select(m, n, k, dtype, block_size, **gpu, rank=rank, experts=experts)


@pytest.mark.parametrize(("m", "kernel"), [(1, "gemv"), (16, "gemv"), (32, "gemv"), (33, "gemm"), (64, "gemm")])
def test_few_tokens_take_gemv(m, kernel):
    chosen = select(m)
    assert (chosen["forward"], chosen["why_not_faster"]) == (kernel, "")
    assert chosen["why_not_faster_backward"] == ""


@pytest.mark.parametrize(
    ("change", "forward", "backward", "gradients"),
    [
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
    chosen = select(16, **change)
    assert forward in chosen["why_not_faster"]
    assert backward in chosen["why_not_faster_backward"]
    assert gradients in chosen["why_not_faster_gradients"]
    assert (chosen["gradients"] == "general") == bool(gradients)
    assert (chosen["forward"] == "general") == bool(forward)
    assert (chosen["backward"] == "general") == bool(backward)


def test_float32_takes_the_general_path_for_few_tokens_and_the_vendors_gemm_for_more():
    few, more = select(16, dtype="float32"), select(17, dtype="float32")
    assert (few["forward"], few["backward"]) == ("general", "general")
    assert (more["forward"], more["backward"]) == ("dequantize_matmul", "dequantize_matmul")
    for chosen in (few, more):  # TF32 would be faster, but torch's switch controls it
        assert "float32 tokens" in chosen["why_not_faster"]
        assert chosen["gradients"] == "general"
    assert select(64, dtype="float32", k=4096 + 4)["backward"] == "general"


def test_tiles_grow_with_the_product_and_fit_the_gpu():
    assert select(16, n=1024)["forward_tile"] == (16, 16)  # 32 rows per block would leave SMs idle
    assert select(16, n=14336)["forward_tile"] == (32, 16)
    assert select(1, n=14336)["forward_tile"] == (16, 16)
    assert select(16, n=14336, gpu=RTX4090)["forward_tile"] == (16, 16)
    assert select(64)["forward_tile"] == (64, 64)  # 128 tiles of 32 tokens are one more than a wave of 108
    assert select(64, gpu=H100)["forward_tile"] == (64, 32)
    assert select(64, n=14336, gpu=B200)["forward_tile"] == (128, 64)
    assert select(64, n=14336, gpu=H100)["forward_tile"] == (128, 64)  # with wgmma
    assert select(256, gpu=H100)["forward_tile"] == (128, 64)
    assert select(512, gpu=H100)["forward_tile"] == (128, 128)
    assert select(64, gpu=RTX4090)["forward_tile"] == (64, 32)
    assert select(200, n=14336, gpu=RTX4090)["forward_tile"] == (128, 64)
    assert select(64, k=14336, gpu=H100)["backward_tile"] == (128, 64)
    assert select(4096, gpu=T4, dtype="float16")["forward_tile"] == (64, 64)  # a larger tile does not fit in 64 KiB
    assert select(4096, gpu=T4, dtype="float16")["backward_tile"] == (128, 64)


@pytest.mark.parametrize(
    ("gpu", "forward", "backward"),
    [(H100, 513, 513), (B200, 65, 65), (A100, 65, 65), (RTX4090, 256, 256), (RTX5090, 256, 256)],
)
def test_dequantize_matmul_takes_many_tokens(gpu, forward, backward):
    for tokens in (forward, 4096):
        assert select(tokens, gpu=gpu)["forward"] == "dequantize_matmul"
    assert select(forward - 1, gpu=gpu)["forward"] == "gemm"
    assert select(backward, gpu=gpu)["backward"] == "dequantize_matmul"
    assert select(backward - 1, gpu=gpu)["backward"] == "gemm_dx"
    assert select(4096, n=256, gpu=gpu)["forward"] == "gemm"
    assert select(4096, k=256, gpu=gpu)["backward"] == "gemm_dx"


@pytest.mark.parametrize("arch", [87, 103, 110, 121])
def test_architectures_between_the_known_ones_have_thresholds_too(arch):
    assert select(256, gpu=H100 | {"arch": arch})["forward"] == "dequantize_matmul"
    assert select(256, gpu=H100 | {"arch": arch})["backward"] == "dequantize_matmul"


def test_turing_has_no_faster_instructions_than_the_fused_kernels():
    chosen = select(1 << 20, gpu=T4, dtype="float16")
    assert (chosen["forward"], chosen["backward"]) == ("gemm", "gemm_dx")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_panels_are_whole_weights_up_to_128_mib_and_of_equal_size_beyond(dtype):
    size = 4 if dtype == "float32" else 2
    for n, k in ((512, 4096), (4096, 4096), (14336, 4096), (28672, 8192), (128256, 8192)):
        rows = select(2048, n=n, k=k, dtype=dtype, gpu=H100)["forward_tile"][0]
        assert 0 < rows <= n
        if n * k * size <= 128 << 20:
            assert rows == n
        else:
            assert rows % 64 == 0
            assert rows * k * size <= 128 << 20
            assert -(-n // rows) * rows - n < rows  # no empty panel


@pytest.mark.parametrize("gpu", [A100, H100, RTX4090, T4])
@pytest.mark.parametrize("k", [64, 1024, 4096, 13824, 14336, 16384, 28672, 65536])
def test_gemv_fits_into_shared_memory(gpu, k):
    for m in range(1, 33):
        for n in (16, 1280, 4096, 14336):
            chosen = select(m, n, k, "float16", gpu=gpu)
            assert chosen["shared_bytes"] <= gpu["shared_bytes_per_block"], (m, n)


def test_few_tokens_of_a_small_rank_take_dot_products():
    assert select(32, rank=32)["low_rank"] == "token_dot"
    assert select(32, rank=33)["low_rank"] == "lora_down"
    assert select(33, rank=16)["low_rank"] == "lora_down"
    assert select(512, k=4100)["low_rank"] == "token_dot"  # rows that are not aligned to 16 bytes


def test_tiles_of_experts_grow_with_the_rows_of_each():
    """Qwen3-30B-A3B: 128 experts, gate_up (1536, 2048). 64 tokens have 4 rows for an expert, 2,048 have 128."""
    for tokens, gpu, tile in [
        (64, A100, (64, 32)),
        (64, H100, (64, 32)),
        (64, RTX4090, (64, 32)),
        (2048, A100, (128, 64)),
        (2048, H100, (128, 64)),  # without wgmma, which has no kernel for experts
        (512, RTX4090, (64, 32)),
        (2048, RTX4090, (128, 64)),
    ]:
        assert select(tokens * 8, n=1536, k=2048, gpu=gpu, experts=128)["experts_tile"] == tile, (tokens, gpu)
    few = select(8 * 128, n=1536, k=2048, experts=128), select(8 * 128 + 1, n=1536, k=2048, experts=128)
    assert [chosen["experts_forward"] for chosen in few] == ["gemv", "gemm"]
    assert select(64, n=1536, k=2080, experts=128)["experts_forward"] == "general"
    turing = select(4096, n=1536, k=2048, gpu=T4, dtype="float16", experts=128)
    assert (turing["experts_tile"], turing["experts_backward_tile"]) == ((64, 64), (128, 64))
