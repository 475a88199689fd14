"""llama.cpp computes from the files what transformers computes from the folders: tokens, logits, answers.

It needs the package xllamacpp (``pip install xllamacpp``), a build of llama.cpp that is not ours.
"""

import re

import pytest
import torch
from export import zoo
from export.llama_cpp import LlamaCpp, needs_llama_cpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.demo.smollm2 import cache_folder
from qlora.export.gguf_adapter import export_gguf_adapter
from qlora.export.gguf_model import export_gguf
from qlora.models.loading import load_for_inference

pytestmark = needs_llama_cpp

TEXTS = [
    *filter(None, zoo.TEXT.splitlines()),
    zoo.TEXT,
    "a  b\n\n\nc",
    " x",
    "",
    "<|user|>Hi there<|end|>",
    "🙂ﬁ\t\u00a0é",
]
LENGTHS = (1, 2, 5, 17, 60)  # of prompts: more than the sliding windows, and than the original context of yarn


def as_llama_cpp_computes(model):
    """Gives a Gemma model the activation of llama.cpp, which is a table for float16 values."""
    if "gemma" in model.config.model_type:
        for module in model.modules():
            if hasattr(module, "act_fn") and hasattr(module, "down_proj"):
                module.act_fn = Rounded(module.act_fn)
    return model


class Rounded(torch.nn.Module):
    def __init__(self, exact):
        super().__init__()
        self.exact = exact

    def forward(self, x):
        return self.exact(x.half().to(x.dtype)).half().to(x.dtype)


@torch.no_grad()
def log_probabilities(model, ids):
    return model(torch.tensor([ids])).logits.log_softmax(-1)[0]


def assert_computes(runtime, model, ids):
    """Expects log-probabilities with at most twice torch's own error, both against float64."""
    own = log_probabilities(model, ids).double()
    exact = log_probabilities(model.double(), ids)
    model.float()
    allowed = 2 * (own - exact).abs().max().item()
    for length in LENGTHS:
        found = runtime.log_probabilities(ids[:length], model.config.vocab_size).double()
        assert (found - exact[length - 1]).abs().max().item() <= allowed


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_architecture_and_its_tokenizer(name, tmp_path):
    folder = zoo.save(name, tmp_path / "model")
    export_gguf(folder, tmp_path / "m.gguf", tensor_type="f32")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with LlamaCpp(tmp_path / "m.gguf") as runtime:
        for text in TEXTS:
            assert runtime.tokens(text) == tokenizer(text)["input_ids"], text
        assert_computes(runtime, as_llama_cpp_computes(model), tokenizer(zoo.TEXT)["input_ids"][:60])


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "llama3", "dbrx", "qwen2", "tekken", "gpt4o"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_byte_level_tokenizers_split_as_in_the_folder(kind, add_bos, tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.MODELS, "any", ("llama", kind, {}))
    folder = zoo.save("any", tmp_path / "model")
    tokenizer = zoo.tokenizer(kind, add_bos)
    tokenizer.save_pretrained(folder)
    export_gguf(folder, tmp_path / "m.gguf")
    with LlamaCpp(tmp_path / "m.gguf") as runtime:
        for text in TEXTS:
            assert runtime.tokens(text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "gemma3", "smollm3"])
def test_a_merged_file_and_a_lora_on_its_base_are_the_fine_tuned_model(name, tmp_path):
    folder = zoo.save(name, tmp_path / "model")
    adapter = zoo.save_adapter(folder, tmp_path / "adapter")
    export_gguf(folder, tmp_path / "merged.gguf", adapter=adapter, tensor_type="f32")
    export_gguf(folder, tmp_path / "base.gguf", adapter=adapter, base_only=True, tensor_type="f32")
    export_gguf_adapter(adapter, tmp_path / "lora.gguf", model=folder)
    model, tokenizer = load_for_inference(folder, adapter, torch.float32)
    as_llama_cpp_computes(model)
    ids = tokenizer(zoo.TEXT)["input_ids"][:60]
    # 4-bit layers have no float64 kernels: the reference is the same model, dense and merged.
    with LlamaCpp(tmp_path / "base.gguf") as base, LlamaCpp(tmp_path / "base.gguf", tmp_path / "lora.gguf") as both:
        for length in LENGTHS:
            with torch.no_grad(), model.disable_adapter():
                plain = log_probabilities(model, ids[:length])[-1]
            tuned = log_probabilities(model, ids[:length])[-1]
            assert_close(base.log_probabilities(ids[:length], model.config.vocab_size), plain, name)
            assert_close(both.log_probabilities(ids[:length], model.config.vocab_size), tuned, name)
            assert (plain - tuned).abs().max() > 0.5
    with LlamaCpp(tmp_path / "merged.gguf") as merged:
        assert_close(merged.log_probabilities(ids, model.config.vocab_size), log_probabilities(model, ids)[-1], name)


