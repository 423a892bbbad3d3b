"""Compare plain TRL with grpo_lite's engine, side by side in one process: seconds, tokens and peak memory of a step.

    python bench/compare_trl.py --model DIR [--shapes sums gsm8k long] [--repeats 3] [--curves] [--json FILE]
    python bench/compare_trl.py --family gemma3 mistral … [--repeats 3]

Both engines train the same model (4-bit, or with `--family` a random one of `bench/families.py`) with the same LoRA,
settings and completions, in turns. Lengths are drawn afresh for each turn, as in training, so that what a kernel costs
at a length it has not seen is part of the time; they are forced on both samplers. The samples are thrown away, and both
train on the same invented completions, so that the two training phases do the same work and their gradient norms can be
compared. No group has equal rewards, so the saving from skipped zero-advantage rows comes on top. On CPU the memory is
the process's peak resident set per phase.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LogitsProcessor, LogitsProcessorList
from trl import GRPOConfig, GRPOTrainer

from bench.families import FAMILIES, family
from grpo_lite.engine.attention import uninstall
from grpo_lite.engine.options import EngineOptions
from grpo_lite.engine.out_of_memory import free_memory
from grpo_lite.engine.packing import pack, plan_microbatches
from grpo_lite.engine.router_loss import has_router_loss
from grpo_lite.engine.score import base_model
from grpo_lite.trainer.trainer import PackedGRPOTrainer


@dataclass(frozen=True)
class Shape:
    """One step: how many prompts and completions, how long, and in how many micro-steps."""

    name: str
    prompts: int
    group: int
    prompt_tokens: int  # mean; each prompt within a tenth of it
    completion_tokens: tuple[str, float, float]  # distribution: uniform(low, high) or lognormal(median, sigma)
    longest: int
    rows_per_micro_step: int

    def lengths(self, seed: int) -> tuple[list[int], list[int]]:
        """Return prompt lengths and completion lengths, the latter group by group."""
        rng = random.Random(seed)
        spread = self.prompt_tokens // 10
        prompts = [self.prompt_tokens + rng.randint(-spread, spread) for _ in range(self.prompts)]
        kind, a, b = self.completion_tokens
        draws = [
            rng.uniform(a, b) if kind == "uniform" else a * 2.718281828 ** rng.gauss(0, b)
            for _ in range(self.prompts * self.group)
        ]
        return prompts, [min(self.longest, max(2, round(draw))) for draw in draws]


SHAPES = {
    "sums": Shape("sums", 16, 8, 29, ("uniform", 1.5, 4.5), 4, 64),
    "gsm8k": Shape("gsm8k", 4, 8, 150, ("lognormal", 200, 0.45), 512, 8),
    "long": Shape("long", 2, 4, 150, ("uniform", 700, 1024), 1024, 4),
}
PHASES = ("rollout", "training")
FAMILY_SHAPE = Shape("family", 2, 8, 150, ("lognormal", 60, 0.45), 160, 8)


class EndAt(LogitsProcessor):  # type: ignore[misc]
    """Make each row of a batch end after its given number of tokens."""

    def __init__(self, lengths: list[int], end: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.end = end
        self.prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Forbid the end token before a row's last position and force it there."""
        if self.prompt is None:
            self.prompt = input_ids.size(1)
        last = (self.lengths.to(scores.device) <= input_ids.size(1) - self.prompt + 1).unsqueeze(1)
        is_end = torch.arange(scores.size(1), device=scores.device) == self.end
        return scores.masked_fill(last != is_end, float("-inf"))


class Clock:
    """Wall time, CPU time and peak memory of phases."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}

    def run(self, phase: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Measure a call as (part of) a phase."""
        free_memory()
        reset_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        result = call(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        record = self.phases.setdefault(phase, {"wall_s": 0.0, "cpu_s": 0.0, "peak_gib": 0.0})
        record["wall_s"] += time.perf_counter() - wall
        record["cpu_s"] += time.process_time() - cpu
        record["peak_gib"] = max(record["peak_gib"], peak_bytes() / 2**30)
        return result


def reset_peak() -> None:
    """Forget the peak so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the peak since `reset_peak`: CUDA memory, or the process's resident set."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def load(path: str) -> Any:
    """Load the model in NF4 with LoRA r16 on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    place = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=quantization, **place)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def measured(engine: str, model: Any, clock: Clock, tokens: dict[str, int]) -> type[GRPOTrainer]:
    """Return the engine's trainer, which times its phases and counts the tokens that it trains on.

    The model is left as before any trainer.
    """
    inner = base_model(model)
    inner.__dict__.pop("forward", None)  # TRL's head of the previous trainer
    uninstall(inner)
    base = GRPOTrainer if engine == "plain" else PackedGRPOTrainer

    class Measured(base):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batch = self.gradients.read(model, inputs) if isinstance(self, PackedGRPOTrainer) else None
            if batch is None:
                width = inputs["prompt_ids"].size(1) + inputs["completion_ids"].size(1)
                tokens["training"] += inputs["prompt_ids"].size(0) * width
            else:
                parts = plan_microbatches(batch, range(len(batch.completions)), None)
                tokens["training"] += sum(pack(batch, pieces).num_tokens for pieces in parts)
            return super().compute_loss(model, inputs, *args, **kwargs)

        def _prepare_inputs(self, batch: Any) -> Any:
            return clock.run("generation and scoring", super()._prepare_inputs, batch)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return clock.run("step", super().training_step, *args, **kwargs)

    return Measured


