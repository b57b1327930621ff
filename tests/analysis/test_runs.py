"""Runs: the same bytes whoever computes them, in whatever order, and after whatever interruption."""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_cases import COUNT, HEADING, PROTOCOL, RADII, case, stage
from torch import Tensor, nn

from analysis import store, units, workers
from analysis.evaluation import evaluate
from analysis.journal import MANIFEST, RECORDS, TIMINGS, read
from analysis.layers import layer_sensitivity
from analysis.lines import unpack
from analysis.manifest import Manifest
from analysis.merge import merge
from analysis.records import Report
from analysis.runs import Interrupted, Result, Way, carry_out
from analysis.shard import Shard
from certify.errors import InvalidFile, InvalidInput
from models import mlp


def kept(folder: Path, **ways: object) -> Result:
    """Carry out the small run in a folder."""
    return carry_out(stage(), HEADING, Way(folder=folder, **ways))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    kept(folder)
    return folder


def records(folder: Path) -> bytes:
    return (folder / RECORDS).read_bytes()


def three_lines(error: Exception) -> str:
    text = str(error)
    assert len(text.splitlines()) <= 3
    return text


def test_two_runs_write_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    kept(tmp_path)
    assert records(tmp_path) == records(whole)
    assert (tmp_path / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()


def test_the_file_holds_what_evaluation_and_layers_give(whole: Path) -> None:
    report = read(whole)
    assert [network.name for network in report.networks] == ["one", "two"]
    for network, seed in zip(report.networks, (3, 4), strict=True):
        batch = case(network.name, seed).batch
        assert network.evaluation == evaluate(batch.model, batch.x, batch.y, PROTOCOL, index=batch.index)
        right = [place for place, sample in enumerate(network.evaluation.samples) if sample.correct][:6]
        assert network.layers == layer_sensitivity(
            batch.model, batch.x[right], batch.y[right], PROTOCOL, radius=RADII[0]
        )
    assert report.warnings == ()


def test_the_report_of_a_run_is_the_one_of_its_files(whole: Path, tmp_path: Path) -> None:
    result = kept(tmp_path)
    assert result.report == read(tmp_path) == read(tmp_path / RECORDS)
    assert (result.done, result.asked) == (12, 12)
    assert Report.from_dict(json.loads(json.dumps(result.report.to_dict()))) == result.report


def test_a_run_that_is_not_kept_gives_the_same_report(whole: Path) -> None:
    assert replace(carry_out(stage(), HEADING).report, course=None) == replace(read(whole), course=None)


def test_timings_and_the_machine_are_no_part_of_the_records(whole: Path) -> None:
    course = read(whole).course
    assert course is not None
    assert set(course.seconds["one"]) == {"attack", "ibp", "crown", "layers"}
    assert b"seconds" not in records(whole).replace(b"sample_seconds", b"")
    assert course.machine.encode() not in records(whole)


def test_a_chunk_does_not_depend_on_the_others() -> None:
    forward, shuffled = stage(), list(stage().units)
    random.Random(1).shuffle(shuffled)
    found = {unit.number: units.perform(forward, unit).data for unit in shuffled}
    assert [found[unit.number] for unit in forward.units] == [
        units.perform(stage(), unit).data for unit in forward.units
    ]


def test_every_sample_is_in_one_unit() -> None:
    parts = [unit.part for unit in stage().units if unit.case == 1]
    assert parts[-1] is None
    assert [place for part in parts if part for place in range(*part)] == list(range(COUNT))


def test_processes_write_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    kept(tmp_path, jobs=2, load=stage)
    assert records(tmp_path) == records(whole)


def test_an_error_of_a_process_keeps_its_three_parts(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        kept(tmp_path, jobs=2, load=broken)
    assert (caught.value.got, caught.value.expected, caught.value.remedy) == ("this", "that", "those")


def broken() -> units.Stage:
    raise InvalidInput("this", "that", "those")


def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perform = units.perform
    for place in (0, 1, 7, 11):

        def stopping(at: units.Stage, unit: units.Unit, tick: units.Tick, place: int = place) -> units.Done:
            if unit.number == place:
                raise KeyboardInterrupt
            return perform(at, unit, tick)

        folder = tmp_path / str(place)
        monkeypatch.setattr(workers, "perform", stopping)
        with pytest.raises(Interrupted) as caught:
            kept(folder)
        assert (caught.value.done, caught.value.asked) == (place, 12)
        monkeypatch.setattr(workers, "perform", perform)
        assert kept(folder, resume=True).report.networks == read(whole).networks
        assert records(folder) == records(whole)


def test_a_file_cut_anywhere_goes_on_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    data = records(whole)
    (tmp_path / MANIFEST).write_bytes((whole / MANIFEST).read_bytes())
    places = [0, 1, len(data), len(data) - 1, *(data.index(b"\n", at) + 1 for at in range(0, len(data), 20000))]
    for place in [*places, *random.Random(0).sample(range(len(data)), 5)]:
        (tmp_path / RECORDS).write_bytes(data[:place])
        kept(tmp_path, resume=True)
        assert records(tmp_path) == data


def test_torn_timings_are_cut_too(whole: Path, tmp_path: Path) -> None:
    kept(tmp_path)
    cut = records(tmp_path).index(b'{"kind":"unit","unit":7')
    (tmp_path / RECORDS).write_bytes(records(tmp_path)[:cut])
    (tmp_path / TIMINGS).write_bytes((tmp_path / TIMINGS).read_bytes()[:-9])
    kept(tmp_path, resume=True)
    for line in (tmp_path / TIMINGS).read_text().splitlines():
        json.loads(line)


def test_what_is_torn_is_left_out_and_said(whole: Path, tmp_path: Path) -> None:
    cut = records(whole).index(b'{"kind":"unit","unit":1')
    (tmp_path / RECORDS).write_bytes(records(whole)[: cut + 20])
    report = read(tmp_path)
    assert [(network.name, network.evaluation.count) for network in report.networks] == [("one", 4)]
    assert report.course is None
    assert "1 of 12 units" in report.warnings[0]
    assert "0 of 18 samples of two" in report.warnings[0]


def test_a_finished_run_computes_nothing_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path)

    def never(*_: object) -> units.Done:
        raise AssertionError

    monkeypatch.setattr(workers, "perform", never)
    assert kept(tmp_path, resume=True).done == 12


def test_records_are_not_overwritten(tmp_path: Path) -> None:
    kept(tmp_path)
    with pytest.raises(InvalidInput, match="holds the records of a run"):
        kept(tmp_path)


def test_two_processes_do_not_write_at_once(tmp_path: Path) -> None:
    with open(tmp_path / RECORDS, "ab+") as file:
        store._lock(file, tmp_path)
        with pytest.raises(InvalidFile, match="another process"):
            kept(tmp_path, resume=True)


def changed_weights(at: units.Stage) -> units.Stage:
    about = replace(at.cases[1].about, weights_sha256="0" * 64)
    return replace(at, cases=(at.cases[0], replace(at.cases[1], about=about)))


def changed_structure(at: units.Stage) -> units.Stage:
    """The same weights between other activations."""
    batch = at.cases[0].batch
    model = mlp([6, 8, 4], "tanh").eval()
    model.load_state_dict(batch.model.state_dict())
    return replace(at, cases=(replace(at.cases[0], batch=replace(batch, model=model)), at.cases[1]))


def changed_data(at: units.Stage) -> units.Stage:
    batch = at.cases[0].batch
    x = batch.x.clone()
    x[7, 0] += 2.0**-20
    return replace(at, cases=tuple(replace(one, batch=replace(one.batch, x=x)) for one in at.cases))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (changed_weights, "weights of two"),
        (changed_data, "data images"),
        (changed_structure, "structure of one"),
        (lambda at: replace(at, protocol=replace(at.protocol, radii=RADII[:1])), "configuration radii"),
        (lambda at: replace(at, protocol=replace(at.protocol, seed=1)), "configuration seed"),
        (lambda at: replace(at, protocol=replace(at.protocol, batch=5)), "configuration batch"),
        (lambda at: replace(at, protocol=replace(at.protocol, attack=replace(at.protocol.attack, steps=6))), "attack"),
        (lambda at: replace(at, layers=replace(at.layers, samples=5)), "layer_samples"),
    ],
)
def test_another_run_does_not_go_on_and_is_told_what_differs(tmp_path: Path, change: object, word: str) -> None:
    kept(tmp_path)
    before = records(tmp_path)
    with pytest.raises(InvalidFile) as caught:
        carry_out(change(stage()), HEADING, Way(folder=tmp_path, resume=True))  # type: ignore[operator]
    assert word in three_lines(caught.value)
    assert records(tmp_path) == before


