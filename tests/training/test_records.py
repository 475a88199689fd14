"""Reading records: every file format and every shape of record gives the same result."""

import json

import pytest
from tiny_models import save_llama
from transformers import AutoTokenizer

from qlora.cli import main
from qlora.training.data import about_the_first, learnt_ends, stop_tokens, tokenize, tokenize_all
from qlora.training.records import BadRecord, Record, read_records

QUESTION, ANSWER = "what is the sea ?", "the light ."
MESSAGES = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
SHAPES = {
    "messages": MESSAGES,
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "alpaca with its text": {"instruction": QUESTION, "output": ANSWER, "text": "Below is an instruction"},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_llama(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_conversation(tmp_path, tokenizer, shape):
    records, _ = read_records(write(tmp_path / "data.jsonl", SHAPES[shape]))
    assert records[0].content == MESSAGES
    assert tokenize(records[0].content, tokenizer) == tokenize({"prompt": QUESTION, "completion": ANSWER}, tokenizer)


def test_alpacas_input_and_sharegpts_system_and_roles(tmp_path):
    record = {"instruction": "name it", "input": "a ship", "output": "sail"}
    content = read_records(write(tmp_path / "a.json", [record]))[0][0].content
    assert content["messages"][0]["content"] == "name it\n\na ship"
    turns = [{"from": name, "value": name} for name in ("user", "assistant", "human", "gpt")]
    content = read_records(write(tmp_path / "b.json", [{"system": "keeper", "conversations": turns}]))[0][0].content
    assert [m["role"] for m in content["messages"]] == ["system", "user", "assistant", "user", "assistant"]


def test_nothing_that_a_record_says_is_dropped(tmp_path):
    answer = {"role": "assistant", "content": ANSWER}
    alpaca = {"instruction": "and now ?", "output": ANSWER, "system": "keeper", "history": [[QUESTION, "sail"]]}
    content = read_records(write(tmp_path / "a.json", [alpaca]))[0][0].content
    assert [m["content"] for m in content["messages"]] == ["keeper", QUESTION, "sail", "and now ?", ANSWER]

    call = {"function": {"name": "look", "arguments": {"at": "sea", "zone": None}}}
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = [{"name": "look", "strict": None}]
    record = {"messages": [*messages, answer], "tools": tools, "system": "keeper"}
    content = read_records(write(tmp_path / "b.json", [record]))[0][0].content
    assert content["tools"] == [{"name": "look"}]
    assert content["messages"][0] == {"role": "system", "content": "keeper"}
    called = content["messages"][2]
    assert (called["content"], called["tool_calls"][0]["function"]["arguments"]) == ("", {"at": "sea"})

    record = {"prompt": QUESTION, "completion": ANSWER, "system": "keeper"}
    assert read_records(write(tmp_path / "c.json", [record]))[0][0].content == record
    record["tools"] = [{"name": "look"}]
    assert read_records(write(tmp_path / "e.json", [record]))[0][0].content == record
    for key in ("system", "tools"):
        with pytest.raises(BadRecord, match=f"'{key}' beside 'text'"):
            read_records(write(tmp_path / "f.json", [{"text": "x", key: record[key]}]))
    with pytest.raises(BadRecord, match="turn of 'history' must be"):
        read_records(write(tmp_path / "d.json", [alpaca | {"history": ["x"]}]))


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "json-lines-named.json", "wrapped.json", "csv", "tsv", "parquet"])
def test_every_file_format(tmp_path, ending, mark):
    rows = [{"prompt": f"q, {i}", "completion": f'a "{i}"\nand more'} for i in range(3)]
    path = tmp_path / f"data.{ending}"
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending in ("csv", "tsv"):
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            file.write(mark)
            writer = csv.DictWriter(file, rows[0], delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = "\n".join(map(json.dumps, rows))
        content = {"jsonl": lines, "json": json.dumps(rows), "wrapped.json": json.dumps({"data": rows})}.get(
            ending, lines
        )
        path.write_text(mark + content, encoding="utf-8")
    records, bad = read_records(path)
    assert ([record.content for record in records], bad) == (rows, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", "prompt,completion\na,b\nc\n", r"data\.csv:3: the row must have as many fields"),
        ("data.csv", 'prompt,completion\na,"b\n', r"data\.csv:\d: "),
        ("data.csv", "question\nx\n", r"data\.csv:2: keys \['question'\]: a record has either"),
        ("data.json", '[{"prompt": "a",]', r"data\.json:1: "),
        ("data.json", "[3]", r"data\.json\[record 1\]: a record is a JSON object, not int"),
        ("data.parquet", "no parquet", "is not a readable Parquet file"),
        (
            "data.jsonl",
            '{"text": "a"}\n{"prompt": "a", "completion": "b"}',
            r":2: a record with 'prompt' in a file whose",
        ),
        ("data.jsonl", '{"conversations": [{"from": "robot", "value": "x"}]}', "'from' is 'robot': it must be one of"),
        ("data.jsonl", '{"instruction": "x"}', "'output' must be a string that is not empty"),
    ],
)
def test_errors_name_the_place(tmp_path, name, content, message):
    with pytest.raises(BadRecord, match=message):
        read_records(write(tmp_path / name, content))


