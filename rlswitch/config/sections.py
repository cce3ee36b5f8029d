"""Every setting of a run on one page: the name, the type, the default and what it means.

YAML under conf/ holds choices and deltas only. The algorithms' settings stand in their own files
(rlswitch/algorithms/); OPTIONS is the one table of what can be chosen by name. Nothing here imports
torch or vLLM: a typing mistake is answered before either could have been loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlswitch.config.fields import choice, number

TENANTS = {"judge": "judge", "reward_model": "reward model"}
"""What reward.functions can name beside functions, and the name in switch.jsonl. Each has a section of
settings."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    path: str = "???"
    """A Hugging Face directory or hub id, or `builtin:addition`, made on the spot."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: str = choice("auto", "float32", "bfloat16", "float16")
    """What the engine computes in: auto (bfloat16 on CUDA, float32 on a CPU), float32, bfloat16, float16."""
    attn_implementation: str | None = None
    """The trainer's attention as transformers names it, such as flash_attention_2; null: its choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose authors you trust."""
    lora_rank: int = number(0, at_least=0)
    """Rank of the LoRA adapters that are trained instead of the weights; 0: train the weights."""
    lora_alpha: float = number(0.0, at_least=0)
    """Their scale is lora_alpha / lora_rank; 0: twice the rank."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the linear layers that get one, as q_proj; empty: all but the head."""
    warm_start_seed: int = number(0, at_least=0)
    """Seed of the built-in model: apart from `seed`, so that a sweep over seeds starts from one model."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    path: str = "???"
    """A hub id, a JSONL, CSV or parquet file, a saved dataset directory, or `builtin:addition`."""
    name: str | None = None
    """Configuration (subset) of a hub dataset."""
    split: str = "train"
    eval_path: str | None = None
    """Where the held-out rows come from; null: `eval_split` of `path`, or `eval_rows` cut off `split`."""
    eval_split: str | None = None
    eval_rows: int = number(256, at_least=1)
    """How many held-out rows to evaluate on."""
    prompt_key: str = "prompt"
    """The column with the prompt: a string, or a list of chat messages."""
    max_prompt_tokens: int = number(512, at_least=1)
    overlong: str = choice("error", "drop")
    """What to do with a longer prompt: stop with an error, or drop the row and say how many."""

    @property
    def cuts_held_out_rows(self) -> bool:
        """Whether rows to evaluate on have no place of their own, and are taken from those to train on."""
        return not (self.eval_path or self.eval_split or self.path.startswith("builtin:"))


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    functions: list[str] = field(default_factory=lambda: ["exact_match"])
    """Built-in names, `package.module:function`, or `file.py:function`, with TRL's signature; and the models
    `judge` and `reward_model`, each with a section of its own."""
    weights: list[float] = field(default_factory=list)
    """One weight each; empty: all 1."""
    overlong_buffer: int = number(0, at_least=0)
    """Completions that use the last so many tokens lose up to 1 of their reward (DAPO); 0: none do."""
    workers: int = number(1, at_least=1)
    """Processes that the functions run in; each is given whole groups of a step, `code` one program."""
    timeout_s: float = number(60.0, above=0)
    """A call of a function that takes longer is killed, and repeated in parts to find the guilty rows."""
    memory_gib: float = number(4.0, at_least=0.25)
    """Memory that a worker, and each program in the sandbox, may take."""
    max_error_rate: float = number(0.1, at_least=0, at_most=1)
    """Share of a step's rollouts that may have no reward and be left out; more stops the run."""
    format_pattern: str | None = None
    """What the built-in `format` asks for: a regular expression for the whole completion."""
    allow_unsandboxed: bool = False
    """Run programs that the model wrote where the kernel gives no isolation: with limits only."""


@dataclass(kw_only=True, slots=True)
class JudgeConfig:
    """The reward `judge`: a second vLLM engine that takes its turn on the device (docs/rewards.md).

    It is always a local one, with the run's engine.* and model.dtype, a context of its own, and without
    trust_remote_code.
    """

    path: str | None = None
    """Its model, as in model.path; `builtin:addition-judge` is made on the spot."""
    level: str = choice("1", "2")
    """While others have the device: 1, weights in RAM; 2, dropped and read from its files again."""
    prompt: str = (
        "Question:\n{prompt}\n\nAnswer:\n{completion}\n\n"
        "Is the answer correct? Reply with 1 if it is and with 0 if it is not, and nothing else."
    )
    """What it is asked: {prompt}, {completion} and the dataset's columns are filled in. As one message of
    a chat where its tokenizer has a chat template, as text to continue where not."""
    pattern: str = r"\b([01])\b"
    """Regular expression with one group around the score; its last match in the reply counts."""
    scale: float = number(1.0, above=0)
    """What the score is divided by: 10 for a scale from 0 to 10."""
    retries: int = number(2, at_least=0)
    """How often it is asked again, at temperature > 0, after a reply without a score: then it is an error."""
    max_new_tokens: int = number(32, at_least=1)


