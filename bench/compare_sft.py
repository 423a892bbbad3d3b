"""Compare plain TRL's SFTTrainer with the warm-up's trainer, side by side in one process: seconds and peak memory.

    python bench/compare_sft.py --model DIR [--shapes addition reasoning] [--repeats 3] [--json FILE]

Both compute loss and gradient of the same rows with the same 4-bit model, LoRA and settings, in turns: one step,
without the optimizer. Plain is SFTTrainer's own `compute_loss` on the padded rows. Lengths are drawn afresh for each
turn. On a CPU the memory is the process's peak resident set in a turn.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.compare_trl import load, peak_bytes, reset_peak, versions
from grpo_lite.engine.attention import IMPLEMENTATION
from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.out_of_memory import free_memory
from grpo_lite.models.load import lora_to_float32
from grpo_lite.task.traces import Trace
from grpo_lite.trainer.warmup import IGNORED, StepRows, WarmupTrainer

# Rows of a step, mean tokens of a prompt and of a completion; each within a tenth, completions within a half.
SHAPES = {"addition": (24, 22, 24), "reasoning": (4, 120, 380)}


def rows_of(shape: tuple[int, int, int], seed: int, vocabulary: int) -> list[Trace]:
    """Return rows of random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(mean: int, spread: float) -> list[int]:
        count = round(mean * (1 + spread * (2 * float(torch.rand((), generator=generator)) - 1)))
        return torch.randint(3, vocabulary, (max(1, count),), generator=generator).tolist()

    return [Trace(tokens(shape[1], 0.1), tokens(shape[2], 0.5)) for _ in range(shape[0])]


def trainer_of(path: str) -> Any:
    """Return the warm-up's trainer on a model's folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=1, report_to="none", max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=not torch.cuda.is_available(), bf16=True,
        remove_unused_columns=False, disable_tqdm=True, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = WarmupTrainer(
        model=load(path), args=args, processing_class=tokenizer, train_dataset=Dataset.from_list([{"rows": [0]}]),
        data_collator=StepRows([], tokenizer.pad_token_id), options=EngineOptions(), show=print,
    )  # fmt: skip
    lora_to_float32(trainer.model)
    assert trainer._is_packable()
    return trainer


def one_step(trainer: Any, inputs: dict[str, Any], plain: bool) -> dict[str, float]:
    """Return seconds, peak bytes and gradient norm of one forward and backward."""
    model = trainer.model
    model.zero_grad(set_to_none=True)
    model.train()
    free_memory()
    reset_peak()
    count = (inputs["labels"] != IGNORED).sum()
    model.get_base_model().config._attn_implementation = "sdpa" if plain else IMPLEMENTATION
    compute = super(WarmupTrainer, trainer).compute_loss if plain else trainer.compute_loss
    began = time.perf_counter()
    with trainer.compute_loss_context_manager():
        loss = compute(model, dict(inputs), num_items_in_batch=count)
    loss.backward()
    norm = float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
    return {"seconds": time.perf_counter() - began, "peak": peak_bytes(), "norm": norm, "loss": float(loss)}


def compare(trainer: Any, shape: str, repeats: int) -> dict[str, Any]:
    """Return medians over turns with fresh lengths, after a turn to warm up."""
    vocabulary = trainer.model.get_base_model().config.vocab_size
    turns: dict[str, list[dict[str, float]]] = {"plain": [], "grpo_lite": []}
    for turn in range(repeats + 1):
        inputs = trainer._prepare_inputs(trainer.data_collator.padded(rows_of(SHAPES[shape], turn, vocabulary)))
        for name in turns:
            turns[name].append(one_step(trainer, inputs, name == "plain"))
            gc.collect()
    medians = {
        name: {key: statistics.median(turn[key] for turn in made[1:]) for key in made[0]}
        for name, made in turns.items()
    }
    return {"shape": shape, "rows, prompt, completion": SHAPES[shape], **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    trainer = trainer_of(options.model)
    results = [compare(trainer, shape, options.repeats) for shape in options.shapes]
    for result in results:
        plain, ours = result["plain"], result["grpo_lite"]
        print(
            f"{result['shape']}: plain TRL {plain['seconds']:.2f} s, grpo_lite {ours['seconds']:.2f} s "
            f"({plain['seconds'] / ours['seconds']:.2f}x); peak {plain['peak'] / 2**30:.2f} -> "
            f"{ours['peak'] / 2**30:.2f} GiB; gradient norms {plain['norm']:.4f}, {ours['norm']:.4f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
