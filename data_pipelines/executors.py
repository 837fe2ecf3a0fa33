"""Where tasks run: processes on this machine, Slurm or Ray, by one setting, which rows, curation and self-instruct share.

What comes in: a task (called with documents, rank and number of tasks, as datatrove calls it), how many of it there are,
and a folder of marks. What goes out: nothing, once every task is finished; finished ones are skipped when it is called
again. The executors are datatrove's. What is ours: workers find `data_pipelines`, and what a recipe names, whatever folder
they start in (PYTHONPATH in the job script, a runtime environment for Ray, `InFolder`), and this process waits until the
last task has ended, or says which did not.

What it does not do: start a Slurm or Ray cluster of many machines. Ray connects to the one that RAY_ADDRESS names, and
starts one on this machine where there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codetune.recipe import settings_from_file
from codetune.slurm import CLUSTER, ClusterSettings

Task = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[1]
LOOK_SECONDS = 2.0
GPU_TASK_GB = 64  # of memory asked of Slurm for each GPU of a task that does not take a whole node
GONE_LOOKS = 5  # times that a job is not in the queue before its missing tasks are given up


def worker_count(text: str) -> int:
    """A number of workers, as a command is given it: 1 or more."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text}; write 1 or more, or leave it out")
    return count


@dataclass(frozen=True)
class InFolder:
    """A task in the folder where it was given out: the paths of a recipe are relative to it, and workers begin elsewhere."""

    task: Task
    folder: str

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        with contextlib.chdir(self.folder):
            return self.task(data, rank, world_size)


def run_tasks(kind: str, task: Task, tasks: int, workers: int, logs: Path, cluster: Path = CLUSTER, gpus: int = 0) -> None:
    """Run every unfinished one of `tasks` tasks, each with so many GPUs, at most `workers` at once, and wait for them.

    `logs` must lie where every machine sees it; so must whatever the task reads and writes.

    Raises:
        ValueError: a task did not finish; the message says where its log is. On this machine, a task's own error.
    """
    logs = logs.resolve()
    task = InFolder(task, os.getcwd())
    workers = max(1, min(workers, tasks))
    if kind == "slurm":
        executor = _slurm(task, tasks, workers, logs, settings_from_file(ClusterSettings, cluster), gpus)
    elif kind == "ray":
        executor = _ray(task, tasks, workers, logs, gpus)
    else:
        executor = _local(task, tasks, workers, logs)
    executor.run()
    if kind == "slurm":
        _wait_for_slurm(executor)
    missing = executor.get_incomplete_ranks(range(tasks), skip_completed=True)
    if missing:
        raise ValueError(
            f"{len(missing)} of {tasks} tasks did not finish (first: {missing[0]}); logs: {logs}; mend what they "
            f"say and run the same command again{_last_words(logs, missing[0])}"
        )


def search_path() -> str:
    """PYTHONPATH of a worker: the repository and its sources before what is there."""
    own = [str(ROOT), str(ROOT / "src")]
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part not in own]
    return os.pathsep.join([*own, *others])


def _last_words(logs: Path, rank: int) -> str:
    """The error at the end of a task's log, or of what Slurm has kept of it."""
    names = [logs / "logs" / f"task_{rank:05d}.log", *sorted((logs / "slurm_logs").glob("*.out"))]
    lines = [line for name in names if name.is_file() for line in name.read_text(errors="replace").splitlines()]
    errors = [line.strip() for line in lines if "Error" in line and "Traceback" not in line]
    return f": {errors[-1]}" if errors else ""


def _local(task: Task, tasks: int, workers: int, logs: Path) -> Any:
    from datatrove.executor import LocalPipelineExecutor

    return LocalPipelineExecutor(
        pipeline=[task], tasks=tasks, workers=workers, logging_dir=str(logs), skip_completed=True, start_method="spawn"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Ray


def _ray(task: Task, tasks: int, workers: int, logs: Path, gpus: int) -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError("`executor: ray` needs the package ray: pip install -e '.[ray]'") from None
    from datatrove.executor.ray import RayPipelineExecutor

    environment = {"env_vars": {"PYTHONPATH": search_path()}}
    if not ray.is_initialized():
        given = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, configure_logging=False, runtime_env=environment, **given)
    return RayPipelineExecutor(
        pipeline=[task],
        tasks=tasks,
        workers=workers,
        logging_dir=str(logs),
        gpus_per_task=gpus,
        mem_per_cpu_gb=0.5,  # what is reserved, not a limit; datatrove's 2 GB would wait for ever on a small machine
        ray_remote_kwargs={"runtime_env": environment},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Slurm


def _slurm(task: Task, tasks: int, workers: int, logs: Path, settings: ClusterSettings, gpus: int) -> Any:
    from data_pipelines.slurm_tasks import SlurmTasks

    return SlurmTasks(
        pipeline=[task],
        tasks=tasks,
        time=settings.time,
        partition="",
        qos="",
        workers=workers,
        logging_dir=str(logs),
        slurm_logs_folder=str(logs / "slurm_logs"),
        job_name="codetune-data",
        env_command=_worker_environment(settings),
        sbatch_args=_sbatch_options(settings, gpus),
        with_srun=False,
    )


def _worker_environment(settings: ClusterSettings) -> str:
    lines = [settings.prologue.strip(), f"export PYTHONPATH='{search_path()}'"]
    lines += [f"export {name}='{value}'" for name, value in settings.environment.items()]
    return "\n".join(line for line in lines if line)


def _sbatch_options(settings: ClusterSettings, gpus: int) -> dict[str, str | None]:
    """`--partition=cpu` as {"partition": "cpu"}; what the cluster file says of GPUs and nodes is about training.

    A task with GPUs has as many as it needs, and their part of a node's processors and memory.

    Raises:
        ValueError: a node has not so many GPUs.
    """
    given = [option.removeprefix("--").partition("=") for option in settings.options]
    options: dict[str, str | None] = {
        name: value for name, _, value in given if not name.startswith(("gpus", "gres", "nodes"))
    }
    if not gpus:
        return options
    if gpus > settings.gpus_per_node:
        raise ValueError(
            f"a task needs {gpus} GPUs, and a node has {settings.gpus_per_node} (`gpus_per_node` of the cluster's file); "
            "lower `tensor_parallel` or `data_parallel` of its engine"
        )
    options["gpus-per-node"] = str(gpus)
    if settings.cpus_per_node:
        options["cpus-per-task"] = str(max(1, settings.cpus_per_node * gpus // settings.gpus_per_node))
    # of memory the cluster's file can say how much a node has; 0 is all of it, for a task that takes the whole node
    options["mem"] = "0" if gpus == settings.gpus_per_node else f"{GPU_TASK_GB * gpus}G"
    options["mem-per-cpu"] = None  # datatrove's, which goes
    return options


def _wait_for_slurm(executor: Any) -> None:
    """Until every task is marked as finished, or the job has left the queue without it."""
    if executor.job_id in (None, -1):
        return
    gone = 0
    while executor.get_incomplete_ranks(range(executor.tasks), skip_completed=True):
        asked = subprocess.run(["squeue", "--noheader", "--job", str(executor.job_id)], capture_output=True, text=True)
        gone = 0 if asked.stdout.strip() else gone + 1
        if gone >= GONE_LOOKS:
            return
        time.sleep(LOOK_SECONDS)
