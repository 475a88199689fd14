"""`qlora bench`: fair alternation, consistent figures, and its output files."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys

import fake_works as fake
import pytest
import torch

from qlora.bench import left_out
from qlora.bench.measure import Watch, alternate, median_ratio
from qlora.bench.progress import Progress
from qlora.bench.session import Session
from qlora.cli import main

SMALL = ("--shape", "64x128", "--m", "1", "20", "--rank", "4", "--repeats", "2", "--dtype", "fp32")


@pytest.fixture
def quick(monkeypatch):
    """Replaces the slow measurement of limits."""
    monkeypatch.setattr("qlora.bench.measure.measure_limits", fake.fixed_limits)


@pytest.fixture
def bench(quick, monkeypatch, tmp_path, capfd):
    """Runs the command on works of this test; returns its status, its outputs and its results by work."""

    def run(*works, limit=1.0, repeats=3):
        monkeypatch.setattr("qlora.bench.works.works_of_shape", lambda *arguments: iter(works))
        file = tmp_path / "b.json"
        options = ("--time-limit", str(limit), "--repeats", str(repeats), "--json", str(file))
        status = main(["bench", "forward", *options])
        content = json.loads(file.read_text())
        out, err = capfd.readouterr()
        return status, out, err, content["complete"], {r["name"]: r for r in content["results"]}

    return run


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


class _Clock:
    """Contenders whose calls take given seconds, and the measurement of them."""

    def __init__(self, monkeypatch, **seconds):
        self.calls: list[str] = []
        self.contenders = {
            name: lambda i, name=name, of_name=of_name: self._call(name, of_name) for name, of_name in seconds.items()
        }
        monkeypatch.setattr("qlora.bench.measure.seconds", self._seconds)

    def _call(self, name, seconds):
        self.calls.append(name)
        if isinstance(seconds, Exception):
            raise seconds
        self.now += seconds[min(self.calls.count(name), len(seconds)) - 1]

    def _seconds(self, run, device):
        self.now = 0.0
        run()
        return self.now


@pytest.mark.parametrize(
    ("seconds", "calls", "figures"),
    [
        ([0.5], 2 + 2 + 5, [0.5] * 5),
        ([3.0], 2 + 4, [3.0] * 4),  # fewer rounds: 6 calls take 18 s of 20
        ([8.0], 2, [8.0]),  # the second call is the figure
        ([15.0], 1, [15.0]),
        ([9.0, 1.0], 2 + 2 + 5, [1.0] * 5),  # what only the first call does is not expected of others
    ],
)
def test_calls_fit_the_budget(monkeypatch, seconds, calls, figures):
    clock = _Clock(monkeypatch, a=[0.1], b=seconds)
    times = alternate(clock.contenders, torch.device("cpu"), 1, 5, budget_s=20.0)
    assert times == {"a": pytest.approx([0.1] * 5), "b": figures}
    assert clock.calls.count("b") == calls


def test_an_error_ends_the_measurement_unless_it_is_watched(monkeypatch):
    error = RuntimeError("no")
    clock = _Clock(monkeypatch, a=[0.1], b=error)
    with pytest.raises(RuntimeError, match="no"):
        alternate(clock.contenders, torch.device("cpu"), 1, 2)
    failures = {}
    watch = Watch()
    watch.failed = failures.__setitem__
    times = alternate(clock.contenders, torch.device("cpu"), 1, 2, watch=watch)
    assert times == {"a": pytest.approx([0.1, 0.1])}
    assert failures == {"b": error}


def test_the_ratio_is_that_of_rounds():
    ratio, spread = median_ratio([1.0, 2.0, 30.0], [2.0, 4.0, 10.0])
    assert (ratio, spread) == (0.5, 5.0)
    ratio, spread = median_ratio([1.0, 2.0], [4.0])  # the other had one round
    assert ratio == 0.25
    assert math.isnan(spread)


def test_table_json_and_roofline(quick, tmp_path, capsys):
    files = ("--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png"))
    assert main(["bench", *SMALL, *files]) == 0
    out = capsys.readouterr().out
    assert "÷ torch" in out
    assert "limits here" in out
    content = json.loads((tmp_path / "b.json").read_text())
    results = content["results"]
    assert {r["name"] for r in results} == {"forward", "backward", "multi", "quantize", "dequantize"}
    assert content["complete"]
    without_torch = {r["name"] for r in results if "torch" in r["left_out"]}
    assert without_torch == {"multi", "quantize", "dequantize"}
    assert {r["left_out"]["torch"]["why"] for r in results if r["left_out"]} == {"no such operation"}
    assert "no such operation" in out
    assert content["machine"]["threads"] == str(torch.get_num_threads())
    forward = next(r for r in results if r["name"] == "forward" and r["extents"]["m"] == 20 and r["extents"]["r"] == 4)
    assert forward["flops"] == 2 * 20 * (64 * 128 + 4 * (64 + 128))
    assert len(forward["seconds"]["qlora"]) == len(forward["seconds"]["torch"]) == 2
    assert forward["ratios"]["torch"]["median"] > 0
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_contenders_compute_the_same():
    from qlora.bench.works import Weights

    weights = Weights(64, 128, torch.float32, torch.device("cpu"), 4)
    x = torch.randn(3, 128)
    prepare = weights.contenders(x, weights.adapter)
    results = {name: prepare[name]()(1) for name in ("qlora", "torch")}
    error = (results["qlora"] - results["torch"]).norm() / results["torch"].norm()
    assert error < 0.15  # the quantization error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sing"], "sing is unknown: use forward"),
        (["--device", "cuda"], "sees no GPU"),
        (["--repeats", "1"], "repeats=1: a median needs at least 2"),
        (["backward", "--m", "1"], "no work is left of backward"),
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


def test_a_time_limit_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--time-limit", "0"])
    assert "0 is not a positive number of seconds" in capsys.readouterr().err


def test_contenders_that_fail_are_left_out_with_the_reason(bench):
    status, out, _, complete, results = bench(
        fake.work(
            qlora=(fake.sleeps, (0.001,)),
            raising=(fake.raises, (RuntimeError("bad shape\nand more"),)),
            elsewhere=(fake.raises, (NotImplementedError("Could not run 'op' with the 'CPU' backend"),)),
            large=(fake.raises, (RuntimeError("can't allocate memory: you tried to allocate 9 bytes"),)),
            absent=(fake.missing, None),
            also=("unable",),
        )
    )
    assert (status, complete) == (0, True)
    result = results["fake"]
    assert {name: reason["why"] for name, reason in result["left_out"].items()} == {
        "raising": "failed",
        "elsewhere": "not on this device",
        "large": "out of memory",
        "absent": "not installed",
        "unable": "no such operation",
    }
    assert result["left_out"]["raising"]["detail"] == "RuntimeError: bad shape"
    assert len(result["seconds"]["qlora"]) == 3
    for text in (
        "raising everywhere: failed: RuntimeError: bad shape\n",
        "absent everywhere: not installed: ImportError: No module named 'peer' (pip install",
    ):
        assert text in out


def test_a_contender_that_is_too_slow_is_stopped_and_not_begun_again(bench):
    contenders = {"qlora": (fake.sleeps, (0.001,)), "slow": (fake.sleeps, (60,))}
    status, out, _, _, results = bench(
        fake.work("small", m=1, qlora=contenders["qlora"], slow=(fake.sleeps, (0.3,))),
        fake.work("large", m=8, **contenders),
        fake.work("large", m=9, **contenders),
    )
    assert status == 0
    assert len(results["small"]["seconds"]["slow"]) == 1  # of two calls in 0.6 s, so that a third might exceed 1 s
    assert "(1 call)" in out
    assert "(> 1 s)" in out
    assert "slow large m=8 n=2 k=3: > 1 s: its first call was stopped after 1 s\n" in out
    assert "slow large m=9 n=2 k=3: > 1 s (estimated): not begun, because of large m=8 n=2 k=3\n" in out
    assert results["large"]["left_out"]["slow"] == {  # of the last one, m=9
        "why": "> 1 s (estimated)",
        "detail": "not begun, because of large m=8 n=2 k=3",
        "more_than_s": None,
    }
    assert len(results["large"]["seconds"]["qlora"]) == 3


def test_a_smaller_work_is_begun_after_one_that_was_too_slow(bench):
    contenders = {"qlora": (fake.sleeps, (0.001,))}
    *_, results = bench(
        fake.work("a", m=8, **contenders, slow=(fake.sleeps, (60,))),
        fake.work("b", m=8, **contenders, slow=(fake.sleeps, (0.001,))),
    )
    assert results["a"]["left_out"]["slow"]["more_than_s"] == 1.0
    assert results["b"]["left_out"] == {}


def test_contenders_that_crash_or_never_get_ready(bench, monkeypatch):
    monkeypatch.setattr("qlora.bench.session.PREPARE_SECONDS", 1.0)
    status, out, _, _, results = bench(
        fake.work("a", qlora=(fake.sleeps, (0.001,)), crash=(fake.raises, (ValueError(),)), hang=(fake.hangs, None)),
        fake.work("b", qlora=(fake.sleeps, (0.001,)), crash=(fake.dying, ()), hang=(fake.hangs, None)),
    )
    assert status == 0
    assert results["a"]["left_out"]["hang"]["why"] == "prepares > 1 s"
    assert results["b"]["left_out"]["hang"]["why"] == "prepares > 1 s (estimated)"
    assert results["b"]["left_out"]["crash"]["detail"] == "its process ended with SIGKILL"
    assert "qlora" in results["b"]["seconds"]
    assert "crash b m=1 n=2 k=3: crashed: its process ended with SIGKILL\n" in out


def test_without_figures_of_qlora_the_times_of_the_others_are_shown(bench):
    status, out, *_ = bench(fake.work(qlora=(fake.raises, (ValueError("odd"),)), torch=(fake.sleeps, (0.002,))))
    assert status == 0
    assert "qlora everywhere: failed: ValueError: odd" in out
    assert " ms │" in out


@pytest.fixture
def ctrl_c():
    """Python's reaction to Ctrl-C, which a shell switches off for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_prints_what_was_measured(bench, ctrl_c):
    status, out, err, complete, results = bench(
        fake.work("first", qlora=(fake.sleeps, (0.001,)), torch=(fake.sleeps, (0.001,))),
        fake.work("second", qlora=(fake.sleeps, (0.04,)), torch=(fake.interrupts, (7,)), also=("none",)),
        fake.work("third", qlora=(fake.sleeps, (0.001,))),
        repeats=9,
        limit=30.0,
    )
    assert (status, complete) == (130, False)
    assert set(results) == {"first", "second"}
    assert len(results["first"]["seconds"]["torch"]) == 9
    assert 1 <= len(results["second"]["seconds"]["torch"]) < 9  # the rounds before
    assert results["second"]["ratios"]["torch"]["median"] > 0
    assert "first" in out
    assert "third" not in out
    assert "interrupted in work 2 of 3" in err
    assert "Traceback" not in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_a_work_prints_what_was_measured(bench):
    status, out, err, complete, results = bench(fake.work("first", qlora=(fake.sleeps, (0.001,))), fake.broken())
    assert (status, complete, set(results)) == (1, False, {"first"})
    assert "first" in out
    assert "broken m=1 n=2 k=3: the measuring process ended: its process ended with SIGKILL" in err