@dataclass(kw_only=True, slots=True)
class RewardModelConfig:
    """The reward `reward_model`: the one logit of a sequence classifier (docs/rewards.md)."""

    path: str | None = None
    """Its model, as in model.path, with num_labels 1; `builtin:addition-reward-model` is made on the spot."""
    level: str = choice("1", "2")
    """While others have the device: 1, weights in RAM; 2, dropped and read from its files again."""


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    num_prompts: int = number(64, at_least=1)
    """Prompts in one step."""
    group_size: int = number(8, at_least=1)
    """Completions sampled for each prompt."""
    max_new_tokens: int = number(256, at_least=1)
    temperature: float = number(1.0, at_least=0.01)  # vLLM raises less to 0.01 by itself


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """vllm.LLM with its engine core in a process of its own."""

    max_model_len: int | None = number(None, at_least=2)
    """Longest prompt plus completion; null: data.max_prompt_tokens + rollout.max_new_tokens."""
    gpu_memory_utilization: float = number(0.85, above=0, at_most=1)
    """Share of a GPU's memory for weights and KV cache together."""
    kv_cache_gib: float | None = number(None, above=0)
    """Fixed size of the KV cache instead; null: fill gpu_memory_utilization on CUDA, 0.25 on a CPU."""
    tensor_parallel_size: int = number(1, at_least=1)
    enforce_eager: bool = False
    """Without CUDA graphs and torch.compile: starts sooner, generates slower. Always so on a CPU."""
    fork_server: bool = True
    """Start vLLM's processes from one that has imported vLLM already; false: a new interpreter each."""
    start_timeout_s: float = number(600.0, above=0)
    request_timeout_s: float = number(1800.0, above=0)
    """Longest silence of vLLM on one call; then the engine counts as lost."""
    max_restarts: int = number(3, at_least=0)
    """How often in a row a lost engine is started again; its version is pushed and proven anew."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Anything else for vllm.LLM, as it is: engine.vllm.max_num_seqs=64."""

    @property
    def is_started_here(self) -> bool:
        return True


@dataclass(kw_only=True, slots=True)
class ServerEngineConfig(EngineConfig):
    """vLLM's HTTP server, launched or attached to; the same settings, and how it is reached."""

    listen: str = "socket"
    """Where to launch it: socket (in a private directory), or HOST:PORT (port 0: any free one)."""
    url: str | None = None
    """Attach to a running server instead: http://HOST:PORT, or unix:/path/of/the/socket."""
    allow_remote: bool = False
    """Allow other addresses than loopback: whoever reaches the server controls it, see docs/server.md."""

    @property
    def is_started_here(self) -> bool:
        return self.url is None


@dataclass(kw_only=True, slots=True)
class SwitchConfig:
    level: str = choice("2", "1", "kv", "0", "auto")
    """2: weights and KV cache discarded; 1: weights to RAM; kv: KV cache only; 0: pause only; auto: the
    least that makes room for the update (docs/levels.md)."""
    transport: str = choice("auto", "shm", "disk")
    """Where a push goes through: /dev/shm (shm), the run directory (disk), or shm when it fits (auto)."""
    verify: str = choice("every", "first", "off")
    """Prove every push, the first one only, or none."""
    canary_tolerance: float = number(1e-4, above=0)
    """Largest |difference| of a canary log-probability in float32. Other dtypes learn it on push 0."""


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    lr: float = number(1e-6, above=0)
    lr_schedule: str = choice(
        "constant",
        "linear",
        "cosine",
        "cosine_with_min_lr",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    )
    """What the learning rate does between the warm-up and num_steps; transformers' schedules."""
    lr_schedule_kwargs: dict[str, Any] = field(default_factory=dict)
    """What else the schedule takes: trainer.lr_schedule_kwargs.min_lr_rate=0.1."""
    warmup_steps: int = number(0, at_least=0)
    """Optimizer steps over which the learning rate rises from zero."""
    critic_lr: float = number(1e-5, above=0)
    weight_decay: float = number(0.0, at_least=0)
    adam_beta1: float = number(0.9, at_least=0, below=1)
    adam_beta2: float = number(0.999, at_least=0, below=1)
    max_grad_norm: float = number(1.0, above=0)
    epochs: int = number(1, at_least=1)
    """Passes over each step's rollouts."""
    minibatches: int = number(1, at_least=1)
    """Optimizer steps in one pass."""
    micro_batch_tokens: int = number(16384, at_least=1)
    """Tokens (padding included) in one forward and backward: memory only, never the result."""
    packing: bool = False
    """Rollouts of a micro-batch in one row without padding. Pays off with attn_implementation
    flash_attention_2 and lengths that differ much; same result."""
    gradient_checkpointing: bool = False
    park: str = choice("auto", "nothing", "optimizer", "everything")
    """What leaves the GPU while the engine has it; auto: only what would not fit beside the engine."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every: int = number(50, at_least=0)
    """Save after every so many steps, and at the end; 0: only at the end."""
    keep: int = number(2, at_least=1)
    """How many checkpoints to keep."""
    merged: bool = False
    """With LoRA: write merged/ beside the adapter, a whole model that needs no peft."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    every: int = number(25, at_least=0)
    """Evaluate before training, after every so many steps, and at the end; 0: never."""
    num_samples: int = number(4, at_least=1)
    """Samples per prompt for pass@k; the accuracy itself is greedy."""
