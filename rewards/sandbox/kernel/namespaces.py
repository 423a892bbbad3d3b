"""The namespace layer: own processes, network, mounts and IPC, entered once by the worker; or bubblewrap instead.

Inside, the file system is an empty one that shows the interpreter's library read-only and holds a small directory in
memory; the network has no interface up; the worker is process 1, so that one signal ends whatever a program left.
"""

from __future__ import annotations

import ctypes
import os
import sys

from . import limits, linux
from .library import DEVICES, LibraryFiles

WORK_ROOT = "/grpo-lite-sandbox"  # inside; no path that a library could lie under

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (1 << n for n in (17, 26, 27, 28, 29, 30))
_OTHERS = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = (1 << n for n in (0, 1, 2, 3, 5, 12, 14, 18))
_DETACH = 2
_KEEP = _NOSUID | _NODEV | _NOEXEC  # flags of a mount that a user namespace may not take off
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # the C library has no wrapper


def enter_namespaces(library: LibraryFiles) -> bool:
    """Move into new namespaces: fork, return in the child (process 1 inside), wait for it in the parent and exit.

    Returns:
        Whether a user namespace was needed, which root does without.

    Raises:
        OSError: the kernel or the container forbids a step. The process may then be half inside: let it end.
    """
    own_user = _unshare()
    pid = os.fork()
    if pid:
        os.closerange(0, 512)  # the control socket above all: its end must be the worker's end
        _, status = os.waitpid(pid, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    linux.prctl(linux.PR_SET_PDEATHSIG, 9)
    _build_root(library)
    return own_user


def _unshare() -> bool:
    """Unshare everything, with a user namespace if this process lacks the right to do it without."""
    if os.geteuid() == 0:
        try:
            linux.call("unshare", _OTHERS)
            return False
        except OSError:
            pass
    uid, gid = os.geteuid(), os.getegid()
    linux.call("unshare", _OTHERS | _NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    return True


def _build_root(library: LibraryFiles) -> None:
    """Make an empty file system the root, with the library bound into it read-only."""
    paths = [*library.binds, *(path for path in DEVICES if os.path.exists(path))]
    sources = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in paths]  # before /tmp covers some of them
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "mode=0755,size=1m")
    root = "/tmp"
    for path, source in sources:
        _bind(f"/proc/self/fd/{source}", root + path, os.path.isdir(f"/proc/self/fd/{source}"))
        os.close(source)
    for path in library.masks:
        _mount("tmpfs", root + path, "tmpfs", _NOSUID | _NODEV | _RDONLY, "mode=0755,size=4k")
    os.makedirs(root + WORK_ROOT)
    size = f"mode=0755,size={limits.DISK_BYTES},nr_inodes={limits.DISK_ENTRIES}"
    _mount("tmpfs", root + WORK_ROOT, "tmpfs", _NOSUID | _NODEV | _NOEXEC, size)
    os.chdir(root)
    linux.syscall(_PIVOT_ROOT[os.uname().machine], b".", b".")
    linux.call("umount2", b".", _DETACH)
    os.chdir("/")
    _mount("none", "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _bind(source: str, target: str, is_directory: bool) -> None:
    """Show a file or a tree read-only at a path of the new root."""
    if is_directory:
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, None, _BIND | _REC)
    locked = os.statvfs(target).f_flag & _KEEP
    devices = 0 if target.endswith(DEVICES) else _NODEV
    _mount("none", target, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | devices | locked)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Call mount(2); the error names the target."""
    texts = [os.fsencode(text) if text is not None else None for text in (source, target, kind)]
    try:
        linux.call("mount", *texts, ctypes.c_ulong(flags), options.encode())
    except OSError as error:
        raise OSError(error.errno, f"mount {target}: {os.strerror(error.errno or 0)}") from None


def bubblewrap_command(bwrap: str, library: LibraryFiles, package: str) -> list[str]:
    """Return the command line that puts a program into the same namespaces through bubblewrap.

    Args:
        bwrap: path of the executable; it may be set-uid or have its own AppArmor profile, where unshare is refused.
        package: the directory of this package, which the worker is read from.
    """
    command = [bwrap, "--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session", "--clearenv"]
    command += ["--cap-drop", "ALL", "--dev", "/dev"]
    for path in (*library.binds, os.path.realpath(sys.executable), package):
        command += ["--ro-bind", path, path]
    for path in library.masks:
        command += ["--tmpfs", path]
    work = ["--size", str(limits.DISK_BYTES), "--tmpfs", WORK_ROOT]
    return [*command, *work, "--setenv", "PYTHONHASHSEED", "0", "--remount-ro", "/", "--"]
