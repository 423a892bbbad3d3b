"""Time the attention of one packed layer, forward and backward, by kernel and shape: which one is chosen, and why.

    python bench/attention.py [--repeats 7] [--dtype bfloat16]

Kernels: *blocks* (matrix products over blocks of queries, on a CPU), *segmented* (a call per completion against its
prompt's keys), *dense* (a call over groups padded alike with a boolean mask), *whole row* (one call over the flat row
with an additive mask of the compute dtype, the naive way) and on CUDA *flex* (FlexAttention with a block mask).
Heads as in SmolLM2-135M: 9 queries, 3 keys/values, 64 wide.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grpo_lite.engine import attention, blockwise
from grpo_lite.engine.attention import PackedLayout, Rule, _segmented, packed_attention

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
SHAPES = {  # groups, prompt, completions of a group
    "sums: 8 groups, 29 + 8 x 3": (8, 29, [3] * 8),
    "2 groups, 60 + 8 x 16": (2, 60, [16] * 8),
    "2 groups, 100 + 8 x 40": (2, 100, [40] * 8),
    "gsm8k: 1 group, 150 + 8 x 200": (1, 150, [120, 150, 180, 200, 200, 220, 250, 280]),
    "long: 1 group, 150 + 4 x 860": (1, 150, [700, 820, 900, 1020]),
}


def kernels(segments: list[tuple[int, list[int]]], dtype: torch.dtype, device: str) -> dict[str, Callable[..., Tensor]]:
    """Return the kernels by name, their masks built outside the timing."""
    layouts = {}
    for is_dense, limit in ((False, -1), (True, 1 << 30)):
        attention.DENSE_TOKENS = limit
        layouts[is_dense] = PackedLayout(segments, torch.device(device))
    owner, group = [], []
    for row, (prompt, completions) in enumerate(segments):
        owner += [0] * prompt + [i + 1 for i, size in enumerate(completions) for _ in range(size)]
        group += [row] * (prompt + sum(completions))
    o, g = torch.tensor(owner, device=device), torch.tensor(group, device=device)
    order = torch.arange(len(owner), device=device)
    sees = (g[:, None] == g) & ((o[:, None] == o) | (o == 0)) & (order[:, None] >= order)
    additive = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill(~sees, float("-inf"))

    def whole_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=additive, enable_gqa=True).transpose(1, 2)

    found: dict[str, Callable[..., Tensor]] = {
        "segmented": lambda q, k, v: _segmented(q, k, v, layouts[False], Rule()),
        "dense": lambda q, k, v: packed_attention(q, k, v, layouts[True], Rule()),
        "whole row": whole_row,
    }
    if device == "cpu":
        found = {"blocks": lambda q, k, v: blockwise.attend(q, k, v, segments, None, None)} | found
    if device == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        size = len(owner)
        block = create_block_mask(lambda b, h, i, j: sees[i, j], None, None, size, size, device=device)
        compiled = torch.compile(flex_attention)
        found["flex"] = lambda q, k, v: compiled(q, k, v, block_mask=block, enable_gqa=True).transpose(1, 2)
    return found


def milliseconds(call: Callable[..., Tensor], tokens: int, dtype: torch.dtype, device: str, repeats: int) -> float:
    """Return the median CPU time (CUDA: wall time) of forward and backward."""
    shapes = [(1, heads, tokens, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    states = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(repeats + 2):
        begun = clock()
        call(*states).float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - begun)
    return 1000 * statistics.median(times[2:])


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, arguments.dtype)
    chosen_up_to = attention.DENSE_TOKENS
    print(f"torch {torch.__version__}, {device}, {arguments.dtype}, {torch.get_num_threads()} threads; ms a layer")
    for number, (name, (groups, prompt, completions)) in enumerate(SHAPES.items()):
        found = kernels([(prompt, completions)] * groups, dtype, device)
        if number == 0:
            print("| shape | " + " | ".join(found) + " | chosen |\n|---|" + "---|" * (len(found) + 1))
        tokens = groups * (prompt + sum(completions))
        times = [milliseconds(call, tokens, dtype, device, arguments.repeats) for call in found.values()]
        chosen = "dense" if prompt + sum(completions) <= chosen_up_to else next(iter(found))
        print(f"| {name} | " + " | ".join(f"{t:.1f}" for t in times) + f" | {chosen} |", flush=True)


if __name__ == "__main__":
    main()
