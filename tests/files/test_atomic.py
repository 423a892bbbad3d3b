"""Folders that are replaced whole: no failure and no kill leaves less than the old or the new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grpo_lite.files.atomic import publish, restore
from grpo_lite.files.manifest import MANIFEST_NAME


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / MANIFEST_NAME).write_text(content)
    return path


def content(parent: Path) -> dict[str, str]:
    return {path.name: (path / MANIFEST_NAME).read_text() for path in parent.iterdir()}


def test_a_published_folder_replaces_the_one_before(tmp_path: Path) -> None:
    folder(tmp_path / "target", "old")
    publish(folder(tmp_path / "scratch", "new"), tmp_path / "target")
    assert content(tmp_path) == {"target": "new"}


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "target", "old")
    scratch, rename = folder(tmp_path / "scratch", "new"), os.rename

    def refuse(source: Path, target: Path) -> None:
        if source == scratch:
            raise OSError("Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        publish(scratch, tmp_path / "target")
    assert content(tmp_path) == {"scratch": "new", "target": "old"}


@pytest.mark.parametrize("aside", [".replaced-target", "target.previous"], ids=["now", "an earlier version"])
@pytest.mark.parametrize("replaced", [False, True], ids=["killed between the renames", "killed after them"])
def test_what_a_kill_left_aside_gets_its_name_back_or_goes(tmp_path: Path, aside: str, replaced: bool) -> None:
    folder(tmp_path / aside, "old")
    if replaced:
        folder(tmp_path / "target", "new")
    restore(tmp_path / "target")
    assert content(tmp_path) == {"target": "new" if replaced else "old"}
