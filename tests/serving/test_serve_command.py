"""The command qlora serve as a process of its own, its options, and the lines of the guide."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from running import QUESTION, Running, free_port, save_model, text_alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served"), {"a": 4, "b": 9})


def start_command(folder, port, *options):
    command = [sys.executable, "-m", "qlora", "serve", "--model", str(folder / "base"), "--served-name", "base"]
    command += ["--adapter", f"a={folder / 'a'}", "--port", str(port), "--compute-dtype", "fp32", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if '"ready"' in line:
            return process
    raise AssertionError("".join(lines))


def test_the_command_serves_stops_gently_and_survives_a_kill(folder):
    port = free_port()
    process = start_command(folder, port, "--cache-tokens", "1024")
    address = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none", "max_retries": 0}
    client = openai.OpenAI(**address)
    options = {"model": "a", "messages": QUESTION, "temperature": 0}
    assert client.chat.completions.create(**options, max_tokens=8).choices[0].message.content == text_alone(
        folder, "a", 8
    )
    events = iter(client.chat.completions.create(**options, max_tokens=150, stream=True))
    next(events)
    process.send_signal(signal.SIGTERM)
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == text_alone(folder, "a", 150)  # what runs is finished
    assert process.wait(30) in (0, -signal.SIGTERM)  # uvicorn raises the signal again when it is done
    log = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]
    assert [entry["status"] for entry in log if entry["event"] == "request"] == [200, 200]
    process = start_command(folder, port)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process = start_command(folder, port)
    try:
        assert openai.OpenAI(**address).models.list().data
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130, -signal.SIGINT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "a"], "must be NAME=FOLDER"),
        (["--adapter", "x=nowhere"], "is not an adapter folder"),
        (["--adapter", "base={a}", "--served-name", "base"], "must differ"),
        (["--slots", "0"], "--slots 0 must be positive"),
    ],
)
def test_wrong_options(folder, options, message, capsys, monkeypatch):
    from qlora.cli import main

    # The command's logs go to the stderr of this test, which is closed when other tests serve in this process.
    monkeypatch.setattr(logging.getLogger("qlora.serving"), "handlers", [])
    given = [option.format(a=folder / "a") for option in options]
    assert main(["serve", "--model", str(folder / "base"), "--compute-dtype", "fp32", *given]) == 1
    assert message in capsys.readouterr().err


def test_curl_lines_of_the_guide_run_as_they_stand(folder, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "serve.md").read_text()
    blocks = [block.split("```")[0] for block in guide.split("```sh\n")[1:]]
    lines = [block.strip() for block in blocks if block.startswith("curl")]
    assert len(lines) >= 4
    adapters = tmp_path / "runs"
    for run in ("support", "legal"):
        shutil.copytree(folder / "a", adapters / run / "adapter")
    (tmp_path / "base").symlink_to(folder / "base")
    for run in ("support", "legal"):
        (tmp_path / run).symlink_to(adapters / run / "adapter")
    (tmp_path / "keys").mkdir()
    server = Running(tmp_path, ["support"], keys=["my-key"])
    try:
        for line in lines:
            line = line.replace("http://localhost:8000", server.url)
            result = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, cwd=tmp_path, check=False)
            assert result.returncode == 0, f"{line}\n{result.stderr}"
            assert result.stdout, line
            assert '"error"' not in result.stdout, f"{line}\n{result.stdout}"
    finally:
        server.stop()
