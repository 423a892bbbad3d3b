"""A bounded fuzz of everything that comes from outside; `bench/fuzz.py` runs the same for hours."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzzing import TARGETS

EXAMPLES = {"rows": 25, "completions": 25, "adapters": 60, "checkpoints": 40}


@pytest.mark.parametrize("share", [0.4, pytest.param(1, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("name", TARGETS)
def test_no_input_ends_in_anything_but_a_result_or_one_clear_error(name: str, share: float) -> None:
    function, strategies = TARGETS[name]
    limits = settings(
        max_examples=int(share * EXAMPLES.get(name, 80)), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    limits(given(**strategies)(function))()