def assert_close(found, wanted, name):
    """float32 throughout: log-probabilities of these models have errors of 1e-5 against float64 (the test above).

    In a Gemma model such an error can choose the next entry of llama.cpp's table, which differs by 2**-11.
    """
    assert (found - wanted).abs().max() < (2.0**-11 if name.startswith("gemma") else 5e-5)


def test_long_and_short_factors_are_chosen_by_the_size_of_the_context(tmp_path):
    folder = zoo.save("phi3-longrope", tmp_path / "model")
    export_gguf(folder, tmp_path / "m.gguf", tensor_type="f32")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = (AutoTokenizer.from_pretrained(folder)(zoo.TEXT)["input_ids"] * 2)[:140]  # beyond the original context of 128
    wanted = log_probabilities(model, ids)[-1]
    with LlamaCpp(tmp_path / "m.gguf", context=256) as runtime:
        assert_close(runtime.log_probabilities(ids, model.config.vocab_size), wanted, "phi3")


def test_a_chat_ends_where_the_model_ends_it(tmp_path):
    folder = zoo.save("qwen2", tmp_path / "model")
    export_gguf(folder, tmp_path / "m.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is a storm?"}]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    with LlamaCpp(tmp_path / "m.gguf") as runtime:
        assert runtime.chat_prompt(messages) == wanted
    assert re.fullmatch(r"<\|user\|>What is a storm\?<\|end\|><\|assistant\|>", wanted)


def test_special_tokens_that_strip_the_spaces_after_them(tmp_path):
    """As in Phi-3: llama.cpp knows it by the model's name alone."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    folder = zoo.save("phi3", tmp_path / "model", rows_without_token=8)
    core = zoo.sentencepiece(prefix=True)
    core.add_special_tokens(["<|endoftext|>"])
    stripping = ["</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    core.add_special_tokens([AddedToken(token, rstrip=True, normalized=False) for token in stripping])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    export_gguf(folder, tmp_path / "m.gguf")
    text = "<|user|>\nHi there<|end|>\n<|assistant|>\n"
    with LlamaCpp(tmp_path / "m.gguf") as runtime:
        assert runtime.tokens(text, special=False) == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


SMOLLM2 = cache_folder() / "SmolLM2-135M-Instruct"


@pytest.mark.skipif(not (SMOLLM2 / "config.json").exists(), reason="needs SmolLM2 in the cache: run qlora demo once")
def test_a_real_model_gives_the_same_answers(tmp_path):
    adapter = zoo.save_adapter(SMOLLM2, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    export_gguf(SMOLLM2, tmp_path / "m.gguf", adapter=adapter, tensor_type="f32")
    model, tokenizer = load_for_inference(SMOLLM2, adapter, torch.float32)
    with LlamaCpp(tmp_path / "m.gguf") as runtime:
        for text in TEXTS:
            assert runtime.tokens(text) == tokenizer(text)["input_ids"], text
        for prompt in ("What does a lighthouse do?", "Name three fruits that are red."):
            ids = tokenizer(prompt)["input_ids"]
            for found in runtime.greedy(ids, 8):
                chosen = next(iter(found))
                wanted = log_probabilities(model, ids)[-1]
                # Equal tokens, or two that float32 cannot tell apart after 30 layers (measured: errors of 2.2e-4).
                assert wanted.max() - wanted[chosen] < 1e-3
                assert abs(found[chosen] - wanted[chosen]) < 1e-3
                ids = [*ids, chosen]
