"""Long runs from the command line: killed, interrupted, limited, shared out, and shown again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

import certify
from analysis.journal import MANIFEST, RECORDS, read
from analysis.records import Report
from cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = "report net --radius 0.02,0.1 --samples 12 --batch 4 --restarts 1 --steps 2 --layer-samples 4"
LONG = "report net --radius 0.02,0.1 --samples 400 --batch 2 --restarts 5 --steps 100 --no-layers"
Capture = pytest.CaptureFixture[str]


def done(capsys: Capture, words: str, code: int = 0) -> str:
    """Run a command in this process; return its stdout."""
    found = main(words.split())
    captured = capsys.readouterr()
    assert found == code, captured.err
    return captured.out


def begun(folder: Path, words: str, units: int = 2) -> subprocess.Popen[str]:
    """Start a command as a process group of its own and wait until it has written so many units."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "cli", *words.split(), "--out", "run"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start: the tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end, file = time.monotonic() + 60, folder / "run" / RECORDS
    while not (file.is_file() and file.read_bytes().count(b'"kind":') >= 2 + 3 * units):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    return process


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{process}\n" in (place / "status").read_text():
                found.append(int(place.name))
        except OSError:
            continue
    return found


def alive(processes: list[int]) -> list[int]:
    """Those of the processes that have not ended, after some seconds at most."""
    end = time.monotonic() + 10
    while processes and time.monotonic() < end:
        processes = [process for process in processes if _runs(process)]
        time.sleep(0.05)
    return processes


