"""The wire between the parent and a sandboxed process: values as bounded plain text, and the messages that carry them.

The two sides do not trust each other. What a program returned reaches the parent as JSON and never becomes an object
there that could act: `matches` walks it along the expected value, so that neither an odd `__eq__` nor a million
colliding keys can do anything. A message is a length of four bytes, then JSON.

Scalars and lists are JSON's own. Everything else is an object with one key, its tag:
    t tuple · s set · f frozenset · d dict as pairs · b bytes · B bytearray · c complex · i large int, hexadecimal
    r range · y an iterator's items · T a builtin type by name · h [number, type] an object that stays where it is
    ! anything else, by its type's name; it equals nothing
"""

from __future__ import annotations

import builtins
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any

MAX_FRAME_BYTES = 4 << 20
LENGTH_BYTES = 4
_ITERATOR_ITEMS = 10_000  # an endless generator must not fill the memory
_JSON_INT = 1 << 63
_INT_DIGITS = 20  # of the longest integer below it, with its sign
Keep = Callable[[Any], int]
Restore = Callable[[int, str], Any]


class CodecError(ValueError):
    """The text is not a value in this encoding."""


def pack(text: bytes) -> bytes:
    """Return a message ready to be sent.

    Raises:
        CodecError: the message is longer than a reader would take.
    """
    if len(text) > MAX_FRAME_BYTES:
        raise CodecError(f"a message of {len(text)} bytes, more than {MAX_FRAME_BYTES}")
    return len(text).to_bytes(LENGTH_BYTES, "big") + text


def read_message(descriptor: int) -> Any:
    """Wait for a message and return it; None at the end of the stream. For the sandboxed side: it waits forever."""
    head = _read(descriptor, LENGTH_BYTES)
    return loads(_read(descriptor, int.from_bytes(head, "big"))) if head else None


def write_message(descriptor: int, message: Any) -> None:
    """Send a message, waiting as long as the other side is busy."""
    data = memoryview(pack(dumps(message)))
    while data:
        data = data[os.write(descriptor, data) :]


def _read(descriptor: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def dumps(value: Any) -> bytes:
    """Return JSON as bytes; non-ASCII characters and lone surrogates are escaped, so any string survives."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def loads(text: bytes) -> Any:
    """Read JSON from an untrusted process.

    Raises:
        CodecError: not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_int=_short_int if len(text) > _INT_DIGITS else None)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CodecError(f"not JSON: {type(error).__name__}") from None


def _short_int(digits: str) -> int:
    """Read an integer; `encode` writes long ones otherwise, and reading digits takes quadratic time."""
    if len(digits) > _INT_DIGITS:
        raise ValueError("an integer with too many digits")
    return int(digits)


def encode(value: Any, keep: Keep | None = None) -> Any:
    """Return a value in terms of JSON. A subclass of a builtin counts as the builtin, by its own data.

    Runs beside untrusted code, and promises nothing but the form: the reader checks everything.

    Args:
        keep: stores an object that has no encoding and returns its number; without it such an object equals nothing.

    >>> encode([1, (2.5, None), {"a": {3}}])
    [1, {'t': [2.5, None]}, {'d': [['a', {'s': [3]}]]}]
    """
    if value is None or value is True or value is False:
        return value
    for base, encoder in _ENCODERS:
        if isinstance(value, base):
            return encoder(value, keep)
    kind: type = type(value)
    if kind is type and vars(builtins).get(name := str(value.__name__)) is value:
        return {"T": name}
    if keep is not None:
        return {"h": [keep(value), kind.__name__]}
    return {"!": kind.__name__}


def _items(tag: str | None, iterate: Callable[[Any], Iterator[Any]]) -> Callable[[Any, Keep | None], Any]:
    def encoder(value: Any, keep: Keep | None) -> Any:
        items = [encode(item, keep) for item in iterate(value)]
        return items if tag is None else {tag: items}

    return encoder


def _integer(value: int, keep: Keep | None) -> Any:
    number = int.__int__(value)
    return number if -_JSON_INT < number < _JSON_INT else {"i": hex(number)}


def _pairs(value: dict[Any, Any], keep: Keep | None) -> Any:
    return {"d": [[encode(key, keep), encode(item, keep)] for key, item in dict.items(value)]}


def _iterator(value: Iterator[Any], keep: Keep | None) -> Any:
    return {"y": [encode(item, keep) for item in itertools.islice(value, _ITERATOR_ITEMS)]}


_ENCODERS: tuple[tuple[Any, Callable[[Any, Keep | None], Any]], ...] = (
    (str, lambda value, keep: str.__getitem__(value, slice(None))),
    (int, _integer),
    (float, lambda value, keep: float.__float__(value)),
    (list, _items(None, list.__iter__)),
    (tuple, _items("t", tuple.__iter__)),
    (dict, _pairs),
    (set, _items("s", set.__iter__)),
    (frozenset, _items("f", frozenset.__iter__)),
    (complex, lambda value, keep: {"c": [value.real, value.imag]}),
    (bytes, lambda value, keep: {"b": bytes.hex(value)}),
    (bytearray, lambda value, keep: {"B": bytearray.hex(value)}),
    (range, lambda value, keep: {"r": [value.start, value.stop, value.step]}),
    (Iterator, _iterator),
)


