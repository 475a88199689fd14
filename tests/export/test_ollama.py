"""Modelfiles: the template in Go's syntax says what the chat template says, or is left out."""

import pytest
from export import zoo

from qlora.export.ollama import modelfile

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)


def rendered(template, turns, system=""):
    """What Ollama makes of a TEMPLATE: it is applied to each turn, and the system text is that of the first."""
    text = ""
    for prompt, response in turns:
        before, _, after = template.partition("{{ .Prompt }}")
        if "{{ if .System }}" in before:
            shown = before.partition("{{ if .System }}")[2].partition("{{ end }}")
            before = (shown[0].replace("{{ .System }}", system) if system else "") + shown[2]
        text += before + prompt + after.replace("{{ .Response }}", response or "\0")
        system = ""
    return text.partition("\0")[0]


@pytest.mark.parametrize(
    ("template", "system", "bos"),
    [(CHATML, "", False), (CHATML, "Be brief.", False), (DEFAULT + CHATML, None, False), (NO_SYSTEM, "", True)],
)
def test_conversations_read_the_same(template, system, bos):
    tokenizer = zoo.tokenizer("qwen2", add_bos=bos)
    tokenizer.chat_template = template
    text = modelfile(tokenizer, "m.gguf", [2])
    go = text.partition('TEMPLATE """')[2].partition('"""')[0]
    default = text.partition('SYSTEM """')[2].partition('"""')[0]
    turns = [("Hello", "Hi."), ("And?", "")]
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
    ]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert default == ("Be kind." if system is None else "")
    assert rendered(go, turns, default if system is None else system) == wanted.removeprefix("<s>" if bos else "")


def test_files_and_ends_of_answers():
    tokenizer = zoo.tokenizer("qwen2")
    text = modelfile(tokenizer, "base.gguf", [2, 5], adapter_file="a.gguf")
    assert text.startswith("FROM ./base.gguf\nADAPTER ./a.gguf\nTEMPLATE")
    assert text.endswith('PARAMETER stop "</s>"\nPARAMETER stop "<|end|>"\n')


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",  # turns that differ
        "{% for m in messages %}{{ '{{' }}{{ m['content'] }}{% endfor %}",  # what Go would read as its own
        "{{ messages[0]['content'] | upper }}",
    ],
)
def test_a_template_without_an_equivalent_is_left_out(template):
    tokenizer = zoo.tokenizer("qwen2")
    tokenizer.chat_template = template
    text = modelfile(tokenizer, "m.gguf")
    assert "TEMPLATE" not in text
    assert "has no equivalent" in text
    tokenizer.chat_template = None
    assert modelfile(tokenizer, "m.gguf") == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'
