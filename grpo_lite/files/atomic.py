"""A file or folder is whole under its name or not there at all, and a kill while it is replaced loses nothing.

A folder is filled under another name. `publish` flushes it to disk and renames it; what lies under its name is set
aside until then. After a kill between the two renames, `restore` gives the old folder its name back.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from grpo_lite.files.manifest import MANIFEST_NAME

ASIDE = ".replaced-"  # before the name of a folder that is being replaced
_FORMER_ASIDE = ".previous"  # after the name of an export that an earlier version was replacing


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def read_record(path: Path) -> dict[str, Any]:
    """Return a JSON record, or an empty mapping where the file is missing or holds no JSON object."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def publish(folder: Path, target: Path) -> None:
    """Flush a complete folder to disk and give it its name; if the renaming fails, the old folder stays."""
    flush(folder)
    _swap(folder, target)


def restore(target: Path) -> None:
    """Finish what a kill interrupted: give a folder that was set aside its name back, or remove it once replaced."""
    former = target.with_name(f"{target.name}{_FORMER_ASIDE}")
    ours = [former] if (former / MANIFEST_NAME).is_file() else []  # a user may have a folder of that name
    for aside in (_aside(target), *ours):
        if not aside.is_dir():
            continue
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, target)


def flush(folder: Path) -> None:
    """Flush a folder and all that it holds to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Flush one file or folder to disk; some mounted drives cannot flush folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
    finally:
        os.close(descriptor)


def _swap(folder: Path, target: Path) -> None:
    aside = _aside(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
    try:
        os.rename(folder, target)
    except BaseException:
        if aside.exists() and not target.exists():
            with contextlib.suppress(OSError):  # the first error says more
                os.rename(aside, target)
        raise
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f"{ASIDE}{target.name}")
