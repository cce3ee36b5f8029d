"""Every setting of a run on one page: the name, the type, the default and what it means.

YAML under conf/ holds choices and deltas only. Each algorithm's settings are in its own file
(rlswitch/algorithms/); OPTIONS in run.py lists what can be chosen by name. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlswitch.config.fields import choice, number

TENANTS = {
    "judge": "rlswitch.rewards.models.judge",
    "reward_model": "rlswitch.rewards.models.reward_model",
}
"""The models that reward.functions can name beside functions, and the module of each (with a `SPEC`, see
rewards/models/tenant.py). Each has a section of settings under the same name, a TenantConfig."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    path: str = "???"
    """A Hugging Face directory or hub id, or `builtin:addition`, which is made on the spot."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: str = choice("auto", "float32", "bfloat16", "float16")
    """The engine's dtype: auto (bfloat16 on CUDA, float32 on a CPU), float32, bfloat16, float16."""
    attn_implementation: str | None = None
    """The trainer's attention by its name in transformers, such as flash_attention_2; null: the default."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for models whose authors you trust."""
    lora_rank: int = number(0, at_least=0)
    """Rank of LoRA adapters to train instead of the weights; 0: train the weights."""
    lora_alpha: float = number(0.0, at_least=0)
    """The adapters are scaled by lora_alpha / lora_rank; 0: twice the rank."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the linear layers that get an adapter, such as q_proj; empty: all but the head."""
    warm_start_seed: int = number(0, at_least=0)
    """Seed of the built-in model, apart from `seed`: a sweep over seeds starts from the same model."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    path: str = "???"
    """A hub id, a JSONL, CSV or parquet file, a saved dataset directory, or `builtin:addition`."""
    name: str | None = None
    """Configuration (subset) of a hub dataset."""
    split: str = "train"
    eval_path: str | None = None
    """Source of the held-out rows; null: `eval_split` of `path`, or `eval_rows` cut off `split`."""
    eval_split: str | None = None
    eval_rows: int = number(256, at_least=1)
    """Number of held-out rows to evaluate on."""
    prompt_key: str = "prompt"
    """The column with the prompt: a string, or a list of chat messages."""
    max_prompt_tokens: int = number(512, at_least=1)
    overlong: str = choice("error", "drop")
    """Longer prompts: stop with an error, or drop their rows and report how many."""

    @property
    def cuts_held_out_rows(self) -> bool:
        """Whether the rows to evaluate on are taken from the training rows."""
        return not (self.eval_path or self.eval_split or self.path.startswith("builtin:"))


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    functions: list[str] = field(default_factory=lambda: ["exact_match"])
    """Built-in names, `package.module:function`, or `file.py:function`, with TRL's signature; and the models
    `judge` and `reward_model`, which have their own sections."""
    weights: list[float] = field(default_factory=list)
    """One weight per function; empty: all 1."""
    overlong_buffer: int = number(0, at_least=0)
    """Completions that reach into the last this many tokens lose up to 1 of their reward (DAPO); 0: off."""
    workers: int = number(1, at_least=1)
    """Processes that run the functions, on whole groups at a time (`code`: one program at a time)."""
    timeout_s: float = number(60.0, above=0)
    """A call that takes longer is killed, and repeated in parts to find the rows at fault."""
    memory_gib: float = number(4.0, at_least=0.25)
    """Memory limit of each worker, and of each program in the sandbox."""
    max_error_rate: float = number(0.1, at_least=0, at_most=1)
    """Largest share of a step's rollouts that may be left out for want of a reward; more stops the run."""
    format_pattern: str | None = None
    """Regular expression that the built-in `format` matches against the whole completion."""
    allow_unsandboxed: bool = False
    """Run programs that the model wrote with limits only, where the kernel offers no isolation."""


@dataclass(kw_only=True, slots=True)
class TenantConfig:
    """What the settings of all models among the rewards share."""

    device_name: ClassVar[str]
    """In switch.jsonl and on the console."""
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    """The class of transformers that builds such a model; a plan counts its parameters."""
    has_engine: ClassVar[bool] = False
    """Whether it runs in an engine of vLLM, with a KV cache."""

    path: str | None = None
    """Its model, as in model.path; `builtin:addition-judge` and `builtin:addition-reward-model` are made on
    the spot."""
    level: str = choice("1", "2")
    """While others have the device: 1, weights in RAM; 2, dropped and read from its files again."""


@dataclass(kw_only=True, slots=True)
class JudgeConfig(TenantConfig):
    """The reward `judge`: a second vLLM engine that takes its turn on the device (docs/rewards.md).

    It is always a local one, with the run's engine.* and model.dtype, its own context length, and without
    trust_remote_code.
    """

    device_name: ClassVar[str] = "judge"
    has_engine: ClassVar[bool] = True

    prompt: str = (
        "Question:\n{prompt}\n\nAnswer:\n{completion}\n\n"
        "Is the answer correct? Reply with 1 if it is and with 0 if it is not, and nothing else."
    )
    """The question: {prompt}, {completion} and the dataset's columns are filled in. As one message of a chat
    where its tokenizer has a chat template, otherwise as text to continue."""
    pattern: str = r"\b([01])\b"
    """Regular expression with one group around the score; its last match in the reply counts."""
    scale: float = number(1.0, above=0)
    """What the score is divided by: 10 for a scale from 0 to 10."""
    retries: int = number(2, at_least=0)
    """How often it is asked again, at temperature > 0, after a reply without a score: then it is an error."""
    max_new_tokens: int = number(32, at_least=1)


