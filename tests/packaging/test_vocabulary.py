"""One word for each concept in identifiers (docs/concepts/glossary.md): retired words do not come back."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Retired words of identifiers -> the word to use.
RETIRED = {
    "vendor": "dequantize_matmul",
    "decode": "gemv for the kernel, unpack for nibbles, dequantize for a whole tensor",
    "matmul16": "tiles",
    "lora_t": "x_down",
    "stretch": "panel, chunk or tile",
}
CODE = sorted(
    path
    for folder in ("csrc", "tests/simt", "tests/cpp", "benchmarks/cuda")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".h", ".cpp", ".cu", ".cuh"}
)


def words(name: str) -> str:
    """kGemvTokens and gemv_tokens to _k_gemv_tokens_ and _gemv_tokens_."""
    return "_" + "_".join(re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])|\d+", name)).lower() + "_"


def identifiers(source: str) -> set[str]:
    without_comments = re.sub(r"//[^\n]*", "", source)
    return set(re.findall(r"[A-Za-z_]\w*", without_comments))


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_retired_words_are_gone(path):
    for name in identifiers(path.read_text()):
        for word, better in RETIRED.items():
            assert f"_{word}_" not in words(name), f"{path}: {name} has '{word}', use {better}"


def test_the_glossary_names_every_retired_word():
    glossary = (ROOT / "docs/concepts/glossary.md").read_text()
    assert [word for word in RETIRED if word not in glossary] == []


def test_a_retired_word_is_found():
    assert "kDecodeTokens" in identifiers("int kDecodeTokens = 8;  // lora_t")
    assert "lora_t" not in identifiers("int kDecodeTokens = 8;  // lora_t")
    assert words("kDecodeTokens") == "_k_decode_tokens_"
