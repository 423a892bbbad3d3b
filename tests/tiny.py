"""Tiny models of several architectures, a byte tokenizer, and trainers with fixed completions: seconds on one core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_lite.task.traces import Trace

SPECIAL = ["<unk>", "<bos>", "<eos>"]
VOCABULARY = 320
# What our trainer logs beside TRL's metrics (`grpo_lite/trainer/journal.py`).
OUR_METRICS = {"time/rollout_s", "time/reward_s", "memory/peak_gib"}
# Two layers of a hybrid: one recurrent, one with attention.
HYBRIDS: dict[str, dict[str, Any]] = {
    "granite4": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "shared_intermediate_size": 24,
        "num_local_experts": 0,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_5": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PROMPTS = ["2+3=", "Name a colour and say why you like it.", "7+9=", "Count: one two three"]


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Return a byte tokenizer that pads on the left with the end-of-text token, as many real ones do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        padding_side="left",
    )


def tiny_model(
    kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Build a random two-layer model whose weights are large enough for attention to matter."""
    import transformers

    names = {
        "llama": "Llama",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "gemma": "Gemma",
        "gemma2": "Gemma2",
        "mistral": "Mistral",
        "mixtral": "Mixtral",
        "gpt2": "GPT2",
        "granite4": "GraniteMoeHybrid",
        "lfm2": "Lfm2",
        "qwen3_5": "Qwen3_5",
    }
    if kind == "gpt2":
        settings: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    else:
        settings = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
        }
    settings |= HYBRIDS.get(kind, EXPERTS if kind == "mixtral" else {}) | {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config_class = f"{names[kind]}{'Text' if kind == 'qwen3_5' else ''}Config"
    config = getattr(transformers, config_class)(**(settings | overrides))
    head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, f"{names[kind]}{head}")(config).to(dtype)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 2
    return model


def tiny_lora(model: PreTrainedModel, seed: int = 1, rank: int = 4) -> Any:
    """Wrap a model with a LoRA adapter on all linear layers, its B matrices non-zero so that every gradient is."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return wrapped


def tiny_prompts(count: int = 4) -> Dataset:
    """Return prompts of different lengths."""
    return Dataset.from_dict({"prompt": [PROMPTS[i % len(PROMPTS)] + " " * (i // len(PROMPTS)) for i in range(count)]})


def fixed_completions(rows: int, longest: int, seed: int, lengths: list[int] | None = None) -> list[list[int]]:
    """Return made-up completions; all but the longest ones end with the end-of-text token."""
    generator = torch.Generator().manual_seed(seed)
    sizes = lengths or (torch.randint(longest, (rows,), generator=generator) + 1).tolist()
    made = []
    for size in sizes:
        ids = torch.randint(3, 250, (size,), generator=generator).tolist()
        made.append(ids if size == longest else [*ids[:-1], 2])
    return made


def alike_completions(rows: int, longest: int, seed: int) -> list[list[int]]:
    """Return made-up completions, four to a prompt, that begin alike.

    Of each four, two fork behind the same tokens, one is equal to the first, and one ends where they still agree.
    """
    made = []
    for first in range(0, rows, 4):
        start, one, other = fixed_completions(3, longest, seed + 97 * first, [longest - 5, 4, longest])
        made += [start[:-1] + one, start[:-1] + other[:5], start[:-1] + one, start[: longest - 7]]
    return made[:rows]


def traces(count: int, seed: int = 0) -> list[Trace]:
    """Return rows of a warm-up, of different lengths; every completion ends with the end token, 2."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        prompt, completion = (int(n) for n in torch.randint(1, 12, (2,), generator=generator))
        ids = torch.randint(3, 250, (prompt + completion,), generator=generator).tolist()
        rows.append(Trace(ids[:prompt], [*ids[prompt:], 2]))
    return rows


def parity_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Pay by the first token, so that some groups have equal rewards and most do not."""
    return [float(ids[0] % 3 == 0) + 0.25 * (len(ids) % 2) for ids in completion_ids]


class Gradients(TrainerCallback):
    """Keeps a copy of every gradient before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})


def tiny_args(output_dir: Path | str, **settings: Any) -> GRPOConfig:
    """Return arguments for a short, quiet, reproducible CPU run without gradient clipping."""
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "beta": 0.0,
        "seed": 3,
    }
    return GRPOConfig(**(defaults | settings))


def train_fixed(
    trainer_class: type[GRPOTrainer],
    model: Any,
    args: GRPOConfig,
    lengths: list[int] | None = None,
    reward: Any = parity_reward,
    prompts: Dataset | None = None,
    same_completions: bool = False,
    alike: bool = False,
    resume: str | None = None,
    **kwargs: Any,
) -> tuple[GRPOTrainer, Gradients]:
    """Train with made-up completions instead of generated ones, so that two trainers see the same data."""
    tokenizer = tiny_tokenizer()
    calls = [0]

    class Fixed(trainer_class):  # type: ignore[misc, valid-type]
        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
            calls[0] = 1 if same_completions else calls[0] + 1
            rows, longest = len(prompt_ids), args.max_completion_length
            if alike:
                return alike_completions(rows, longest, calls[0]), None
            return fixed_completions(rows, longest, calls[0], lengths), None

    gradients = Gradients()
    trainer = Fixed(
        model=model,
        args=args,
        reward_funcs=reward,
        train_dataset=tiny_prompts(8) if prompts is None else prompts,
        processing_class=tokenizer,
        callbacks=[gradients],
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, gradients


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of two sets of gradients (or weights) over the norm of the expected ones."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name].double() - expected[name].double()).pow(2).sum()) for name in expected)
    scale = sum(float(expected[name].double().pow(2).sum()) for name in expected)
    return float((difference / max(scale, 1e-300)) ** 0.5)