def arguments_of(shape: Any, **more: Any) -> GRPOConfig:
    """Return TRL's arguments for one step of a shape."""
    return GRPOConfig(
        **more,
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=shape.rows_per_micro_step,
        gradient_accumulation_steps=shape.prompts * shape.group // shape.rows_per_micro_step,
        num_generations=shape.group,
        max_completion_length=shape.longest,
        max_steps=1,
        learning_rate=1e-5,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=1,
    )


def varied_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return a reward that differs within a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def train_once(trainer: Any, clock: Clock) -> dict[str, dict[str, float]]:
    """Train a step, and return what each phase of it cost."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    if isinstance(trainer, PackedGRPOTrainer):
        assert trainer.support.is_supported(trainer.model)  # its self-check is paid once per run, not per step
    trainer.train()
    phases = clock.phases
    step, prepared = phases["step"], phases.pop("generation and scoring")
    phases["training"] = {key: step[key] - prepared[key] for key in ("wall_s", "cpu_s")}
    phases["training"]["peak_gib"] = step["peak_gib"]
    step["peak_gib"] = max(step["peak_gib"], phases["rollout"]["peak_gib"])
    return phases


def in_turns(step: Callable[[str, int], dict[str, Any]], repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let the engines take turns.

    Args:
        step: gets an engine and a seed; its result has `phases`.
        repeats: counted turns.

    Returns:
        By engine, the medians of its phases; and its first counted result.
    """
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "grpo_lite": []}
    for turn in range(repeats + 1):  # the first turn warms up kernels and is not counted
        for engine in runs:
            free_memory()
            result = step(engine, turn)
            if turn > 0 or repeats == 0:
                runs[engine].append(result)
    medians = {
        engine: {
            phase: {key: statistics.median(run["phases"][phase][key] for run in results) for key in measures}
            for phase, measures in results[0]["phases"].items()
        }
        for engine, results in runs.items()
    }
    return medians, {engine: results[0] for engine, results in runs.items()}