def test_a_data_set_of_the_hub(monkeypatch, tmp_path):
    """With a stand-in for the Hub: the loader gets the split, and its records are checked like those of a file."""
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "nobody/nothing":
            raise datasets.exceptions.DatasetNotFoundError("no such data set")
        return datasets.Dataset.from_list([SHAPES["alpaca"], {**SHAPES["alpaca"], "output": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BadRecord, match=r"someone/alpaca:test\[record 2\]: 'output' must be a string"):
        read_records("someone/alpaca:test")
    records, bad = read_records("someone/alpaca", skip_bad=True)
    assert (len(records), bad) == (1, 1)
    assert asked == [("someone/alpaca", "test"), ("someone/alpaca", "train")]
    with pytest.raises(BadRecord, match="neither a file nor a data set of the Hub"):
        read_records("nobody/nothing")
    for path in (tmp_path / "x.jsonl", "./data/train", "data/train.jsonl"):
        with pytest.raises(FileNotFoundError):
            read_records(path)


def test_the_end_of_turn_is_looked_for(tmp_path, tokenizer):
    good = tokenize_all([Record(MESSAGES, "x:1")], tokenizer, 100).examples
    ids = stop_tokens(tokenizer, tmp_path)
    assert learnt_ends(good, ids)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert not learnt_ends(tokenize_all([Record(MESSAGES, "x:1")], tokenizer, 100).examples, ids)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert stop_tokens(tokenizer, tmp_path) == {tokenizer.eos_token_id, 7, 9}


def test_a_tokenizer_that_adds_an_end_by_itself_has_it_learnt(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(save_llama(tmp_path, chat=False))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    example = tokenize({"prompt": "what is ", "completion": "the sea"}, tokenizer)
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert example.labels[-1] == tokenizer.eos_token_id


def test_what_is_learnt_is_shown(tmp_path, tokenizer, capsys):
    example = tokenize_all([Record(MESSAGES, "data:7")], tokenizer, 100).examples[0]
    assert about_the_first(example, tokenizer) == (
        "first record (data:7): 4 of 12 tokens are learnt: 'the light . <|end|>'"
    )
    data = write(tmp_path / "data.json", [SHAPES["sharegpt"]])
    options = ["--model", tokenizer.name_or_path, "--data", str(data), "--output", str(tmp_path / "run")]
    assert main(["finetune", *options, "--show-example"]) == 0
    out = capsys.readouterr().out
    assert "4 of 12 tokens are learnt (in colour); nothing was trained" in " ".join(out.split())
    assert not (tmp_path / "run").exists()