def test_progress_without_a_terminal_is_lines(bench, monkeypatch):
    monkeypatch.setattr("qlora.bench.progress.LINE_S", 0.2)
    _, _, err, *_ = bench(
        fake.work("first", m=1, qlora=(fake.sleeps, (0.001,))),
        fake.work("second", m=2, qlora=(fake.sleeps, (0.001,)), slow=(fake.sleeps, (60,))),
        fake.work("third", m=3, qlora=(fake.sleeps, (0.001,))),
    )
    lines = err.splitlines()
    assert lines[0] == "measuring the limits of this machine"
    assert "1 of 3: first m=1 n=2 k=3" in lines
    assert any(re.fullmatch(r"2 of 3: about \d+ s left · second m=2 n=2 k=3", line) for line in lines)
    assert any("slow, first call: 1 s of at most 1 s" in line for line in lines)


def test_time_left_follows_the_shares(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress()
    progress.works([1.0, 3.0, 6.0])
    progress.start("a")
    assert progress.seconds_left() is None
    now[0] += 2.0
    progress.finish()
    progress.start("b")
    assert progress.seconds_left() == 18.0
    now[0] += 4.0
    assert progress.seconds_left() == 14.0
    now[0] += 50.0
    assert progress.seconds_left() == 12.0  # of the last one, at the rate of the first


def test_a_turn_of_many_calls_that_is_stopped_is_no_figure():
    assert left_out.too_slow(5.0, "round 2 of 7", 40) == left_out.LeftOut(
        "stopped", "its round 2 of 7 was stopped after 5 s"
    )


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


class _Stubborn(Exception):
    """Cannot be built from its arguments, so it does not survive pickling."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def _fail():
    raise _Stubborn("this", "that")


def test_the_first_child_of_a_process_ignores_ctrl_c():
    script = """
import signal, torch
from qlora.bench.progress import Progress
from qlora.bench.session import Session

if __name__ == "__main__":
    with Session(torch.device("cpu"), 1, 10.0, Progress()) as session:
        assert signal.SIGINT in session.call(signal.pthread_sigmask, signal.SIG_BLOCK, ())
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_child_of_a_session():
    """It reports errors that cannot be pickled, and is replaced if it dies between two works."""
    with Session(torch.device("cpu"), 1, 10.0, Progress()) as session:
        with pytest.raises(RuntimeError, match=r"(?s)_Stubborn: this and that"):
            session.call(_fail)
        first = session.call(os.getpid)
        os.kill(first, signal.SIGKILL)
        session._child[1].join()
        assert session.call(os.getpid) != first
