"""The built-in task: the split, the careless demonstrations, a deterministic warm start."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rlswitch.recipes.addition import policy as addition_policy
from rlswitch.recipes.addition import task as addition
from rlswitch.recipes.addition.policy import build_model, ensure_model, warm_start
from rlswitch.recipes.addition.task import (
    EOS,
    HELD_OUT,
    PAD,
    build_tokenizer,
    demonstrate,
    load_datasets,
    split,
)

TWO_DIGITS = st.integers(0, 99)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A warm start of three small steps, cached in a temporary directory."""
    monkeypatch.setattr(addition_policy, "STEPS", 3)
    monkeypatch.setattr(addition_policy, "BATCH", 4)
    monkeypatch.setenv("RLSWITCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    pairs = zip(parameters(ours), parameters(theirs), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# -- the problems ------------------------------------------------------------------------------


def test_the_split_covers_every_problem_once():
    train, held_out = split()
    assert len(held_out) == HELD_OUT
    assert sorted(train + held_out) == [(a, b) for a in range(100) for b in range(100)]


def test_the_split_never_moves():
    assert split() == split()
    assert split()[1][:3] == [(13, 54), (26, 16), (86, 57)]


def test_the_datasets_are_the_split_with_the_right_answers():
    datasets = load_datasets()
    for name, problems in zip(("train", "test"), split(), strict=True):
        assert [row["prompt"] for row in datasets[name]] == [f"{a:02d}+{b:02d}=" for a, b in problems]
        for row in datasets[name][:50]:
            a, b = row["prompt"].rstrip("=").split("+")
            assert row["answer"] == f"{int(a) + int(b):03d}"


def test_held_out_problems_are_never_demonstrated():
    tokenizer, held_out = build_tokenizer(), set(split()[1])
    shown = set()
    for seed in range(2):
        for batch in addition_policy._demonstrations(seed):
            for text in tokenizer.batch_decode(batch, skip_special_tokens=True):
                problem, answer = text.split("=")
                a, b = problem.split("+")
                shown.add((int(a), int(b)))
                assert len(answer) == 3
    assert len(shown) > 8000
    assert not shown & held_out


# -- the demonstrations ------------------------------------------------------------------------


@given(a=TWO_DIGITS, b=TWO_DIGITS, seed=st.integers(0, 99))
def test_the_pupil_only_ever_forgets_carries(a: int, b: int, seed: int):
    answer = demonstrate(a, b, random.Random(seed))
    wrong_by = a + b - int(answer)
    assert len(answer) == 3
    # the carry into the tens, the hundred, or both: a dropped tens carry can remove the hundred
    assert wrong_by in {0, 10, 100, 110}
    assert answer[2] == str((a + b) % 10)
    if a % 10 + b % 10 < 10:
        assert wrong_by in {0, 100}
    if a + b < 100:
        assert wrong_by in {0, 10}


@given(a=TWO_DIGITS, b=TWO_DIGITS, seed=st.integers(0, 99))
def test_the_pupil_never_forgets_a_carry_that_a_nine_gives_away(a: int, b: int, seed: int):
    a = a // 10 * 10 + 9
    assert (a + b - int(demonstrate(a, b, random.Random(seed)))) in {0, 100}


@given(a=TWO_DIGITS, b=TWO_DIGITS)
def test_the_pupil_makes_no_mistake_without_a_carry(a: int, b: int):
    a, b = a // 20 * 10 + a % 5, b // 20 * 10 + b % 5
    assert all(int(demonstrate(a, b, random.Random(s))) == a + b for s in range(5))


@pytest.mark.parametrize(("a", "b"), [(17, 26), (62, 71)])
def test_the_pupil_forgets_about_as_often_as_he_is_said_to(a: int, b: int):
    generator = random.Random(0)
    wrong = sum(int(demonstrate(a, b, generator)) != a + b for _ in range(2000))
    assert wrong / 2000 == pytest.approx(addition.FORGETS, abs=0.05)


# -- tokenizer and model -----------------------------------------------------------------------


@given(text=st.text("0123456789+=", max_size=12))
def test_the_tokenizer_gives_back_what_it_was_given(text: str):
    tokenizer = build_tokenizer()
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and len(ids) == len(text) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_model_and_tokenizer_agree_about_special_tokens():
    tokenizer, config = build_tokenizer(), build_model().config
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, EOS)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(tokenizer, name) == getattr(config, name)
    assert len(tokenizer) == config.vocab_size


def test_the_embeddings_are_tied():
    model = build_model()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


# -- the warm start ----------------------------------------------------------------------------


def test_the_warm_start_depends_on_its_seed_and_on_nothing_else(quick):
    torch.manual_seed(1)
    first = warm_start(0, show=False)
    torch.manual_seed(2)
    assert same(warm_start(0, show=False), first)
    assert not same(warm_start(1, show=False), first)


def test_the_warm_start_leaves_the_global_generator_alone(quick):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    warm_start(0, show=False)
    assert torch.equal(torch.rand(1), expected)


def test_the_warm_start_learns(quick, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(addition_policy, "STEPS", 25)
    tokens = next(addition_policy._demonstrations(99))
    losses = []
    for model in (build_model(), warm_start(0, show=False)):
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1], logits_to_keep=4).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -4:].flatten())
        losses.append(float(loss))
    assert losses[1] < losses[0] / 1.5


def test_the_model_is_made_once_and_loads(quick):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said: list[str] = []
    path = ensure_model(0, said.append)
    assert ensure_model(0, said.append) == path
    assert len(said) == 1 and "builtin:addition (about a minute" in said[0]
    assert [entry.name for entry in quick.iterdir()] == [path.name]
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert same(loaded, warm_start(0, show=False))
    assert AutoTokenizer.from_pretrained(path)("1+2=").input_ids == [13, 1, 10, 2, 11]


def test_every_seed_and_every_recipe_has_a_model_of_its_own(quick, tmp_path, monkeypatch):
    paths = {ensure_model(0, print), ensure_model(1, print)}
    changed = tmp_path / "addition.py"
    changed.write_bytes(Path(addition.__file__).read_bytes() + b"\n# another recipe\n")
    monkeypatch.setattr(addition, "__file__", str(changed))
    paths.add(ensure_model(0, print))
    assert len(paths) == 3 and all(path.is_dir() for path in paths)


def test_a_warm_start_that_breaks_off_leaves_nothing(quick, monkeypatch: pytest.MonkeyPatch):
    def interrupted(seed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(addition_policy, "warm_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_model(0, print)
    assert list(quick.iterdir()) == []


def test_whoever_comes_second_takes_the_model_of_the_first(quick, monkeypatch: pytest.MonkeyPatch):
    recipe, made = addition_policy.warm_start, []

    def raced(seed: int):
        if not made:
            made.append(None)
            made.append(ensure_model(seed, print))  # another process finishes first
        return recipe(seed, show=False)

    monkeypatch.setattr(addition_policy, "warm_start", raced)
    assert ensure_model(0, print) == made[1]
    assert [entry.name for entry in quick.iterdir()] == [made[1].name]
