"""Draw a finished run's live board, step by step, as one moving picture: `python docs/recording.py RUN OUT.svg`.

The frames are the board that a terminal showed, drawn again from the run's own files. The picture needs no script and
no network; a viewer that does not play it shows the last frame.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from grpo_lite.files.records import read_json_lines
from grpo_lite.report.board import rendered
from grpo_lite.report.watch import read_board
from grpo_lite.runs.run_dir import RunDir

WIDTH = 92
FRAME_S = 1.2


def frames(run: RunDir) -> Iterator[str]:
    """Yield the board after each step of GRPO, as SVG."""
    board = read_board(run)
    console = Console(record=True, file=io.StringIO(), width=WIDTH)
    for count in range(1, len(board.steps) + 1):
        steps = board.steps[:count]
        step = steps[-1]["step"]
        rows = list(read_json_lines(run.path / "completions" / f"step_{step:06d}.jsonl"))
        seconds = sum(record["step_time"] for record in steps)
        findings = board.findings if count == len(board.steps) else ()
        console.print(
            rendered(replace(board, steps=steps, rows=rows, seconds=seconds, findings=findings), "quickstart")
        )
        yield console.export_svg(title="make train", unique_id=f"frame{count}", code_format=_FORMAT)


# rich's own, without the font that it fetches from the network.
_FORMAT = """<svg class="frame" preserveAspectRatio="xMidYMin" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>.{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
line-height: {line_height}px; font-variant-east-asian: full-width; }} {styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>{chrome}<g transform="translate({terminal_x}, {terminal_y})"
clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>"""


def moving(pictures: list[str]) -> str:
    """Return one SVG that shows pictures one after the other, again and again."""
    sizes = [re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', picture) for picture in pictures]
    width, height = (max(float(size[i]) for size in sizes if size) for i in (1, 2))
    total, share = FRAME_S * (len(pictures) + 2), 100 / (len(pictures) + 2)  # the last frame stays for three
    style = [".frame { visibility: hidden; }"]
    for i in range(len(pictures)):
        begin, end = share * i, 100 if i == len(pictures) - 1 else share * (i + 1)
        hidden = "" if begin == 0 else f"0%, {begin - 0.01:.2f}% {{ visibility: hidden; }} "
        after = "" if end == 100 else f" {end:.2f}%, 100% {{ visibility: hidden; }}"
        style.append(f"@keyframes f{i} {{ {hidden}{begin:.2f}%, {end - 0.01:.2f}% {{ visibility: visible; }}{after} }}")
        style.append(f".f{i} {{ animation: f{i} {total:.1f}s infinite step-end; }}")
    style.append(f".f{len(pictures) - 1} {{ visibility: visible; }}")
    body = "".join(p.replace('class="frame"', f'class="frame f{i}"', 1) for i, p in enumerate(pictures))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="the live board of a training"><style>{" ".join(style)}</style>{body}</svg>\n'
    )


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(moving(list(frames(RunDir(Path(sys.argv[1]))))), encoding="utf-8")