class Scaled(nn.Module):
    """A network behind a constant."""

    scale = 1.0

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.scale)


def test_another_constant_does_not_go_on(tmp_path: Path) -> None:
    def at(scale: float) -> units.Stage:
        asked = stage()
        model = Scaled(asked.cases[1].batch.model).eval()
        model.scale = scale
        case = replace(asked.cases[1], batch=replace(asked.cases[1].batch, model=model))
        return replace(asked, cases=(asked.cases[0], case))

    carry_out(at(1.5), HEADING, Way(folder=tmp_path))
    carry_out(at(1.5), HEADING, Way(folder=tmp_path, resume=True))
    with pytest.raises(InvalidFile, match="outputs of two"):
        carry_out(at(-3.0), HEADING, Way(folder=tmp_path, resume=True))


def test_another_version_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path)
    monkeypatch.setattr("analysis.manifest.version", lambda name: "9.9" if name == "torch" else "0.1.0")
    with pytest.raises(InvalidFile, match="version of torch"):
        kept(tmp_path, resume=True)


def shards(folder: Path, n: int) -> list[Path]:
    folders = [folder / f"shard-{i}" for i in range(1, n + 1)]
    for i, place in enumerate(folders, 1):
        kept(place, shard=Shard(i, n))
    return folders


@pytest.mark.parametrize("n", [1, 7, 13])
def test_shards_merge_to_the_same_bytes_in_any_order(whole: Path, tmp_path: Path, n: int) -> None:
    folders = shards(tmp_path, n)
    for seed in range(3):
        random.Random(seed).shuffle(folders)
        report = merge(folders, tmp_path / f"merged-{seed}")
        for name in (RECORDS, MANIFEST):
            assert (tmp_path / f"merged-{seed}" / name).read_bytes() == (whole / name).read_bytes()
        assert report.networks == read(whole).networks
        assert report.course is not None


