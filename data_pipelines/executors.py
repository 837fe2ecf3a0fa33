"""Where tasks run: processes on this machine, Slurm or Ray, by one setting; the rows of a stage and curation share it.

What comes in: a task (called with documents, rank and number of tasks, as datatrove calls it), how many of it there are,
and a folder of marks. What goes out: nothing, once every task is finished; finished ones are skipped when it is called
again. The executors are datatrove's. What is ours: workers find `data_pipelines` whatever folder they start in
(PYTHONPATH in the job script, a runtime environment for Ray), and this process waits until the last task has ended, or
says which did not.

What it does not do: start a Slurm or Ray cluster of many machines. Ray connects to the one that RAY_ADDRESS names, and
starts one on this machine where there is none.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codetune.recipe import settings_from_file
from codetune.slurm import CLUSTER, ClusterSettings

Task = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[1]
LOOK_SECONDS = 2.0
GONE_LOOKS = 5  # times that a job is not in the queue before its missing tasks are given up


def run_tasks(kind: str, task: Task, tasks: int, workers: int, logs: Path, cluster: Path = CLUSTER) -> None:
    """Run every unfinished one of `tasks` tasks, at most `workers` at once, and wait for them.

    `logs` must lie where every machine sees it; so must whatever the task reads and writes.

    Raises:
        ValueError: a task did not finish; the message says where its log is. On this machine, a task's own error.
    """
    logs = logs.resolve()
    workers = max(1, min(workers, tasks))
    if kind == "slurm":
        executor = _slurm(task, tasks, workers, logs, settings_from_file(ClusterSettings, cluster))
    else:
        executor = _ray(task, tasks, workers, logs) if kind == "ray" else _local(task, tasks, workers, logs)
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


def _ray(task: Task, tasks: int, workers: int, logs: Path) -> Any:
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
        mem_per_cpu_gb=0.5,  # what is reserved, not a limit; datatrove's 2 GB would wait for ever on a small machine
        ray_remote_kwargs={"runtime_env": environment},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Slurm


def _slurm(task: Task, tasks: int, workers: int, logs: Path, settings: ClusterSettings) -> Any:
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
        sbatch_args=_sbatch_options(settings),
        with_srun=False,
    )


def _worker_environment(settings: ClusterSettings) -> str:
    lines = [settings.prologue.strip(), f"export PYTHONPATH='{search_path()}'"]
    lines += [f"export {name}='{value}'" for name, value in settings.environment.items()]
    return "\n".join(line for line in lines if line)


def _sbatch_options(settings: ClusterSettings) -> dict[str, str]:
    """`--partition=cpu` as {"partition": "cpu"}; what the cluster file says of GPUs and nodes is about training."""
    given = [option.removeprefix("--").partition("=") for option in settings.options]
    return {name: value for name, _, value in given if not name.startswith(("gpus", "gres", "nodes"))}


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
