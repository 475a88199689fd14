"""Training data: three shapes of records, clear errors, loss only on the assistant's tokens, exact packing."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.training import data as module
from qlora.training.data import (
    IGNORED,
    BadRecord,
    Collator,
    Example,
    Record,
    Sequences,
    pack,
    packs_without_leaks,
    read_records,
    tokenize,
    tokenize_all,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


GOOD = {"prompt": "what is the sea ?", "completion": "the light ."}


def learnt(example, tokenizer):
    return tokenizer.decode([token for token in example.labels if token != IGNORED])


def test_prompt_completion_goes_through_the_chat_template(tokenizer):
    example = tokenize(GOOD, tokenizer)
    assert tokenizer.decode(example.input_ids) == "<|user|> what is the sea ? <|end|> <|assistant|> the light . <|end|>"
    assert learnt(example, tokenizer) == "the light . <|end|>"


def test_every_assistant_turn_is_learnt(tokenizer):
    messages = [
        {"role": "system", "content": "keeper"},
        {"role": "user", "content": "how ?"},
        {"role": "assistant", "content": "sail ."},
        {"role": "user", "content": "what ?"},
        {"role": "assistant", "content": "wind ."},
    ]
    example = tokenize({"messages": messages}, tokenizer)
    assert learnt(example, tokenizer) == "sail . <|end|> wind . <|end|>"


def test_plain_text_is_learnt_whole_and_ends(tokenizer):
    example = tokenize({"text": "the sea"}, tokenizer)
    assert example.labels == example.input_ids
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_without_a_chat_template_prompt_and_completion_are_joined(tmp_path):
    plain = AutoTokenizer.from_pretrained(save_llama(tmp_path, chat=False))
    example = tokenize({"prompt": "what is ", "completion": "the sea"}, plain)
    assert plain.decode(example.input_ids) == "what is the sea <|end|>"
    assert learnt(example, plain) == "the sea <|end|>"


TURN = "<|{{ m['role'] }}|> {{ m['content'] }} "
PROMPT = "{% if add_generation_prompt %}<|assistant|> {% endif %}"
# Templates that render a turn in another way when others follow.
REWRITING = {
    # as Phi-3: only the last turn ends in the end-of-sequence token
    "end": "{% for m in messages %}" + TURN + "<|system|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% else %}<|end|>{% endif %}",
    # as Qwen3: only the last turn has its reasoning
    "reasoning": "{% for m in messages %}<|{{ m['role'] }}|> {% if loop.last and m['role'] == 'assistant' %}log log {%"
    " endif %}{{ m['content'] }} <|end|> {% endfor %}" + PROMPT,
    # as DeepSeek-R1: the prompt for an answer begins its reasoning, which no turn has
    "prompt": "{% for m in messages %}" + TURN + "<|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> log {% endif %}",
    # the number of messages stands before them
    "count": "{{ messages | length }} {% for m in messages %}" + TURN + "<|end|> {% endfor %}" + PROMPT,
}
LEARNT = {
    "end": "sail . <|system|> wind . <|system|> <|end|>",
    "reasoning": "sail . <|end|> log log wind . <|end|>",
    "prompt": "sail . <|end|> wind . <|end|>",
    "count": "sail . <|end|> wind . <|end|>",
}


@pytest.mark.parametrize("name", REWRITING)
def test_turns_that_a_template_renders_in_another_way_when_others_follow(folder, name):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = REWRITING[name]
    turns = [("user", "how ?"), ("assistant", "sail ."), ("user", "what ?"), ("assistant", "wind .")]
    messages = [{"role": role, "content": content} for role, content in turns]
    example = tokenize({"messages": messages}, tokenizer)
    assert learnt(example, tokenizer) == LEARNT[name]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert example.input_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_a_template_whose_other_text_depends_on_an_answer_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ messages[-1]['content'] | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    with pytest.raises(ValueError, match="depends on that turn's content"):
        tokenize(GOOD, tokenizer)
    # as SmolVLM, whose template expects a list of parts
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|> {% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
        " <|end|> {% endfor %}" + PROMPT
    )
    with pytest.raises(ValueError, match="the content is not shown"):
        tokenize(GOOD, tokenizer)


def trl_template(tokenizer, name):
    import trl

    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer.bos_token = "<|system|>"
    return tokenizer


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}
CALLING = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "look", "content": "r1"},
    {"role": "assistant", "content": "a1"},
]
# What the templates of real models make of it: the texts of the assistant's turns.
REAL = {
    "qwen3": [
        '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call><|im_end|>\n',
        "<think>\n\n</think>\n\na1<|im_end|>\n",
    ],
    "qwen2_5": [
        '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call><|im_end|>\n',
        "a1<|im_end|>\n",
    ],
    "llama3_1": ['{"name": "look", "parameters": {"at": "sea"}}<|eot_id|>', "a1<|eot_id|>"],
}


@pytest.mark.parametrize("name", REAL)
def test_calls_of_tools_by_the_templates_of_real_models(folder, name):
    tokenizer = trl_template(AutoTokenizer.from_pretrained(folder), name)
    text, spans = module._render(CALLING, tokenizer)
    assert [text[begin:end] for begin, end in spans] == REAL[name]


@pytest.mark.parametrize("content", ["<think>r</think>a1", "<think>\nr\n</think>\na1"])
def test_reasoning_in_any_spelling(folder, content):
    tokenizer = trl_template(AutoTokenizer.from_pretrained(folder), "qwen3")
    text, spans = module._render(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}], tokenizer
    )
    assert [text[begin:end] for begin, end in spans] == ["<think>\nr\n</think>\n\na1<|im_end|>\n"]


def test_what_a_tool_answers_is_never_learnt(folder):
    """Gemma 4 renders it before the text of the turn that called the tool."""
    tokenizer = trl_template(AutoTokenizer.from_pretrained(folder), "gemma4")
    messages = [CALLING[0], CALLING[1] | {"content": "t1"}, *CALLING[2:]]
    with pytest.raises(ValueError, match="the assistant's part cannot be found"):
        module._render(messages, tokenizer)


def test_tools_that_a_template_does_not_render_are_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="does not render 'tool_calls': 'look' is not in its text"):
        tokenize({"messages": CALLING}, tokenizer)
    with pytest.raises(ValueError, match="does not render 'tools': 'look'"):
        tokenize(GOOD | {"tools": [CALL]}, tokenizer)


def test_tools_and_a_system_message_reach_the_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}{% for m in messages %}" + TURN + "<|end|> {% endfor %}"
    )
    record = {"messages": [{"role": "user", "content": "how ?"}, {"role": "assistant", "content": "sail ."}]}
    text = tokenizer.decode(tokenize(record | {"tools": [{"name": "wind"}]}, tokenizer).input_ids)
    assert text == "wind <|user|> how ? <|end|> <|assistant|> sail . <|end|>"
    text = tokenizer.decode(tokenize(GOOD | {"system": "keeper"}, tokenizer).input_ids)
    assert text.startswith("<|system|> keeper <|end|> <|user|> what is the sea ?")
    tokenizer.chat_template = None
    for more in ({"system": "keeper"}, {"tools": [{"name": "wind"}]}):
        with pytest.raises(ValueError, match="no chat template"):
            tokenize(GOOD | more, tokenizer)


def test_what_max_length_cuts_and_drops_is_counted(tokenizer):
    long = {"prompt": "what is the sea ?", "completion": "the light stays on and on ."}
    hopeless = {"prompt": "what " * 30, "completion": "sea"}
    records = [Record(content, f"data:{i}") for i, content in enumerate((GOOD, long, hopeless))]
    result = tokenize_all(records, tokenizer, 13)
    assert [len(example.input_ids) for example in result.examples] == [12, 13]
    assert (result.bad, result.cut, result.dropped) == (0, 2, 1)


def test_a_record_that_the_chat_template_refuses_names_its_place(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    records = [Record(GOOD, "data.jsonl:7")]
    with pytest.raises(BadRecord, match=r"data\.jsonl:7: System role not supported"):
        tokenize_all(records, tokenizer, 100)
    assert tokenize_all(records, tokenizer, 100, skip_bad=True).bad == 1


def test_packing_is_fast_for_many_records():
    packed = pack(examples(*(1 + i % 97 for i in range(50_000))), 256)
    assert packed.tokens == sum(1 + i % 97 for i in range(50_000))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", r"data\.jsonl:2: Expecting property name"),
        ("[" * 200_000, r"data\.jsonl:2: .*recursion"),
        ([1], r"data\.jsonl:2: a record is a JSON object, not list"),
        ({"question": "?"}, r"keys \['question'\]: a record has either"),
        ({"prompt": "a", "text": "b"}, "either 'messages'"),
        ({"prompt": "a"}, "'completion' must be a string that is not empty"),
        ({"prompt": "", "completion": "b"}, "'prompt' must be a string"),
        ({"text": 3}, "'text' must be a string"),
        ('{"text": "half a \\ud800 pair"}', "surrogates not allowed"),
        ({"messages": []}, "list that is not empty"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot' is not one of"),
        ({"messages": [{"role": "user", "content": "x"}]}, "there is nothing to learn"),
        ({"messages": [{"role": "user"}]}, "string 'content'"),
    ],
)
def test_malformed_records_name_file_and_line(tmp_path, bad, message):
    path = write(tmp_path / "data.jsonl", GOOD, bad, GOOD)
    with pytest.raises(BadRecord, match=message):
        read_records(path)
    records, count = read_records(path, skip_bad=True)
    assert (len(records), count) == (2, 1)


def test_bytes_that_are_no_utf8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(BadRecord, match=r"data\.jsonl:2"):
        read_records(path)


def test_files_without_records(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        read_records(tmp_path / "nothing.jsonl")
    with pytest.raises(BadRecord, match="no usable record"):
        read_records(write(tmp_path / "empty.jsonl", "", "  "))


def examples(*lengths):
    return [Example(list(range(1, n + 1)), list(range(1, n + 1))) for n in lengths]


def test_packing_keeps_every_example_whole_and_fills_rows():
    packed = pack(examples(5, 3, 8, 2, 6), 8)
    assert sorted(len(e.input_ids) for row in packed.rows for e in row) == [2, 3, 5, 6, 8]
    assert len(packed) == 3  # 8 | 6 + 2 | 5 + 3
    assert packed.tokens == 24


def test_a_packed_batch_restarts_positions_and_never_predicts_across_examples():
    batch = Collator(0, packed=True)([examples(3, 2), examples(4)])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 2], [IGNORED, 2, 3, 4, IGNORED]]
    assert "attention_mask" not in batch


def test_a_model_that_ignores_positions_is_found_out(folder):
    from transformers import OPTConfig, OPTForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llama.config.use_cache = False
    assert packs_without_leaks(llama)
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=32,
            word_embed_proj_dim=32,
            use_cache=False,
        )
    )
    assert not packs_without_leaks(opt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_sum_in_another_order_are_no_leak(dtype):
    """The number of tokens per expert depends on the other record, and so do the last digits of its products."""
    import transformers

    import qlora

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(
        vocab_size=100, num_key_value_heads=2, num_local_experts=4, use_cache=False, **sizes
    )
    model = transformers.MixtralForCausalLM(config).to(dtype)
    qlora.prepare_model(model, rank=2)
    assert packs_without_leaks(model)


def test_packed_and_padded_rows_have_the_same_loss(folder):
    """Examples in one row are isolated: transformers derives block-diagonal attention from the positions."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False  # as in finetune: with a cache transformers does not look for packed sequences
    group = [
        Example(ids, ids) for ids in (torch.randint(5, model.config.vocab_size, (n,)).tolist() for n in (9, 5, 7, 3))
    ]
    packed = Collator(1, packed=True)(pack(group, 16).rows)
    padded = Collator(1, packed=False)(Sequences([[e] for e in group]).rows)
    with torch.no_grad():
        assert torch.allclose(model(**packed).loss, model(**padded).loss, rtol=1e-5)
        mixed_up = dict(packed, position_ids=torch.arange(packed["input_ids"].shape[1])[None].expand(2, -1))
        assert not torch.allclose(model(**mixed_up).loss, model(**padded).loss, rtol=1e-5)