def test_a_merged_run_can_be_resumed(tmp_path: Path) -> None:
    merge(shards(tmp_path, 2), tmp_path / "all")
    assert kept(tmp_path / "all", resume=True).done == 12


def test_shards_that_are_no_whole_run_are_refused(tmp_path: Path) -> None:
    one, two, three = shards(tmp_path, 3)
    other = tmp_path / "other"
    carry_out(
        replace(stage(), layers=replace(stage().layers, samples=5)), HEADING, Way(folder=other, shard=Shard(2, 3))
    )
    half, undivided = tmp_path / "half", tmp_path / "undivided"
    kept(half, shard=Shard(1, 2))
    kept(undivided)
    for folders, words in (
        ((one, three), "2 are missing"),
        ((three,), "1, 2 are missing"),
        ((one, two, three, two), "shard 2/3 is there twice"),
        ((one, other, three), "different runs: configuration layer_samples"),
        ((one, two, half), "different runs"),
        ((one, two, undivided), "undivided"),
        ((one, two, tmp_path / "nowhere"), "cannot read"),
    ):
        with pytest.raises(InvalidFile) as caught:
            merge(folders, tmp_path / "never")
        assert words in three_lines(caught.value)
    with pytest.raises(InvalidInput):
        merge((one, two, three), undivided)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("place", [3, -3])
def test_torn_shards_are_refused(tmp_path: Path, place: int) -> None:
    one, two = shards(tmp_path, 2)
    lines = records(two).splitlines(keepends=True)
    (two / RECORDS).write_bytes(b"".join(lines[:place]) + lines[place][:30])
    with pytest.raises(InvalidFile, match=r"shard 2/2 .* is not finished"):
        merge((one, two), tmp_path / "never")


def test_a_shard_is_no_other_shard(tmp_path: Path) -> None:
    one, two = shards(tmp_path, 2)
    with pytest.raises(InvalidFile, match="shard 2/2"):
        kept(one, shard=Shard(2, 2), resume=True)
    (two / RECORDS).write_bytes(records(one))
    with pytest.raises(InvalidFile, match="does not belong"):
        merge((one, two), tmp_path / "never")


def test_no_unit_begins_after_the_deadline_and_the_rest_can_follow(whole: Path, tmp_path: Path) -> None:
    result = kept(tmp_path, deadline=time.monotonic() - 1)
    assert (result.done, result.report.networks) == (0, ())
    assert "0 of 12 units" in result.report.warnings[0]
    assert kept(tmp_path, deadline=time.monotonic() - 1, jobs=2, load=stage, resume=True).done == 0
    assert kept(tmp_path, resume=True).done == 12
    assert records(tmp_path) == records(whole)


def test_one_thread_computes_what_is_kept_and_the_threads_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met, perform = [], units.perform
    monkeypatch.setattr(workers, "perform", lambda *args: (met.append(torch.get_num_threads()), perform(*args))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        kept(tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(met) == {1}


def test_a_full_disk_says_so_and_what_was_written_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, iter(range(1000))

    def full(handle: int) -> None:
        if next(calls) == 9:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr("analysis.store.os.fsync", full)
        with pytest.raises(InvalidFile, match="no space left") as caught:
            kept(tmp_path)
    three_lines(caught.value)
    kept(tmp_path, resume=True)
    assert records(tmp_path) == records(whole)


@pytest.mark.parametrize("words", ["", "0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"])
def test_shards_that_cannot_be_meant(words: str) -> None:
    with pytest.raises(InvalidInput):
        Shard.parse(words)


def test_the_manifest_is_that_of_the_records(whole: Path) -> None:
    manifest = Manifest.read(whole / MANIFEST)
    first = unpack(records(whole).splitlines()[0], "whole")
    assert first.identity == manifest.identity  # type: ignore[union-attr]
    assert set(manifest.models) == {"one", "two"}
