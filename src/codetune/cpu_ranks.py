"""Several ranks on a machine without a GPU: everything that the libraries need told there, and nothing else, in one place.

What comes in: the environment that `accelerate launch` sets. What goes out: Accelerate's state such that the launch files
for GPUs run as they are written, with the device alone replaced: ranks that talk by gloo, ZeRO that shares out, FSDP2 that
shards. It is for tests and for trying a layout out: the arithmetic is that of the GPU path, the speed is not. It is asked
for by a variable:

    export CODETUNE_CPU_RANKS=1
    accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 2 -m codetune.train --recipe ...

Not asked for, a launch for GPUs that finds none is refused: a node whose driver is gone would train for days at a thousandth
of its speed. Where a GPU is there, nothing in this module does anything.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import training_args

ACCELERATE_INIT = AcceleratorState.__init__
ASKED = "CODETUNE_CPU_RANKS"


def settle_deepspeed() -> None:
    """Tell DeepSpeed that there is no GPU, where there is none: on import it would look for one and warn on stderr.

    Every command calls it first; libraries import DeepSpeed where it is installed, whether or not it is used.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def settle() -> None:
    """Prepare Accelerate for ranks on the CPU, before it is asked for anything.

    Raises:
        ValueError: the launch is one for GPUs, none is seen, and the CPU was not asked for.
    """
    settle_deepspeed()
    if torch.accelerator.is_available() or not launched_for_gpus():
        return
    if os.environ.get(ASKED) != "1":
        raise ValueError(
            "the launch is one for GPUs, and this machine shows none (torch.accelerator.is_available() is False); mend the "
            f"driver or CUDA_VISIBLE_DEVICES, or set {ASKED}=1 to run its ranks on the CPU (slow: for tests)"
        )
    if _says("ACCELERATE_USE_DEEPSPEED"):
        # subtle: without `use_cpu`, see below, bf16 is refused where there is no GPU; `use_bf16` has asked the machine
        training_args.__dict__["is_torch_bf16_gpu_available"] = lambda: True
    if _says("ACCELERATE_USE_FSDP") and AcceleratorState.__init__ is ACCELERATE_INIT:
        _let_accelerate_shard_on_cpus()


def launched_for_gpus() -> bool:
    """Whether a launcher started this process, and not for the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("0", "false", "no"):
        return True  # Accelerate's launcher of a single process says which of the two it is for
    return _has_a_group() and not _says("ACCELERATE_USE_CPU")


def _has_a_group() -> bool:
    """Whether ranks are to talk to each other, or one alone through a library that wants to be talked to."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return "LOCAL_RANK" in os.environ and (several or _says("ACCELERATE_USE_DEEPSPEED") or _says("ACCELERATE_USE_FSDP"))


def device_arguments() -> dict[str, Any]:
    """What TrainingArguments must be told of the device; nothing where there is a GPU."""
    if torch.accelerator.is_available():
        return {}
    if launched_for_gpus() and _has_a_group():
        # subtle: with `use_cpu` Accelerate forgets DeepSpeed and gives DDP; without a backend each rank is alone
        return {"use_cpu": not _says("ACCELERATE_USE_DEEPSPEED"), "ddp_backend": "gloo"}
    return {"use_cpu": True}


def _let_accelerate_shard_on_cpus() -> None:
    """Make FSDP of what Accelerate calls MULTI_CPU: it chooses FSDP by the kind of device, and gives DDP without a word."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        ACCELERATE_INIT(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


def _says(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
