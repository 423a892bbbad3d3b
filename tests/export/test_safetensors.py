"""Safetensors files are read as the safetensors library reads them, and distrusted."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grpo_lite.errors import ExportError
from grpo_lite.export.safetensors import FLOATS, build_head, open_checkpoint, open_shard, row_blocks

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a": torch.arange(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "empty": torch.zeros(0, 3),
    "whole": torch.arange(6, dtype=torch.int64),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_tensors_are_those_that_the_library_reads(path: Path) -> None:
    shard = open_shard(path)
    assert shard.metadata == {"format": "pt"}
    assert shard.tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        spec = shard.tensors[name]
        assert spec.shape == tuple(expected.shape)
        if spec.dtype in FLOATS:
            assert torch.equal(shard.read(spec), expected)


@given(rows=st.integers(0, 9), columns=st.integers(1, 9), most=st.integers(1, 30))
def test_blocks_cover_every_row_once_and_stay_small(rows: int, columns: int, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_lite.export.safetensors.BLOCK_ELEMENTS", most)
        blocks = list(row_blocks((rows, columns)))
    assert [row for start, end in blocks for row in range(start, end)] == list(range(rows))
    assert all((end - start) * columns <= max(most, columns) for start, end in blocks)


def test_rows_of_a_tensor_are_read_alone(path: Path) -> None:
    shard = open_shard(path)
    assert torch.equal(shard.read(shard.tensors["b.weight"], 1, 3), TENSORS["b.weight"][1:3])


def test_head_that_is_built_is_read_by_the_library(tmp_path: Path) -> None:
    head = build_head([("x", "BF16", (2, 2)), ("ü", "F32", (1,))], {"format": "pt"})
    (tmp_path / "new").write_bytes(head + bytes(8) + struct.pack("<f", 1.5))
    assert load_file(tmp_path / "new")["ü"].item() == 1.5
    with safe_open(tmp_path / "new", "pt") as file:
        assert file.metadata() == {"format": "pt"}


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({}, b"rest"),
        ([], b""),
        (b"{", b""),
        (b"\xff\xfe", b""),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, b""),
        (b"[" * 100_000, b""),
        ({"x": 5}, b""),
        ({"x": "text"}, b""),
        ({"x": {}}, b""),
        ({"x": F32 | {"dtype": ["F32"]}}, b"1234"),
        ({"x": F32 | {"dtype": None}}, b"1234"),
        ({"x": F32 | {"shape": "1"}}, b"1234"),
        ({"x": F32 | {"shape": [-1, -1]}}, b"1234"),
        ({"x": F32 | {"shape": [2]}}, b"1234"),
        ({"x": F32 | {"shape": [1.0]}}, b"1234"),
        ({"x": F32 | {"data_offsets": [4, 0]}}, b"1234"),
        ({"x": F32 | {"data_offsets": [0]}}, b"1234"),
        ({"x": F32 | {"data_offsets": [4, 8]}}, b"12345678"),
        ({"x": F32, "y": F32}, b"1234"),
        ({"x": F32}, b"12345"),
        ({"x": F32}, b"123"),
        (b'{"x":%b,"x":%b}' % ((json.dumps(F32).encode(),) * 2), b"1234"),
    ],
)
def test_inconsistent_header_is_refused(header: Any, data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"bad\.safetensors: is not a whole safetensors file"):
        open_shard(write(tmp_path / "bad.safetensors", header, data))


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_damaged_header_is_refused_or_still_consistent(
    tmp_path_factory: pytest.TempPathFactory, place: float, byte: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file(TENSORS, file)
    data = bytearray(file.read_bytes())
    data[int(place * (8 + int.from_bytes(data[:8], "little")))] = byte
    file.write_bytes(data)
    try:
        shard = open_shard(file)
    except ExportError:
        return
    ends = [(spec.start, spec.end) for spec in shard.tensors.values()]
    assert ends[-1][1] == len(data)
    assert all(one[1] == two[0] for one, two in pairwise(ends))


def test_file_that_shrinks_while_it_is_read_is_named(path: Path) -> None:
    shard = open_shard(path)
    path.write_bytes(path.read_bytes()[:-60])
    first, last = (list(shard.tensors.values())[place] for place in (0, -1))
    with pytest.raises(ExportError, match=r"ends at byte \d+ while being read"):
        shard.read_bytes(first.start, last.end - first.start)


def test_single_file_is_preferred_to_an_index_as_transformers_does(path: Path) -> None:
    (path.parent / "model.safetensors.index.json").write_text("{}")
    assert [shard.path for shard in open_checkpoint(path.parent)] == [path]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nowhere: no such folder"):
        open_checkpoint(tmp_path / "nowhere")
