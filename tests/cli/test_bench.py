"""`qlora bench`: fair alternation, consistent figures, and its output files."""

import contextlib
import json

import pytest
import torch

from qlora.bench.measure import Limits, alternate, median_ratio
from qlora.cli import main

SMALL = ("--shape", "64x128", "--m", "1", "20", "--rank", "4", "--repeats", "2", "--dtype", "fp32")


@pytest.fixture
def quick(monkeypatch):
    """Replaces the slow measurement of limits, and shortens turns."""
    monkeypatch.setattr("qlora.bench.measure.ROUND_SECONDS", 1e-4)
    monkeypatch.setattr("qlora.bench.measure.measure_limits", lambda device, dtype: Limits(1e9, 1e10))


def test_contenders_take_turns_over_all_weights(monkeypatch):
    monkeypatch.setattr("qlora.bench.measure.ROUND_SECONDS", 0.0)  # a turn is one call
    calls: list[tuple[str, int]] = []
    contenders = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    times = alternate(contenders, torch.device("cpu"), copies=3, repeats=4)
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4}
    rounds = calls[-8:]
    assert "".join(name for name, _ in rounds) == "abbaabba"
    assert [i for name, i in rounds if name == "a"] == [0, 1, 2, 0]


class _Graph:
    """Stand-in for a CUDA graph: replays the calls made during its capture."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def gpu(monkeypatch):
    """Replaces the parts of torch.cuda that `alternate` uses; returns the graphs that it creates."""
    graphs: list[_Graph] = []
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: graphs.append(_Graph()) or graphs[-1])
    monkeypatch.setattr("torch.cuda.graph", lambda graph, stream: contextlib.nullcontext())
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("qlora.bench.measure.seconds", lambda call, device: call() or 6.0)
    monkeypatch.setattr("qlora.bench.measure.ROUND_SECONDS", 0.0)
    return graphs


def test_on_a_gpu_a_graph_of_all_weights_is_replayed(gpu, capsys):
    called: list[int] = []
    refused: list[int] = []

    def refuses(i):
        refused.append(i)
        if len(refused) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    contenders = {"a": called.append, "b": refuses}
    times = alternate(contenders, torch.device("cuda"), copies=3, repeats=2)
    assert called == [0, 0, 1, 2]  # once before the capture
    assert gpu[0].replays == 2 + 2 + 2  # warm up, estimate, rounds
    assert times == {"a": [2.0, 2.0], "b": [6.0, 6.0]}  # a turn of `a` is one replay with three calls
    error = capsys.readouterr().err
    assert (
        error == "b is timed with its launches, not as a CUDA graph: operation not permitted when stream is capturing\n"
    )
    assert alternate({"a": called.append}, torch.device("cuda"), 3, 2, graphs=False) == {"a": [6.0, 6.0]}


def test_the_ratio_is_that_of_rounds():
    ratio, spread = median_ratio([1.0, 2.0, 30.0], [2.0, 4.0, 10.0])
    assert (ratio, spread) == (0.5, 5.0)


def test_table_json_and_roofline(quick, tmp_path, capsys):
    files = ("--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png"))
    assert main(["bench", *SMALL, *files]) == 0
    out = capsys.readouterr().out
    assert "÷ torch" in out
    assert "limits here" in out
    content = json.loads((tmp_path / "b.json").read_text())
    results = content["results"]
    assert {r["name"] for r in results} == {"forward", "backward", "multi", "quantize", "dequantize"}
    assert content["machine"]["threads"] == str(torch.get_num_threads())
    forward = next(r for r in results if r["name"] == "forward" and r["extents"]["m"] == 20 and r["extents"]["r"] == 4)
    assert forward["flops"] == 2 * 20 * (64 * 128 + 4 * (64 + 128))
    assert len(forward["seconds"]["qlora"]) == len(forward["seconds"]["torch"]) == 2
    assert forward["ratios"]["torch"]["median"] > 0
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_contenders_compute_the_same():
    from qlora.bench.works import Weights

    weights = Weights(64, 128, torch.float32, torch.device("cpu"), ("torch",), 4)
    x = torch.randn(3, 128)
    results = {name: c(1) for name, c in weights.contenders(x, weights.a, weights.b).items()}
    error = (results["qlora"] - results["torch"]).norm() / results["torch"].norm()
    assert error < 0.15  # the quantization error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sing"], "sing is unknown: use forward"),
        (["--device", "cuda"], "sees no GPU"),
        (["--repeats", "1"], "repeats=1: a median needs at least 2"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is a GPU")
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_peer_that_is_unknown(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--compare", "torch,numpy"])
    assert "numpy is unknown: use torch, bitsandbytes or none" in capsys.readouterr().err


def test_step_of_a_small_model(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "qlora.bench.step.SMOLLM2",
        {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
    )  # fmt: skip
    assert main(["bench", "step", *SMALL, "--json", str(tmp_path / "b.json")]) == 0
    (result,) = json.loads((tmp_path / "b.json").read_text())["results"]
    assert (result["name"], result["extents"]["m"]) == ("step", 512)
    assert set(result["seconds"]) == {"qlora", "torch"}
