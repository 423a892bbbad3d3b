"""Time a rollout's decoding, variant by variant: today's loop, static rows, CUDA graphs, Hugging Face, other engines.

    python bench/decode.py [--shape qwen2.5-1.5b] [--dtype bfloat16] [--rows 32] [--variants loop graph …] [--json FILE]

The model has random weights of a real shape (NF4 by default) and a LoRA of rank 16 on all linear layers; nothing is
downloaded. No token ends a completion, so every variant generates `--completion` tokens a row. The variants take turns
in one process, with fresh prompts of fresh lengths each turn; the first turn warms up and is reported by itself. A time
includes reading the prompts. Launches and waits come from runs of two lengths: what the longer one adds, per step.
On a CPU (`--layers 2` for a try) a time is CPU time, operators are counted instead of launches, waits are not counted,
and there are no graphs.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from bench.decode_peers import PEERS, Unavailable  # noqa: E402
from bench.machine import processor  # noqa: E402
from bench.random_model import random_model  # noqa: E402
from grpo_lite.bootstrap import nvidia_driver  # noqa: E402
from grpo_lite.engine import attention  # noqa: E402
from grpo_lite.engine.decode import GroupDecoder  # noqa: E402
from grpo_lite.engine.generate import left_padded  # noqa: E402
from grpo_lite.engine.graphs import StepGraphs  # noqa: E402
from grpo_lite.engine.lora import shorten_lora  # noqa: E402
from grpo_lite.engine.out_of_memory import free_memory  # noqa: E402
from grpo_lite.engine.quantised import keep_weights_unpacked  # noqa: E402
from grpo_lite.engine.rollout_weights import rollout_weights  # noqa: E402
from grpo_lite.engine.static_decode import LOOK, StaticDecoder, engine_of  # noqa: E402
from grpo_lite.models.config import KNOWN, known_config  # noqa: E402
from grpo_lite.models.load import lora_to_float32  # noqa: E402
from grpo_lite.recipe.recipe import TINY_MODEL  # noqa: E402
from tests.fake_cuda.kernels import launches_kernel  # noqa: E402

Generate = Callable[[list[list[int]], int], None]  # prompts, one a row, and tokens to generate
OURS = ("loop", "static", "graph", "generate")
LABELS = {
    "loop": "the loop (`GroupDecoder`)",
    "static": "static rows, kernel by kernel",
    "graph": "static rows, CUDA graphs",
    "generate": "`generate` with PEFT's LoRA",
    "batching": "transformers' continuous batching",
    "vllm": "vLLM, 16-bit base and LoRA",
    "unsloth": "Unsloth",
}
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Settings:
    """What is decoded."""

    shape: str = "qwen2.5-1.5b"
    load_in: str = "4bit"
    dtype: str = "bfloat16"
    rows: int = 32
    group: int = 8  # rows of one prompt
    prompt: int = 150  # mean tokens; each within a tenth of it
    completion: int = 128
    layers: int | None = None
    turns: int = 3
    variants: tuple[str, ...] = tuple(LABELS)
    device: str = "cuda"

    @property
    def config(self) -> dict[str, Any]:
        """The facts of config.json."""
        return (KNOWN | {"tiny": known_config(TINY_MODEL) or {}})[self.shape]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of what is not quantized."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def prompts(self, seed: int) -> list[list[int]]:
        """Return fresh prompts of fresh lengths, one a row."""
        rng, spread = random.Random(seed), self.prompt // 10
        groups = [
            [rng.randrange(3, self.config["vocab_size"]) for _ in range(self.prompt + rng.randint(-spread, spread))]
            for _ in range(-(-self.rows // self.group))
        ]
        return [groups[row // self.group] for row in range(self.rows)]


def measure(settings: Settings, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Let the variants take turns and return the record; `write` gets it after each run.

    A variant that fails is recorded with its error and left out from then on.
    """
    begun = time.perf_counter()
    model = policy(settings)
    record: dict[str, Any] = {"machine": machine(settings.device), "settings": asdict(settings)}
    record["model_s"] = round(time.perf_counter() - begun, 1)
    results: dict[str, dict[str, Any]] = {}
    record["variants"] = results
    generators: dict[str, Generate] = {}
    for name in settings.variants:
        results[name] = {}
        with recording_errors(results[name]):
            generators[name] = make_variant(name, model, settings)
    write(record)
    for turn in range(settings.turns + 1):
        prompts = settings.prompts(turn)
        for name, generate in generators.items():
            result = results[name]
            if "error" in result:
                continue
            with recording_errors(result):
                seconds, peak = timed(generate, prompts, settings)
                if turn == 0:
                    result["first_s"] = round(seconds, 3)
                else:
                    result.setdefault("seconds", []).append(round(seconds, 4))
                    result |= summary(result["seconds"], settings)
                result["peak_gib"] = peak
            write(record)
    for name, generate in generators.items():
        if name in OURS and "error" not in results[name]:
            counted: dict[str, Any] = {}
            with recording_errors(counted):
                counted = counts(generate, settings)
            results[name] |= {"not counted": counted["error"]} if "error" in counted else counted
            write(record)
    return record


