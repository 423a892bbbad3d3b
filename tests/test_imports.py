"""The architecture's import rules, by AST: which room may use which, what stays torch-free, who may print."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUND = "errors units processes commands alias"
PROGRAM = "grpo_lite.cli"  # its name as a string is `python -m`: the public command line in a process of its own
# A room of grpo_lite (a package, or a module beside them) -> the rooms that it may import, besides the ground and
# itself; `room.module` allows that module alone. Imports in functions and in programs held as strings count too.
ALLOWED = {
    "errors": "",
    "units": "",
    "processes": "",
    "commands": "",
    "alias": "rewards",  # gives the rewards their second name
    "__init__": "alias",
    "bootstrap": "",
    "environments": "rewards",  # its python tool runs code in the rewards' sandbox
    "files": "",
    "recipe": "",
    "engine": "",
    "screen": "files",
    "models": "bootstrap engine recipe files",  # set-up and a run judge a driver by the same facts
    "runs": "recipe files screen",
    "memory": "models engine.options engine.out_of_memory recipe files screen",
    "task": "environments models recipe files screen rewards",
    "report": "runs recipe files screen rewards",
    "trainer": "engine memory task.tokens task.tool_guard task.traces runs.checkpoints models.device models.reference",
    "evaluation": "task engine memory models runs recipe files screen rewards",
    "ui": "report memory task engine models runs recipe files screen",  # looks at runs and plans, asks models
    "reproduce": "report runs models recipe screen",
    "session": "trainer evaluation report memory task models runs recipe files screen rewards",
    "export": "evaluation task engine memory.fit models runs recipe files screen",
    "train": "engine.out_of_memory session export evaluation report memory task models runs recipe screen",
    "cli": "train session export evaluation report memory task models runs recipe files screen engine reproduce "
    "ui rewards",
}
# The same within rewards: the worker's side knows nothing of the rewards, and no reward knows the tests of rewards.
WORKER_SIDE = ("rewards/sandbox/inside/", "rewards/sandbox/kernel/")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Return every dotted name that a module imports: at the top, in functions, in programs held as strings."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{_module(path, node)}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not _is_docstring(path, node):
            for module, rest in re.findall(r"^\s*(?:from|import) ([\w.]+)(?: import ([\w, ]+))?", node.value, re.M):
                names |= {f"{module}.{name.strip()}" for name in rest.split(",")} if rest else {module}
            names |= set(re.findall(r"^(?:grpo_lite|rewards)\.[\w.]+$", node.value)) - {PROGRAM}
    return {name.removeprefix("grpo_lite.") if _is_rewards(name) else name for name in names}


def _is_rewards(name: str) -> bool:
    return f"{name}.".startswith("grpo_lite.rewards.")


def _module(path: Path, node: ast.ImportFrom) -> str:
    """Return the absolute name of what is imported from; only rewards, which has two names, imports relatively."""
    if not node.level:
        return node.module or ""
    parts = path.relative_to(ROOT).parts
    assert parts[0] == "rewards", f"{path}: relative import"
    return ".".join([*parts[: len(parts) - node.level], *([node.module] if node.module else [])])


def _is_docstring(path: Path, node: ast.Constant) -> bool:
    return id(node) in _docstrings(path)


@cache
def _docstrings(path: Path) -> set[int]:
    return {id(statement.value) for statement in ast.walk(tree(path)) if isinstance(statement, ast.Expr)}


def modules(package: str) -> list[Path]:
    built = ROOT / "rewards" / "build"  # of `pip install ./rewards`
    return sorted(path for path in (ROOT / package).rglob("*.py") if built not in path.parents)


def room_of(dotted: str) -> str:
    """Return the room of grpo_lite in which a dotted name lies, `rewards` for all of rewards, "" for others."""
    top, _, rest = dotted.partition(".")
    room = rest.partition(".")[0]
    return top if top == "rewards" else room if top == "grpo_lite" and room in ALLOWED else ""


def arrows() -> Iterator[tuple[Path, str, str]]:
    """Yield every import of one room of grpo_lite by another: the module, its room, the dotted name."""
    for path in modules("grpo_lite"):
        room = path.relative_to(ROOT / "grpo_lite").with_suffix("").parts[0]
        for name in sorted(imported(path)):
            if room_of(name) not in ("", room):
                yield path.relative_to(ROOT), room, name


def test_every_room_is_in_the_table() -> None:
    rooms = {path.relative_to(ROOT / "grpo_lite").with_suffix("").parts[0] for path in modules("grpo_lite")}
    assert rooms == set(ALLOWED)


def test_rooms_import_only_what_the_table_allows() -> None:
    wrong = []
    for path, room, name in arrows():
        allowed = {*GROUND.split(), *ALLOWED[room].split()}
        target = room_of(name)
        module = ".".join(name.split(".")[1:3])
        if target not in allowed and module not in allowed:
            wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_the_table_has_no_circle_and_at_most_ten_floors() -> None:
    uses = {room: {name.partition(".")[0] for name in row.split()} - {"rewards"} for room, row in ALLOWED.items()}

    @cache
    def floor(room: str) -> int:  # a circle would end in a RecursionError
        return 1 + max((floor(other) for other in uses[room]), default=0)

    assert max(map(floor, uses)) <= 10


def test_no_circle_of_modules_not_even_a_lazy_one() -> None:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (*modules("grpo_lite"), *modules("rewards"))
    }
    names = {name: path for name, path in names.items() if not name.endswith("__init__")}
    edges = {
        name: {target for dotted in imported(path) for target in (dotted, dotted.rpartition(".")[0]) if target in names}
        - {name}
        for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_every_package_says_what_its_room_is_for() -> None:
    faces = [path for package in ("grpo_lite", "rewards") for path in modules(package) if path.name == "__init__.py"]
    assert len(faces) > 15
    assert [str(path) for path in faces if not ast.get_docstring(tree(path))] == []


def test_a_function_fits_a_screen() -> None:
    """At most 60 lines, its docstring aside; the exception is one flat list."""
    long = set()
    for path in (*modules("grpo_lite"), *modules("rewards")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                if (node.end_lineno or 0) - first.lineno + 1 > 60:
                    long.add(f"{path.stem}.{node.name}")
    assert long <= {"cheats.all_cheats"}


def test_no_script_hides_a_package() -> None:
    """`python bench/x.py` puts bench/ first on the path: a bench/rewards.py there would be found as `rewards`."""
    packages = {"grpo_lite", "rewards", "recipes", "tests", *sys.stdlib_module_names}
    scripts = [path for folder in ("bench", "docs", "launch") for path in (ROOT / folder).glob("*.py")]
    assert len(scripts) > 10
    assert [path.name for path in scripts if path.stem in packages] == []


def test_bitsandbytes_is_used_in_few_modules() -> None:
    users = {
        path.relative_to(ROOT / "grpo_lite").as_posix()
        for path in modules("grpo_lite")
        if "bitsandbytes" in _tops(path)
    }
    assert users == {"models/load.py", "engine/quantised.py"}


def test_rewards_import_neither_torch_nor_grpo_lite() -> None:
    heavy = {"torch", "transformers", "trl", "grpo_lite"}
    assert [str(path) for path in modules("rewards") if _tops(path) & heavy] == []


def test_the_sandbox_worker_imports_nothing_else_of_rewards() -> None:
    """It loads without running `rewards/__init__.py`; anything more would slow every start and every fork."""
    allowed = ("rewards.sandbox.inside", "rewards.sandbox.kernel", "rewards.sandbox.wire")
    for path in modules("rewards"):
        if path.relative_to(ROOT).as_posix().startswith(WORKER_SIDE):
            own = [name for name in imported(path) if name.startswith("rewards.")]
            assert [name for name in own if not name.startswith(allowed)] == [], path


def test_the_sandbox_needs_only_the_standard_library() -> None:
    for path in (ROOT / "rewards" / "sandbox").rglob("*.py"):
        assert _tops(path) <= {"rewards", *sys.stdlib_module_names}, path


def _tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_only_the_cli_prints_or_exits() -> None:
    wrong = []
    for path in modules("grpo_lite"):
        if path.stem in ("cli", "bootstrap"):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit", "exit", "click.echo"):
                wrong.append(f"{path.name}:{node.lineno}")
    assert wrong == []


@pytest.mark.parametrize(
    "code",
    [
        "import rewards; rewards.accuracy_reward",
        "import grpo_lite.rewards; grpo_lite.rewards.accuracy_reward",
        "import grpo_lite.cli",
        "from grpo_lite.recipe.load import load_recipe; load_recipe('gsm8k')",
        "import grpo_lite.report.doctor, grpo_lite.report.page, grpo_lite.report.watch",
        "import grpo_lite.session.backend, grpo_lite.runs.remote, grpo_lite.reproduce",  # Unsloth comes before
        "import grpo_lite.memory.report, grpo_lite.memory.fit",
        "import grpo_lite.ui.server",
        "import grpo_lite.environments.methods, grpo_lite.environments.python, grpo_lite.environments.search",
    ],
)
def test_light_things_stay_free_of_torch(code: str) -> None:
    heavy = "{'torch', 'transformers', 'trl', 'sympy', 'datasets', 'peft'}"
    check = f"{code}; import sys; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
