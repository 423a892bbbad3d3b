"""MANIFEST.sha256: the checksums of every file of an exported folder.

The format is that of `sha256sum`, so `sha256sum -c MANIFEST.sha256` checks a folder where grpo_lite is not installed.
Comment lines, which sha256sum skips, hold the sizes: a truncated file can be told from a changed one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from grpo_lite.errors import ExportError

MANIFEST_NAME = "MANIFEST.sha256"

_ENTRY = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_SIZE = re.compile(r"# ([0-9]{1,19}) bytes: (.+)")


@dataclass(frozen=True)
class FileEntry:
    """A manifest's entry for one file."""

    sha256: str
    size_bytes: int | None  # None: the manifest was written by sha256sum itself


def write_manifest(folder: Path, known: Mapping[str, str] | None = None) -> Path:
    """Write the manifest of all files below a folder and return its path.

    Args:
        folder: symbolic links inside are refused, since their targets do not travel with the folder.
        known: digests by relative name of files that need not be read again (a merge hashes what it writes).

    Raises:
        ExportError: a link, a name with a line break or backslash, or a file that cannot be read or written.
    """
    names = _file_names(folder)
    try:
        entries = {
            name: FileEntry((known or {}).get(name) or sha256_of(folder / name), (folder / name).stat().st_size)
            for name in names
        }
        return _write(folder, entries)
    except OSError as error:
        raise ExportError(f"{folder}: the manifest cannot be written: {error}. Check rights and free space.") from None


def update_manifest(folder: Path, names: Iterable[str]) -> Path:
    """Add or renew the entries of the named files, without reading the others again."""
    entries = read_manifest(folder)
    for name in names:
        entries[name] = FileEntry(sha256_of(folder / name), (folder / name).stat().st_size)
    return _write(folder, dict(sorted(entries.items())))


def verify_manifest(folder: Path) -> int:
    """Check every file of a folder against its manifest and return how many were checked.

    Raises:
        ExportError: all missing, truncated, corrupted and extra files, named together; or no usable manifest.
    """
    entries = read_manifest(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    faults: list[str] = []
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name}: missing")
            continue
        size = path.stat().st_size
        if entry.size_bytes is not None and size < entry.size_bytes:
            faults.append(f"{name}: truncated ({size} of {entry.size_bytes} bytes)")
        elif entry.size_bytes is not None and size > entry.size_bytes:
            faults.append(f"{name}: corrupted ({size} bytes, {entry.size_bytes} were written)")
        elif sha256_of(path) != entry.sha256:
            faults.append(f"{name}: corrupted (its sha256 is not the recorded one)")
    faults += [f"{name}: extra (not in the manifest)" for name in sorted(present - entries.keys() - {MANIFEST_NAME})]
    if faults:
        raise ExportError(
            f"{folder}: {len(faults)} of {len(present | entries.keys())} files do not match {MANIFEST_NAME}:\n"
            + "\n".join(f"  {fault}" for fault in faults)
            + "\nExpected: exactly the files that were exported. Export or download the folder again; if you changed a "
            "file on purpose, write a new manifest."
        )
    return len(entries)


def fault_in(folder: Path) -> str | None:
    """Return in one line what is wrong with a folder's files by its manifest, or None."""
    try:
        verify_manifest(folder)
    except (ExportError, OSError) as error:
        lines = str(error).splitlines()
        return "; ".join(line.strip() for line in lines[1:-1] or lines[:1])  # each faulty file has a line of its own
    return None


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """Return the manifest's entries by relative name.

    Raises:
        ExportError: missing, empty, malformed, or naming a path outside the folder.
    """
    path = folder / MANIFEST_NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}). Only folders that grpo_lite "
            "exported have a manifest: check the path, or export again."
        ) from None
    digests: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if size := _SIZE.fullmatch(line):
            sizes[size[2]] = int(size[1])
        elif entry := _ENTRY.fullmatch(line):
            name = PurePosixPath(entry[2])
            if name.is_absolute() or ".." in name.parts or entry[2] in digests:
                raise ExportError(f"{path}: line {number}: {entry[2]!r} is outside it or listed twice. Export again.")
            digests[entry[2]] = entry[1]
        elif line.strip() and not line.startswith("#"):
            raise ExportError(f"{path}: line {number} is not '<sha256>  <file>': {line[:80]!r}. Export again.")
    if not digests or (sizes and sizes.keys() != digests.keys()):
        raise ExportError(f"{path}: lists {len(digests)} of {len(sizes)} files: it is truncated. Export again.")
    return {name: FileEntry(digest, sizes.get(name)) for name, digest in digests.items()}


def sha256_of(path: Path) -> str:
    """Return a file's sha256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_names(folder: Path) -> list[str]:
    names = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ExportError(f"{path}: is a symbolic link. Exported folders hold real files only: copy the file.")
        if "\n" in name or "\r" in name or "\\" in name:
            raise ExportError(f"{folder}: the file name {name!r} has a line break or backslash. Rename it.")
        if path.is_file() and name != MANIFEST_NAME:
            names.append(name)
    return sorted(names)


def _write(folder: Path, entries: Mapping[str, FileEntry]) -> Path:
    lines = ["# Check with: grpo-lite verify DIR, or sha256sum -c MANIFEST.sha256"]
    lines += [f"# {entry.size_bytes} bytes: {name}" for name, entry in entries.items()]
    lines += [f"{entry.sha256}  {name}" for name, entry in entries.items()]
    partial = folder / f"{MANIFEST_NAME}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MANIFEST_NAME)
    return folder / MANIFEST_NAME
