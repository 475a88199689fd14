"""Text of answers: whole characters, stop strings, and where a stop string begins in one token and ends in another."""

import random

import pytest

from qlora.serving.text import StopFilter, TextStream


def filtered(pieces, stops):
    stop = StopFilter(stops)
    parts = [stop.add(piece) for piece in pieces]
    return "".join([*parts, stop.end()]), stop.stopped, parts


def test_stop_strings_are_found_across_pieces():
    assert filtered(["one t", "wo th", "ree"], ["two"])[:2] == ("one ", True)
    assert filtered(["one", " two"], ["xyz"])[:2] == ("one two", False)
    assert filtered(["a##", "#b"], ["###"])[:2] == ("a", True)
    assert filtered(["ab", "c"], ["bc", "b"])[:2] == ("a", True)  # the first that begins
    assert filtered(["never ending"], [])[:2] == ("never ending", False)


def test_only_a_possible_beginning_is_held_back():
    assert filtered(["hello EN", "VY END", "x"], ["END"])[2] == ["hello ", "ENVY ", ""]


@pytest.mark.parametrize("seed", range(50))
def test_any_cut_gives_the_same_text(seed):
    generator = random.Random(seed)
    text = "".join(generator.choice("ab") for _ in range(40))
    stops = ["".join(generator.choice("ab") for _ in range(generator.randint(2, 6))) for _ in range(2)]
    cuts = sorted(generator.sample(range(len(text)), 10))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    assert filtered(pieces, stops)[:2] == (text[: min(found)] if found else text, bool(found))


def byte_level_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def test_characters_of_several_bytes_come_whole():
    tokenizer = byte_level_tokenizer()
    wanted = "naïve 💡 ok"
    tokens = tokenizer(wanted)["input_ids"]
    stream = TextStream(tokenizer)
    parts = [stream.add([token]) for token in tokens]
    assert "".join([*parts, stream.end()]) == wanted
    assert all("�" not in part for part in parts)


def test_a_character_that_is_cut_off_shows_at_the_end_only():
    tokenizer = byte_level_tokenizer()
    tokens = tokenizer("ok 💡")["input_ids"][:-1]
    stream = TextStream(tokenizer)
    assert "".join(stream.add([token]) for token in tokens) == "ok "
    assert stream.end() == tokenizer.decode(tokens)[3:] != ""


def test_special_tokens_are_left_out_unless_raw():
    tokenizer = byte_level_tokenizer()
    tokens = [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]
    assert TextStream(tokenizer).add(tokens) == "a"
    assert TextStream(tokenizer, raw=True).add(tokens) == "a<|end|>"