def one_step(
    engine: str, model: Any, tokenizer: Any, shape: Shape, options: EngineOptions, seed: int
) -> dict[str, Any]:
    """Train one step with one engine on lengths drawn from a seed, and return what it cost."""
    rng = random.Random(seed + 1)
    prompt_lengths, lengths = shape.lengths(seed)
    vocabulary = model.config.vocab_size
    prompts = [[rng.randrange(3, vocabulary // 2) for _ in range(size)] for size in prompt_lengths]
    made = [[rng.randrange(3, vocabulary // 2) for _ in range(size - 1)] + [tokenizer.eos_token_id] for size in lengths]
    clock = Clock()
    tokens = {"rollout": 0, "training": 0}
    inner = base_model(model)

    class Forced(measured(engine, model, clock, tokens)):  # type: ignore[misc]
        def _tokenize_prompts(self, given: list[str]) -> Any:
            self.drawn = [int(prompt) for prompt in given]
            return [prompts[index] for index in self.drawn], None, {}

        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            rows = [index * shape.group + i % shape.group for i, index in enumerate(self.drawn)]
            forced = LogitsProcessorList([EndAt([lengths[row] for row in rows], tokenizer.eos_token_id)])
            generate = inner.generate
            inner.generate = lambda *a, **k: generate(*a, logits_processor=forced, **k)
            try:
                ids, _ = clock.run("rollout", super()._generate_single_turn, prompt_ids, *args, **kwargs)
            finally:
                del inner.__dict__["generate"]
            assert [len(row) for row in ids] == [lengths[row] for row in rows]
            rollout = self.rollouts.last if isinstance(self, PackedGRPOTrainer) else None
            padded = len(ids) * (max(map(len, prompt_ids)) + max(lengths) - 1)
            tokens["rollout"] = padded if rollout is None else rollout.prefill_tokens + rollout.decode_tokens
            if rollout is not None:
                self.rollouts.last = None  # the invented completions below are not the ones it describes
            return [made[row] for row in rows], None

    # TRL 1.16 asks for the router's loss of Granite 4 without experts, and fails.
    router = {} if has_router_loss(inner) else {"router_aux_loss_coef": 0.0}
    extra = {} if engine == "plain" else {"options": options}
    trainer = Forced(
        model=model,
        args=arguments_of(shape, **router),
        reward_funcs=varied_reward,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(shape.prompts)]}),
        processing_class=tokenizer,
        **extra,
    )
    return {
        "phases": train_once(trainer, clock),
        "tokens": tokens,
        "grad_norm": trainer.state.log_history[0]["grad_norm"],
    }


def compare(model: Any, tokenizer: Any, shape: Shape, options: EngineOptions, repeats: int) -> dict[str, Any]:
    """Let the engines take turns; return the medians and their ratios."""
    medians, first = in_turns(
        lambda engine, turn: one_step(engine, model, tokenizer, shape, options, seed=turn), repeats
    )
    plain, ours = medians["plain"], medians["grpo_lite"]
    return {
        "shape": asdict(shape),
        "median": medians,
        "ratio": {
            phase: {key: plain[phase][key] / max(ours[phase][key], 1e-9) for key in plain[phase]} for phase in plain
        },
        "tokens": {engine: result["tokens"] for engine, result in first.items()},
        "grad_norm": {engine: result["grad_norm"] for engine, result in first.items()},
        "repeats": max(repeats, 1),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| shape | phase | plain TRL s | grpo_lite s | faster (wall) | (CPU time) | tokens | peak GiB | of plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        plain, ours, ratio = result["median"]["plain"], result["median"]["grpo_lite"], result["ratio"]
        for phase, label in (("rollout", "rollout"), ("training", "training"), ("step", "**whole step**")):
            tokens = "" if phase == "step" else " → ".join(str(result["tokens"][e][phase]) for e in result["tokens"])
            memory = f"{plain[phase]['peak_gib']:.2f} → {ours[phase]['peak_gib']:.2f}"
            lines.append(
                f"| {result['shape']['name']} | {label} | {plain[phase]['wall_s']:.2f} | {ours[phase]['wall_s']:.2f} "
                f"| {ratio[phase]['wall_s']:.1f}× | {ratio[phase]['cpu_s']:.1f}× | {tokens} | {memory} "
                f"| {1 / ratio[phase]['peak_gib']:.2f} |"
            )
    return "\n".join(lines)


def family_table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results of several families as a Markdown table, a line each."""
    lines = [
        "| family | rollout, CPU time | training | whole step (wall) | tokens generated | tokens trained on |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        ratio = result["ratio"]
        rollout, training = (" → ".join(str(each[phase]) for each in result["tokens"].values()) for phase in PHASES)
        lines.append(
            f"| {name} | {ratio['rollout']['cpu_s']:.1f}× | {ratio['training']['cpu_s']:.1f}× "
            f"| {ratio['step']['cpu_s']:.1f}× ({ratio['step']['wall_s']:.1f}×) | {rollout} | {training} |"
        )
    return "\n".join(lines)


def curve_shapes() -> list[Shape]:
    """Return shapes along the group size and along the length, with about the same number of completion tokens."""
    groups = [Shape(f"G={g}", 32 // g, g, 100, ("lognormal", 40, 0.4), 96, 32) for g in (2, 4, 8, 16, 32)]
    lengths = [Shape(f"C={c}", 2, 8, 100, ("lognormal", c, 0.4), 2 * c, 8) for c in (8, 32, 128, 384)]
    return [*groups, *lengths]


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    of_what = parser.add_mutually_exclusive_group(required=True)
    of_what.add_argument("--model", help="folder of a causal language model with a tokenizer")
    of_what.add_argument("--family", nargs="+", choices=list(FAMILIES), help="random models of families")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--curves", action="store_true", help="also G = 2 ... 32 and C = 8 ... 384")
    parser.add_argument("--repeats", type=int, default=3, help="counted turns; 0 for one turn without warming up")
    parser.add_argument("--tokens-per-microbatch", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    options = EngineOptions(tokens_per_microbatch=arguments.tokens_per_microbatch)
    if arguments.family:
        compare_families(arguments.family, options, arguments.repeats)
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model = load(arguments.model)
    results = []
    for shape in [SHAPES[name] for name in arguments.shapes] + (curve_shapes() if arguments.curves else []):
        results.append(compare(model, tokenizer, shape, options, arguments.repeats))
        print(table(results[-1:]), flush=True)
        print("grad_norm", results[-1]["grad_norm"], flush=True)
    record = {"versions": versions(), "results": results}
    print("\n" + table(results) + "\n\n" + json.dumps(record["versions"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def compare_families(names: list[str], options: EngineOptions, repeats: int) -> None:
    """Compare the engines on a random model of each family, and print a table."""
    from tests.tiny import tiny_tokenizer

    results: dict[str, dict[str, Any]] = {}
    for name in names:
        results[name] = compare(family(name), tiny_tokenizer(), FAMILY_SHAPE, options, repeats)
        lines = family_table(results).splitlines()
        print("\n".join(lines if len(results) == 1 else lines[-1:]), flush=True)
    print("\n" + json.dumps(versions()))


def versions() -> dict[str, str]:
    """Return what the figures depend on."""
    from importlib.metadata import version

    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {name: version(name) for name in names} | {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
