"""Train on a GPU whose allocator may take only so much, which the plan does not know: the run has to survive it.

Usage: python bench/gpu_oom.py GIB RECIPE [KEY=VALUE …] [--run DIR]
Expected: lines `out of memory in …, the same step is done again`, and exit status 0.
"""

import sys

import torch

from grpo_lite.cli import main

if __name__ == "__main__":
    limit, *arguments = sys.argv[1:]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(float(limit) * 2**30 / total)
    main(["train", *arguments])
