"""Files: whole or not at all, readable by whom the umask says, and what was there keeps its mode."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from certify.errors import InvalidFile
from models.files import write


@pytest.fixture
def umask() -> Iterator[None]:
    """Puts the process's umask back."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: None, mask: int) -> None:
    os.umask(mask)
    write({tmp_path / "new.json": b"{}"})
    assert mode(tmp_path / "new.json") == 0o666 & ~mask
    assert os.umask(mask) == mask, "writing changed the umask of the process"


@pytest.mark.parametrize("given", [0o600, 0o640, 0o666, 0o444])
def test_a_file_that_was_there_keeps_its_mode(tmp_path: Path, umask: None, given: int) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(b"old")
    path.chmod(given)
    write({path: b"new"})
    assert path.read_bytes() == b"new"
    assert mode(path) == given


def test_a_link_that_lies_in_the_way_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write({tmp_path / "link": b"new"})
    assert (tmp_path / "target").read_bytes() == b"mine"
    assert (tmp_path / "link").read_bytes() == b"new"


def test_where_one_file_cannot_be_written_none_is(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    too_long = "second" * 60
    with pytest.raises(InvalidFile, match="cannot write") as error:
        write({tmp_path / "folder" / "first": b"1", tmp_path / too_long: b"2"})
    assert len(str(error.value).splitlines()) == 3
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]
