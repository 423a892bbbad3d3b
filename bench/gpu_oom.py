"""Train with a memory limit that the plan does not know about: the run has to survive it.

Usage: python bench/gpu_oom.py GIB RECIPE [KEY=VALUE …] [--run DIR]
Expected: lines `out of memory in …, the same step is done again`, and exit status 0; 2 if memory never ran out.
Without a GPU no memory is limited; to try the script, decoding fails beyond ten completions per GiB.
"""

from __future__ import annotations

import sys
from typing import Any

import click
import torch

from grpo_lite.cli import main


def limit_memory(gib: float) -> None:
    """Let this process take no more than so many GiB."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
        return
    from grpo_lite.engine.decode import GroupDecoder

    real = GroupDecoder._choose

    def choose(self: GroupDecoder, ids: torch.Tensor, *rest: Any) -> Any:
        if len(ids) > gib * 10:
            raise torch.OutOfMemoryError(f"pretended: no more than {gib * 10:.0f} completions at once")
        return real(self, ids, *rest)

    GroupDecoder._choose = choose  # type: ignore[method-assign]


if __name__ == "__main__":
    limit, *arguments = sys.argv[1:]
    limit_memory(float(limit))
    said: list[str] = []
    echo = click.echo
    click.echo = lambda line="", *args, **kwargs: (said.append(str(line)), echo(line, *args, **kwargs))[1]
    main(["train", *arguments], standalone_mode=False)
    if not any("out of memory in" in line for line in said):
        print("memory never ran out: give a smaller GIB")
        sys.exit(2)