def policy(settings: Settings) -> Any:
    """Return the model with its adapter, as the trainer prepares it for a rollout."""
    from peft import LoraConfig, get_peft_model

    base = random_model(settings.config, settings.load_in, settings.device, settings.torch_dtype, settings.layers)
    keep_weights_unpacked(base)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    lora_to_float32(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    attention.install(model.get_base_model())
    shorten_lora(model)
    return model


def make_variant(name: str, model: Any, settings: Settings) -> Generate:
    """Return the call that generates by a variant.

    Raises:
        Unavailable: it cannot run here, and why.
    """
    if name in PEERS:
        return PEERS[name](model, settings)
    if name == "graph" and settings.device != "cuda":
        raise Unavailable("CUDA graphs need CUDA")
    base = model.get_base_model()

    def autocast() -> Any:
        return torch.autocast(settings.device, dtype=settings.torch_dtype)

    def ours(prompts: list[list[int]], tokens: int) -> None:
        decoder = (GroupDecoder if name == "loop" else StaticDecoder)(autocast)
        by_kernel = mock.patch.object(StepGraphs, "run", lambda self, key, step: step())
        with rollout_weights(base, autocast), by_kernel if name == "static" else nullcontext():
            run_generate(base, prompts, tokens, custom_generate=decoder)
        if name != "loop" and (reason := engine_of(base).obstacle):
            raise RuntimeError(f"static rows are off: {reason}")
        batch = engine_of(base)._batch
        if name == "graph" and batch is not None and not batch.graphs.switch.is_on:
            raise RuntimeError("CUDA graphs are off: see the log line above")

    def plain(prompts: list[list[int]], tokens: int) -> None:
        with peft_as_it_is(model), autocast():
            run_generate(model, prompts, tokens)

    return plain if name == "generate" else ours


def run_generate(model: Any, prompts: list[list[int]], tokens: int, **more: Any) -> None:
    """Sample so many tokens a row by transformers' `generate`."""
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(row)) + row for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=2
    )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.generation_config.eos_token_id = None  # `generate` would fill it in
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **more)
    if out.size(1) - width != tokens:
        raise RuntimeError(f"{out.size(1) - width} tokens were generated instead of {tokens}")


def answered(base: Any, rows: list[list[int]], tokens: int, ends: list[int], decoder: Any) -> list[list[int]]:
    """Return what a decoder samples behind rows, padded to the longest."""
    ids, mask = left_padded(rows, 2, base.device)
    config = GenerationConfig(max_new_tokens=tokens, do_sample=True, top_k=0, eos_token_id=ends, pad_token_id=2)
    with torch.no_grad():
        out = base.generate(input_ids=ids, attention_mask=mask, generation_config=config, custom_generate=decoder)
    answers: list[list[int]] = out[:, ids.size(1) :].tolist()
    return answers


@contextmanager
def peft_as_it_is(model: Any) -> Iterator[None]:
    """Take our attention and our short LoRA layers off inside the context."""
    base = model.get_base_model()
    short = {
        layer: layer.__dict__.pop("forward")
        for layer in model.modules()
        if hasattr(layer, "lora_A") and "forward" in layer.__dict__
    }
    base.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        attention.install(base)
        for layer, forward in short.items():
            layer.forward = forward


@contextmanager
def recording_errors(result: dict[str, Any]) -> Iterator[None]:
    """Note an error in a variant's result, and let the others run."""
    try:
        yield
    except Unavailable as reason:
        result["skipped"] = str(reason)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    if "skipped" in result or "error" in result:
        free_memory()


