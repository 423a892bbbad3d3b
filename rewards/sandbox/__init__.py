"""Run model-written code without harm: `run_tests`, what it takes and what it returns.

`inside` runs in the workers' processes; `kernel` is what Linux enforces around them.
"""

from .forms import Call, Calls, Streams, TestCode, Tests
from .pool import SandboxError, close_all
from .programs import Outcome
from .run import WITHOUT, IsolationError, Layer, isolation, layers, run_tests

__all__ = [
    "WITHOUT",
    "Call",
    "Calls",
    "IsolationError",
    "Layer",
    "Outcome",
    "SandboxError",
    "Streams",
    "TestCode",
    "Tests",
    "close_all",
    "isolation",
    "layers",
    "run_tests",
]
