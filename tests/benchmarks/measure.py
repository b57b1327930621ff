"""Measuring: CPU seconds (median of repeats after a warm-up) and peak memory, each case in a fresh process."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # what the benchmarks share with the tests


def hardware() -> str:
    """Processor, cores and versions, for the head of a table."""
    import torch

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, {os.cpu_count()} cores, one thread; torch {torch.__version__}, Python {platform.python_version()}"


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def growth_mb(run: Callable[[], Any]) -> float:
    """Peak resident memory during ``run`` above what was resident before it, in MB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of what came before, as of a compiler
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def cpu_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median CPU seconds of ``run`` after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def fresh(script: str, *arguments: str, threads: int = 1) -> dict[str, Any]:
    """Run ``script ARGUMENTS`` of this folder in a new process and read the JSON line that it prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))
