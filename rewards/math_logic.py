"""Three verdicts: True, False, and None for "not known", as `all` and `any` over them."""

from __future__ import annotations

from collections.abc import Iterable


def all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """Return False if one is False, else None if one is not known, else True.

    >>> all_of([True, None]), all_of([None, False]), all_of([])
    (None, False, True)
    """
    result: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            result = None
    return result


def any_of(verdicts: Iterable[bool | None]) -> bool | None:
    """Return True if one is True, else None if one is not known, else False.

    >>> any_of([False, None]), any_of([None, True]), any_of([])
    (None, True, False)
    """
    result: bool | None = False
    for verdict in verdicts:
        if verdict:
            return True
        if verdict is None:
            result = None
    return result
