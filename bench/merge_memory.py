"""Peak memory and time of a merge, on a synthetic base with Qwen2.5-7B's tensor shapes and shard size.

    python bench/merge_memory.py --layers 6 --folder /a/disk/with/room [--peft]

Writes a sharded bfloat16 base and a LoRA adapter (all linear layers) of random numbers, merges them in a process of its
own and prints that process's peak resident set. `--peft` also measures `merge_and_unload`, which holds the whole model.
28 layers make the full 7B (15.2 GB, twice that on disk); peak memory does not depend on the number of layers, which
`--layers 2 --layers 6` shows. Everything written is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grpo_lite.export.safetensors import INDEX_NAME, build_head  # noqa: E402

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCAB = 3584, 18944, 512, 152064
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
SHARD_BYTES = 4 * 10**9  # the published model's shards are of 3.5 to 3.9 GB

MERGE = """
import sys
from pathlib import Path
from grpo_lite.export.merge.merge import merge_adapter
print(merge_adapter(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
"""
PEFT = """
import sys
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
IMPORTS = "import torch, numpy"


def main() -> None:
    """Measure and print one line for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, action="append", help="layers of the synthetic base (repeatable)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="needs twice the base's size")
    parser.add_argument("--peft", action="store_true", help="measure PEFT's merge_and_unload too")
    options = parser.parse_args()
    print(f"{'':28}{'base GiB':>9}{'peak RSS GiB':>14}{'seconds':>9}")
    peak, seconds = measure(IMPORTS, [])
    print(f"{'importing torch alone':28}{'':>9}{peak / 2**30:14.2f}{seconds:9.1f}", flush=True)
    for layers in options.layers or [6]:
        folder = Path(tempfile.mkdtemp(prefix="merge-bench-", dir=options.folder))
        try:
            size = write_base(folder / "base", layers)
            write_adapter(folder / "adapter", layers, options.rank)
            for name, program in [("grpo_lite merge", MERGE), *([("peft", PEFT)] if options.peft else [])]:
                paths = [str(folder / part) for part in ("base", "adapter", "merged")]
                peak, seconds = measure(program, paths)
                shutil.rmtree(folder / "merged")
                label = f"{name}, {layers} layers"
                print(f"{label:28}{size / 2**30:9.2f}{peak / 2**30:14.2f}{seconds:9.1f}", flush=True)
        finally:
            shutil.rmtree(folder)


def measure(program: str, arguments: list[str]) -> tuple[int, float]:
    """Run a program in a process of its own and return (peak resident set in bytes, seconds)."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        output = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the measured process failed ({process.returncode}): {output}")
    scale = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * scale, time.monotonic() - began


def write_base(folder: Path, layers: int) -> int:
    """Write a sharded random bfloat16 checkpoint and return its bytes."""
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in base_tensors(layers):
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, "BF16", shape))
        filled += size
    noise = (torch.randn(1 << 24) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    weight_map = {}
    for number, specs in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(path, "wb") as file:
            file.write(build_head(specs, {"format": "pt"}))
            for name, _, shape in specs:
                weight_map[name] = path.name
                left = 2 * torch.Size(shape).numel()
                while left:
                    left -= file.write(noise[: min(left, len(noise))])
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def base_tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes as Qwen2.5-7B has them."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in LINEAR.items():
            yield f"{prefix}{name}.weight", shape
        for name in "qkv":
            yield f"{prefix}self_attn.{name}_proj.bias", (HIDDEN if name == "q" else KEY_VALUE,)
        yield f"{prefix}input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def write_adapter(folder: Path, layers: int, rank: int) -> None:
    """Write a random float32 adapter on all linear layers, as PEFT saves it."""
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for name, (out, into) in LINEAR.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = (torch.rand(rank, into) - 0.5) * (2 / into**0.5)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.split(".")[-1] for name in LINEAR),
        "lora_dropout": 0.0,
        "bias": "none",
        "base_model_name_or_path": "synthetic",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
