"""Job scripts for Slurm, and what a job does when a session of training has ended.

What comes in: a recipe, a file of recipes/accelerate, a number of nodes and what is particular to the cluster
(recipes/slurm/cluster.yaml). What goes out: `runs/<size>/<name>/slurm/job.sbatch`, which holds everything it needs at fixed
paths, because Slurm runs a copy of it from a folder of its own, days later and more than once:

    python -m codetune.slurm render --recipe recipes/lcft/7b.yaml --nodes 4 --accelerate recipes/accelerate/zero3.yaml
    sbatch runs/7b/lcft/slurm/job.sbatch

A job starts again by itself until the run is finished. Asked to stop (time up, preempted), with a checkpoint: again, as
often as it takes. Ended by a message about something to mend: not again. Killed, or ended by anything else (a lost node,
NCCL, memory): again, until `max_failures` such ends follow one another without a new checkpoint between them.

What it does not do: talk to Slurm, but for `--submit`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from codetune.artifacts import fail, read_json, write_json
from codetune.recipe import Recipe, load_recipe, settings_from_file
from codetune.steps import derive_steps

BODY = Path("recipes/slurm/launch.sh")
CLUSTER = Path("recipes/slurm/cluster.yaml")
SCRIPT = "job.sbatch"


@dataclass(frozen=True)
class ClusterSettings:
    """What a cluster is called and has."""

    options: tuple[str, ...] = ()  # of sbatch, as they are
    time: str = "24:00:00"  # of one start, as sbatch takes it
    gpus_per_node: int = field(default=8, metadata={"low": 0})
    processes_per_node: int | None = field(default=None, metadata={"low": 1})  # none: one per GPU
    cpus_per_node: int | None = field(default=None, metadata={"low": 1})  # none: the cluster's own default, as for the next
    memory_per_node: str | None = None  # as sbatch takes it
    lead_seconds: int = field(default=600, metadata={"low": 30})  # before the time ends, when the run is asked to stop
    max_failures: int = field(default=3, metadata={"low": 1})  # in a row, without a new checkpoint
    main_address: str | None = None  # of the first node; none: its name
    prologue: str = ""  # bash, before training
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        return self.processes_per_node or max(self.gpus_per_node, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Before: the script


def job_script(
    recipe_path: Path, overrides: Sequence[str], nodes: int, accelerate: Path | None, cluster: ClusterSettings, root: Path
) -> tuple[Recipe, str]:
    """The recipe, and the text of its job script.

    Raises:
        ValueError: the recipe does not load, its batch does not divide by the ranks, there is no such accelerate file, or
            several processes are asked for without one.
    """
    recipe = load_recipe(recipe_path, overrides)
    world = nodes * cluster.processes
    if accelerate is None and world > 1:
        raise ValueError(
            f"{nodes} node(s) with {cluster.processes} process(es) each need a file of recipes/accelerate; write "
            "ACCELERATE=recipes/accelerate/zero3.yaml, or NODES=1 with `processes_per_node: 1`"
        )
    if accelerate is not None and not accelerate.is_file():
        beside = ", ".join(sorted(path.name for path in accelerate.parent.glob("*.yaml"))) or "nothing"
        raise ValueError(f"{accelerate}: no such file; beside it: {beside}")
    derive_steps(recipe, world // ranks_per_row(accelerate, world))
    body = root / BODY
    if not body.is_file():
        raise ValueError(f"{body} is not there; run this from the root of the repository")
    run_dir = (root / recipe.run_dir).resolve()
    folder = run_dir / "slurm"
    module = "codetune.sft" if recipe.data is not None and recipe.data.chat is not None else "codetune.train"
    training = ["-m", module, "--recipe", str(recipe_path)]
    training += [part for override in overrides for part in ("--set", override)]
    variables = {
        "root": root.resolve(),
        "run_dir": run_dir,
        "folder": folder,
        "script": folder / SCRIPT,
        "python": root.resolve() / sys.executable,  # an absolute path stays as it is
        "accelerate": accelerate or "",
        "processes_per_node": cluster.processes,
        "lead_seconds": cluster.lead_seconds,
        "max_failures": cluster.max_failures,
    }
    lines = ["#!/usr/bin/env bash"]
    lines += [f"#SBATCH {option}" for option in sbatch_options(recipe, nodes, cluster, folder)]
    lines += ["", f"# {recipe_path} on {nodes} node(s); made by `make slurm`, which writes it anew", ""]
    lines += [f"{name}={shlex.quote(str(value))}" for name, value in variables.items()]
    lines += [f"main_address={_expanded(cluster.main_address or '')}"]
    lines += [f"training=({' '.join(map(shlex.quote, training))})"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    # subtle: what sites give people to load their modules seldom stands `set -u`, which the body begins with
    lines += ["", *cluster.prologue.splitlines(), "", body.read_text(encoding="utf-8").partition("\n")[2]]
    return recipe, "\n".join(lines)


def ranks_per_row(accelerate: Path | None, world: int) -> int:
    """How many ranks share each row: 1, but for sequence parallelism.

    Raises:
        ValueError: the ranks cannot be dealt so.
    """
    if accelerate is None:
        return 1
    settings = yaml.safe_load(accelerate.read_text(encoding="utf-8")).get("parallelism_config") or {}
    share = settings.get("parallelism_config_sp_size") or 1
    if world % share:
        raise ValueError(f"{accelerate} has {share} ranks share a row, and {world} ranks cannot be dealt so")
    return share


def sbatch_options(recipe: Recipe, nodes: int, cluster: ClusterSettings, folder: Path) -> list[str]:
    """Options in the head of the script; the cluster's own come last, and win."""
    options = [
        f"--job-name={recipe.size}-{recipe.name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--time={cluster.time}",
    ]
    options += [f"--gpus-per-node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []
    options += [f"--cpus-per-task={cluster.cpus_per_node}"] if cluster.cpus_per_node else []
    options += [f"--mem={cluster.memory_per_node}"] if cluster.memory_per_node else []
    options += [
        "--requeue",
        "--open-mode=append",
        f"--signal=USR1@{cluster.lead_seconds}",
        f"--output={shlex.quote(f'{folder}/%j.log')}",
    ]
    return [*options, *cluster.options]


def notes(recipe: Recipe, root: Path) -> list[str]:
    """What the job will miss unless it is made before it starts, a sentence each."""
    found = []
    if not (root / recipe.rows_dir / "manifest.json").is_file():
        found.append(f"{recipe.rows_dir} is not there yet: make the rows before the job starts")
    parent = root / recipe.parent_path
    if recipe.parent is not None and "/" not in recipe.parent and not parent.is_dir():
        found.append(f"{recipe.parent_path} is not there yet: make the parent before the job starts")
    return found


def _expanded(value: str) -> str:
    """In double quotes, so that $(hostname) is asked where the script runs."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`") + '"'


# ---------------------------------------------------------------------------------------------------------------------
# After: what next


def verdict(run_dir: Path, folder: Path, job: str, max_failures: int, code: str) -> str:
    """`finished`, `again` or `end`, and why, from `ended.json` that the session left, or did not.

    Failures in a row are counted in `<folder>/<job>.failures.json`; a checkpoint that is new since the last one starts the
    count again.
    """
    ended = read_json(run_dir / "ended.json") if (run_dir / "ended.json").is_file() else {"state": "killed"}
    state, reason = (
        ended["state"],
        ended.get("reason") or f"no word from the run, {'and its time is up' if code == 'time' else f'code {code}'}",
    )
    if state == "finished":
        return "finished the run is finished"
    if state == "stopped":
        return f"again the run was asked to stop ({reason}), and goes on from {ended.get('checkpoint') or 'its parent'}"
    if state == "interrupted":
        return f"end the run was interrupted ({reason})"
    if state == "failed" and reason.startswith("ValueError: "):
        return f"end something is to be mended first: {reason.removeprefix('ValueError: ')}"
    record = folder / f"{job}.failures.json"
    newest = max((int(path.name.removeprefix("checkpoint-")) for path in _checkpoints(run_dir)), default=0)
    before = read_json(record) if record.is_file() else {"failures": 0, "step": newest}
    failures = 1 if newest > before["step"] else before["failures"] + 1
    write_json(record, {"failures": failures, "step": newest})
    if failures >= max_failures:
        return f"end {failures} failures in a row without a checkpoint after step {newest}; the last: {reason}"
    return f"again failure {failures} of at most {max_failures} in a row without a new checkpoint: {reason}"


def _checkpoints(run_dir: Path) -> list[Path]:
    found = (run_dir / "checkpoints").glob("checkpoint-*")
    return [path for path in found if path.name.removeprefix("checkpoint-").isdigit() and (path / "manifest.json").is_file()]


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def main(arguments: Sequence[str] | None = None) -> None:
    """`render` writes a job script; `after` says, in the job, what follows."""
    parser = argparse.ArgumentParser(prog="python -m codetune.slurm", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    render = commands.add_parser("render", help="write a job script")
    render.add_argument("--recipe", type=Path, required=True)
    render.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.key=value")
    render.add_argument("--nodes", type=int, default=1)
    render.add_argument("--accelerate", type=Path, help="a file of recipes/accelerate")
    render.add_argument("--cluster", type=Path, default=CLUSTER)
    render.add_argument("--submit", action="store_true", help="call sbatch")
    after = commands.add_parser("after", help="what follows on a session that has ended (job scripts call it)")
    after.add_argument("--run-dir", type=Path, required=True)
    after.add_argument("--folder", type=Path, required=True)
    after.add_argument("--job", required=True)
    after.add_argument("--max-failures", type=int, required=True)
    after.add_argument("--code", required=True, help="its exit code, or `time` where its time is up")
    options = parser.parse_args(arguments)
    try:
        if options.command == "after":
            print(verdict(options.run_dir, options.folder, options.job, options.max_failures, options.code))
        else:
            render_script(options)
    except ValueError as error:
        fail(str(error))


def render_script(options: Any) -> None:
    """Write the script, say how it is submitted, and submit it if that was asked for."""
    if options.nodes < 1:
        raise ValueError(f"NODES is {options.nodes}; write at least 1")
    root = Path.cwd()
    cluster = settings_from_file(ClusterSettings, options.cluster)
    recipe, text = job_script(options.recipe, options.set, options.nodes, options.accelerate, cluster, root)
    script = root / recipe.run_dir / "slurm" / SCRIPT
    script.parent.mkdir(parents=True, exist_ok=True)  # Slurm does not make the folder of its log, and fails without a word
    script.write_text(text, encoding="utf-8")
    script.chmod(0o755)
    for note in notes(recipe, root):
        print(f"note: {note}")
    print(f"written: {script.relative_to(root) if script.is_relative_to(root) else script}")
    print(f"sbatch {shlex.quote(os.path.relpath(script, root))}", flush=True)
    if not options.submit:
        return
    if shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch here; submit the script on a login node of the cluster")
    if subprocess.run(["sbatch", str(script)], check=False).returncode:
        raise ValueError(f"sbatch refused {script}; the cluster's names are in {options.cluster}")


if __name__ == "__main__":
    main()
