"""Job scripts: what is in them, run by bash with stand-ins for Slurm, and on a real slurmctld where there is one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from slurm_cluster import Slurm, real_slurm

from codetune.artifacts import read_json, write_json
from codetune.recipe import load_recipe, settings_from_file
from codetune.slurm import SCRIPT, ClusterSettings, job_script, main, verdict
from codetune.train import train

ROOT = Path(__file__).parents[2]
ZERO3 = Path("recipes/accelerate/zero3.yaml")
STEPS = 120
LONG = {
    "training.train_tokens": STEPS * 256,
    "training.evaluate_tokens": STEPS * 256,
    "training.save_tokens": 20 * 256,
    "probes.infill_prompts": 0,
}
PATIENCE_SECONDS = 900  # on machines that do much else
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CODETUNE_CPU_RANKS": "1"}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# The script


def test_a_script_for_four_nodes_says_what_they_run(tmp_path: Path) -> None:
    settings = [f"runs={tmp_path}/my runs", "training.micro_batch_rows=4"]
    cluster = ClusterSettings(
        options=("--partition=gpu",), time="12:00:00", memory_per_node="512G", prologue="module load cuda"
    )
    recipe, text = job_script(ROOT / "recipes/stage1/7b.yaml", settings, 4, ROOT / ZERO3, cluster, ROOT)
    lines = text.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--nodes=4", "--gpus-per-node=8", "--requeue", "--signal=USR1@600", "--mem=512G"} <= set(options)
    assert options[-1] == "--partition=gpu"  # the cluster's own come last, and win
    assert f"--output='{tmp_path}/my runs/7b/stage1/slurm/%j.log'" in options
    assert lines.index("module load cuda") < lines.index("set -euo pipefail")
    assert "processes_per_node=8" in lines
    assert recipe.need_training().micro_batch_rows == 4
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_shellcheck_has_nothing_to_say(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    _, text = job_script(ROOT / "recipes/stage1/7b.yaml", [], 4, ROOT / ZERO3, ClusterSettings(), ROOT)
    script = tmp_path / "job.sh"
    script.write_text(text, encoding="utf-8")
    for path in (script, ROOT / "recipes/slurm/launch.sh"):
        checked = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("nodes", "accelerate", "message"),
    [
        (4, None, r"4 node\(s\) with 8 process\(es\) each need a file of recipes/accelerate"),
        (4, ROOT / "recipes/accelerate/zero4.yaml", r"zero4.yaml: no such file; beside it: .*zero3.yaml"),
        (3, ROOT / ZERO3, r"which 24 ranks cannot share evenly"),
        (3, ROOT / "recipes/accelerate/ulysses.yaml", r"which 12 ranks cannot share evenly"),  # two of them share a row
    ],
)
def test_what_cannot_run_is_refused_before_it_waits_in_a_queue(nodes: int, accelerate: Path | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job_script(ROOT / "recipes/stage1/7b.yaml", [], nodes, accelerate, ClusterSettings(), ROOT)


def test_a_cluster_file_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("gpus_pre_node: 4\n", encoding="utf-8")
    with pytest.raises(ValueError, match="unknown key `gpus_pre_node`; did you mean `gpus_per_node`"):
        settings_from_file(ClusterSettings, path)
    path.write_text("environment: {OMP_NUM_THREADS: 8}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="`environment.OMP_NUM_THREADS` takes text, found the number 8"):
        settings_from_file(ClusterSettings, path)


def test_the_command_writes_the_script_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    command = ["render", "--recipe", "recipes/stage1/7b.yaml", "--nodes", "2", "--accelerate", str(ZERO3)]
    main([*command, "--set", f"runs={tmp_path}"])
    out = capsys.readouterr().out
    script = tmp_path / "7b" / "stage1" / "slurm" / SCRIPT
    assert os.access(script, os.X_OK)
    assert "rows is not there yet: make the rows before the job starts" in out
    assert "base/model is not there yet: make the parent" in out
    assert "sbatch " in out
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        main([*command, "--set", f"runs={tmp_path}", "--submit"])
    assert "there is no sbatch here" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# What follows


def judge(run: Path, code: str = "1", **ended: Any) -> str:
    if ended:
        write_json(run / "ended.json", ended)
    return verdict(run, run / "slurm", "7", max_failures=3, code=code)


def checkpoint(run: Path, step: int) -> None:
    write_json(run / "checkpoints" / f"checkpoint-{step}" / "manifest.json", {})


def test_a_finished_run_is_finished_and_one_that_was_asked_to_stop_goes_on(tmp_path: Path) -> None:
    assert judge(tmp_path, state="finished").startswith("finished ")
    for _ in range(9):  # however often
        assert judge(tmp_path, state="stopped", reason="SIGUSR1", checkpoint="checkpoint-8").startswith("again ")


def test_what_a_person_must_mend_is_not_tried_again(tmp_path: Path) -> None:
    told = judge(tmp_path, state="failed", reason="ValueError: rows are missing; build them")
    assert told == "end something is to be mended first: rows are missing; build them"
    assert judge(tmp_path, state="interrupted", reason="SIGINT").startswith("end ")


def test_failures_in_a_row_end_the_job_and_a_new_checkpoint_starts_their_count_again(tmp_path: Path) -> None:
    assert judge(tmp_path, code="137").startswith("again failure 1 of at most 3")
    assert judge(tmp_path, state="failed", reason="RuntimeError: NCCL").startswith("again failure 2 of at most 3")
    checkpoint(tmp_path, 20)
    assert judge(tmp_path, state="failed", reason="RuntimeError: NCCL").startswith("again failure 1 of at most 3")
    checkpoint(tmp_path, 5)  # older than what is there: no progress
    (tmp_path / "checkpoints" / "checkpoint-40").mkdir()  # not whole: none either
    assert judge(tmp_path, state="failed", reason="RuntimeError: NCCL").startswith("again failure 2 of at most 3")
    last = judge(tmp_path, state="failed", reason="RuntimeError: NCCL")
    assert last == "end 3 failures in a row without a checkpoint after step 20; the last: RuntimeError: NCCL"


# ---------------------------------------------------------------------------------------------------------------------
# Run by bash, with stand-ins for srun and scontrol that do here what Slurm does elsewhere

SRUN = r"""#!/usr/bin/env bash
# `srun OPTIONS bash ...`: a process a node, numbered, its output where --output says; passes USR1 and TERM on
nodes=1
while [[ $1 == --* ]]; do
  case $1 in --nodes=*) nodes=${1#*=} ;; --output=*) output=${1#*=} ;; esac
  shift
done
tasks=()
for ((node = 0; node < nodes; node++)); do
  log=${output//%j/$SLURM_JOB_ID}
  SLURM_NODEID=$node "$@" >> "${log//%n/$node}" 2>&1 &
  tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -TERM "${tasks[@]}"' TERM
echo $$ > "$STAND_IN/srun.pid"
code=0
for task in "${tasks[@]}"; do
  while true; do
    this=0
    wait "$task" || this=$?
    kill -0 "$task" 2> /dev/null || break
  done
  ((this == 0)) || code=$this
done
exit $code
"""
SCONTROL = r"""#!/usr/bin/env bash
echo "$*" >> "$STAND_IN/scontrol.calls"
[[ $1 == show ]] && echo 127.0.0.1
exit 0
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    folder = tmp_path / "stand-ins"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def start_job(script: Path, stand_ins: Path, restart: int) -> subprocess.Popen[str]:
    """The script as Slurm runs it: a copy, in a folder of its own, from elsewhere."""
    elsewhere = stand_ins / "spool"
    elsewhere.mkdir(exist_ok=True)
    copy = shutil.copy(script, elsewhere / "slurm_script")
    environment = {**os.environ, "PATH": f"{stand_ins}:{os.environ['PATH']}", "STAND_IN": str(stand_ins)}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here"}
    environment |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
    return subprocess.Popen(
        ["bash", str(copy)], cwd=elsewhere, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.05)


def reached(run: Path, step: int) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.is_file() and f'"step": {step},' in metrics.read_text(encoding="utf-8")


def write_script(recipe_path: Path, nodes: int, accelerate: Path | None, cluster: ClusterSettings) -> Path:
    recipe, text = job_script(recipe_path, [], nodes, accelerate, cluster, ROOT)
    script = recipe.run_dir / "slurm" / SCRIPT
    script.parent.mkdir(parents=True)
    script.write_text(text, encoding="utf-8")
    return script


@pytest.mark.slow
def test_a_job_stopped_and_started_again_ends_with_the_weights_of_one_that_was_not(
    make_run: Callable[..., Path], stand_ins: Path
) -> None:
    straight = train(load_recipe(make_run("straight", **LONG)))
    path = make_run("job", **LONG)
    recipe = load_recipe(path)
    cluster = ClusterSettings(gpus_per_node=0, lead_seconds=120, environment=ENVIRONMENT)
    script = write_script(path, 1, None, cluster)

    first = start_job(script, stand_ins, restart=0)
    wait_for(lambda: reached(recipe.run_dir, 5), "step 5")
    os.kill(int((stand_ins / "srun.pid").read_text()), signal.SIGUSR1)  # what --signal=USR1@120 does
    out, _ = first.communicate(timeout=PATIENCE_SECONDS)
    assert first.returncode == 75, out
    assert "the run was asked to stop (SIGUSR1), and goes on from checkpoint-" in out
    assert (stand_ins / "scontrol.calls").read_text().splitlines()[-1] == "requeue 42"

    (stand_ins / "squeue").write_text(
        "#!/bin/sh\necho 2001-01-01T00:00:00\n", encoding="utf-8"
    )  # when the time is up: it is
    (stand_ins / "squeue").chmod(0o755)
    second = start_job(script, stand_ins, restart=1)
    wait_for(lambda: reached(recipe.run_dir, 60), "step 60")
    os.kill(int((stand_ins / "srun.pid").read_text()), signal.SIGTERM)  # as Slurm does then, to ranks and shell
    second.send_signal(signal.SIGTERM)
    out, _ = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == 75, out
    assert "start 2: the time is up, and the run has not ended yet" in out
    # whichever came first: the end that was not waited for, or a checkpoint
    in_time = "the run was asked to stop (SIGTERM), and goes on from checkpoint-" in out
    assert in_time or "failure 1 of at most 3 in a row without a new checkpoint: no word from the run, and its time" in out
    assert (stand_ins / "scontrol.calls").read_text().count("requeue 42") == 2
    assert read_json(recipe.run_dir / "ended.json")["reason"] == "SIGTERM"  # it has saved all the same

    third = start_job(script, stand_ins, restart=2)
    out, _ = third.communicate(timeout=PATIENCE_SECONDS)
    assert third.returncode == 0, out
    assert "start 3: the run is finished" in out
    assert (recipe.model_dir / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_job_with_something_to_mend_ends_and_says_what(make_run: Callable[..., Path], stand_ins: Path) -> None:
    path = make_run("job", rows=False)
    cluster = ClusterSettings(gpus_per_node=0, lead_seconds=120, environment=ENVIRONMENT)
    job = start_job(write_script(path, 1, None, cluster), stand_ins, restart=0)
    out, _ = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 2
    assert "something is to be mended first: " in out
    assert "make data" in out
    assert "requeue" not in (stand_ins / "scontrol.calls").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# On a real slurmctld with two slurmd, two nodes of one rank


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    with real_slurm() as cluster:
        yield cluster


@pytest.mark.slow
def test_a_real_slurm_stops_requeues_and_finishes_a_run_of_two_nodes(make_run: Callable[..., Path], slurm: Slurm) -> None:
    straight = train(load_recipe(make_run("straight", **LONG)))
    path = make_run("job", **LONG)
    recipe = load_recipe(path)
    settings = ClusterSettings(
        gpus_per_node=0, time="00:30:00", lead_seconds=110, main_address="127.0.0.1", environment=ENVIRONMENT
    )
    script = write_script(path, 2, ROOT / "recipes/accelerate/ddp.yaml", settings)
    job = slurm.call(["sbatch", "--parsable", str(script)])
    log = recipe.run_dir / "slurm" / f"{job}.log"

    wait_for(lambda: reached(recipe.run_dir, 5), "step 5")
    slurm.call(["scancel", "--signal=USR1", job])  # what --signal=USR1@110 does before the time is up
    wait_for(lambda: slurm.state(job) == "PENDING", "the first requeue")
    assert read_json(recipe.run_dir / "ended.json")["reason"] == "SIGUSR1"
    assert "start 1: the run was asked to stop (SIGUSR1), and goes on from checkpoint-" in log.read_text()

    slurm.call(["scontrol", "update", f"jobid={job}", "StartTime=now"])  # it would wait for two minutes
    wait_for(lambda: reached(recipe.run_dir, 60), "step 60")
    slurm.call(["scontrol", "requeue", job])  # as preemption does: TERM to everything
    wait_for(lambda: slurm.state(job) == "PENDING", "the second requeue")
    assert read_json(recipe.run_dir / "ended.json")["reason"] == "SIGTERM"

    slurm.call(["scontrol", "update", f"jobid={job}", "StartTime=now"])
    wait_for(lambda: slurm.state(job) in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"), "the end")
    assert slurm.state(job) == "COMPLETED", log.read_text()
    assert "start 3: the run is finished" in log.read_text()
    assert read_json(recipe.model_dir / "manifest.json")["hardware"]["devices"] == 2
    for name, tensor in weights_of(straight).items():
        torch.testing.assert_close(weights_of(recipe.model_dir)[name], tensor, atol=1e-4, rtol=0)
