"""records.jsonl: every line obeys the shipped schema, and a file that was changed is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_cases import HEADING, PROTOCOL, stage

from analysis.journal import MANIFEST, RECORDS, read
from analysis.lines import KINDS, RunLine, WarningLine, pack, unpack
from analysis.runs import Way, carry_out
from analysis.schema import SHIPPED, schema, text
from certify.errors import InvalidFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    carry_out(stage(), HEADING, Way(folder=place))
    return place


@pytest.fixture
def lines(folder: Path) -> list[bytes]:
    return (folder / RECORDS).read_bytes().splitlines(keepends=True)


def refused(tmp_path: Path, lines: list[bytes]) -> str:
    """What reading and resuming say alike about lines."""
    (tmp_path / RECORDS).write_bytes(b"".join(lines))
    with pytest.raises(InvalidFile) as caught:
        read(tmp_path)
    with pytest.raises(InvalidFile):
        carry_out(stage(), HEADING, Way(folder=tmp_path, resume=True))
    assert (tmp_path / RECORDS).read_bytes() == b"".join(lines)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def test_the_shipped_schema_is_made_from_the_records() -> None:
    assert SHIPPED.read_text() == text()


def test_every_line_obeys_the_schema(lines: list[bytes]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    validator = jsonschema.Draft202012Validator(schema())
    found = [json.loads(line) for line in (*lines, pack(WarningLine("one", "memory ran out")))]
    for line in found:
        validator.validate(line)
    assert {line["kind"] for line in found} == set(KINDS)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "simple"},
        {"network": 3},
        {"extra": 1},
        {"sample": {}},
    ],
)
def test_the_schema_refuses_other_lines(lines: list[bytes], change: dict) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    sample = next(json.loads(line) for line in lines if b'"kind":"sample"' in line)
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(sample)
    assert not validator.is_valid({**sample, **change})
    outcome = sample["sample"]["outcomes"][0]
    outcome["verdict"] = "surely"
    assert not validator.is_valid(sample)


def test_every_line_is_read_back_as_it_was_written(lines: list[bytes]) -> None:
    for line in lines:
        assert pack(unpack(line, "the run")) == line


def test_samples_are_in_the_order_of_the_data(folder: Path) -> None:
    for network in read(folder).networks:
        assert [sample.index for sample in network.evaluation.samples] == list(range(0, 54, 3))


@pytest.mark.parametrize("place", [5, 9, 20, -3])
def test_a_line_that_is_missing_in_the_middle_is_noticed(
    folder: Path, tmp_path: Path, lines: list[bytes], place: int
) -> None:
    (tmp_path / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    del lines[place]
    assert "is not what was written" in refused(tmp_path, lines)


def test_a_better_verdict_is_noticed(folder: Path, tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    place = next(place for place, line in enumerate(lines) if b'"attacked":true' in line)
    lines[place] = lines[place].replace(b'"attacked":true', b'"attacked":false').replace(b"violated", b"holds")
    assert "is not what was written" in refused(tmp_path, lines)


@pytest.mark.parametrize(
    ("before", "after"), [(b'"norm":"linf"', b'"norm":"l2"'), (b'"name":"one"', b'"name":"two"'), (b"1/10", b"1/99")]
)
def test_another_heading_is_noticed(
    folder: Path, tmp_path: Path, lines: list[bytes], before: bytes, after: bytes
) -> None:
    (tmp_path / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    assert before in lines[1]
    lines[1] = lines[1].replace(before, after)
    assert "is not what was written" in refused(tmp_path, lines)


def test_a_unit_that_is_there_twice_is_noticed(folder: Path, tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    end = next(place for place, line in enumerate(lines) if b'"kind":"unit"' in line) + 1
    assert "unit 0" in refused(tmp_path, lines[:end] + lines[3:end] + lines[end:])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"{}\n",
        b"[1]\n",
        b"\x00" * 50 + b"\n",
        b'{"kind":"unit","unit":0,"lines":0,"sha256":""}\n',
        b'{"kind":"run"}\n',
        b'{"kind":"run","schema_version":1,"identity":"","command":"","arguments":{},"samples":"","seed":0,"versions":{},'
        b'"count":1,"networks":"two","units":1,"warnings":[]}\n',
        b"not json\n" * 3,
        b"[" * 10**5 + b"\n",
    ],
)
def test_files_that_are_no_records(tmp_path: Path, data: bytes) -> None:
    (tmp_path / RECORDS).write_bytes(data)
    with pytest.raises(InvalidFile) as caught:
        read(tmp_path)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_newer_schema_is_told(tmp_path: Path, lines: list[bytes]) -> None:
    lines[0] = lines[0].replace(b'"schema_version":1', b'"schema_version":2')
    (tmp_path / RECORDS).write_bytes(b"".join(lines))
    with pytest.raises(InvalidFile, match="schema version 2"):
        read(tmp_path)


def test_the_first_line_says_all_that_was_asked(lines: list[bytes]) -> None:
    first = unpack(lines[0], "the run")
    assert isinstance(first, RunLine)
    assert (first.count, first.networks, first.units) == (18, 2, 12)
    assert (first.command, first.arguments, first.seed) == ("report", {"radius": "0.02,0.1"}, PROTOCOL.seed)
