"""datatrove's Slurm executor with what its job script lacks, and what such a job runs.

What comes in: tasks, from `executors.run_tasks`. What goes out: an array job. datatrove starts workers by a console script
that is looked for on PATH and does not see the repository; here they are started by this very Python, from any folder.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor


class SlurmTasks(SlurmPipelineExecutor):
    """Says nothing of a partition that was not given, and needs neither PATH nor scontrol in a job."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        args = super().get_sbatch_args(max_array)
        return {
            key: value for key, value in args.items() if value is not None and (value or key not in ("partition", "qos"))
        }

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """The script, its last line replaced: it would start a console script that may not be there."""
        _, _, pickled = run_script.partition("launch_pickled_pipeline ")
        worker = f"'{sys.executable}' -m data_pipelines.slurm_tasks '{pickled}'"
        return super().get_launch_file_contents(sbatch_args, worker)

    def launch_merge_stats(self) -> None:
        """Datatrove's own statistics are not read here; ours are files beside the output."""

    def get_distributed_env(self, node_rank: int = -1) -> Any:
        """A task has one node: no need to ask for the names of others."""
        return {
            "datatrove_node_ips": os.environ.get("SLURM_NODELIST", ""),
            "datatrove_cpus_per_task": str(self.cpus_per_task),
            "datatrove_mem_per_cpu": str(self.mem_per_cpu_gb),
            "datatrove_gpus_on_node": "0",
            "datatrove_executor": "SLURM",
        }


def main() -> None:
    """The tasks of this job's place in the array, unpickled."""
    import dill

    with open(sys.argv[1], "rb") as file:
        dill.load(file).run()


if __name__ == "__main__":
    main()
