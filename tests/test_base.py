"""Errors, registry, specs, and files that are never half-written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kronfold.base import files
from kronfold.base.errors import InputError, OutputError, suggest
from kronfold.base.registry import Registry
from kronfold.base.specs import divisors


def test_suggest_names_the_nearest_and_all_allowed():
    text = suggest("kroneker", ["kronecker", "low_rank"])
    assert "'kronecker'" in text
    assert "low_rank" in text


def test_registry_loads_lazily_and_refuses_strangers():
    registry: Registry = Registry("thing")
    registry.register("join", "os.path:join")
    assert registry.get("join") is os.path.join
    with pytest.raises(InputError, match="Unknown thing 'joint'.*'join'"):
        registry.get("joint")
    with pytest.raises(InputError, match="registered already"):
        registry.register("join", "os.path:split")


def test_divisors_by_hand():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
    assert divisors(49) == [1, 7, 49]


def test_atomic_directory_keeps_the_old_when_writing_fails(tmp_path: Path):
    target = tmp_path / "out"
    with files.atomic_directory(target) as place:
        (place / "a").write_text("old")
    with pytest.raises(OutputError, match="exists already.*--overwrite"), files.atomic_directory(target):
        pass
    with pytest.raises(OutputError, match="No space left.*unchanged"):
        with files.atomic_directory(target, overwrite=True) as place:
            (place / "a").write_text("new")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert (target / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    with files.atomic_directory(target, overwrite=True) as place:
        (place / "b").write_text("new")
    assert [entry.name for entry in target.iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_write_text_keeps_the_old_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "results.json"
    files.write_json(target, {"value": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        files.write_json(target, {"value": 2})
    assert '"value": 1' in target.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_check_output_refuses_what_cannot_become_a_directory(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        files.check_output(tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()
    assert files.check_output(tmp_path / "empty") == tmp_path / "empty"


def test_check_output_refuses_a_place_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Root may write anywhere, so the refusal is planted where the operating system would give it.
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)
    with pytest.raises(OutputError, match="Permission denied.*choose another|Permission denied.*Choose another"):
        files.check_output(tmp_path / "out")


def test_sha256_by_hand(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "x").startswith("ba7816bf8f01cfea")
