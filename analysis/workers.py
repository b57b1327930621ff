"""Units of work computed here, or by processes that each load the networks themselves; always in the order asked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from analysis.chunk import Tick
from analysis.units import Done, Stage, Unit, perform
from certify.errors import CertifyError, InvalidInput

#: Returns the stage, in whatever process calls it: a function of a module, with plain data.
Load = Callable[[], Stage]


def in_turn(stage: Stage, units: Sequence[Unit], deadline: float, tick: Tick) -> Generator[Done, None, None]:
    """Yield every unit, computed in this process; none is begun after the deadline (of ``time.monotonic``)."""
    for unit in units:
        if time.monotonic() > deadline:
            return
        yield perform(stage, unit, tick)


@dataclass
class _Worker:
    """A process, the pipe to it, and the place of the unit that it computes."""

    process: BaseProcess
    pipe: Connection
    place: int | None = None


def side_by_side(
    load: Load, stage: Stage, units: Sequence[Unit], jobs: int, deadline: float, tick: Tick
) -> Generator[Done, None, None]:
    """Yield every unit in order, computed by ``jobs`` processes of one thread each; none is begun after the deadline.

    An error of a unit is raised when its turn comes. The processes end with this generator, or with this process.
    """
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        with _unheard():
            for _ in range(min(jobs, len(units))):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, load), daemon=True)
                process.start()
                theirs.close()
                workers.append(_Worker(process, ours))
        yield from _collect(workers, stage, units, deadline, tick)
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.pipe.close()


@contextmanager
def _unheard() -> Iterator[None]:
    """Processes that are started within the block never hear Ctrl-C, not even while they load: this one answers."""
    resource_tracker.ensure_running()  # started within, it would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(
    workers: list[_Worker], stage: Stage, units: Sequence[Unit], deadline: float, tick: Tick
) -> Iterator[Done]:
    """Hand out units in order and yield what comes back in the same order."""
    found: dict[int, Done | Exception] = {}
    begun, given, failed = 0, 0, False
    while given < len(units):
        for worker in workers:
            if worker.place is None and begun < len(units) and not failed and time.monotonic() <= deadline:
                worker.pipe.send(units[begun].number)
                worker.place, begun = begun, begun + 1
        busy = {worker.pipe: worker for worker in workers if worker.place is not None}
        if not busy:
            return
        for pipe in wait(list(busy)):
            worker = busy[pipe]  # type: ignore[index]  # wait returns what it was given
            assert worker.place is not None
            found[worker.place] = answer = _answer(worker)
            worker.place, failed = None, failed or isinstance(answer, Exception)
        while given in found:
            result = found.pop(given)
            if isinstance(result, Exception):
                raise result
            tick(stage.work(units[given]))
            yield result
            given += 1


def _answer(worker: _Worker) -> Done | Exception:
    try:
        answer: Done | Exception = worker.pipe.recv()
    except (EOFError, ConnectionError):
        worker.process.join(1)
        return InvalidInput(
            f"a worker process was ended from outside (exit code {worker.process.exitcode})",
            "memory for every process to hold the networks",
            "fewer --jobs; with --out, --resume goes on",
        )
    return answer


def _serve(pipe: Connection, load: Load) -> None:
    """What a worker does: compute the units whose numbers come in, until the parent is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    stage: Stage | None = None
    with suppress(EOFError, ConnectionError):
        while True:
            number = pipe.recv()
            try:
                stage = stage or load()
                pipe.send(perform(stage, stage.units[number]))
            except Exception as error:
                pipe.send(_portable(error))


def _portable(error: Exception) -> Exception:
    """The error as it can be sent: those of ours whole, of others the kind and the words."""
    return error if isinstance(error, CertifyError) else RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """Wait for the parent's end, however it comes, and end this process with it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
