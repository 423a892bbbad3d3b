"""A finished run of a tiny model, laid out as `train` does, without training: adapter, verified merge, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from grpo_lite.evaluation.evaluate import compare
from grpo_lite.export.merge.merge import merge_adapter
from grpo_lite.recipe.recipe import Recipe
from grpo_lite.runs.run_dir import RunDir, dump_recipe
from tests.tiny import tiny_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = ["What is 2+3? It is 5.", "the sum of the two is thirteen", "  and   then\n\n it's 17 = 8 + 9"] * 4


def bpe_tokenizer(split: str | None = None, template: str | None = CHATML) -> PreTrainedTokenizerBase:
    """Train a small byte-level BPE: special tokens at the end, as chat models add them.

    Args:
        split: a regular expression before the bytes; None: GPT-2's own.
    """
    backend = Tokenizer(models.BPE(ignore_merges=split == LLAMA3_SPLIT))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), bytes_only]) if split else bytes_only
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<think>"])  # not special: it is shown
    tokenizer.chat_template = template
    return tokenizer


def make_base(
    folder: Path, kind: str = "llama", tokenizer: PreTrainedTokenizerBase | None = None, **config: Any
) -> Path:
    """Save a random base of an architecture with a tokenizer, 20 unused embeddings more than tokens."""
    tokenizer = tokenizer or bpe_tokenizer()
    config = {"vocab_size": len(tokenizer) + 20, "bos_token_id": None, "hidden_size": 32, **config}
    end = tokenizer.eos_token_id
    model = tiny_model(
        kind, dtype=torch.bfloat16, **(config | {"eos_token_id": end, "pad_token_id": tokenizer.pad_token_id})
    )
    model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_run(folder: Path, after: int = 15, warm: int | None = None, **base_config: Any) -> RunDir:
    """Lay out a finished run; of 20 held-out prompts the base solved 5, the trained model `after`.

    Args:
        folder: of base and run.
        after: prompts that the trained model solved.
        warm: prompts that the warm-up's adapter solved; None: there was no warm-up.
        base_config: of the base.
    """
    base = make_base(folder / "base-model", **base_config)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    run = RunDir(folder / "run")
    run.path.mkdir(parents=True)
    recipe = make_recipe(base)
    if warm is not None:
        recipe = Recipe.model_validate({**recipe.model_dump(), "warmup": {"source": "self"}})
    run.recipe_file.write_text(dump_recipe(recipe))
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM"),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(run.adapter)
    merge_adapter(base, run.adapter, run.merged)
    columns = {"base": _records(5), **({} if warm is None else {"warm": _records(warm)}), "trained": _records(after)}
    run.scores_file.write_text(json.dumps(compare(recipe, columns)))
    run.update_run(
        steps=3, seed=42, peak_memory_bytes=5 << 30, training_seconds=90.0, trained_at="2026-01-01T00:00:00Z",
        finished_at="2026-01-01T00:01:00Z", versions={"torch": "2.13.0", "trl": "1.16.0"}, device={"name": "a CPU"},
        merge={
            "prompts": 8, "positions": 100, "held_out": True, "top1_agreement": 1.0, "mean_kl": 1e-8,
            "max_logit_difference": 0.001, "passed": True,
        },
    )  # fmt: skip
    return run


def _records(right: int) -> list[dict[str, Any]]:
    return [{"lenient": i < right, "strict": i < right, "samples_right": 1, "truncated": i == 0} for i in range(20)]


def make_recipe(base: Path, **data: Any) -> Recipe:
    """Return a recipe of sums on a local base."""
    section = {"train": {"generator": "sums", "kwargs": {"low": 1, "high": 9}}, "holdout": 8, "prompt": "{question}="}
    return Recipe.model_validate(
        {
            "name": "sums",
            "description": "A tiny model learns sums",
            "least_gpu": "none",
            "model": {"id": str(base), "load_in": "16bit"},
            "data": section | data,
            "rewards": [{"function": "rewards.accuracy_reward"}],
            "grpo": {"max_completion_length": 8, "num_generations": 2},
            "lora": {"r": 4},
            "eval": {"samples": 2},
        }
    )


def set_recipe(run: RunDir, recipe: Recipe) -> None:
    """Put another recipe into a run."""
    run.recipe_file.write_text(dump_recipe(recipe))


def replaced(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """Return a recipe with values of one section changed."""
    data = recipe.model_dump()
    data[section] |= values
    return Recipe.model_validate(data)
