"""Which files of a model folder are read, and which tensor names in them."""

import shutil

import pytest
import torch
import transformers
from compatibility.refusals import result_or_refusal
from tiny_models import FOUR_BIT, SAME, TOKENS, difference, llama, logits, save_llama

import qlora
from qlora.models.loading import load_for_inference, load_quantized, resolve_model
from qlora.storage.weights import WeightSource

SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def test_a_stray_safetensors_file_does_not_replace_the_weights_of_the_model(tmp_path):
    """Expects the same model as without the stray file, which transformers ignores too."""

    def read():
        return logits(load_quantized(tmp_path, torch.float32, rank=None, progress=False)[0])

    llama().save_pretrained(tmp_path)
    wanted = read()
    llama(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "model_old.safetensors")
    assert torch.equal(read(), wanted)


@pytest.mark.parametrize("name", ["GPTNeoX", "ModernBertDecoder"])
def test_streaming_reads_a_checkpoint_whose_head_has_another_name_or_a_tied_weight_and_a_bias(name, tmp_path):
    """Expects the model that transformers loads, within the 4-bit error.

    GPT-NeoX files name the untied head ``embed_out``; ModernBERT's decoder stores a bias for a head whose weight is the
    embedding's.
    """
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "ModernBertDecoder":
        special |= {"cls_token_id": 1, "sep_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**SMALL, **special, num_hidden_layers=1)
    torch.manual_seed(0)
    dense = getattr(transformers, f"{name}ForCausalLM")(config)
    dense.save_pretrained(tmp_path)
    model, _ = load_quantized(tmp_path, torch.float32, rank=4, progress=False)
    assert difference(logits(model), logits(dense)) < FOUR_BIT


def lara_mini():
    if not hasattr(transformers, "LaraMiniConfig"):
        pytest.skip("transformers before 5.24 does not know this architecture")
    config = transformers.LaraMiniConfig(**SMALL, num_hidden_layers=2, num_key_value_heads=2, head_dim=16)
    return transformers.LaraMiniForCausalLM(config)


def molmo2_text():
    config = transformers.Molmo2TextConfig(**SMALL, num_hidden_layers=2, num_key_value_heads=2, head_dim=16)
    return transformers.Molmo2TextModel(config)


@pytest.mark.parametrize("make", [lara_mini, molmo2_text])
def test_a_model_whose_checkpoint_fuses_projections_of_unequal_size_is_read_back_in_4_bit(make, tmp_path):
    """Expects the same output after saving and loading in 4 bit, or an error of save_pretrained that names the layers;
    it must not write files that cannot be read."""
    torch.manual_seed(0)
    dense = make()
    dense.save_pretrained(tmp_path / "dense")
    load = type(dense).from_pretrained
    model = load(tmp_path / "dense", quantization_config=qlora.QLoRAConfig())
    names = "in_proj", "linear_attn", "self_attn"
    if result_or_refusal(lambda: model.save_pretrained(tmp_path / "packed"), *names) is not None:
        again = load(tmp_path / "packed")
        with torch.no_grad():
            assert difference(again.eval()(TOKENS)[0], model.eval()(TOKENS)[0]) < SAME


def test_prepare_model_reads_the_model_of_a_folder_and_nothing_else(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    llama(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "model_old.safetensors")
    source = WeightSource(tmp_path)
    assert torch.equal(source.read("model.norm.weight"), model.model.norm.weight)
    assert torch.equal(source.read("model.layers.0.mlp.up_proj.weight"), model.model.layers[0].mlp.up_proj.weight)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model_old.safetensors.*pass the path"):
        WeightSource(tmp_path)


def test_an_adapter_meets_the_same_base_whatever_the_compute_dtype(tmp_path):
    """The weights of a float32 checkpoint are quantized directly, not after a cast."""
    llama().save_pretrained(tmp_path)
    one, other = (load_quantized(tmp_path, dtype, progress=False)[0] for dtype in (torch.float32, torch.bfloat16))
    layers = {n: m for n, m in one.named_modules() if isinstance(m, qlora.nn.Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), other.get_submodule(name).buffers(), strict=True))
        assert torch.equal(layer.weight, other.get_submodule(name).weight)
    assert other.get_submodule("model.norm").weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["config.json", "model-1.safetensors", "original/model.safetensors", "metal/model.bin", "README.md"],
            ["config.json", "model-1.safetensors"],
        ),
        (
            ["config.json", "model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "tokenizer.model"],
            ["config.json", "model.safetensors", "tokenizer.model"],
        ),
        (["config.json", "pytorch_model.bin", "tf_model.h5"], ["config.json", "pytorch_model.bin"]),
    ],
)
def test_a_model_of_the_hub_is_downloaded_once(tmp_path, monkeypatch, files, expected):
    """One form of the weights, by the Hub's own filter on what a repository may hold."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    def snapshot_download(name, allow_patterns, ignore_patterns):
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve_model("someone/model")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == expected


def test_generation_ends_at_the_tokenizers_end_too(tmp_path):
    """The usual state after a chat format was added to the tokenizer of a base model."""
    from transformers import GenerationConfig

    folder = save_llama(tmp_path)
    GenerationConfig(eos_token_id=9).save_pretrained(folder)
    model, tokenizer = load_for_inference(folder, None, torch.float32)
    assert model.generation_config.eos_token_id == sorted({9, tokenizer.eos_token_id})
