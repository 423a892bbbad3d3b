"""A manifest names every file that is missing, truncated, corrupted or extra."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lite.errors import ExportError
from grpo_lite.files.manifest import MANIFEST_NAME, read_manifest, update_manifest, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/two words #1.txt").write_text("text")
    (tmp_path / "empty").touch()
    return tmp_path


def test_untouched_folder_verifies(folder: Path) -> None:
    write_manifest(folder)
    assert verify_manifest(folder) == 4
    entry = read_manifest(folder)["config.json"]
    assert entry.sha256 == hashlib.sha256(b"{}").hexdigest()
    assert entry.size_bytes == 2


def test_every_fault_is_named_in_one_message(folder: Path) -> None:
    write_manifest(folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    (folder / "config.json").write_text("[]")
    (folder / "sub/two words #1.txt").unlink()
    (folder / "empty").write_text("no longer")
    (folder / "stray.bin").touch()
    with pytest.raises(ExportError) as error:
        verify_manifest(folder)
    assert str(error.value).split("\n")[1:6] == [
        "  config.json: corrupted (its sha256 is not the recorded one)",
        "  empty: corrupted (9 bytes, 0 were written)",
        "  model.safetensors: truncated (2559 of 2560 bytes)",
        "  sub/two words #1.txt: missing",
        "  stray.bin: extra (not in the manifest)",
    ]


@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, 2559), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flip")
    data = bytearray(bytes(range(256)) * 10)
    (folder / "weights").write_bytes(data)
    write_manifest(folder)
    data[place] ^= 1 << bit
    (folder / "weights").write_bytes(data)
    with pytest.raises(ExportError, match="weights: corrupted"):
        verify_manifest(folder)


@pytest.mark.parametrize("kept", range(0, 700, 23))
def test_truncated_manifest_never_verifies(folder: Path, kept: int) -> None:
    path = write_manifest(folder)
    data = path.read_bytes()
    assert len(data) > 460
    path.write_bytes(data[: min(kept, len(data) - 2)])
    with pytest.raises(ExportError):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../outside"])
def test_paths_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    write_manifest(folder)
    with (folder / MANIFEST_NAME).open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(ExportError, match=r"(outside it or listed twice|truncated)"):
        verify_manifest(folder)


def test_folder_without_manifest_says_so(folder: Path) -> None:
    with pytest.raises(ExportError, match=r"MANIFEST.sha256: cannot be read \(No such file or directory\)"):
        verify_manifest(folder)


def test_link_is_refused_since_its_target_does_not_travel(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(ExportError, match="link: is a symbolic link"):
        write_manifest(folder)


def test_file_replaced_by_a_link_to_nothing_is_missing(folder: Path) -> None:
    write_manifest(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("gone")
    with pytest.raises(ExportError, match=r"config\.json: missing"):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ["line\nbreak", "back\\slash"])
def test_names_that_sha256sum_escapes_are_refused(folder: Path, name: str) -> None:
    (folder / name).touch()
    with pytest.raises(ExportError, match="has a line break or backslash"):
        write_manifest(folder)


def test_update_renews_only_the_named_files(folder: Path) -> None:
    write_manifest(folder)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "verify.json").write_text("new")
    update_manifest(folder, ["config.json", "verify.json"])
    assert verify_manifest(folder) == 5


def test_known_digests_are_not_computed_again(folder: Path) -> None:
    write_manifest(folder, known={"config.json": "0" * 64})
    assert read_manifest(folder)["config.json"].sha256 == "0" * 64


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_reads_ours_and_we_read_its(folder: Path) -> None:
    write_manifest(folder)
    run = subprocess.run(["sha256sum", "--strict", "-c", MANIFEST_NAME], cwd=folder, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count(": OK") == 4
    (folder / MANIFEST_NAME).unlink()
    listing = subprocess.run(["sha256sum", "config.json", "empty"], cwd=folder, capture_output=True, text=True)
    (folder / MANIFEST_NAME).write_text(listing.stdout)
    with pytest.raises(ExportError, match=r"(?s)model\.safetensors: extra.*sub/two words #1\.txt: extra"):
        verify_manifest(folder)
