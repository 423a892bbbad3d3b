"""Which layers this machine allows, tested by putting each one on and trying to get past it.

Runs in a worker process of its own (`main`), one fork per layer: a version number or a config file proves nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
from collections.abc import Callable
from typing import Any, NoReturn

from . import landlock, limits, linux, seccomp
from .library import library_files
from .namespaces import enter_namespaces

_HERE = __file__  # read by none of the layers' rules
_REASON_BYTES = 500


def main(descriptor: int, options: dict[str, Any]) -> NoReturn:
    """Send `{layer: ""}` for what works and `{layer: reason}` for what does not, and exit."""
    inside = options.get("inside")
    probes = {"bubblewrap": _try_inside} if inside else _PROBES
    reasons = {name: _in_fork(probe) for name, probe in probes.items()}
    with socket.socket(fileno=descriptor) as control:
        control.sendall(json.dumps(reasons).encode("ascii") + b"\n")
    os._exit(0)


def _in_fork(probe: Callable[[], str]) -> str:
    """Run a probe in a child and return its reason why not, "" if there is none."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        reason = "the probe ended without an answer"
        try:
            os.close(ours)
            reason = probe()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        finally:
            os.write(theirs, reason.encode()[:_REASON_BYTES] or b"\n")
            os._exit(0)
    os.close(theirs)
    answer = b""
    while part := os.read(ours, _REASON_BYTES):
        answer += part
    os.close(ours)
    os.waitpid(pid, 0)
    return answer.decode(errors="replace").strip() if answer else "the probe died"


def _try_rlimits() -> str:
    limits.set_shared_limits()
    limits.set_own_limits(60.0, None)
    try:
        bytearray(2 * limits.MEMORY_BYTES)
    except MemoryError:
        return ""
    return "" if not linux.LINUX else "the address space limit has no effect"


def _try_uid() -> str:
    if os.geteuid() != 0:
        return "not root: programs run as this user"
    library = library_files().listable
    uid = limits.sandbox_uid()
    limits.become(uid)
    if not all(os.access(path, os.R_OK | os.X_OK) for path in library):
        return f"user {uid} may not read the Python library in {library[0]}"
    return ""


def _try_landlock() -> str:
    rules = landlock.build_ruleset(library_files(), (), None)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    rules.restrict_self()
    return _first_success(lambda: os.listdir("/"), lambda: open(_HERE).close()) or _library_is_missing()


def _try_seccomp() -> str:
    if not seccomp.machine_is_known():
        return f"no table of system calls for {os.uname().machine}"
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.Filter().restrict_self()
    return _first_success(socket.socket, os.fork, lambda: os.chmod("/", 0o755), lambda: os.kill(os.getppid(), 0))


def _try_namespaces() -> str:
    if not linux.LINUX:
        return "Linux only"
    enter_namespaces(library_files())
    return _try_inside()


def _try_inside() -> str:
    """From inside the namespaces: nothing of the machine is to be seen, and nothing can be changed."""
    if interfaces := {name for _, name in socket.if_nameindex()} - {"lo"}:
        return f"network interfaces {sorted(interfaces)} are there"
    if os.path.exists("/proc/self") or os.path.exists("/etc/passwd"):
        return "the machine's files are there"
    return _first_success(lambda: os.mkdir("/made"), _send_datagram) or _library_is_missing()


def _send_datagram() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"", ("192.0.2.1", 9))


def _first_success(*attempts: Callable[[], Any]) -> str:
    """Return which attempt was not stopped."""
    for number, attempt in enumerate(attempts):
        try:
            attempt()
        except OSError:
            continue
        return f"it does not stop attempt {number}"
    return ""


def _library_is_missing() -> str:
    """Return why programs could not import: a layer that hides the library is of no use."""
    try:
        importlib.import_module("statistics")
        importlib.import_module("_json")
    except Exception as error:
        return f"the library cannot be read: {error}"
    return ""


_PROBES: dict[str, Callable[[], str]] = {
    "rlimits": _try_rlimits,
    "uid": _try_uid,
    "landlock": _try_landlock,
    "seccomp": _try_seccomp,
    "namespaces": _try_namespaces,
}
