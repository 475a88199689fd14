"""Text of answers: whole characters, stop strings, and where a stop string begins in one token and ends in another."""

import random

import pytest

from qlora.serving.text import StopFilter, TextStream, TokenTexts


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


def byte_fallback_tokenizer():
    """As Llama 2's: pieces with ▁ for spaces, and bytes for characters that have no piece."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁cd", "e", "é"]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_streamed_text_is_the_text_of_all_tokens():
    generator = random.Random(0)
    for tokenizer in (byte_level_tokenizer(), byte_fallback_tokenizer()):
        for _ in range(200):
            text = "".join(generator.choice(["a", " b", "é", "💡", " cd", "  ", "漢"]) for _ in range(12))
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            stream = TextStream(tokenizer)
            streamed = "".join([*(stream.add([token]) for token in tokens), stream.end()])
            assert streamed == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def test_any_tokens_give_some_text():
    generator = random.Random(0)
    for tokenizer in (byte_level_tokenizer(), byte_fallback_tokenizer()):
        for _ in range(200):
            stream = TextStream(tokenizer)
            for _ in range(15):
                stream.add([generator.randrange(len(tokenizer))])
            stream.end()


def test_a_continuation_keeps_the_space_before_its_first_word():
    tokenizer = byte_fallback_tokenizer()
    a, cd = (tokenizer.convert_tokens_to_ids(piece) for piece in ("▁a", "▁cd"))
    assert TextStream(tokenizer, before=[a]).add([cd]) == " cd"
    assert TextStream(tokenizer).add([cd]) == "cd"


def test_the_bytes_of_a_token_that_is_a_part_of_a_character():
    for tokenizer in (byte_level_tokenizer(), byte_fallback_tokenizer()):
        texts = TokenTexts(tokenizer)
        parts = [texts.of(token) for token in tokenizer("💡", add_special_tokens=False)["input_ids"]]
        assert bytes(byte for _, content in parts for byte in content).decode().strip() == "💡"
    a = byte_fallback_tokenizer().convert_tokens_to_ids("▁a")
    assert TokenTexts(byte_fallback_tokenizer()).of(a) == (" a", [32, 97])


def test_special_tokens_are_left_out_unless_raw():
    tokenizer = byte_level_tokenizer()
    tokens = [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]
    assert TextStream(tokenizer).add(tokens) == "a"
    assert TextStream(tokenizer, raw=True).add(tokens) == "a<|end|>"
