"""Tokenizers as fields of GGUF files."""

import json

import pytest
from export import zoo
from gguf import TokenType
from tiny_models import save_llama
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora.export.gguf_tokenizer import load_fast_tokenizer, read_tokenizer

PRE = {
    "gpt2": "gpt-2",
    "smollm": "smollm",
    "llama3": "llama-bpe",
    "dbrx": "dbrx",
    "qwen2": "qwen2",
    "tekken": "tekken",
    "gpt4o": "gpt-4o",
}


@pytest.mark.parametrize("kind", PRE)
def test_a_pre_tokenizer_is_recognized_by_its_rules(kind):
    fields = read_tokenizer(zoo.tokenizer(kind), 500, [])
    assert (fields.model, fields.pre) == ("gpt2", PRE[kind])
    assert fields.merges
    assert fields.scores is None


def test_an_unknown_pre_tokenizer_is_refused_or_named_by_the_user():
    made = zoo.tokenizer("gpt2")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]
    )
    with pytest.raises(
        ValueError, match=r"pre-tokenizer \['Punctuation', 'gpt2'\] is not one of.*--pre-tokenizer NAME"
    ):
        read_tokenizer(made, 500, [])
    assert read_tokenizer(made, 500, [], pre="falcon").pre == "falcon"


def test_types_and_padding_of_the_vocabulary():
    made = zoo.tokenizer("sentencepiece")
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("▁▁▁", normalized=False)])
    fields = read_tokenizer(made, len(made) + 2, [])
    kinds = dict(zip(fields.tokens, fields.types, strict=True))
    assert len(fields.tokens) == len(made) + 2
    assert kinds["<unk>"] == TokenType.UNKNOWN
    assert kinds["<s>"] == kinds["<|user|>"] == TokenType.CONTROL
    assert kinds["<0x0A>"] == TokenType.BYTE
    assert kinds["<think>"] == kinds["   "] == TokenType.USER_DEFINED
    assert kinds[f"[PAD{len(made)}]"] == TokenType.UNUSED
    assert kinds["▁the"] == TokenType.NORMAL


def test_special_tokens_and_what_is_added_around_a_text():
    fields = read_tokenizer(zoo.tokenizer("sentencepiece"), 600, [2, 5, 3])
    assert fields.ids == {"bos": 1, "eos": 2, "unk": 0, "eot": 5, "eom": 3}
    assert fields.flags == {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}
    assert not read_tokenizer(zoo.tokenizer("sentencepiece-bare"), 600, []).flags["add_space_prefix"]
    assert read_tokenizer(zoo.tokenizer("qwen2"), 500, []).flags == {"add_bos_token": False, "add_eos_token": False}
    assert read_tokenizer(zoo.tokenizer("qwen2", add_bos=True), 500, []).flags["add_bos_token"]


def test_scores_give_the_order_of_the_merges():
    made = zoo.tokenizer("sentencepiece")
    fields = read_tokenizer(made, len(made), [])
    scores = dict(zip(fields.tokens, fields.scores, strict=True))
    merged = ["".join(pair) for pair in json.loads(made.backend_tokenizer.to_str())["model"]["merges"]]
    in_order = [scores[token] for token in dict.fromkeys(merged)]
    assert in_order == sorted(in_order, reverse=True)
    assert scores["<0x00>"] == 0.0


def test_merges_that_no_score_can_order_are_refused():
    made = zoo.tokenizer("sentencepiece")
    data = json.loads(made.backend_tokenizer.to_str())
    merges = data["model"]["merges"]
    first, second = next(pair for pair in zip(merges, merges[1:], strict=False) if "".join(pair[0]) == "".join(pair[1]))
    assert first != second
    merges.remove(second)
    merges.append(second)
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))
    with pytest.raises(ValueError, match="at two places of its order"):
        read_tokenizer(made, 600, [])


def test_runs_of_one_character_may_alternate_as_in_gemma():
    """Gemma's merges of line breaks, spaces and tabs stand before all others, sorted by the length of the left part."""
    made = zoo.tokenizer("sentencepiece-bare")
    data = json.loads(made.backend_tokenizer.to_str())
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    runs = [c * n for c in "~^" for n in range(1, 6)]
    vocabulary |= {run: len(vocabulary) + i for i, run in enumerate(r for r in runs if r not in vocabulary)}
    pairs = [[c * left, c * right] for left in (4, 3, 2, 1) for right in (3, 2, 1) if left + right < 6 for c in "~^"]
    data["model"]["merges"] = [*pairs, *(pair for pair in merges if pair not in pairs)]
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))
    fields = read_tokenizer(made, 800, [])
    scores = dict(zip(fields.tokens, fields.scores, strict=True))
    assert scores["~~~~~"] > scores["~~~~"] > scores["~~~"] > scores["~~"]


def test_spaces_that_llama_cpp_adds_are_noted():
    made = zoo.tokenizer("sentencepiece")
    assert read_tokenizer(made, 600, []).note is None
    made.backend_tokenizer.normalizer = None
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fields = read_tokenizer(made, 600, [])
    assert fields.flags["add_space_prefix"]
    assert "llama.cpp puts a space before every text" in fields.note


def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path):
    words = AutoTokenizer.from_pretrained(save_llama(tmp_path / "words"))
    with pytest.raises(ValueError, match="WordLevel model: GGUF files are written for BPE"):
        read_tokenizer(words, 100, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_fast_tokenizer(tmp_path / "empty")


def test_several_chat_templates_keep_their_names():
    made = zoo.tokenizer("gpt2")
    made.chat_template = {"default": "a", "tool_use": "b"}
    fields = read_tokenizer(made, 500, [])
    assert fields.chat_template == [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
