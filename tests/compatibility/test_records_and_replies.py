"""Labels of training text, and replies to prompts."""

import json

import torch
from tiny_models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora.models.loading import chat_reply
from qlora.training.data import read_records, tokenize

CODE = "if x:\n        return  1\n"


def byte_level_tokenizer(**options):
    """A byte-level tokenizer with some merges, whose post-processor trims offsets by default."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([CODE] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", **options)


def test_white_space_of_the_answer_is_learnt():
    """Expects a loss on the whole completion and its end token, and on nothing of the prompt."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([" " * 8])
    example = tokenize({"prompt": "Q:  what", "completion": CODE}, tokenizer)
    assert tokenizer.decode([label for label in example.labels if label != -100]) == CODE + "</s>"


def test_a_tokenizer_that_gives_token_types_does_not_stop_generation():
    """Expects a reply; a causal model does not use token types."""
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = byte_level_tokenizer(model_input_names=names)
    assert "token_type_ids" in tokenizer("x")
    torch.manual_seed(0)
    assert isinstance(chat_reply(llama(vocab_size=320), tokenizer, "x = 1", max_new_tokens=3), str)


def test_a_byte_order_mark_at_the_head_of_a_file_is_no_part_of_its_first_record(tmp_path):
    """Expects all records and no bad ones."""
    lines = "".join(json.dumps({"prompt": f"question {i}", "completion": "answer"}) + "\n" for i in range(3))
    (tmp_path / "records.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    records, bad = read_records(tmp_path / "records.jsonl")
    assert ([record.content["prompt"] for record in records], bad) == (["question 0", "question 1", "question 2"], 0)
