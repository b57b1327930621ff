"""Ctrl-C ends the command soon, even where one call into a library takes minutes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cli.complaints import INTERRUPTED

#: Seconds that Python is given to end in good order.
PATIENCE = 1.5


@contextmanager
def promptly(words: str) -> Iterator[None]:
    """Within the block, end the process with ``words`` where Ctrl-C is not answered in time.

    Python raises ``KeyboardInterrupt`` between two instructions, thus not within a long call; the wake-up pipe is
    written at once, and a thread waits on it. Elsewhere than in the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    over = threading.Event()
    thread = threading.Thread(target=_wait, args=(reading, over, words), daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(writing)  # the end of the pipe ends the thread
        thread.join()
        os.close(reading)


def _wait(reading: int, over: threading.Event, words: str) -> None:
    while signals := os.read(reading, 1):
        if signals[0] == signal.SIGINT:
            over.wait(PATIENCE)
            if not over.is_set():
                sys.stderr.write(f"{words}\n")
                sys.stderr.flush()
                os._exit(INTERRUPTED)