def timed(generate: Generate, prompts: list[list[int]], settings: Settings) -> tuple[float, float | None]:
    """Return a run's seconds (on a CPU: of CPU time, as others may use it too) and, on CUDA, its peak in GiB."""
    on_cuda = settings.device == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter if on_cuda else time.process_time
    begun = clock()
    generate(prompts, settings.completion)
    if on_cuda:
        torch.cuda.synchronize()
    seconds = clock() - begun
    return seconds, round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_cuda else None


def summary(seconds: list[float], settings: Settings) -> dict[str, float]:
    """Return the medians of a variant's counted turns."""
    median = statistics.median(seconds)
    return {
        "ms_per_step": round(1000 * median / settings.completion, 2),
        "tokens_per_s": round(settings.rows * settings.completion / median, 1),
    }


def counts(generate: Generate, settings: Settings) -> dict[str, float | None]:
    """Return launches per step and waits per token, from runs of two lengths."""
    prompts, short, long = settings.prompts(0), LOOK, 3 * LOOK
    count = launches_and_waits if settings.device == "cuda" else operators
    found = []
    for tokens in (short, long):
        generate(prompts, tokens)  # graphs of this length are captured here
        found.append(count(lambda tokens=tokens: generate(prompts, tokens)))
    launches, waits = (
        None if b is None or a is None else round((b - a) / (long - short), 2) for a, b in zip(*found, strict=True)
    )
    return {"launches_per_step": launches, "waits_per_token": waits}


def launches_and_waits(run: Callable[[], None]) -> tuple[int, int]:
    """Count a run's kernel launches and its waits for the device, by torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:  # the runtime's calls are among them
        run()
        torch.cuda.synchronize()
    # The raw events: to make Python's of some 100,000 takes longer than the run.
    names = Counter(event.name() for event in profiler.profiler.kineto_results.events())
    if not any(names[name] for name in LAUNCHES):
        raise RuntimeError("torch.profiler reports no launches here")
    return sum(names[name] for name in LAUNCHES), sum(names[name] for name in WAITS)


def operators(run: Callable[[], None]) -> tuple[int, None]:
    """Count a run's operators, views and allocations left out: about what would be launched on a GPU."""

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.total += launches_kernel(func) and not func.overloadpacket.__name__.startswith("_local_scalar")
            return func(*args, **(kwargs or {}))

    with Count():
        run()
    return Count.total, None


def machine(device: str) -> dict[str, str]:
    """Return what the figures depend on."""
    versions = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "trl", "vllm", "unsloth"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "driver": (driver.version if (driver := nvidia_driver()) else "") or "none",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **versions,
    }


def cpu_name() -> str:
    """Return the processor's name and what PyTorch's kernels use of it."""
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"


def table(record: dict[str, Any]) -> str:
    """Return the record as a Markdown table."""
    lines = ["| decoded by | ms a step | tokens/s | first run s | launches a step | waits a token | peak GiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    keys = ("ms_per_step", "tokens_per_s", "first_s", "launches_per_step", "waits_per_token", "peak_gib")
    for name, result in record["variants"].items():
        reason = result.get("skipped") or result.get("error")
        cells = [f"not run: {reason}", *[""] * 5] if reason else [str(result.get(key, "")) for key in keys]
        lines.append(f"| {LABELS[name]} | " + " | ".join("" if cell == "None" else cell for cell in cells) + " |")
    return "\n".join(lines)


def writer(path: Path | None) -> Callable[[dict[str, Any]], None]:
    """Return what writes a record to a file, if there is one."""

    def write(record: dict[str, Any]) -> None:
        if path:
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    return write


def main() -> None:
    """Measure and print a table."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=defaults.shape, choices=[*KNOWN, "tiny"])
    parser.add_argument("--load-in", default=defaults.load_in, choices=("4bit", "16bit"))
    parser.add_argument("--dtype", default=defaults.dtype, choices=("bfloat16", "float16", "float32"))
    for name in ("rows", "group", "prompt", "completion", "turns"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--layers", type=int, help="fewer than the shape's")
    parser.add_argument("--variants", nargs="*", default=list(LABELS), choices=list(LABELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    arguments = vars(parser.parse_args())
    write = writer(arguments.pop("json"))
    warnings.filterwarnings("ignore")
    record = measure(Settings(**arguments | {"variants": tuple(arguments["variants"])}), write)
    print(table(record))
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    if failures := [name for name, result in record["variants"].items() if "error" in result]:
        sys.exit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