@dataclass(kw_only=True, slots=True)
class RewardModelConfig(TenantConfig):
    """The reward `reward_model`: the one logit of a sequence classifier, num_labels 1 (docs/rewards.md)."""

    device_name: ClassVar[str] = "reward model"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    num_prompts: int = number(64, at_least=1)
    """Prompts per step."""
    group_size: int = number(8, at_least=1)
    """Completions per prompt."""
    max_new_tokens: int = number(256, at_least=1)
    temperature: float = number(1.0, at_least=0.01, at_most=2)  # vLLM raises smaller values, rejects larger


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """vllm.LLM, with its engine core in another process."""

    max_model_len: int | None = number(None, at_least=2)
    """Longest prompt plus completion; null: data.max_prompt_tokens + rollout.max_new_tokens."""
    gpu_memory_utilization: float = number(0.85, above=0, at_most=1)
    """Share of a GPU's memory for weights and KV cache."""
    kv_cache_gib: float | None = number(None, above=0)
    """Fixed size of the KV cache; null: what fits gpu_memory_utilization on CUDA, 0.25 on a CPU."""
    tensor_parallel_size: int = number(1, at_least=1)
    enforce_eager: bool = False
    """No CUDA graphs and torch.compile: starts faster, generates slower. Always on on a CPU."""
    fork_server: bool = True
    """Fork vLLM's processes from a server that has imported vLLM; false: a new interpreter for each."""
    start_timeout_s: float = number(600.0, above=0)
    request_timeout_s: float = number(1800.0, above=0)
    """An engine that is silent for longer during one call counts as lost."""
    max_restarts: int = number(3, at_least=0)
    """Restarts of a lost engine in a row; each pushes the weights and proves them again."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Other arguments of vllm.LLM: engine.vllm.max_num_seqs=64."""


@dataclass(kw_only=True, slots=True)
class ServerEngineConfig(EngineConfig):
    """vLLM's HTTP server, launched or attached to."""

    listen: str = "socket"
    """Where the launched server listens: socket (in a private directory), or HOST:PORT (port 0: any free)."""
    url: str | None = None
    """Attach to a running server instead: http://HOST:PORT, or unix:/path/of/the/socket."""
    allow_remote: bool = False
    """Allow addresses other than loopback. Whoever reaches the server controls it: see docs/server.md."""


@dataclass(kw_only=True, slots=True)
class SwitchConfig:
    level: str = choice("2", "1", "kv", "0", "auto")
    """How deep the engine sleeps. 2: discard weights and KV cache; 1: weights to RAM; kv: discard only the KV
    cache; 0: pause only; auto: the lightest that makes room for the update (docs/levels.md)."""
    transport: str = choice("auto", "shm", "disk")
    """Files of a push: in /dev/shm (shm), in the run directory (disk), or in shm if they fit (auto)."""
    verify: str = choice("every", "first", "off")
    """Prove every push, only the first, or none."""
    canary_tolerance: float = number(1e-4, above=0)
    """Largest |difference| of a canary log-probability in float32. Other dtypes learn theirs on push 0."""


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    lr: float = number(1e-6, above=0)
    lr_schedule: str = choice(
        *"constant linear cosine cosine_with_min_lr cosine_with_restarts polynomial inverse_sqrt".split(),
        "warmup_stable_decay",
    )
    """Schedule of the learning rate from the warm-up to num_steps, by its name in transformers."""
    lr_schedule_kwargs: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the schedule: trainer.lr_schedule_kwargs.min_lr_rate=0.1."""
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
    """Optimizer steps per pass."""
    micro_batch_tokens: int = number(16384, at_least=1)
    """Tokens, padding included, in one forward and backward pass: changes memory, never the result."""
    packing: bool = False
    """Pack the rollouts of a micro-batch into one row without padding: same result, faster with
    attn_implementation flash_attention_2 and very different lengths."""
    gradient_checkpointing: bool = False
    park: str = choice("auto", "nothing", "optimizer", "everything")
    """What leaves the GPU while the engine has it; auto: only what does not fit beside the engine."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every: int = number(50, at_least=0)
    """Steps between checkpoints; the last step is always saved; 0: only that one."""
    keep: int = number(2, at_least=1)
    """Number of checkpoints to keep."""
    merged: bool = False
    """With LoRA: also write merged/, a whole model that loads without peft."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    every: int = number(25, at_least=0)
    """Steps between evaluations; the first is before training, the last at the end; 0: never evaluate."""
    num_samples: int = number(4, at_least=1)
    """Samples per prompt for pass@k; accuracy is measured greedily."""
