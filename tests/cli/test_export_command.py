"""qlora export: what it writes and prints, and errors of one line."""

import pytest
from export import zoo
from gguf import GGUFReader

from qlora.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    zoo.save("llama", folder / "model")
    zoo.save_adapter(folder / "model", folder / "adapter")
    return folder


def gguf(world, output, *more, model=True):
    named = ("--model", str(world / "model")) if model else ()
    return main(["export", "gguf", *named, "--output", str(output), *more])


def test_model_base_and_adapter(world, tmp_path, capsys):
    adapter = ("--adapter", str(world / "adapter"))
    assert gguf(world, tmp_path / "merged.gguf", *adapter) == 0
    out = capsys.readouterr().out
    assert "merged.gguf (30 tensors, 0.3 MB)" in out
    assert f"ollama create NAME -f {tmp_path / 'merged.Modelfile'}" in out
    assert (tmp_path / "merged.Modelfile").read_text().startswith("FROM ./merged.gguf\nTEMPLATE")
    assert gguf(world, tmp_path / "base.gguf", *adapter, "--base-only", "--type", "f32") == 0
    assert GGUFReader(tmp_path / "base.gguf").fields["general.file_type"].contents() == 0
    # The base is the one that the adapter names.
    assert gguf(world, tmp_path / "lora.gguf", *adapter, "--adapter-only", model=False) == 0
    shown = capsys.readouterr().out
    assert "(21 layers" in shown
    assert f"qlora export gguf --model {world / 'model'} --adapter {world / 'adapter'} --base-only" in shown
    assert "FROM ./base.gguf\nADAPTER ./lora.gguf\n" in (tmp_path / "lora.Modelfile").read_text()
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--adapter-only",), "--adapter-only needs --adapter"),
        (("--base-only",), "--base-only needs --adapter"),
        (("--type", "q4_k"), "type 'q4_k' is unknown: use one of f16, bf16, f32, q8_0"),
        (("--adapter", "nowhere"), "nowhere has no adapter_config.json: it is not an adapter folder"),
    ],
)
def test_errors_are_one_line(world, tmp_path, capsys, more, message):
    assert gguf(world, tmp_path / "m.gguf", *more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qlora export: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_exist_are_kept(world, tmp_path, capsys):
    (tmp_path / "m.Modelfile").write_text("mine")
    assert gguf(world, tmp_path / "m.gguf") == 1
    assert "m.Modelfile exists: choose another output" in capsys.readouterr().err
    assert gguf(world, tmp_path / "m.gguf", model=False) == 1
    assert "--model is missing: only --adapter-only takes the base from the adapter" in capsys.readouterr().err


def test_a_folder_for_vllm(world, tmp_path, capsys):
    command = ["export", "vllm", "--model", str(world / "model"), "--adapter", str(world / "adapter"), "--output"]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert f"run: vllm serve {tmp_path / 'out'} --quantization bitsandbytes" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert main([*command, str(tmp_path / "out")]) == 1
    assert "qlora export: " in capsys.readouterr().err
