"""GPUs by name: memory, peak speed and power, as `make plan` needs them before any is at hand.

What comes in: `8xH100`, `2x8xA100-80`. What goes out: a `Cluster`, or one `ValueError` that says what is known. Peaks are
the makers' dense bf16 figures and equal trl's table, which the run's MFU is measured against, wherever that has the device
(a test compares them; reading it here would mean importing trl, which takes longer than the whole plan). Memory is what
PyTorch reports as total, rounded down: less than the name says, as the driver and error correction keep some.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from codetune.recipe import did_you_mean_hint

GIB = 2**30
GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Gpu:
    """One kind of device."""

    name: str
    memory_bytes: int
    flops: float | None  # dense, bf16; None: not known
    reported: str = ""  # what the driver calls it
    watts: float | None = None  # the most that the maker says the board takes

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


@dataclass(frozen=True)
class Cluster:
    """So many devices of one kind on so many machines."""

    gpu: Gpu
    machines: int
    per_machine: int

    @property
    def count(self) -> int:
        return self.machines * self.per_machine

    def __str__(self) -> str:
        machines = f"{self.machines} machines of " if self.machines > 1 else ""
        return f"{machines}{self.per_machine} x {self.gpu.name}"


def _gpu(name: str, watts: float, memory_gib: float, teraflops: float, reported: str) -> Gpu:
    return Gpu(name, int(memory_gib * GIB), teraflops * 1e12, reported, watts)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40", 400, 39.3, 312, "NVIDIA A100-SXM4-40GB"),
        _gpu("A100-80", 400, 79.1, 312, "NVIDIA A100-SXM4-80GB"),
        _gpu("H100", 700, 79.1, 989, "NVIDIA H100 80GB HBM3"),
        _gpu("H100-PCIe", 350, 79.1, 756, "NVIDIA H100 PCIe"),
        _gpu("H100-NVL", 400, 93.0, 835, "NVIDIA H100 NVL"),
        _gpu("H200", 700, 139.7, 989, "NVIDIA H200"),
        _gpu("H20", 400, 95.0, 148, "NVIDIA H20"),
        _gpu("B200", 1000, 178.3, 2250, "NVIDIA B200"),
        _gpu("L40S", 350, 44.3, 362, "NVIDIA L40S"),
        _gpu("L4", 72, 22.0, 121, "NVIDIA L4"),
        _gpu("A10", 150, 22.0, 125, "NVIDIA A10"),
        _gpu("A10G", 300, 22.0, 125, "NVIDIA A10G"),
        _gpu("A6000", 300, 47.4, 154.85, "NVIDIA RTX A6000"),
        _gpu("RTX3090", 350, 23.6, 71, "NVIDIA GeForce RTX 3090"),
        _gpu("RTX4090", 450, 23.5, 165.2, "NVIDIA GeForce RTX 4090"),
        _gpu("RTX5090", 575, 31.3, 209.5, "NVIDIA GeForce RTX 5090"),
        _gpu("MI300X", 750, 191.5, 1300, "AMD Instinct MI300X"),
    )
}
_ALIASES = {"a100-40gb": "A100-40", "a100-80gb": "A100-80", "h100-80": "H100", "h100-80gb": "H100", "h100-sxm": "H100"}
_ALIASES |= {"3090": "RTX3090", "4090": "RTX4090", "5090": "RTX5090", "rtxa6000": "A6000"}


def find_gpu(name: str) -> Gpu:
    """A kind of GPU by its name, however it is capitalised; `cpu` is this machine.

    Raises:
        ValueError: not a kind that we know.
    """
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    if key == "cpu":
        return Gpu("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None)
    if key == "a100":
        raise ValueError("GPU `A100` comes with 40 or with 80 GB; write A100-40 or A100-80")
    known = {gpu.lower(): gpu for gpu in GPUS} | {gpu.lower().replace("-", ""): gpu for gpu in GPUS}
    known |= {gpu.lower().replace("rtx", "rtx-"): gpu for gpu in GPUS} | _ALIASES
    if key not in known:
        hint = did_you_mean_hint(key, known)
        near = re.search(r"did you mean `(.*)`", hint)
        hint = f"; did you mean {known[near.group(1)]}?" if near else f"; known here: {', '.join(GPUS)}"
        raise ValueError(f"no GPU `{name}` in the table{hint}")
    return GPUS[known[key]]


def device_watts(reported: str) -> float | None:
    """The power of a device by what its driver calls it; None where it is no GPU that we know."""
    return next((gpu.watts for gpu in GPUS.values() if gpu.reported == reported), None)


def parse_cluster(text: str) -> Cluster:
    """Read `8xH100` (one machine up to eight), `2x8xH100` (machines x GPUs each) or `H100` (one).

    Example: `64xA100-80` is 8 machines of 8; `3x4xL40S` is 3 of 4

    Raises:
        ValueError: a GPU that is not known, or a count that is none.
    """
    read = re.fullmatch(r"\s*((?:[-+.\d]+\s*[x×*]\s*)*)(\d{4}|[A-Za-z].*?)\s*", text)
    if read is None:
        raise ValueError(f"GPUs {text!r}: no GPU is named; write 8xH100, or 2x8xH100 for two machines of eight")
    counts, name = re.findall(r"[-+.\d]+", read.group(1)), read.group(2)
    bad = next((count for count in counts if not re.fullmatch(r"[1-9]\d*", count)), None)
    if bad is not None or len(counts) > 2:
        wrong = f"{bad} is no number of GPUs" if bad is not None else "at most machines x GPUs can stand before a name"
        raise ValueError(f"GPUs {text!r}: {wrong}; write 8xH100, or 2x8xH100 for two machines of eight")
    gpu, numbers = find_gpu(name), [int(count) for count in counts]
    if len(numbers) == 2:
        return Cluster(gpu, *numbers)
    count = numbers[0] if numbers else 1
    if count > GPUS_PER_MACHINE and count % GPUS_PER_MACHINE:
        raise ValueError(
            f"GPUs {text!r}: {count} do not fill machines of {GPUS_PER_MACHINE}; say how they stand, machines x GPUs: "
            f"{_even_split(count)}x{name}"
        )
    per_machine = min(count, GPUS_PER_MACHINE)
    return Cluster(gpu, count // per_machine, per_machine)


def _even_split(count: int) -> str:
    per_machine = max(number for number in range(1, GPUS_PER_MACHINE + 1) if count % number == 0)
    return f"{count // per_machine}x{per_machine}"
