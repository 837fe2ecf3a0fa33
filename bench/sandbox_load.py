"""The hostile suite and HumanEval's references again with four busy processes per core beside them: are the verdicts the
same?

Reference: the verdicts of the same programs without the busy processes, in the same run. The busy processes have
sessions of their own, since the kernel shares time between sessions first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from bench.hostile_programs import Watch, cases
from bench.humaneval_programs import references
from codetune.sandbox import ExecutionResult, Job, Limits, Sandbox

MINUTES = 12
BUSY_PER_CORE = 4
# Right programs that use most of their limit: the ones that load turns into time-outs where a clock on the wall decides.
NEARLY = {
    "1.2 s of processor time, limit 2 s": "import time\nwhile time.process_time() < 1.2: pass\n",
    "1.2 s of sleep, limit 2 s": "import time\ntime.sleep(1.2)\n",
    "0.5 s of both, limit 2 s": "import time\ntime.sleep(0.5)\nwhile time.process_time() < 0.6: pass\n",
}


def run(jobs: list[Job]) -> tuple[list[ExecutionResult], float]:
    start = time.monotonic()
    with Sandbox(workers=2) as sandbox:
        return list(sandbox.run_many(jobs)), time.monotonic() - start


def main() -> None:
    with Watch() as watch:
        jobs = {f"{case.family}: {case.name}": case.job(watch.places) for case in cases()}
        jobs |= {candidate.name: candidate.job() for candidate in references()}
        function = "def add(a, b):\n    return a + b\n"
        jobs |= {
            name: Job(text + function, "assert add(1, 2) == 3", "add", limits=Limits(wall_seconds=2))
            for name, text in NEARLY.items()
        }
        quiet, quiet_seconds = run(list(jobs.values()))
        count = BUSY_PER_CORE * (os.cpu_count() or 1)
        command = [sys.executable, "-I", "-S", "-c", "while True: pass"]
        busy = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
        try:
            time.sleep(1)
            loaded, loaded_seconds = run(list(jobs.values()))
        finally:
            for process in busy:
                process.kill()
                process.wait()
    different = [
        f"{name}: {before.verdict} ({before.reason}) alone, {after.verdict} ({after.reason}) under load"
        for name, before, after in zip(jobs, quiet, loaded, strict=True)
        if before.verdict != after.verdict
    ]
    again = [sum(result.ran_again_alone for result in results) for results in (quiet, loaded)]
    print(f"{len(jobs)} programs; {count} busy processes on {os.cpu_count()} cores beside the second run")
    print(
        f"seconds: {quiet_seconds:.0f} without, {loaded_seconds:.0f} with them; "
        f"suspected time-outs run again alone: {again[0]}, {again[1]}"
    )
    print(
        f"waited for a processor: {sum(r.starved_seconds for r in quiet):.0f} s without, "
        f"{sum(r.starved_seconds for r in loaded):.0f} s with them"
    )
    print(f"verdicts that differ: {len(different)} (to reach: 0)")
    for line in different:
        print(f"  {line}")
    print("RESULT " + json.dumps({"programs": len(jobs), "busy": count, "different": different, "again_alone": again}))


if __name__ == "__main__":
    main()
