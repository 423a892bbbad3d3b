"""Recipe: one YAML file is one whole run. The keys we own, as frozen pydantic models.

`lora:` and `grpo:` carry upstream's own names; grpo_lite.recipe.load checks them against the installed versions.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from grpo_lite.recipe.algorithms import Word
from grpo_lite.recipe.expected import Expected
from grpo_lite.recipe.schedule import Schedule

EMBEDDED_MODEL = "embedded/SmolLM2-135M-Instruct"
TINY_MODEL = "tiny/random-llama"

# Our keys in the section `lora`, beside peft.LoraConfig's, with what they mean.
LORA_OWN = {
    "init_from": "Adapter that training starts from: a run directory, a folder with a saved adapter, or `user/repo`.",
}
# What a recipe gets where it says nothing; written out in the resolved recipe.
LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.0}
GRPO_DEFAULTS: dict[str, Any] = {
    "num_generations": 8,
    "max_completion_length": 256,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-5,  # TRL's 1e-6 is for full fine-tuning: LoRA learns nothing with it
    "beta": 0.0,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """The base model and how it is loaded."""

    id: str = Field(
        min_length=1,
        description=f"Hub id, a local folder, `{EMBEDDED_MODEL}` (PyPI wheel) or `{TINY_MODEL}` (made on the spot).",
    )
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    load_in: Literal["4bit", "8bit", "16bit", "32bit"] = Field(
        "4bit", description="4bit: NF4 with double quantisation; 8bit: LLM.int8(); 16bit; 32bit."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Compute dtype. auto: bfloat16 where the device computes in it, otherwise float16 (CUDA)."
    )
    attn_implementation: str | None = Field(None, description="sdpa, eager, flash_attention_2 …; null: upstream's.")
    backend: Literal["auto", "hf", "unsloth"] = Field(
        "auto",
        description="What loads and trains it: hf anywhere, unsloth on CUDA with its package; auto: the faster there.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the model.")
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="Chat template in place of the model's own, saved with what is trained: `smollm2-tools` (ChatML "
        "with tools), or a .jinja file.",
    )


Generator = Literal[
    "sums", "products", "chain", "countdown", "counting", "wordle", "sudoku", "towns", "reasoning_gym", "verifiers"
]


class SourceSection(_Section):
    """Where rows come from: exactly one of hub, path, generator."""

    hub: str | None = Field(None, description="Dataset id on the Hub.")
    config: str | None = Field(None, description="Hub dataset configuration.")
    data_dir: str | None = Field(None, description="Folder of the Hub dataset, where each holds a set of its own.")
    split: str = Field("train", description="Hub dataset split.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    path: str | None = Field(None, description="Local .jsonl, .json, .csv or .parquet file.")
    generator: Generator | None = Field(None, description="A named generator.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the generator.")
    limit: int | None = Field(None, ge=1, description="Use the first rows only.")

    @model_validator(mode="after")
    def _one_source(self) -> SourceSection:
        sources = [key for key in ("hub", "path", "generator") if getattr(self, key)]
        if len(sources) != 1:
            raise ValueError(
                f"exactly one of hub, path, generator is needed, {' and '.join(sources) or 'none'} is given"
            )
        if self.kwargs and not self.generator:
            raise ValueError("kwargs belong to a generator, and none is named")
        return self


class Example(_Section):
    """One worked example put before every prompt."""

    prompt: str
    answer: str


class DataSection(_Section):
    """Rows and how they become prompts."""

    train: SourceSection
    eval: SourceSection | None = Field(None, description="Held-out rows; null: `holdout` rows of train.")
    holdout: float = Field(
        0, ge=0, description="Rows of train kept for evaluation, never trained on; below 1: that share of them."
    )
    prompt: str = Field("{prompt}", description="Template over the row's columns, e.g. `{question}`.")
    answer: str | None = Field("answer", description="Column of the gold answer; null: the rewards need none.")
    format: Literal["chat", "text"] = Field("chat", description="chat: messages through the chat template.")
    system: str | None = Field(None, description="System prompt (chat) or first lines (text).")
    examples: list[Example] = Field(default_factory=list, description="Few-shot examples.")
    gold_completion: str | None = Field(
        "{gold}",
        description="What a perfect completion looks like, over the columns and {gold} (the final answer), for checks; "
        "null: the rows hold none, so the rewards are not tried before training.",
    )
    max_prompt_tokens: int | None = Field(None, ge=1, description="Longer prompts are dropped, with a message.")


class WarmupSection(_Section):
    """Supervised fine-tuning of the same LoRA before GRPO."""

    source: Literal["data", "self", "gold"] = Field(
        "data",
        description="data: rows with completions; self: the base's own right completions; gold: episodes of the "
        "function `gold(row)` beside the environment.",
    )
    data: SourceSection | None = Field(None, description="Rows with completions, for source: data.")
    prompt: str | None = Field(None, description="Template of the prompt over those rows; null: data.prompt.")
    completion: str = Field(
        "{completion}", description="Template of the completion over those rows; the end token is added."
    )
    answer: str | None = Field(
        None, description="Column of the gold answer in those rows, for the rewards; null: data.answer."
    )
    only_right: bool = Field(False, description="Drop rows whose completion the first reward does not pay in full.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; null: as many as `epochs` take.")
    epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Passes over the rows; null: 1 unless `steps` is given."
    )
    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="linear and cosine fall to 0; each rises over the first 5 % of the steps."
    )
    tokens_per_step: int = Field(
        4096, ge=1, description="Most tokens of an optimizer step, prompts included; at least one row is taken."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Longer completions are dropped, with a message; null: grpo.max_completion_length."
    )
    samples: int = Field(4, ge=1, description="source: self: completions sampled for each training prompt.")
    keep: int = Field(1, ge=1, description="source: self: most distinct right completions kept of a prompt.")
    prompts: int | None = Field(
        None, ge=1, description="source: self or gold: training prompts sampled or played; null: all."
    )
    seed: int | None = Field(None, ge=0, lt=2**32, description="Of the order of rows; null: the recipe's seed.")

    @model_validator(mode="after")
    def _one_source(self) -> WarmupSection:
        if self.source == "data" and self.data is None:
            raise ValueError("source: data needs rows with completions: give warmup.data, or source: self")
        if self.source == "self" and self.data is not None:
            raise ValueError("source: self samples the training prompts itself, so data is not given with it")
        if self.source == "gold" and self.data is not None:
            raise ValueError("source: gold plays the training prompts itself, so data is not given with it")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given; give one of them")
        return self


class RewardSection(_Section):
    """One reward function with its weight."""

    function: str = Field(min_length=1, description="`module.function` or `file.py:function`.")
    weight: float = Field(1.0, description="TRL's reward_weights entry.", allow_inf_nan=False)
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments bound to the function.")
    gate: bool = Field(False, description="Count this reward only where the first reward is at its top.")


ENVIRONMENT_REWARD = "get_reward"  # as a score's function: what the row's environment pays


class ScoreSection(_Section):
    """A reward used as a score: solved when it is at least `threshold`."""

    function: str = Field(
        min_length=1,
        description="`module.function` or `file.py:function`; get_reward: what the environment pays.",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict)
    threshold: float = Field(1.0, description="The score from which a completion counts as right.")


class MemorySection(_Section):
    """How the run fits the card: what is null the plan decides."""

    fit: bool = Field(
        True, description="Plan before training, refuse what cannot fit, redo a step with less when memory runs out."
    )
    offload_activations: bool = Field(
        False, description="Keep checkpointed activations in main memory: slower, for long completions on small cards."
    )

    tokens_per_microbatch: int | None = Field(
        None,
        ge=1,
        description="Most tokens in one forward and backward, of the warm-up too; null: what a step has, if it fits.",
    )
    rollout_kv_tokens: int | None = Field(
        None, ge=1, description="Most tokens whose keys and values a rollout holds at once; null: the whole batch."
    )


class SamplingSection(_Section):
    """Better use of each rollout."""

    refill: int = Field(0, ge=0, description="Most extra groups generated a step to replace groups of equal rewards.")
    replay: int = Field(
        0, ge=0, description="Groups of this many last steps may replace groups of equal rewards, each once more."
    )
    length_stages: dict[int, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Shorter completions at first: {50: 128} allows 128 tokens in the first 50 steps.",
    )


class FurtherSource(SourceSection):
    """Rows of another difficulty or distribution, scored beside the held-out ones."""

    limit: int = Field(200, ge=1, description="Use the first rows only.")


class EvalSection(_Section):
    """Evaluation before and after, on held-out prompts."""

    enabled: bool = True
    limit: int | None = Field(200, ge=1, description="Held-out prompts used; null: all.")
    samples: int = Field(4, ge=0, description="Sampled completions a prompt for pass@k; 0: greedy only.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the sampled completions.")
    batch_size: int = Field(64, ge=1, description="Sequences generated at once.")
    max_new_tokens: int | None = Field(None, ge=1, description="null: grpo.max_completion_length.")
    every: int = Field(0, ge=0, description="Steps between greedy held-out scores while it trains; 0: never.")
    every_limit: int = Field(64, ge=1, description="Held-out prompts of those scores.")
    also: dict[str, FurtherSource] = Field(
        default_factory=dict,
        description="Further held-out rows by name, scored greedily and apart, such as a harder kind of the task.",
    )

    lenient: ScoreSection | None = Field(
        None, description="Is the answer right? null: the first reward, else what the environment pays."
    )
    strict: list[ScoreSection] = Field(
        default_factory=list, description="Further scores a completion must reach to be strictly right (format)."
    )

    @model_validator(mode="after")
    def _every_needs_held_out_rows(self) -> EvalSection:
        if self.every and not self.enabled:
            raise ValueError("every is given, but enabled is false, so there are no held-out rows to score")
        return self


class CheckSection(_Section):
    """The check of the rewards before every training: gold must earn the top score."""

    enabled: bool = True
    rows: int = Field(16, ge=2, description="Training rows that the gold and the cheats are tried on.")
    skip: list[str] = Field(default_factory=list, description="Checks that do not apply, by name.")


class JudgeBudget(_Section):
    """What `rewards.judge_reward` may spend, over all runs that share its cache; the run then stops, and may resume."""

    calls: int | None = Field(None, ge=1, description="Most calls; null: no limit.")
    tokens: int | None = Field(None, ge=1, description="Most tokens, of prompts and answers; null: no limit.")
    usd: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Most US dollars, by `usd_per_million`; null: no limit."
    )


class LimitsSection(_Section):
    """When to stop, and what a fault may cost."""

    max_minutes: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Stop training in time to evaluate and merge within so many minutes; `train` again resumes.",
    )
    reward_timeout_s: float | None = Field(
        300.0, gt=0, allow_inf_nan=False, description="Longest call of a reward, in seconds; null: no limit."
    )
    reward_failures: int = Field(
        3, ge=1, description="Batches in a row that a reward may mostly fail to score before the run stops."
    )
    tool_timeout_s: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest call of a tool, and of an environment's reset, in seconds.",
    )
    tool_episode_timeout_s: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="What all calls of one episode may take, in seconds."
    )
    tool_round_timeout_s: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="What all calls of the episodes of a round may take, in seconds."
    )
    tool_result_chars: int = Field(
        4000,
        ge=100,
        description="Longest result of a tool, or text of reset, that the model gets; the rest is cut, with a note.",
    )
    judge_budget: JudgeBudget | None = Field(
        None, description="Most that a reward which asks a paid server may spend; null: no limit."
    )
    skipped_steps: int = Field(
        5, ge=1, description="Steps in a row that may be skipped for a NaN or infinite loss or gradient."
    )


class LogSection(_Section):
    """What is shown while it runs."""

    sample_every: int = Field(10, ge=0, description="Steps between sample completions; 0: never.")
    preflight: bool | None = Field(
        None, description="Begin training with the probe (32 prompts × 8 samples: verdict, ETA); null: on a GPU only."
    )


MergeOnto = Literal["auto", "original", "trained"]  # as in `merge --onto`


class Recipe(_Section):
    """One whole run. Frozen: a change is a new recipe."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the run; by default the file's name."
    )
    description: str = Field(description="One line: what is trained on what.")
    least_gpu: str = Field(
        description="The smallest GPU that holds its plan (`grpo-lite plan`), and one that is fast enough by our "
        "judgement: `4 GB; recommended: T4 16 GB`. It begins with `none` where a CPU is enough."
    )
    seed: int = Field(42, ge=0, lt=2**32)
    model: ModelSection
    lora: dict[str, Any] = Field(
        default_factory=dict, description="peft.LoraConfig, upstream's names; and init_from, an adapter to start from."
    )
    data: DataSection
    rewards: list[RewardSection] = Field(
        description="Reward functions; [] is allowed where every environment has `get_reward`."
    )
    tools: list[str] = Field(
        default_factory=list,
        description="Functions that the model may call: `module.function` or `file.py:function`, with type hints and "
        "a docstring.",
    )
    environment: str | dict[str, str] | None = Field(
        None,
        description="Class whose public methods are tools, reset for each completion (TRL's `environment_factory`): "
        "`module.Class` or `file.py:Class`. Several by name: the row's column `environment` says which.",
    )
    warmup: WarmupSection | None = Field(
        None, description="Supervised fine-tuning of the same LoRA before GRPO; null: GRPO starts at once."
    )
    algorithm: Word = Field(
        "trl",
        description="The objective by one word: keys of `grpo` that belong together in a paper; a key that `grpo` "
        "gives wins. trl: TRL's defaults.",
    )
    grpo: dict[str, Any] = Field(default_factory=dict, description="trl.GRPOConfig, upstream's names.")
    reference: Literal["base", "start"] = Field(
        "base",
        description="What KL (grpo.beta) is measured against. base: the base model; start: the adapter as it was when "
        "GRPO started: from lora.init_from or the warm-up.",
    )
    compute: Literal["packed", "plain"] = Field(
        "packed", description="packed: each prompt computed once a group, no padding; plain: TRL's own. Same gradient."
    )
    rollout: Literal["shared", "generate"] = Field(
        "shared", description="shared: each prompt prefilled once a group, finished rows leave; generate: TRL's own."
    )
    memory: MemorySection = MemorySection()  # type: ignore[call-arg]
    sampling: SamplingSection = SamplingSection()  # type: ignore[call-arg]
    eval: EvalSection = EvalSection()  # type: ignore[call-arg]
    check: CheckSection = CheckSection()  # type: ignore[call-arg]
    limits: LimitsSection = LimitsSection()  # type: ignore[call-arg]
    log: LogSection = LogSection()  # type: ignore[call-arg]
    push_checkpoints: str | None = Field(
        None,
        min_length=1,
        description="Keep checkpoints there too: `user/name` (a private bucket on the Hub) or a folder's path.",
    )
    expected: Expected | None = Field(
        None, description="A measured result of this recipe, drawn as a band; `doctor` says whether a run is inside."
    )
    merge: bool = Field(True, description="Merge the adapter into a 16-bit model after training, and verify it.")
    merge_onto: MergeOnto = Field(
        "auto",
        description="After training in 4 bits: merge onto the `original` 16-bit weights, onto those that training read "
        "(`trained`), or `auto`: onto the original ones unless the merged model then scores significantly worse.",
    )

    @field_validator("push_checkpoints")
    @classmethod
    def _a_path_or_a_bucket(cls, address: str | None) -> str | None:
        if (
            address
            and not address.startswith(("/", "./", "../", "~"))
            and not re.fullmatch(r"[\w.-]+/[\w.-]+", address)
        ):
            raise ValueError(f"{address!r} is given; write user/name, or a path that begins with /, ./ or ~")
        return address

    @field_validator("rewards")
    @classmethod
    def _first_is_no_gate(cls, rewards: list[RewardSection]) -> list[RewardSection]:
        if rewards and rewards[0].gate:
            raise ValueError(
                "the first reward opens the gate, so it cannot be gated itself. Put the reward for what is right first"
            )
        return rewards

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> Recipe:
        if not self.rewards and self.environment is None:
            raise ValueError(
                "rewards: [] is given; at least one reward is needed, unless `environment` names a class with "
                "`get_reward`"
            )
        if self.environment == {}:
            raise ValueError("environment: an empty mapping is given; name at least one class, or remove the key")
        return self

    @property
    def has_tools(self) -> bool:
        """Whether completions are episodes, in which the model's calls of tools are answered."""
        return bool(self.tools) or self.environment is not None

    @property
    def primary_score(self) -> ScoreSection | RewardSection:
        """What says whether an answer is right: `eval.lenient`, the first reward, or the environment's own."""
        own = ScoreSection(function=ENVIRONMENT_REWARD)  # type: ignore[call-arg]
        return self.eval.lenient or (self.rewards[0] if self.rewards else own)

    @property
    def reward_names(self) -> list[str]:
        """Names that the rewards are logged under (`rewards/<name>/mean`): the function's, numbered where taken."""
        names: list[str] = []
        for i, section in enumerate(self.rewards):
            name = section.function.replace(":", ".").rpartition(".")[2]
            names.append(f"{name}_{i}" if name in names else name)
        return names

    @property
    def sources(self) -> dict[str, SourceSection]:
        """Where rows come from, by the recipe's key."""
        named = {"data.train": self.data.train, "data.eval": self.data.eval}
        named["warmup.data"] = self.warmup.data if self.warmup else None
        named |= {f"eval.also.{name}": source for name, source in self.eval.also.items()}
        return {key: source for key, source in named.items() if source is not None}

    @property
    def schedule(self) -> Schedule:
        """What the batch keys of `grpo` mean in completions and steps."""
        return Schedule.of({**GRPO_DEFAULTS, **self.grpo})

    @property
    def lora_arguments(self) -> dict[str, Any]:
        """What peft.LoraConfig gets: the section `lora` without our own keys."""
        return {key: value for key, value in self.lora.items() if key not in LORA_OWN}

    @property
    def init_from(self) -> str | None:
        """The address of the adapter that training starts from: `lora.init_from`; None: a fresh one."""
        return self.lora.get("init_from")

    @property
    def holds_reference(self) -> bool:
        """Whether a frozen copy of the adapter is held for KL; a fresh one would equal the base, and needs none."""
        plain = self.lora.get("init_lora_weights", True) in (True, "gaussian")
        fresh = self.init_from is None and self.warmup is None and plain
        return self.reference == "start" and bool(self.grpo.get("beta")) and not fresh

    @property
    def num_generations(self) -> int:
        """Completions per prompt, G."""
        return self.schedule.group

    @property
    def template_kwargs(self) -> dict[str, Any] | None:
        """What the chat template gets besides the messages."""
        return self.grpo.get("chat_template_kwargs")

    @property
    def max_completion_length(self) -> int:
        """Longest completion, in tokens."""
        return int(self.grpo.get("max_completion_length", GRPO_DEFAULTS["max_completion_length"]))

    @property
    def warmup_completion_length(self) -> int:
        """Longest completion of the warm-up, in tokens: `warmup.max_completion_tokens`, or as in training."""
        return (self.warmup and self.warmup.max_completion_tokens) or self.max_completion_length

    @property
    def eval_completion_length(self) -> int:
        """Longest completion of an evaluation, in tokens: `eval.max_new_tokens`, or as in training."""
        return self.eval.max_new_tokens or self.max_completion_length

    @property
    def temperature(self) -> float:
        """Temperature of a rollout's completions; TRL's default is 1."""
        return float(self.grpo.get("temperature", 1.0))

    def with_section(self, section: str, **values: Any) -> Recipe:
        """Return the recipe with other values in one of its sections; they are not checked."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})

    def evaluated_rows(self, held_out: int) -> int:
        """Return how many of so many held-out rows are evaluated; 0 without an evaluation."""
        return min(held_out, self.eval.limit or held_out) if self.eval.enabled else 0

    def evaluated_completions(self, held_out: int) -> int:
        """Return how many completions the evaluation generates, at most: for base, warm (after a warm-up), trained.

        Args:
            held_out: number of held-out rows that there are.
        """
        if not self.eval.enabled:
            return 0
        models, rows = 2 if self.warmup is None else 3, self.evaluated_rows(held_out)
        return models * (rows * (1 + self.eval.samples) + sum(source.limit for source in self.eval.also.values()))

    @property
    def most_merges(self) -> int:
        """How often a model is merged and scored, at most: twice where the first score chooses what is merged onto."""
        in_four_bits = self.model.load_in == "4bit" and self.model.backend != "unsloth"
        chooses = self.merge_onto == "auto" and in_four_bits and self.eval.enabled
        return self.merge * (2 if chooses else 1)


def values_by_key(value: Any, path: str = "") -> dict[str, Any]:
    """Return the single values of a recipe as plain data, by key as an override names it.

    >>> values_by_key({"grpo": {"beta": 0.0}, "rewards": [{"weight": 1.0}], "tools": []})
    {'grpo.beta': 0.0, 'rewards[0].weight': 1.0, 'tools': []}
    """
    if isinstance(value, dict) and value:
        parts = ((f"{path}.{key}" if path else key, child) for key, child in value.items())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        parts = ((f"{path}[{i}]", child) for i, child in enumerate(value))
    else:
        return {path: value}
    return {key: single for part, child in parts for key, single in values_by_key(child, part).items()}


_MAY_BE_PATHS = ("id", "chat_template", "function", "init_from", "tools", "environment")


def without_paths(recipe: Recipe) -> Recipe:
    """Shorten paths of the training machine to their last part."""

    def shorten(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: shorten(item, key if key == "environment" else name) for name, item in value.items()}
        if isinstance(value, list):
            return [shorten(item, key) for item in value]
        local = key == "path" or (key in _MAY_BE_PATHS and str(value).startswith(("/", "~", ".")))
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2] if local and isinstance(value, str) else value

    return Recipe.model_validate(shorten(recipe.model_dump()))
