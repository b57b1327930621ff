"""A run as shards on a SLURM cluster, through submitit."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

from certify.errors import MissingDependency
from cli.running import Asked, carried_out

#: Minutes that a job has where no --time-limit says it; the environment's SBATCH_TIMELIMIT goes before.
MINUTES = 24 * 60


def submit(asked: Asked, out: Path, shards: int) -> list[str]:
    """Submit a job per shard and return their names; sbatch reads partition and account from SBATCH_PARTITION, ...

    Every shard goes to a folder of its own in ``out`` and is resumed where the cluster requeues its job. Raises
    ``MissingDependency`` without submitit, and without SLURM: so many jobs would start here at once.
    """
    try:
        import submitit
    except ImportError:
        raise MissingDependency(
            "submitit is not installed", "the extra slurm", "pip install 'kafcert[slurm]'"
        ) from None
    if shutil.which("sbatch") is None:
        raise MissingDependency(
            "no SLURM here: sbatch is not found", "a cluster's login node", "--jobs N on this machine"
        )
    limit = asked.run.time_limit
    executor = submitit.AutoExecutor(folder=out / "slurm")
    executor.update_parameters(
        name="certify",
        cpus_per_task=asked.run.jobs,
        timeout_min=MINUTES if limit is None else math.ceil(limit / 60) + 5,  # what has begun by then may end
    )
    with executor.batch():
        jobs = [executor.submit(compute, _shard(asked, out, place, shards)) for place in range(1, shards + 1)]
    return [job.job_id for job in jobs]


def compute(asked: Asked) -> int:
    """Compute one shard, in a job, and return the number of its units that are done."""
    return carried_out(asked).done


def _shard(asked: Asked, out: Path, place: int, shards: int) -> Asked:
    folder = out / f"shard-{place}"
    return replace(asked, run=replace(asked.run, out=folder, resume=True, shard=f"{place}/{shards}", slurm=None))
