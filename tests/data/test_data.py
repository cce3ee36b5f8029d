"""Prompts: the stream, sources of rows and the held-out rows. Bad rows: bad_inputs.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlswitch.config.sections import DataConfig, EvaluationConfig, ModelConfig, RolloutConfig
from rlswitch.data.hub import load_tokenizer
from rlswitch.data.prompts import Prompts, load_prompts, read_tables
from rlswitch.errors import ConfigError
from rlswitch.types import Prompt

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.tool_calls is defined %}{{ raise_exception('null tool_calls') }}{% endif %}"
    "{{ m.role[0] }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def make_tokenizer(ends_text: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """One token per character; with `ends_text` every text ends with eos, as in T5."""
    characters = ["<eos>", "<pad>", *"abcdefghijklmnopqrstuvwxyz0123456789+= "]
    words = {character: i for i, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if ends_text:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<eos>", **special})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = make_tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def run(path: str, *, num_prompts: int = 1, seed: int = 0, every: int = 1, **data) -> SimpleNamespace:
    """The parts of a Run that load_prompts reads."""
    return SimpleNamespace(
        seed=seed,
        model=ModelConfig(path="some/model"),
        data=DataConfig(path=path, **{"eval_rows": 1, **data}),
        rollout=RolloutConfig(num_prompts=num_prompts),
        evaluation=EvaluationConfig(every=every),
    )


def jsonl(name: str, *rows) -> str:
    """A file with one row per line; a string becomes a line unchanged."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def numbered(name: str, start: int, stop: int) -> str:
    return jsonl(name, *({"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(start, stop)))


def load(config, tokenizer) -> tuple[list[Prompt], list[Prompt], list[str]]:
    """Training prompts in row order, held-out prompts, and the printed lines."""
    said: list[str] = []
    stream, held_out = load_prompts(config, read_tables(config), tokenizer, said.append)
    training = sorted(stream.take(len(stream)), key=lambda prompt: prompt.index)
    return training, held_out, said


def problems(config, tokenizer) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_prompts(config, read_tables(config), tokenizer)
    assert all("\n" not in line for line in caught.value.problems)
    return caught.value.problems


# ---- the stream


def stream(size: int, seed: int = 0) -> Prompts:
    return Prompts([Prompt(index=i, messages="", token_ids=[i]) for i in range(size)], seed)


def indices(prompts: list[Prompt]) -> list[int]:
    return [prompt.index for prompt in prompts]


sizes = st.integers(1, 30)
seeds = st.integers(0, 2**32 - 1)


def test_a_prompt_knows_which_pass_it_is_taken_in():
    stream = Prompts([Prompt(index=i, messages="", token_ids=[i]) for i in range(3)], seed=0)
    taken = stream.take(8)
    assert [prompt.epoch for prompt in taken] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert len({(prompt.index, prompt.epoch) for prompt in taken}) == 8


@settings(deadline=None)
@given(size=sizes, seed=seeds, takes=st.lists(st.integers(0, 40), max_size=8))
def test_many_takes_are_one_big_take(size, seed, takes):
    one, many = stream(size, seed), stream(size, seed)
    parts = [index for n in takes for index in indices(many.take(n))]
    assert parts == indices(one.take(sum(takes)))
    assert many.cursor == one.cursor == sum(takes)
    assert many.epoch == sum(takes) / size


@settings(deadline=None)
@given(size=sizes, seed=seeds)
def test_each_epoch_is_a_permutation(size, seed):
    prompts = stream(size, seed)
    for _ in range(3):
        assert sorted(indices(prompts.take(size))) == list(range(size))


@settings(deadline=None)
@given(size=sizes, seed=seeds, cursor=st.integers(0, 100), n=st.integers(0, 40))
def test_seek_is_replay(size, seed, cursor, n):
    replayed, sought = stream(size, seed), stream(size, seed)
    replayed.take(cursor)
    sought.take(7)
    sought.seek(cursor)
    assert indices(sought.take(n)) == indices(replayed.take(n))


def test_epochs_and_seeds_differ():
    prompts, other = stream(50, seed=1), stream(50, seed=2)
    first, second = indices(prompts.take(50)), indices(prompts.take(50))
    assert first != second and first != indices(other.take(50)) and first != list(range(50))


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    assert indices(stream(8, seed=3).take(12)) == [1, 4, 2, 0, 3, 5, 7, 6, 1, 3, 6, 0]


# ---- sources


def test_a_jsonl_file_keeps_every_value_as_it_is_written(tokenizer):
    rows = [
        {"prompt": "a", "answer": "007", "when": "2020-01-01 00:00:00"},
        {"prompt": "b", "answer": "NA", "tests": [1, "x"]},
        {"prompt": "c", "answer": 7},
    ]
    path = jsonl("rows.jsonl", "\ufeff" + json.dumps(rows[0]), "", *rows[1:])
    training, held_out, _ = load(run(path, every=0), tokenizer)
    assert held_out == []
    assert [prompt.messages for prompt in training] == ["a", "b", "c"]
    assert [prompt.index for prompt in training] == [0, 1, 2]
    assert [prompt.columns for prompt in training] == [
        {"answer": "007", "when": "2020-01-01 00:00:00", "tests": None},
        {"answer": "NA", "when": None, "tests": [1, "x"]},
        {"answer": 7, "when": None, "tests": None},
    ]


def save_as(kind: str, rows: list[dict]) -> str:
    import datasets

    dataset = datasets.Dataset.from_list(rows)
    if kind == "json list":
        Path("rows.json").write_text(json.dumps(rows, indent=1))
        return "rows.json"
    if kind == "json lines":
        return jsonl("rows.json", *rows)
    if kind == "csv":
        dataset.to_csv("rows.csv")
        return "rows.csv"
    if kind == "parquet":
        dataset.to_parquet("rows.parquet")
        return str(Path("rows.parquet").absolute())
    if kind == "saved dataset":
        dataset.save_to_disk("saved")
    elif kind == "saved splits":
        datasets.DatasetDict(train=dataset).save_to_disk("saved")
    else:
        Path("saved").mkdir()
        dataset.to_parquet("saved/train-00000-of-00001.parquet")
    return "saved"


@pytest.mark.parametrize(
    "kind",
    [
        *("json list", "json lines", "csv", "parquet"),
        *("saved dataset", "saved splits", "data directory"),
    ],
)
def test_every_kind_of_source_gives_the_same_prompts(tokenizer, kind):
    rows = [{"prompt": f"{i}+1=", "answer": f"a{i}"} for i in range(4)]
    training, _, said = load(run(save_as(kind, rows), every=0), tokenizer)
    assert [{"prompt": p.messages, **p.columns} for p in training] == rows
    assert said == []


def test_csv_values_stay_strings(tokenizer):
    Path("rows.csv").write_text('prompt,answer\n"1+\n1=",002\nb,NA\n')
    training, _, _ = load(run("rows.csv", every=0), tokenizer)
    assert [p.messages for p in training] == ["1+\n1=", "b"]
    assert [p.columns["answer"] for p in training] == ["002", "NA"]


def test_the_built_in_task_holds_out_its_own_test_split(tokenizer):
    from rlswitch.recipes.addition import task as addition

    splits = addition.load_datasets()
    config = run("builtin:addition", eval_rows=100)
    training, held_out, said = load(config, tokenizer)
    assert len(training) == len(splits["train"]) and len(held_out) == 100 and said == []
    assert {p.messages for p in held_out} <= {row["prompt"] for row in splits["test"]}
    assert {p.messages for p in training} == {row["prompt"] for row in splits["train"]}
    assert list(training[0].columns) == ["answer"]


# ---- tokens


def test_text_is_tokenised_as_the_tokenizer_does_but_never_ends_with_eos():
    path = jsonl("rows.jsonl", {"prompt": "ab"})
    (plain,), _, _ = load(run(path, every=0), make_tokenizer())
    (ended,), _, _ = load(run(path, every=0), make_tokenizer(ends_text=True))
    assert make_tokenizer(ends_text=True)("ab")["input_ids"] == [2, 3, 0]
    assert plain.token_ids == ended.token_ids == [2, 3]


def test_chat_messages_go_through_the_template(tokenizer):
    user = {"role": "user", "content": "hi"}
    begun = {"role": "assistant", "content": "so"}
    path = jsonl("rows.jsonl", {"prompt": [user]}, {"prompt": [user, {**begun, "tool_calls": None}]})
    (asked, prefilled), _, _ = load(run(path, every=0), tokenizer)
    assert tokenizer.decode(asked.token_ids).replace(" ", "") == "uhi="
    assert tokenizer.decode(prefilled.token_ids).replace(" ", "") == "uhiaso"
    assert prefilled.messages == [user, begun], "null fields, which Arrow adds, are no fields"


# ---- held-out rows


def test_rows_cut_off_are_removed_and_do_not_depend_on_the_seed(tokenizer):
    path = numbered("rows.jsonl", 0, 50)
    training, held_out, said = load(run(path, eval_rows=10), tokenizer)
    again = load(run(path, eval_rows=10, seed=5), tokenizer)
    assert (training, held_out) == again[:2]
    assert len(held_out) == 10 and len(training) == 40
    assert sorted(indices(training) + indices(held_out)) == list(range(50))
    assert indices(held_out) not in (list(range(10)), list(range(40, 50)))
    assert said == ["data: held out 10 of the 50 prompts of rows.jsonl"]


def test_held_out_rows_of_a_file_are_chosen_up_to_eval_rows(tokenizer):
    train, test = numbered("train.jsonl", 0, 20), numbered("test.jsonl", 20, 60)
    training, held_out, said = load(run(train, eval_path=test, eval_rows=10), tokenizer)
    assert len(training) == 20 and len(held_out) == 10 and said == []
    assert all(int(p.messages.split("+")[0]) == p.index + 20 for p in held_out)
    _, everything, _ = load(run(train, eval_path=test, eval_rows=100), tokenizer)
    assert indices(everything) == list(range(40))


def test_a_training_prompt_that_is_held_out_is_removed_and_counted(tokenizer):
    train, test = numbered("train.jsonl", 0, 20), numbered("test.jsonl", 15, 30)
    training, held_out, said = load(run(train, eval_path=test, eval_rows=100), tokenizer)
    assert not {p.messages for p in training} & {p.messages for p in held_out}
    assert indices(training) == list(range(15))
    assert said == ["data: removed 5 of 20 training rows: their prompt is held out"]


def test_a_duplicate_of_a_row_cut_off_is_removed_too(tokenizer):
    rows = [{"prompt": str(i // 2)} for i in range(20)]
    training, held_out, said = load(run(jsonl("rows.jsonl", *rows), eval_rows=4), tokenizer)
    assert not {p.messages for p in training} & {p.messages for p in held_out}
    assert len(training) < 16 and f"removed {16 - len(training)} of 16" in said[1]


def test_eval_split_of_the_same_path(tokenizer):
    import datasets

    parts = {
        name: datasets.Dataset.from_list([{"prompt": f"{name}{i}"} for i in range(3)])
        for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk("saved")
    training, held_out, _ = load(run("saved", eval_split="test", eval_rows=9), tokenizer)
    assert [p.messages for p in training] == ["train0", "train1", "train2"]
    assert [p.messages for p in held_out] == ["test0", "test1", "test2"]
    assert load(run("saved", eval_split="test", eval_rows=9, every=0), tokenizer)[1] == held_out
    _, (cut,), _ = load(run("saved", eval_rows=1), tokenizer)
    assert cut.messages.startswith("train"), "a test split is not taken unasked"
    (line,) = problems(run("saved", eval_split="tset"), tokenizer)
    assert line.startswith("data.eval_split = tset: saved has the splits train, test; did you mean")
    (line,) = problems(run(numbered("x.jsonl", 0, 9), eval_path="saved"), tokenizer)
    assert line.startswith("data.eval_split = null: saved has the splits train, test; set one")


def test_overlong_prompts_are_dropped_and_counted_where_asked(tokenizer):
    rows = [{"prompt": "a" * n} for n in (3, 9, 4, 7, 2)]
    path = jsonl("rows.jsonl", *rows)
    config = run(path, max_prompt_tokens=4, overlong="drop", every=0)
    training, _, said = load(config, tokenizer)
    assert indices(training) == [0, 2, 4]
    assert said == [
        "data: dropped, by data.max_prompt_tokens = 4: 2 of 5 prompts of rows.jsonl are longer"
        " (the longest has 9 tokens: rows.jsonl:2)"
    ]


# ---- the tokenizer


def test_a_missing_pad_token_becomes_eos_and_a_given_one_stays():
    make_tokenizer().save_pretrained("bare")
    make_tokenizer(pad_token="<pad>").save_pretrained("padded")
    bare = load_tokenizer(ModelConfig(path="bare"), "bare")
    padded = load_tokenizer(ModelConfig(path="padded"), "padded")
    assert (bare.eos_token_id, bare.pad_token_id) == (0, 0)
    assert (padded.eos_token_id, padded.pad_token_id) == (0, 1)


def test_a_tokenizer_with_code_of_its_own_is_not_run_unasked():
    Path("custom").mkdir()
    Path("custom/config.json").write_text('{"model_type": "mine"}')
    auto_map = {"AutoTokenizer": ["mine.MyTokenizer", None]}
    Path("custom/tokenizer_config.json").write_text(
        json.dumps({"auto_map": auto_map, "tokenizer_class": "MyTokenizer"})
    )
    with pytest.raises(ConfigError, match=r"^model\.path = custom: .*with model\.trust_remote_code=true"):
        load_tokenizer(ModelConfig(path="custom"), "custom")
