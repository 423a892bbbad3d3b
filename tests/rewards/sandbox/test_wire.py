"""Values survive the encoding, and comparing them agrees with Python without ever trusting the other side."""

from __future__ import annotations

import enum
import math
from collections import Counter, OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.sandbox.wire import CodecError, decode, dumps, encode, loads, matches

_HASHABLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
_VALUES = st.recursive(
    _HASHABLE | st.binary().map(bytearray) | st.builds(range, st.integers(-9, 9), st.integers(-9, 9)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_HASHABLE, inner, max_size=3)
    | st.sets(_HASHABLE, max_size=3) | st.tuples(inner),
    max_leaves=8,
)  # fmt: skip


def travel(value: Any) -> Any:
    """Return what the parent sees of a value."""
    return loads(dumps(encode(value)))


@given(_VALUES)
def test_any_plain_value_travels_unchanged(value: Any) -> None:
    assert repr(decode(travel(value))) == repr(value) or decode(travel(value)) == value


@given(_VALUES)
def test_any_plain_value_matches_itself(value: Any) -> None:
    assert matches(value, travel(value), strict=True)
    assert matches(value, travel(value), strict=False)


@given(_VALUES, _VALUES)
def test_loose_comparison_is_pythons_own(one: Any, other: Any) -> None:
    assert matches(one, travel(other), strict=False) == (one == other)


@given(_VALUES, _VALUES)
def test_strict_comparison_never_accepts_what_python_calls_different(one: Any, other: Any) -> None:
    if matches(one, travel(other), strict=True):
        assert _with_lists(one) == _with_lists(other)


def _with_lists(value: Any) -> Any:
    """Turn tuples into lists: the one difference that strict comparison forgives (want list, got tuple)."""
    if isinstance(value, list | tuple):
        return [_with_lists(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return value


def test_comparison_policy() -> None:
    table: list[tuple[Any, Any, bool, bool]] = [  # want, got, strict, expected
        (1, True, True, False),
        (1, True, False, True),
        (0, False, True, False),
        (3, 3.0, True, False),
        (3, 3.0, False, True),
        (3.0, 3, True, False),
        ("3", 3, False, False),
        (None, False, False, False),
        (None, 0, True, False),
        ([1, 2], (1, 2), True, True),  # JSON has no tuples, so a list in a test may stand for one
        ([1, 2], (1, 2), False, False),
        ((1, 2), [1, 2], True, False),
        ([1, 2], [1, 2, 3], True, False),
        ([1, 2, 3], [1, 2], True, False),
        ([], None, True, False),
        ([[1], [2]], [(1,), (2,)], True, True),
        ({1, 2}, {2, 1}, True, True),
        ({1, 2}, [1, 2], True, False),
        ({1, 2}, frozenset({1, 2}), True, False),
        ({1, 2}, frozenset({1, 2}), False, True),
        ({1, 2}, {1.0, 2}, True, False),
        ({1, 2}, {1.0, 2}, False, True),
        ({"a": 1}, {"a": True}, True, False),
        ({1: "a"}, {True: "a"}, True, False),
        ({1: "a"}, {1.0: "a"}, False, True),
        ({"a": 1}, {"b": 1}, True, False),
        ({"a": 1}, {"a": 1, "b": 2}, True, False),
        (math.nan, math.nan, True, True),
        (math.nan, math.nan, False, False),
        (math.inf, 1e308 * 10, True, True),
        (0.0, -0.0, True, True),
        (b"a", "a", False, False),
        (b"a", bytearray(b"a"), False, True),
        (b"a", bytearray(b"a"), True, False),
        (10**400, 10**400, True, True),
        (10**400, 10**400 + 1, False, False),
        (2**63, float(2**63), False, True),
        ("\ud800é\0", "\ud800é\0", True, True),
        (range(3), range(0, 3, 1), True, True),
        ([0, 1, 2], range(3), False, False),
        ([1], iter([1]), False, False),
        (int, int, False, False),  # a type is no value to compare with: it equals nothing
    ]  # fmt: skip
    assert [row for row in table if matches(row[0], travel(row[1]), strict=row[2]) is not row[3]] == []


class _Colour(enum.IntEnum):
    RED = 3


class _AlwaysEqual(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__

    def __int__(self) -> int:
        return 42

    __index__ = __int__


class _OddList(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter([1, 2, 3])


def test_subclass_of_a_builtin_counts_as_its_own_data() -> None:
    table: list[tuple[Any, Any]] = [
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(int, a=1), {"a": 1}),
        (namedtuple("P", "x y")(1, 2), (1, 2)),
        (_Colour.RED, 3),
        (_AlwaysEqual(7), 7),
        (_OddList([9]), [9]),
    ]
    assert [type(value) for value, plain in table if encode(value) != encode(plain)] == []


def test_object_without_encoding_equals_nothing() -> None:
    for value in (object(), len, lambda: 1, Exception("x"), type("T", (), {}), ...):
        encoded = travel(value)
        assert not matches(value, encoded, strict=False), value
        with pytest.raises(CodecError):
            decode(encoded)


def test_malformed_encoding_matches_nothing_and_cannot_be_decoded() -> None:
    for text in (
        b'{"t": 5}',
        b'{"t": [1], "s": [1]}',
        b"{}",
        b'{"s": [[1], {}]}',
        b'{"d": [[1]]}',
        b'{"d": [1, 2]}',
        b'{"d": 3}',
        b'{"i": "zz"}',
        b'{"i": 3}',
        b'{"c": ["x", 1]}',
        b'{"r": [1, 2, 0]}',
        b'{"r": [{"s": [1]}, 2, 1]}',
        b'{"b": "0"}',
        b'{"T": "nothing"}',
        b'{"T": "print"}',
        b'{"h": []}',
        b'{"unknown": 1}',
    ):
        encoded = loads(text)
        for want in (1, "a", [1], (1,), {1}, {1: 2}, 1j, b"0", None, range(1, 2)):
            assert not matches(want, encoded, strict=True), (want, text)
            assert not matches(want, encoded, strict=False), (want, text)
        with pytest.raises(CodecError):
            decode(encoded)


def test_what_is_no_json_is_refused() -> None:
    for text in (b"", b"[" * 100_000, b"\x80\x04.", b'{"a"', b"1" * 5000, b"nul", b"9" * 1_000_000):
        with pytest.raises(CodecError):
            loads(text)


def test_colliding_integers_cost_no_quadratic_time() -> None:
    # Python hashes an int modulo 2**61 - 1: all of these share one hash, and a set of them takes minutes to build.
    count = 150_000
    hostile = {"s": [{"i": hex((2**61 - 1) * i)} for i in range(count)]}
    assert not matches(set(range(count)), hostile, strict=False)


def test_endless_iterator_is_cut_off() -> None:
    assert len(encode(iter(int, 1))["y"]) == 10_000


def test_list_containing_itself_is_refused_not_followed() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(RecursionError):
        encode(loop)
