"""The rewards under two names: `grpo_lite.rewards`, which every installation has, and `rewards`, the checkout's folder.

PyPI has an unrelated `rewards`, so a wheel installs the modules as `grpo_lite.rewards` only. Importing grpo_lite makes
the other name work too. Both names give the same module objects: nothing is loaded twice.

                                   the modules are named    the other name
in a checkout                      rewards                  grpo_lite.rewards: an alias
from a wheel                       grpo_lite.rewards        rewards: an alias
either, with a foreign `rewards`   grpo_lite.rewards        rewards: the foreign package, untouched
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

OURS, SHORT = "grpo_lite.rewards", "rewards"

_INSTALLED = Path(__file__).resolve().parent / "rewards"
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parent.parent / "rewards"


def install() -> None:
    """Make both names importable, once a process."""
    if not any(isinstance(finder, _Aliases) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Aliases())
        sys.meta_path.append(_LastResort())


class _Aliases:
    """Finds `grpo_lite.rewards` in a checkout, and the modules below a name that is an alias."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == OURS and FOLDER != _INSTALLED:
            return _alias(fullname, SHORT) if _short_is_ours() else _native(fullname)
        if not fullname.startswith((OURS + ".", SHORT + ".")):
            return None
        parent, _, name = fullname.rpartition(".")
        real = getattr(sys.modules.get(parent), "__name__", parent)
        return _alias(fullname, f"{real}.{name}") if real != parent else None


class _LastResort:
    """Finds `rewards` where no package of that name is on the path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != SHORT:
            return None
        return _alias(fullname, OURS) if FOLDER == _INSTALLED or _ours_is_real() else _native(fullname)


class _Alias:
    """Loads a module by importing it under its real name."""

    def __init__(self, real: str) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave the module to `exec_module`: a module made here would get the alias's `__spec__`."""

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(self.real)  # the import system returns what stands here


def _alias(fullname: str, real: str) -> ModuleSpec | None:
    """Return the spec of an alias; None where the real module does not exist, so that the error has the asked name."""
    return ModuleSpec(fullname, _Alias(real)) if find_spec(real) else None  # type: ignore[arg-type]


def _native(fullname: str) -> ModuleSpec | None:
    return spec_from_file_location(fullname, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])


def _ours_is_real() -> bool:
    """Return whether `grpo_lite.rewards` is loaded under its own name; an alias that is being loaded is not."""
    spec = getattr(sys.modules.get(OURS), "__spec__", None)
    return spec is not None and not isinstance(spec.loader, _Alias)


def _short_is_ours() -> bool:
    """Return whether `import rewards` gives the checkout's folder, and not a package of the same name."""
    try:
        spec = find_spec(SHORT)
    except ValueError:  # a stand-in without a spec is in its place
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == FOLDER / "__init__.py"
