"""The page's server in a thread of the tests' process."""

from __future__ import annotations

import threading
from pathlib import Path

from grpo_lite.ui.server import serve


def served(folder: Path) -> str:
    """Serve a folder of runs until the process ends; return the address, token included."""
    address: list[str] = []
    announced = threading.Event()

    def announce(line: str) -> None:
        address.append(line)
        announced.set()

    threading.Thread(target=serve, args=(folder, 0, announce), daemon=True).start()
    assert announced.wait(120)
    return address[0]
