"""Whole models as GGUF files, read back by the gguf package and by transformers; files that must not be written."""

import json
import shutil

import numpy as np
import pytest
import torch
from export import zoo
from gguf import GGUFReader, dequantize
from tiny_models import difference, save_dense
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import qlora
from qlora.export.gguf_model import export_gguf
from qlora.models.loading import load_for_inference
from qlora.storage import files

# Those that transformers reads from GGUF, by its own tables.
READ_BY_TRANSFORMERS = [name for name in zoo.MODELS if name.partition("-")[0] not in ("gemma", "smollm3")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    zoo.save("llama", folder / "model")
    zoo.save_adapter(folder / "model", folder / "adapter")
    return folder


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()


def text_ids(folder):
    return torch.tensor([AutoTokenizer.from_pretrained(folder)(zoo.TEXT)["input_ids"][:60]])


def tensors_of(path):
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_weights_that_were_written(name, tmp_path):
    folder = zoo.save(name, tmp_path / "model")
    export_gguf(folder, tmp_path / "model.gguf", tensor_type="f32")
    # The config is passed, because transformers does not read all of it from a GGUF file (rope scaling, head_dim).
    # Mistral's file is one of the architecture llama, and transformers reads it as such.
    options = {"gguf_file": "model.gguf", "dtype": torch.float32}
    options |= {} if name == "mistral" else {"config": AutoConfig.from_pretrained(folder)}
    ids = text_ids(folder)
    with torch.no_grad():
        # The permutation of rows is undone exactly; a norm's offset of 1 is rounded once, which gives up to one ulp.
        error = difference(loaded(tmp_path, **options)(ids).logits, loaded(folder)(ids).logits)
    assert error == 0 if "gemma" not in name else error < 1e-6


def test_the_keys_are_those_of_the_config(tmp_path):
    folder = zoo.save("gemma3", tmp_path / "model")
    export_gguf(folder, tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    wanted = {
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.name": "model",
        "general.file_type": 1,
        "gemma3.context_length": 256,
        "gemma3.embedding_length": 64,
        "gemma3.block_count": 7,
        "gemma3.feed_forward_length": 96,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 2,
        "gemma3.attention.key_length": 16,
        "gemma3.attention.value_length": 16,
        "gemma3.attention.sliding_window": 8,
        "gemma3.rope.freq_base": 100000.0,
        "gemma3.rope.freq_base_swa": 10000.0,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 2.0,
    }
    assert {key: reader.fields[key].contents() for key in wanted} == wanted
    assert reader.fields["tokenizer.chat_template"].contents() == zoo.TEMPLATE


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("f16", 11), ("bf16", 8)],
)
def test_16_bit_matrices_are_rounded_once(llama, tmp_path, kind, bits):
    export_gguf(llama / "model", tmp_path / "m.gguf", tensor_type=kind)
    export_gguf(llama / "model", tmp_path / "exact.gguf", tensor_type="f32")
    exact, rounded = tensors_of(tmp_path / "exact.gguf"), tensors_of(tmp_path / "m.gguf")
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    for name, value in exact.items():
        assert types[name] == (kind if value.ndim == 2 else "f32")
        # Half a unit in the last place; values below float16's normal range have a fixed unit of 2**-24.
        allowed = np.abs(value) * 2.0**-bits + 2.0**-25
        assert (np.abs(rounded[name] - value) <= (allowed if value.ndim == 2 else 0)).all(), name


