"""What 10,000 runs leave behind: processes, mounts, folders, files, memory groups, descriptors.

Reference: the same counts before the first run. One program in ten leaves daemons, locked folders, deep paths or large
files, or is killed; the others are a plain function and its tests.
"""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

from bench.hostile_programs import DAEMONS, FILES, RIGHT, TESTS, sandbox_folders, sandbox_processes
from codetune.sandbox import MIB, Job, Limits, Sandbox, cgroup_places

MINUTES = 4
RUNS = 10_000
LITTER = [
    *DAEMONS.values(),
    FILES["leaves locked folders, pipes and deep paths"],
    "open('big', 'wb').write(b'x' * (20 << 20))\n" + RIGHT,
    "import os\nos.abort()\n",
    "x = bytearray(20 << 30)\n",
]


def counts() -> dict[str, int]:
    """What may be left, counted."""
    groups = cgroup_places()
    folders = [
        name for place in (groups[0] if groups else []) for name in os.listdir(place) if name.startswith("codetune-sandbox")
    ]
    return {
        "processes": len(sandbox_processes()),
        "mounts": len(Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()),
        "folders and files": len(sandbox_folders()),
        "memory groups": len(folders),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "System V objects": sum(
            len(Path(f"/proc/sysvipc/{kind}").read_text().splitlines()) - 1 for kind in ("shm", "sem", "msg")
        ),
    }


def main() -> None:
    before, memory = counts(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = Limits(wall_seconds=5, memory_bytes=256 * MIB)
    plain = Job(RIGHT, TESTS, "add", limits=limits)
    jobs = (
        Job(LITTER[number // 10 % len(LITTER)], TESTS, "add", limits=limits) if number % 10 == 9 else plain
        for number in range(RUNS)
    )
    start = time.monotonic()
    with Sandbox(workers=2) as sandbox:
        passed = sum(result.passed for result in sandbox.run_many(jobs))
        tier = sandbox.tier
    seconds = time.monotonic() - start
    after = counts()
    print(f"isolation: {tier}; {RUNS:,} runs in {seconds:.0f} s, {passed:,} passed")
    for name, count in before.items():
        print(f"{name:<18} before {count:>4}, after {after[name]:>4}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"memory of the supervisor grew by {grown:.0f} MB")
    left = {name: after[name] - before[name] for name in before}
    print(f"left behind: {sum(left.values())} (to reach: 0)")
    print("RESULT " + json.dumps({"runs": RUNS, "left": left, "seconds": round(seconds), "passed": passed}))


if __name__ == "__main__":
    main()
