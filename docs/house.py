"""Draw the packages of grpo_lite and rewards, and who imports whom, from the code: `python docs/build.py`.

A room is a package directly in grpo_lite or rewards, or a module beside them. A room stands one floor above the highest
room that it imports. Imports are read as `tests/test_imports.py` reads them: at the top, in functions, and in strings.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.test_imports import GROUND, imported  # noqa: E402

GROUND_ROOM = " · ".join(GROUND.split())  # drawn as one room: every other room may use it
READING = ("completion", "extraction")  # modules of rewards that read completions: the other rooms use them
READ_ROOM = "reading completions"
FUNCTIONS = "reward functions"  # the other modules directly in rewards/
LINE_CHARACTERS, LINE_HEIGHT = 34, 16  # of the module names in a room
ROOM_WIDTH, GAP, FLOOR_GAP, MARGIN = 250, 26, 44, 24


@dataclass(frozen=True)
class House:
    """The rooms of one distribution, each with its modules, and the rooms that it imports."""

    modules: dict[str, list[str]]
    uses: dict[str, frozenset[str]]

    def floors(self) -> list[list[str]]:
        """Return the rooms by floor, the ground floor first."""

        @cache
        def floor(room: str) -> int:
            return max((floor(other) + 1 for other in self.uses[room]), default=0)

        height = max(map(floor, self.uses)) + 1
        return [sorted(room for room in self.uses if floor(room) == level) for level in range(height)]

    def shown_uses(self) -> list[tuple[str, str]]:
        """Return the arrows to draw: none to the ground, and none from A to C where A uses B and B uses C."""

        @cache
        def reached(room: str) -> frozenset[str]:
            return frozenset().union(*({other} | reached(other) for other in self.uses[room]))

        return [
            (room, other)
            for room in sorted(self.uses)
            for other in sorted(self.uses[room] - {GROUND_ROOM})
            if not any(other in reached(between) for between in self.uses[room])
        ]


def grpo_lite_house() -> House:
    """Return the rooms of grpo_lite."""

    def room(parts: tuple[str, ...]) -> str:
        return GROUND_ROOM if parts[0] in GROUND.split() else parts[0]

    return _read("grpo_lite", room)


def rewards_house() -> House:
    """Return the rooms of rewards."""
    packages = {path.parent.name for path in (ROOT / "rewards").glob("*/__init__.py")}

    def room(parts: tuple[str, ...]) -> str:
        return parts[0] if parts[0] in packages else READ_ROOM if parts[0] in READING else FUNCTIONS

    return _read("rewards", room)


def _read(package: str, room_of: Callable[[tuple[str, ...]], str]) -> House:
    modules: dict[str, list[str]] = {}
    uses: dict[str, set[str]] = {}
    tops = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or path.is_dir()}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        room = room_of(parts)
        names = modules.setdefault(room, [])
        if parts[-1] != "__init__":
            names.append(f"{parts[1]}/" if len(parts) > 2 else parts[1] if len(parts) == 2 else f"{parts[0]}.py")
        targets = [name.split(".")[1:] for name in imported(path) if name.startswith(f"{package}.")]
        uses.setdefault(room, set()).update(room_of(tuple(parts)) for parts in targets if parts[0] in tops)
    return House(
        {room: list(dict.fromkeys(names)) for room, names in modules.items()},
        {room: frozenset(others - {room, "cli"}) for room, others in uses.items()},
    )


def purpose(package: str, room: str) -> str:
    """Return the first sentence of a room's docstring, without the module's name in front."""
    path = ROOT / package / room
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").replace("\n", " ")
    sentence = text.removeprefix(f"{room}: ").split(". ")[0].rstrip(".")
    return sentence[:1].upper() + sentence[1:]


def tables() -> str:
    """Return Markdown tables of the rooms of both houses, the top floor first: floor, room, purpose, rooms used."""
    return "\n".join([*_table("grpo_lite", grpo_lite_house()), "", *_table("rewards", rewards_house()), ""])


def _table(package: str, house: House) -> list[str]:
    lines = [f"| floor | room of {package} | what it is for | uses |", "|---|---|---|---|"]
    for level, rooms in reversed(list(enumerate(house.floors(), start=1))):
        for room in rooms:
            files = {GROUND_ROOM: GROUND.split(), FUNCTIONS: ["."], READ_ROOM: READING}.get(room, [room])
            text = "; ".join(purpose(package, file) for file in files)
            shown = " ".join(f"`{file}`" for file in GROUND.split()) if room == GROUND_ROOM else _named(room)
            uses = " ".join(_named(other) for other in sorted(house.uses[room] - {GROUND_ROOM}))
            lines.append(f"| {level} | {shown} | {text} | {uses} |")
    return lines


def _named(room: str) -> str:
    return room if room in (FUNCTIONS, READ_ROOM) else f"`{room}`"


# The picture: floors of boxes; an arrow that passes a floor gets a gap of its own there, so that it crosses no room.


def picture() -> str:
    """Return the SVG of both houses: grpo_lite on the left, rewards on the right."""
    left, right = grpo_lite_house(), rewards_house()
    drawing, width, height = _draw(left, MARGIN, "grpo_lite")
    other, other_width, other_height = _draw(right, MARGIN + width + 3 * GAP, "rewards (usable with plain TRL)")
    total_height = max(height, other_height) + 2 * MARGIN
    shift = height - other_height  # both stand on the same ground
    total_width = width + other_width + 2 * MARGIN + 3 * GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{total_width}" height="{total_height}" '
            f'viewBox="0 0 {total_width} {total_height}" font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="#64748b"/></marker></defs>',
            f'<rect width="{total_width}" height="{total_height}" fill="#ffffff"/>',
            *drawing,
            f'<g transform="translate(0 {shift})">',
            *other,
            "</g>",
            "</svg>",
            "",
        ]
    )


def _draw(house: House, x: int, title: str) -> tuple[list[str], int, int]:
    """Return SVG elements of a house whose left edge is at x, its width and its height."""
    paths = _with_stops(house)
    floors = _ordered(house.floors(), paths)
    lines = {room: _wrapped(names) for room, names in house.modules.items() if room != GROUND_ROOM}
    lines[GROUND_ROOM] = ["the ground: every room may use these"]
    heights = [max((36 + LINE_HEIGHT * len(lines[room]) for room in row if room in lines), default=0) for row in floors]
    widths = [sum(_width(node) + GAP for node in row) - GAP for row in floors]
    width = max(widths)
    elements: list[str] = []
    tops: dict[str, tuple[int, int]] = {}
    centres: dict[str, int] = {}
    y = MARGIN + 40
    for row, row_height, row_width in reversed(list(zip(floors, heights, widths, strict=True))):
        at = x + (width - row_width) // 2
        for node in row:
            centres[node], tops[node] = at + _width(node) // 2, (y, y + row_height)
            if node in lines:
                elements += _room(node, lines[node], at, y, row_height)
            at += _width(node) + GAP
        y += row_height + FLOOR_GAP
    arrows = [_arrow(path, centres, tops) for path in paths]
    heading = f'<text x="{x}" y="{MARGIN + 16}" font-size="18" font-weight="bold" fill="#0f172a">{escape(title)}</text>'
    return [heading, *arrows, *elements], width, y - FLOOR_GAP - MARGIN


def _with_stops(house: House) -> list[list[str]]:
    """Return each shown arrow as a path of nodes: the room, a stop on every floor it passes, the room that it uses."""
    level = {room: number for number, row in enumerate(house.floors()) for room in row}
    return [
        [room, *(f"{room}>{other}@{number}" for number in range(level[room] - 1, level[other], -1)), other]
        for room, other in house.shown_uses()
    ]


def _ordered(floors: list[list[str]], paths: list[list[str]]) -> list[list[str]]:
    """Add the stops to their floors, and order each floor so that few arrows cross (by the mean of the neighbours)."""
    rows = [list(row) for row in floors]
    for path in paths:
        for stop in path[1:-1]:
            rows[int(stop.rpartition("@")[2])].append(stop)
    neighbours: dict[str, list[str]] = {}
    for path in paths:
        for upper, lower in pairwise(path):
            neighbours.setdefault(upper, []).append(lower)
            neighbours.setdefault(lower, []).append(upper)
    place = {node: (index + 0.5) / len(row) for row in rows for index, node in enumerate(row)}
    for sweep in range(24):
        for row in rows if sweep % 2 else rows[::-1]:
            wish = {
                node: sum(place[n] for n in neighbours.get(node, [node])) / len(neighbours.get(node, [node]))
                for node in row
            }
            row.sort(key=lambda node: (round(wish[node], 6), node))
            place.update({node: (index + 0.5) / len(row) for index, node in enumerate(row)})
    return rows


def _width(node: str) -> int:
    return 12 if ">" in node else 3 * ROOM_WIDTH + 2 * GAP if node == GROUND_ROOM else ROOM_WIDTH


def _wrapped(names: list[str]) -> list[str]:
    lines = [""]
    for name in names:
        joined = f"{lines[-1]} · {name}" if lines[-1] else name
        if len(joined) > LINE_CHARACTERS and lines[-1]:
            lines.append(name)
        else:
            lines[-1] = joined
    return [line for line in lines if line]


def _room(name: str, lines: list[str], x: int, y: int, height: int) -> list[str]:
    text = [
        f'<text x="{x + 12}" y="{y + 40 + LINE_HEIGHT * index}" font-size="12" fill="#475569">{escape(line)}</text>'
        for index, line in enumerate(lines)
    ]
    return [
        f'<rect x="{x}" y="{y}" width="{_width(name)}" height="{height}" rx="8" fill="#f1f5f9" stroke="#94a3b8"/>',
        f'<text x="{x + 12}" y="{y + 22}" font-size="15" font-weight="bold" fill="#0f172a">{escape(name)}</text>',
        *text,
    ]


def _arrow(path: list[str], centres: dict[str, int], tops: dict[str, tuple[int, int]]) -> str:
    points = [(centres[path[0]], tops[path[0]][1])]
    for stop in path[1:-1]:
        points += [(centres[stop], tops[stop][0]), (centres[stop], tops[stop][1])]
    points.append((centres[path[-1]], tops[path[-1]][0]))
    steps = [f"M{points[0][0]} {points[0][1]}"]
    for (x, y), (to_x, to_y) in pairwise(points):
        middle = (y + to_y) // 2
        steps.append(f"L{to_x} {to_y}" if x == to_x else f"C{x} {middle} {to_x} {middle} {to_x} {to_y}")
    return f'<path d="{" ".join(steps)}" fill="none" stroke="#94a3b8" stroke-width="1.5" marker-end="url(#arrow)"/>'
