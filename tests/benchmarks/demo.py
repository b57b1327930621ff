"""Wall time, CPU time and peak memory of `certify demo` in a fresh process and a temporary folder."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time

from measure import ROOT, hardware


def main() -> None:
    """Run it and print one line."""
    print(hardware().replace("one thread", "all threads"))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cli", "demo", "--out", f"{folder}/demo"], cwd=ROOT, check=True)
        wall = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"demo: {wall:.1f} s wall, {used.ru_utime + used.ru_stime:.1f} s CPU, {used.ru_maxrss / 1024:.0f} MB peak")


if __name__ == "__main__":
    main()