def test_q8_0_has_half_a_step_of_error_and_leaves_rows_that_do_not_divide(tmp_path):
    folder = zoo.save("phi3", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["intermediate_size"] % 32 == 0
    export_gguf(folder, tmp_path / "m.gguf", tensor_type="q8_0")
    export_gguf(folder, tmp_path / "exact.gguf", tensor_type="f32")
    exact, rounded = tensors_of(tmp_path / "exact.gguf"), tensors_of(tmp_path / "m.gguf")
    for name, value in exact.items():
        if value.ndim == 2:
            largest = np.abs(value).reshape(-1, 32).max(axis=1, keepdims=True)
            # A step is largest / 127, itself rounded to float16; an error is half a step.
            error = np.abs(rounded[name] - value).reshape(-1, 32)
            assert (error <= largest / 127 * 0.5 + largest * 2.0**-11).all(), name
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["token_embd.weight"] == "Q8_0"
    from qlora.export.gguf_tensors import type_of

    assert type_of("x", (8, 48), "q8_0") == "f16"


def test_a_merged_file_holds_base_plus_adapter_in_float32(llama, tmp_path):
    export_gguf(llama / "model", tmp_path / "m.gguf", adapter=llama / "adapter", tensor_type="f32")
    model, _ = load_for_inference(llama / "model", llama / "adapter", torch.float32)
    found = tensors_of(tmp_path / "m.gguf")
    up = model.base_model.model.model.layers[1].mlp.up_proj
    assert torch.equal(torch.from_numpy(found["blk.1.ffn_up.weight"].copy()), up.exact_weight(["default"]))
    ids = text_ids(llama / "model")
    options = {"gguf_file": "m.gguf", "config": AutoConfig.from_pretrained(llama / "model"), "dtype": torch.float32}
    with torch.no_grad():
        wanted, plain = model(ids).logits, loaded(llama / "model")(ids).logits
        result = loaded(tmp_path, **options)(ids).logits
    assert difference(result, wanted) < 1e-5  # float32 sums in another order
    assert difference(plain, wanted) > 0.3


def test_the_base_of_an_adapter_is_its_4_bit_base_and_a_dense_model_stays_dense(llama, tmp_path):
    export_gguf(llama / "model", tmp_path / "base.gguf", adapter=llama / "adapter", base_only=True, tensor_type="f32")
    export_gguf(llama / "model", tmp_path / "dense.gguf", tensor_type="f32")
    quantized = qlora.QLoRAConfig(block_size=32)
    loaded(llama / "model", quantization_config=quantized).save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(llama / "model").save_pretrained(tmp_path / "packed")
    export_gguf(tmp_path / "packed", tmp_path / "packed.gguf", tensor_type="f32")
    base, dense, packed = (tensors_of(tmp_path / f"{name}.gguf") for name in ("base", "dense", "packed"))
    original = loaded(llama / "model").model.layers[0].mlp.down_proj.weight.detach().numpy()
    name = "blk.0.ffn_down.weight"
    assert (dense[name] == original).all()
    assert all((base[key] == packed[key]).all() for key in base)
    assert (base[name] != original).any()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head", "norm"]}, {"bias": "all"}])
def test_what_else_an_adapter_trains_is_merged_too(tmp_path, options):
    folder = zoo.save("llama-biased-tied" if "bias" in options else "llama", tmp_path / "model")
    zoo.save_adapter(folder, tmp_path / "adapter", **options)
    export_gguf(folder, tmp_path / "m.gguf", adapter=tmp_path / "adapter", tensor_type="f32")
    model, _ = load_for_inference(folder, tmp_path / "adapter", torch.float32)
    reading = {"gguf_file": "m.gguf", "config": AutoConfig.from_pretrained(folder), "dtype": torch.float32}
    ids = text_ids(folder)
    with torch.no_grad():
        assert difference(loaded(tmp_path, **reading)(ids).logits, model(ids).logits) < 1e-5


def test_trained_modules_of_a_16_bit_base_keep_float32(tmp_path):
    folder = zoo.save("llama", tmp_path / "model")
    loaded(folder, dtype=torch.bfloat16).save_pretrained(folder)
    zoo.save_adapter(folder, tmp_path / "adapter", modules_to_save=["norm"])
    from safetensors.torch import load_file, save_file

    path = tmp_path / "adapter" / "adapter_model.safetensors"
    trained = {key: torch.randn_like(value) if "norm" in key else value for key, value in load_file(path).items()}
    save_file(trained, path)
    export_gguf(folder, tmp_path / "m.gguf", adapter=tmp_path / "adapter", tensor_type="f32")
    found = torch.from_numpy(tensors_of(tmp_path / "m.gguf")["output_norm.weight"].copy())
    assert torch.equal(found, trained["base_model.model.model.norm.weight"])


def test_a_head_that_an_adapter_unties_is_written(tmp_path):
    folder = zoo.save("qwen2", tmp_path / "model")
    zoo.save_adapter(folder, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    export_gguf(folder, tmp_path / "m.gguf", adapter=tmp_path / "adapter", tensor_type="f32")
    found = tensors_of(tmp_path / "m.gguf")
    original = loaded(folder).model.embed_tokens.weight.detach().numpy()
    assert (found["token_embd.weight"] == original).all()
    assert np.abs(found["output.weight"] - original).max() > 0.01
    gemma = zoo.save("gemma", tmp_path / "gemma")
    zoo.save_adapter(gemma, tmp_path / "untied", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="llama.cpp reads no head for gemma"):
        export_gguf(gemma, tmp_path / "g.gguf", adapter=tmp_path / "untied")


def test_a_tied_model_has_one_matrix(tmp_path):
    export_gguf(zoo.save("qwen2", tmp_path / "model"), tmp_path / "m.gguf")
    names = set(tensors_of(tmp_path / "m.gguf"))
    assert "token_embd.weight" in names
    assert "output.weight" not in names


def test_a_context_beyond_a_window_that_llama_cpp_ignores_is_not_announced(tmp_path):
    folder = changed(zoo.save("mistral", tmp_path / "model"), sliding_window=32)
    exported = export_gguf(folder, tmp_path / "m.gguf")
    assert GGUFReader(exported.path).fields["llama.context_length"].contents() == 32
    assert "a context of 32 tokens instead of 256" in exported.notes[0]


def changed(folder, **changes):
    """Edits the config of a model folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu', but llama.cpp computes this architecture with silu only"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic'",
        ),
        ("qwen3", {"attention_bias": True}, None),
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar=144"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "full in every 2th layer"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30.0"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "no_rope_layers"),
        ("llama-yarn", {"rope_parameters": {**zoo.YARN, "attention_factor": 2.0}}, "yarn with attention_factor=2.0"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(tmp_path, name, changes, message):
    folder = changed(zoo.save(name, tmp_path / "model"), **changes)
    if message is None:  # the biases are only in the weights
        message = "k_proj.bias has no place in a GGUF file of the architecture qwen3"
        loaded(folder).save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        export_gguf(folder, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_unknown_architecture_is_named_with_those_that_work(tmp_path):
    folder = save_dense("gpt2", tmp_path / "model")
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel \(model_type 'gpt2'\).*gemma, gemma2.*qlora merge"):
        export_gguf(folder, tmp_path / "m.gguf")


def test_bad_inputs_write_nothing(llama, tmp_path, monkeypatch):
    output = tmp_path / "out" / "m.gguf"
    bare = shutil.copytree(llama / "model", tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        export_gguf(bare, output)
    other = zoo.save("qwen2", tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on another base"):
        export_gguf(other, output, adapter=llama / "adapter")
    with pytest.raises(ValueError, match="type 'q4_0' is unknown: use one of f16, bf16, f32, q8_0"):
        export_gguf(llama / "model", output, tensor_type="q4_0")
    with pytest.raises(ValueError, match="base_only needs an adapter"):
        export_gguf(llama / "model", output, base_only=True)
    with pytest.raises(ValueError, match="embedding has 100 rows: this is the tokenizer of another model"):
        export_gguf(changed(shutil.copytree(llama / "model", tmp_path / "small"), vocab_size=100), output)
    assert not output.parent.exists()
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="exists: choose another output"):
        export_gguf(llama / "model", tmp_path / "there.gguf")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="m.gguf needs .* GB, but .* free: free some"):
        export_gguf(llama / "model", output)
    assert list(output.parent.iterdir()) == []


def test_a_disk_that_fills_up_leaves_no_file(llama, tmp_path, monkeypatch):
    from gguf import GGUFWriter

    written = GGUFWriter.write_tensor_data

    def full(self, tensor, *args):
        if len(self.tensors[0]) < 5:
            raise OSError(28, "No space left on device")
        written(self, tensor, *args)

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space left"):
        export_gguf(llama / "model", tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_float16_are_refused_and_fit_bf16(tmp_path):
    folder = zoo.save("llama", tmp_path / "model")
    model = loaded(folder)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight has the value 1e\+06.*use --type bf16 or f32"):
        export_gguf(folder, tmp_path / "m.gguf")
    export_gguf(folder, tmp_path / "m.gguf", tensor_type="bf16")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="the weights are broken"):
        export_gguf(folder, tmp_path / "nan.gguf", tensor_type="f32")
