"""A real Slurm of two nodes on this machine, for the tests that ask for one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Slurm:
    """A cluster of two nodes on this machine, as root, with a key, ports and a folder of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a short path: munge's socket has room for 100 characters
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.pid_files = [self.folder / name for name in ("munged.pid", "slurmctld.pid", "n1.pid", "n2.pid")]

    def start(self) -> None:
        """Raises RuntimeError, with the last words of whoever did not start."""
        folder = self.folder
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        for name in ("state", "n1", "n2"):
            (folder / name).mkdir()
        host = socket.gethostname()
        ports = [free_port() for _ in range(3)]
        nodes = "".join(
            f"NodeName=n{place} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000\n"
            for place, port in enumerate(ports[1:], 1)
        )
        (folder / "slurm.conf").write_text(
            f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={ports[0]}\nSlurmUser=root\n"
            f"AuthType=auth/munge\nAuthInfo=socket={folder}/socket\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n"
            f"MpiDefault=none\nSelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nStateSaveLocation={folder}/state\n"
            f"SlurmdSpoolDir={folder}/%n\nSlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/%n.pid\n"
            f"SlurmctldLogFile={folder}/slurmctld.log\nSlurmdLogFile={folder}/%n.log\nReturnToService=2\nJobRequeue=1\n"
            f"KillWait=120\nSlurmdParameters=config_overrides\n{nodes}PartitionName=all Nodes=n1,n2 Default=YES State=UP\n",
            encoding="utf-8",
        )
        munge = ["munged", "--force", f"--socket={folder}/socket", f"--key-file={folder}/key"]
        munge += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"]
        configuration = ["-f", str(folder / "slurm.conf")]
        for command in (munge, ["slurmctld", *configuration], *(["slurmd", *configuration, "-N", n] for n in ("n1", "n2"))):
            self.call(command)
        idle = None
        for _ in range(60):
            idle = subprocess.run(
                ["sinfo", "-h", "-o", "%T"], env=self.environment, capture_output=True, text=True, check=False
            )
            if idle.stdout.split() == ["idle"]:
                return
            time.sleep(0.5)
        raise RuntimeError(f"its nodes are not idle after 30 s: {idle}")

    def call(self, command: list[str]) -> str:
        path = f"{self.environment['PATH']}:/usr/sbin"
        done = subprocess.run(
            command, env={**self.environment, "PATH": path}, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        return self.call(["scontrol", "show", "job", job]).partition("JobState=")[2].split()[0]

    def stop(self) -> None:
        for path in reversed(self.pid_files):
            if path.is_file() and path.read_text().strip():
                try:
                    os.kill(int(path.read_text()), signal.SIGKILL)
                except ProcessLookupError:
                    continue
        shutil.rmtree(self.folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def real_slurm() -> Iterator[Slurm]:
    """A cluster, where one starts; else the test is skipped, and says why."""
    missing = [
        name
        for name in ("munged", "slurmctld", "slurmd", "sbatch")
        if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("starting a cluster takes root")
    if os.environ.get("CODETUNE_TEST_SLURM") != "1":
        pytest.skip("minutes, and its moments are those of an idle machine: set CODETUNE_TEST_SLURM=1 to run it")
    cluster = Slurm()
    try:
        try:
            cluster.start()
        except RuntimeError as error:
            pytest.skip(f"the cluster does not start here: {error}")
        yield cluster
    finally:
        cluster.stop()
