"""Kill a command at random moments and let it go on: ``python killed_runs.py KILLS WORDS...`` prints the folders.

The interpreter is loaded once and forked for every start, so that the kills meet the run and not the imports.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path


def start(words: list[str]) -> int:
    """Run a command in a forked process, silently; return its number."""
    child = os.fork()
    if child == 0:
        from cli.main import main

        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os._exit(main(words))
    return child


def survives(child: int, seconds: float) -> bool:
    """Let the process run for some seconds, then kill it; return whether it was done before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main(kills: int, words: list[str]) -> None:
    """Kill runs, one after the other, each until it is done in spite of it."""
    from cli.main import main as certify

    with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
        certify([*words, "--out", "warm"])  # loads what a run needs, before the forks
        begin = time.monotonic()
        certify([*words, "--out", "whole"])
    seconds, source, run = time.monotonic() - begin, random.Random(0), 0
    while kills:
        run += 1
        out = Path(f"killed-{run}")
        while not survives(start([*words, "--out", str(out), "--resume"]), source.uniform(0, seconds)):
            kills -= 1
            if not kills:  # the last one may end in peace
                seconds = 1e9
        print(out, flush=True)  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
