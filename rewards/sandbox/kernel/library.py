"""Which files a sandboxed program needs in order to compute: the standard library and the C libraries it loads.

Site packages are left out: nothing needs them, and an installed benchmark would bring its answers along.
"""

from __future__ import annotations

import glob
import os
import sys
from typing import NamedTuple

DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_PACKAGES = ("site-packages", "dist-packages")
_LIBRARY_ROOTS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64")
_EXTRAS = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/usr/lib/locale")


class LibraryFiles(NamedTuple):
    """Paths in the words of the two layers that need them."""

    readable: list[str]  # Landlock: files and directories, with what lies below
    listable: list[str]  # Landlock: directories whose names may be listed, so that imports find their files
    binds: list[str]  # namespaces: whole trees to show read-only ...
    masks: list[str]  # ... and directories inside them to cover with an empty one


def library_files() -> LibraryFiles:
    """Find the library of the running interpreter; the same on both sides of an exec of it."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    libraries = {
        os.path.dirname(os.path.abspath(os.__file__)),
        os.path.join(sys.base_exec_prefix, sys.platlibdir, version),
        os.path.join(sys.base_prefix, "lib", version),
    }
    libraries = {path for path in libraries if os.path.isdir(path)}
    roots = [*_LIBRARY_ROOTS, os.path.join(sys.base_prefix, "lib"), os.path.join(sys.base_exec_prefix, sys.platlibdir)]
    roots = [root for root in dict.fromkeys(roots) if os.path.isdir(root)]
    readable = [entry.path for path in libraries for entry in os.scandir(path) if entry.name not in _PACKAGES]
    for root in roots:
        readable += glob.glob(f"{root}/*.so*") + glob.glob(f"{root}/*-linux-*")
    trees = {*libraries, *roots, *(path for path in _EXTRAS if os.path.exists(path))}
    masks = [path for root in trees for name in _PACKAGES for path in glob.glob(f"{root}/python*/{name}")]
    masks += [path for root in libraries for name in _PACKAGES if os.path.isdir(path := f"{root}/{name}")]
    return LibraryFiles(
        readable=sorted({*readable, *_EXTRAS}),
        listable=sorted(libraries),
        binds=_outermost(trees),
        masks=sorted(set(masks)),
    )


def _outermost(paths: set[str]) -> list[str]:
    """Drop the paths that lie below another one."""
    outermost: list[str] = []
    for path in sorted(paths):
        if not any(path.startswith(f"{above}/") for above in outermost):
            outermost.append(path)
    return outermost