def decode(encoded: Any, restore: Restore | None = None) -> Any:
    """Return the value of an encoding: always of a plain builtin type, or what `restore` makes of an object's number.

    Only for sandboxed processes: an encoding can be made so that building its set takes hours.

    Raises:
        CodecError: not an encoding, or of an object that has none.
    """
    if type(encoded) is list:
        return [decode(item, restore) for item in encoded]
    if type(encoded) is not dict:
        return encoded
    tag, body = _tagged(encoded)
    try:
        if tag == "h" and restore is not None:
            return restore(int(body[0]), str(body[1]))
        if tag == "T":
            value = getattr(builtins, body)
            if isinstance(value, type):
                return value
        if tag in _DECODERS:
            return _DECODERS[tag](body, lambda item: decode(item, restore))
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise CodecError(f"malformed value tagged {tag!r}: {error}") from None
    raise CodecError(f"a value of type {body!r} cannot be passed between processes")


_DECODERS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "t": lambda body, one: tuple(map(one, body)),
    "s": lambda body, one: set(map(one, body)),
    "f": lambda body, one: frozenset(map(one, body)),
    "d": lambda body, one: {one(key): one(item) for key, item in body},
    "b": lambda body, one: bytes.fromhex(body),
    "B": lambda body, one: bytearray.fromhex(body),
    "c": lambda body, one: complex(float(body[0]), float(body[1])),
    "i": lambda body, one: int(body, 16),
    "r": lambda body, one: range(*map(operator.index, body)),
    "y": lambda body, one: iter([one(item) for item in body]),
}


def _tagged(encoded: dict[str, Any]) -> tuple[str, Any]:
    """Return the tag and body of an encoded object."""
    if len(encoded) != 1:
        raise CodecError("an encoded object has one key")
    return next(iter(encoded.items()))


def matches(want: Any, got: Any, *, strict: bool) -> bool:
    """Return whether an encoding from an untrusted process stands for the expected value. Never raises, never hangs.

    Args:
        want: plain value from the dataset.
        got: what `loads` returned.
        strict: types must agree too (True is not 1, 1 is not 1.0); only a list, which is all that JSON has, also stands
            for a tuple. Else Python's `==` between builtins decides. NaN equals NaN where types are compared.

    >>> matches([1, 2], {"t": [1, 2]}, strict=True), matches(1, True, strict=True), matches(1, True, strict=False)
    (True, False, True)
    """
    try:
        return _same(want, got, strict)
    except (CodecError, TypeError, ValueError, RecursionError, OverflowError):
        return False


def _same(want: Any, got: Any, strict: bool) -> bool:
    tag, body = ("l", got) if type(got) is list else _tagged(got) if type(got) is dict else ("", got)
    if isinstance(want, list | tuple):
        kinds = ("t",) if isinstance(want, tuple) else ("l", "t") if strict else ("l",)
        return tag in kinds and len(body) == len(want) and all(map(_same, want, body, itertools.repeat(strict)))
    if isinstance(want, dict):
        return tag == "d" and len(body) == len(want) and _same_dict(want, body, strict)
    if isinstance(want, set | frozenset):
        kinds = ("s", "f") if not strict else ("s",) if isinstance(want, set) else ("f",)
        return tag in kinds and len(body) == len(want) and _texts(encode(want), strict) == _texts(got, strict)
    if tag not in ("", "b", "B", "c", "i", "r"):
        return False
    value = decode(got)
    if not strict:
        return bool(want == value)
    return type(want) is type(value) and (want == value or (want != want and value != value))


def _same_dict(want: dict[Any, Any], pairs: Any, strict: bool) -> bool:
    """Compare by the texts of the keys; `pairs` is as long as `want`, and a repeated key leaves another one missing."""
    items = {_text(key, strict): item for key, item in pairs}
    texts = {_text(encode(key), strict): item for key, item in want.items()}
    return all(text in items and _same(item, items[text], strict) for text, item in texts.items())


def _texts(encoded: Any, strict: bool) -> set[str]:
    return {_text(item, strict) for item in next(iter(encoded.values()))}


def _text(encoded: Any, strict: bool) -> str:
    """Return one text for all encodings that are the same set element or dictionary key.

    Texts instead of the values themselves: strings hash with a secret, integers can be chosen to collide.
    """
    if type(encoded) is list:
        raise CodecError("a list is not hashable")
    if type(encoded) is not dict:
        return _atom_text(encoded, strict)
    tag, body = _tagged(encoded)
    if tag == "t":
        return f"t({','.join(_text(item, strict) for item in body)})"
    if tag == "f":
        return f"f({','.join(sorted(_texts(encoded, strict)))})"
    if tag not in ("b", "c", "i", "r"):
        raise CodecError(f"a value tagged {tag!r} is not hashable")
    return _atom_text(decode(encoded), strict)


def _atom_text(value: Any, strict: bool) -> str:
    if not strict and isinstance(value, int | float | complex):  # 1 == 1.0 == True == 1+0j
        if isinstance(value, complex) and value.imag == 0:
            value = value.real
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            value = int(value)
    return f"{type(value).__name__}:{hex(value) if type(value) is int else repr(value)}"
