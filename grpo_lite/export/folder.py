"""An export's folder: its name checked, locked and with room on the disk, then written whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo_lite.errors import ExportError
from grpo_lite.files.atomic import publish, restore
from grpo_lite.files.lock import locked_itself
from grpo_lite.files.manifest import MANIFEST_NAME
from grpo_lite.units import size


@contextlib.contextmanager
def replacing_folder(
    out_dir: Path, need_bytes: int, overwrite: bool = False, protected: Sequence[Path] = ()
) -> Iterator[Path]:
    """Yield an empty `<out_dir>.partial` to fill; it takes out_dir's name when the block ends, and goes if it fails.

    A killed process leaves only the partial folder, which the next call clears. What was under the name before stays
    until the new folder is complete and on disk.

    Args:
        need_bytes: what will be written; refused at once when the disk has less.
        overwrite: replace a folder that grpo_lite made (it has a manifest). Other folders are never replaced.
        protected: folders that must not be, hold or contain `out_dir`.

    Raises:
        ExportError: the name is taken, not writable, in use by another process, or the disk is or becomes full.
    """
    _refuse_protected(out_dir, protected)
    with _locked_partial(out_dir) as partial:
        try:
            restore(out_dir)
            _refuse_taken(out_dir, overwrite)
            _clear(partial)
            _check_space(partial, need_bytes)
            yield partial
            publish(partial, out_dir)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise ExportError(
                    f"{out_dir}: the export failed: {error}. The partial result was removed: have {size(need_bytes)} "
                    "free, and run again."
                ) from error
            raise


def clear_leftovers(out_dir: Path) -> None:
    """Restore what a killed export was replacing, and remove its partial folder unless a process still writes there."""
    partial = _partial(out_dir)
    if partial.is_symlink() or not partial.is_dir():
        restore(out_dir)
        return
    with contextlib.suppress(BlockingIOError), locked_itself(partial):
        restore(out_dir)
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(out_dir: Path) -> None:
    """Remove an export. A kill meanwhile leaves no half of it under its name; the rest goes with the leftovers."""
    out_dir.rename(_partial(out_dir))
    clear_leftovers(out_dir)


@contextlib.contextmanager
def _locked_partial(out_dir: Path) -> Iterator[Path]:
    partial = _partial(out_dir)
    with contextlib.ExitStack() as stack:
        try:
            out_dir.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir(exist_ok=True)
            stack.enter_context(locked_itself(partial))
        except BlockingIOError:
            raise ExportError(f"{partial}: another process writes there. Wait, or give another folder.") from None
        except OSError as error:
            raise ExportError(
                f"{out_dir}: cannot be written: {error.strerror}. Give a folder on a disk that you may write to."
            ) from None
        yield partial


def _refuse_protected(out_dir: Path, protected: Sequence[Path]) -> None:
    target = out_dir.resolve()
    for path in protected:
        other = path.resolve()
        if target == other or target in other.parents or (other in target.parents and (other / "config.json").exists()):
            raise ExportError(f"{out_dir}: is, holds or lies in {path}, which is read. Give another output folder.")


def _refuse_taken(out_dir: Path, overwrite: bool) -> None:
    if not (out_dir.exists() or out_dir.is_symlink()):
        return
    if not overwrite:
        raise ExportError(f"{out_dir}: is already there. Give another output folder, or ask for it to be overwritten.")
    empty = out_dir.is_dir() and not any(out_dir.iterdir())
    if out_dir.is_symlink() or not (empty or (out_dir / MANIFEST_NAME).is_file()):
        raise ExportError(
            f"{out_dir}: was not exported by grpo_lite (it has no {MANIFEST_NAME}), so it is not overwritten. Give "
            "another output folder, or remove it yourself."
        )


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_space(folder: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise ExportError(
            f"{folder}: the export needs {size(need_bytes)} of disk, and {size(free)} are free. Free "
            f"{size(need_bytes - free)}, or give an output folder on another disk."
        )


def _partial(out_dir: Path) -> Path:
    return out_dir.with_name(f"{out_dir.name}.partial")