def _runs(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_a_run_is_shown_again_from_its_files_alone(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = done(capsys, f"{SMALL} --out run --json run.json")
    monkeypatch.setattr("models.checkpoint.load", None)
    for name in ("model.json", "model.safetensors"):
        (folder / "net" / name).unlink()
    assert done(capsys, "report --from run --json again.json") == text
    assert (folder / "again.json").read_bytes() == (folder / "run.json").read_bytes()
    assert done(capsys, f"report --from run/{RECORDS}") == text
    results = json.loads((folder / "run.json").read_text())["results"]
    assert Report.from_dict(results) == read(folder / "run")
    (folder / "run" / "timings.jsonl").unlink()
    without = done(capsys, "report --from run").splitlines()
    assert [line for line in text.splitlines() if not line.startswith("time: ")] == without


@pytest.mark.parametrize("asked", ["--layer act1", "--pixels x.svg"])
def test_layers_that_records_do_not_hold_are_told(folder: Path, capsys: Capture, asked: str) -> None:
    done(capsys, "report net --radius 0.02 --samples 4 --steps 2 --no-layers --out run")
    assert main(f"report --from run {asked}".split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{asked.split()[0]} with records that hold no layers of net" in captured.err
    assert "--no-layers" in captured.err


def test_a_layer_that_records_lack_is_told_before_anything_is_shown(folder: Path, capsys: Capture) -> None:
    done(capsys, f"{SMALL} --out run")
    assert main(["report", "--from", "run", "--layer", "nonsense", "--html", "page.html"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "act1" in captured.err
    assert not (folder / "page.html").exists()


@pytest.mark.parametrize("path", ["absent", "net", "net/model.json", "net/model.safetensors"])
def test_what_holds_no_records_is_told(folder: Path, capsys: Capture, path: str) -> None:
    assert main(["report", "--from", path]) == 5
    assert len(capsys.readouterr().err.splitlines()) <= 3


def test_jobs_and_resuming_change_no_byte(folder: Path, capsys: Capture) -> None:
    first = done(capsys, f"{SMALL} --out one")
    done(capsys, f"{SMALL} --out two --jobs 2")
    for name in (RECORDS, MANIFEST):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    assert done(capsys, f"{SMALL} --out one --resume") == first
    assert main(f"{SMALL} --out one".split()) == 2
    assert "holds the records of a run already" in capsys.readouterr().err


def test_workers_load_a_users_own_network(folder: Path, capsys: Capture) -> None:
    words = "report --model usernets:good --data digits --samples 6 --batch 3 --radius 0.02 --layer-samples 2"
    done(capsys, f"{words} --out one")
    done(capsys, f"{words} --out two --jobs 2")
    assert (folder / "one" / RECORDS).read_bytes() == (folder / "two" / RECORDS).read_bytes()


def test_seven_shards_are_the_run(folder: Path, capsys: Capture) -> None:
    text = done(capsys, f"{SMALL} --batch 1 --out whole")
    for i in range(1, 8):
        assert "certify merge" in done(capsys, f"{SMALL} --batch 1 --out part{i} --shard {i}/7")
    merged = done(capsys, "merge part3 part7 part1 part6 part2 part5 part4 --out merged --json merged.json")
    assert (folder / "merged" / RECORDS).read_bytes() == (folder / "whole" / RECORDS).read_bytes()
    shown = [[line for line in words.splitlines() if not line.startswith("time: ")] for words in (text, merged)]
    assert shown[0] == shown[1]
    assert main(["merge", "part1", "part2", "--out", "never"]) == 5
    assert "of 7 shards 3, 4, 5, 6, 7 are missing" in capsys.readouterr().err


def test_a_run_out_of_time_has_its_own_exit_code_and_goes_on(folder: Path, capsys: Capture) -> None:
    whole = done(capsys, f"{SMALL} --out whole")
    assert main(f"{SMALL} --out run --time-limit 0.000001".split()) == 4
    captured = capsys.readouterr()
    assert "0 of 4 units of work are in run" in captured.err
    assert "warning: not finished" in captured.out
    text = done(capsys, f"{SMALL} --out run --resume --time-limit 600")
    assert (folder / "run" / RECORDS).read_bytes() == (folder / "whole" / RECORDS).read_bytes()
    assert "not finished" not in text
    assert whole.splitlines()[:9] == text.splitlines()[:9]
    assert main(f"{SMALL} --time-limit 0.000001".split()) == 4
    assert "nothing is kept" in capsys.readouterr().err


def test_samples_out_of_time_are_timeouts(folder: Path, capsys: Capture) -> None:
    text = done(capsys, f"{SMALL} --out run --sample-time-limit 0.000001")
    assert "cannot be reproduced" in text
    assert "0.0 (0-27)" in text
    (network,) = read(folder / "run").networks
    words = {outcome.verdict for sample in network.evaluation.samples for outcome in sample.outcomes}
    assert words == {"violated", "timeout"}


def test_other_weights_do_not_go_on(folder: Path, capsys: Capture) -> None:
    done(capsys, f"{SMALL} --out run")
    done(capsys, "train --hidden 16 --epochs 1 --seed 5 --out other")
    for name in ("model.json", "model.safetensors"):
        (folder / "net" / name).write_bytes((folder / "other" / name).read_bytes())
    assert main(f"{SMALL} --out run --resume".split()) == 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "differs in weights of net" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "least"), [(1, 2), (2, 0), (2, 2)])
def test_ctrl_c_ends_within_two_seconds_and_keeps_what_is_done(folder: Path, jobs: int, least: int) -> None:
    process = begun(folder, f"{LONG} --jobs {jobs}", least)
    workers, start = children(process.pid), time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as terminals do: to the workers too
    _, words = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - start < 2
    units = (folder / "run" / RECORDS).read_bytes().count(b'"kind":"unit"')
    assert units >= least
    # A worker that was just being started may complain after this line that its parent is gone.
    first = words.splitlines()[0]
    assert first == f"interrupted: {units} of 200 units of work are in run; the same command with --resume goes on"
    assert alive(workers) == []


def test_ctrl_c_ends_a_call_that_python_does_not_interrupt() -> None:
    code = (
        "import os, signal, threading, time; from cli.interrupts import promptly\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "with promptly('saved'):\n"
        "    time.sleep(60)\n"
    )
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "saved\n")
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(folder: Path) -> None:
    process = begun(folder, f"{LONG} --jobs 2")
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate(timeout=10)
    assert alive(workers) == []


@pytest.mark.slow
def test_a_killed_worker_is_told(folder: Path) -> None:
    process = begun(folder, f"{LONG} --jobs 2")
    for worker in children(process.pid):
        if "spawn_main" in Path(f"/proc/{worker}/cmdline").read_text():
            os.kill(worker, signal.SIGKILL)
    _, words = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "a worker process was ended from outside" in words


@pytest.mark.slow
def test_fifty_kills_change_no_byte(folder: Path) -> None:
    words = f"{SMALL} --batch 1 --samples 40 --no-layers"
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_runs.py")), "50", *words.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    runs = found.stdout.split()
    assert runs
    for run in runs:
        for name in (RECORDS, MANIFEST):
            assert (folder / run / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_slurm_without_submitit_says_how_to_get_it(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(f"{SMALL} --out run --slurm 2".split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "kafcert[slurm]" in lines[2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit leaves its jobs running
def test_submitted_shards_are_the_run(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit", reason="the extra slurm is not installed")
    assert main(f"{SMALL} --out run --slurm 2".split()) == 2, "where there is no SLURM nothing starts"
    assert "sbatch" in capsys.readouterr().err
    monkeypatch.setattr("cli.slurm.shutil.which", lambda _: "sbatch")
    monkeypatch.setattr(submitit, "AutoExecutor", partial(submitit.AutoExecutor, cluster="local"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert "certify merge" in done(capsys, f"{SMALL} --out run --slurm 2")
    end = time.monotonic() + 60
    while main(["merge", "run/shard-2", "run/shard-1", "--out", "merged"]) and time.monotonic() < end:
        time.sleep(0.5)
    capsys.readouterr()
    done(capsys, f"{SMALL} --out whole")
    assert (folder / "merged" / RECORDS).read_bytes() == (folder / "whole" / RECORDS).read_bytes()


def test_an_alarm_keeps_what_was_found_before_it(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Liar(certify.CROWN):
        """Certifies everything from its third set of samples on."""

        name = "liar"
        left = 2

        def bound(self, *args: object) -> Tensor:
            found = certify.CROWN().bound(*args)  # type: ignore[arg-type]
            Liar.left -= 1
            return found if Liar.left >= 0 else found.clamp(min=1.0)

    monkeypatch.setitem(certify.registry.METHODS, "liar", Liar)
    words = "report net --radius 0.3 --samples 60 --batch 5 --restarts 1 --steps 5 --methods liar --no-layers --out run"
    assert main(words.split()) == 6
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert len(list((folder / "run" / "alarms").glob("*.npz"))) == 1
    (network,) = read(folder / "run").networks
    assert network.evaluation.count >= 10
