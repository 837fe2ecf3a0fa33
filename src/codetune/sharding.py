"""Models shared out over ranks by DeepSpeed ZeRO or FSDP2: what the launcher asked for, and whether it is what came of it.

What comes in: the environment that `accelerate launch` sets, and the model as it was prepared for training. What goes out: a
`Layout`, written into every checkpoint so that a continuation knows what it may read, or one sentence of refusal. Accelerate
gives plain data parallelism, or ranks that each train alone, where it cannot do what was asked, and says nothing of it.

A checkpoint of whole files (one process, DDP) may be read by any number of ranks. FSDP2's is dealt anew over any number of
ranks. ZeRO's optimizer files belong to one number of ranks, until they are converted, once, for every other:

    python -m codetune.sharding runs/7b/stage1/checkpoints/checkpoint-1000

What it does not do: turn the checkpoint of one kind of layout into another kind's. The finished model is whole files always.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, Shard

from codetune import cpu_ranks
from codetune.artifacts import MANIFEST, exclusive, fail, read_json, seal_folder, whole_folder, why_invalid
from codetune.recipe import Recipe

WHOLE = ("single", "ddp")  # kinds whose checkpoints are whole files
UNIVERSAL = "_universal"  # what DeepSpeed's converted folder is called behind `global_step<N>`


@dataclass(frozen=True)
class Layout:
    """How a model is laid out over ranks."""

    kind: str  # single, ddp, zero1, zero2, zero3, fsdp2
    ranks: int
    sequence_ranks: int = 1  # ranks that share each row

    @property
    def data_ranks(self) -> int:
        """Ranks that read rows of their own."""
        return self.ranks // self.sequence_ranks

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def asked_layout(environment: Mapping[str, str] = os.environ) -> Layout:
    """What the launcher asks for, in the environment it sets.

    Raises:
        ValueError: FSDP1, a ZeRO stage that shares nothing out, context parallelism, or ranks that do not divide.
    """
    ranks = int(environment.get("WORLD_SIZE", "1"))
    if int(environment.get("PARALLELISM_CONFIG_CP_SIZE", "1")) > 1:
        raise ValueError(
            "the launcher's file says parallelism_config_cp_size above 1: context parallelism drops the mask between packed "
            "documents, and they would see each other; use recipes/accelerate/ulysses.yaml"
        )
    sequence_ranks = int(environment.get("PARALLELISM_CONFIG_SP_SIZE", "1"))
    if ranks % sequence_ranks:
        raise ValueError(
            f"the launcher's file shares each row between {sequence_ranks} ranks (parallelism_config_sp_size), which "
            f"{ranks} ranks cannot be dealt into; start a multiple of {sequence_ranks}"
        )
    if _says(environment, "ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("1", "2", "3"):
            raise ValueError(
                f"the launcher's file says zero_stage {stage}, which shares nothing out; write 2 or 3, or use ddp.yaml"
            )
        return Layout(f"zero{stage}", ranks, sequence_ranks)
    if sequence_ranks > 1:
        raise ValueError(
            "the launcher's file shares rows between ranks (parallelism_config_sp_size), which needs DeepSpeed; use "
            "recipes/accelerate/ulysses.yaml"
        )
    if _says(environment, "ACCELERATE_USE_FSDP"):
        version = environment.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(
                f"the launcher's file says fsdp_version {version}, which is on its way out of the libraries; write "
                "fsdp_version: 2 under fsdp_config, as in recipes/accelerate/fsdp2.yaml"
            )
        return Layout("fsdp2", ranks)
    return Layout("ddp" if ranks > 1 else "single", ranks)


def check_recipe(asked: Layout, recipe: Recipe) -> None:
    """Whether rows that are shared between ranks are what the recipe can be trained on.

    Raises:
        ValueError: rows that cannot be dealt evenly, or an attention under which packed documents would see each other.
    """
    if asked.sequence_ranks == 1:
        return
    data = recipe.need_data()
    if data.sequence_tokens % asked.sequence_ranks:
        raise ValueError(
            f"`data.sequence_tokens` is {data.sequence_tokens}, which the {asked.sequence_ranks} ranks that share a row "
            "(parallelism_config_sp_size) cannot be dealt evenly"
        )
    if data.packing.isolate_documents and not recipe.model.attention.startswith("flash"):
        raise ValueError(
            f"`model.attention` is {recipe.model.attention}, for which DeepSpeed drops the mask where ranks share rows: "
            "packed documents would see each other. Write model.attention: flash_attention_2 (on GPUs), or "
            "data.packing.isolate_documents: false, or launch without parallelism_config_sp_size"
        )


def check_shared_out(asked: Layout, accelerator: Any, model: Any) -> None:
    """Whether the model as prepared is laid out over ranks as the launcher asked; every rank looks at its own part.

    Raises:
        ValueError: fewer ranks, plain copies where parts were asked for, or parts that are whole.
    """
    found = _found_wrong(asked, accelerator, model)
    if found is not None:
        raise ValueError(
            f"the launcher asked for {asked.kind} over {asked.ranks} rank(s), but {found}: each rank would train alone or "
            "hold everything. Launch with a file out of recipes/accelerate, by `accelerate launch --config_file`"
        )


def _found_wrong(asked: Layout, accelerator: Any, model: Any) -> str | None:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if (ranks, accelerator.num_processes) != (asked.ranks, asked.ranks):
        return f"PyTorch sees {ranks} and Accelerate {accelerator.num_processes}"
    zero = asked.kind.startswith("zero")
    wanted = DistributedType.DEEPSPEED if zero else DistributedType.FSDP if asked.kind == "fsdp2" else None
    if wanted is not None and accelerator.distributed_type != wanted:
        return f"Accelerate chose {accelerator.distributed_type.value}"
    if asked.kind == "ddp" and not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return f"Accelerate chose {accelerator.distributed_type.value}, whose model is a plain {type(model).__name__}"
    if asked.kind == "fsdp2":
        whole = [name for name, parameter in model.named_parameters() if not _is_shared_out(parameter, asked.ranks)]
        return f"{whole[0]} and {len(whole) - 1} more parameters are whole on each rank" if whole else None
    if zero:
        engine: Any = model
        stage, partitions = engine.zero_optimization_stage(), engine.seq_dp_world_size
        if (f"zero{int(stage)}", partitions) != (asked.kind, asked.ranks):
            return f"DeepSpeed runs stage {int(stage)} over {partitions}"
        if asked.kind == "zero3":
            whole = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "ds_tensor")]
            return f"{whole[0]} and {len(whole) - 1} more parameters are whole on each rank" if whole else None
    return None


def _is_shared_out(parameter: torch.Tensor, ranks: int) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    return parameter.device_mesh.size() == ranks and any(isinstance(place, Shard) for place in parameter.placements)


# ---------------------------------------------------------------------------------------------------------------------
# Continuing on other ranks


def check_continuation(checkpoint: Path, written: Mapping[str, Any] | None, asked: Layout) -> None:
    """Whether a checkpoint with this layout in its manifest can be read under the layout asked for.

    Raises:
        ValueError: another kind of layout, or ZeRO's files for another number of ranks; the message says what to run.
    """
    then = Layout(**written) if written else Layout("single", 1)
    if then.kind == asked.kind or (then.kind in WHOLE and asked.kind in WHOLE):
        if not asked.kind.startswith("zero") or then.ranks == asked.ranks or universal_folder(checkpoint) is not None:
            return
        raise ValueError(
            f"{checkpoint} was written by {then.ranks} rank(s) under {then.kind}, and this is {asked.ranks}: DeepSpeed's "
            f"optimizer files belong to a number of ranks. Convert them once (python -m codetune.sharding {checkpoint}) "
            f"and start again, or start {then.ranks} rank(s)"
        )
    own = "one process or ddp.yaml" if then.kind in WHOLE else f"{then.kind}.yaml"
    raise ValueError(
        f"{checkpoint} was written under {then.kind}, whose optimizer files {asked.kind} cannot read; go on under {own}, "
        "with any number of ranks that shares the batch evenly"
    )


def universal_folder(checkpoint: Path) -> Path | None:
    """DeepSpeed's converted state in a checkpoint, or None."""
    return next((path for path in checkpoint.glob(f"global_step*{UNIVERSAL}") if path.is_dir()), None)


def convert(checkpoint: Path) -> None:
    """Add to a ZeRO checkpoint the form of its optimizer state that any number of ranks reads; it stays whole throughout.

    Raises:
        ValueError: no sealed checkpoint, none of ZeRO's, or its run is being trained.
    """
    if (reason := why_invalid(checkpoint)) is not None:
        raise ValueError(f"{checkpoint}: not a whole checkpoint, {reason}")
    manifest = read_json(checkpoint / MANIFEST)
    kind = (manifest.get("layout") or {}).get("kind", "single")
    if not kind.startswith("zero"):
        raise ValueError(f"{checkpoint} was written under {kind}, and any number of ranks can read it; nothing to convert")
    if universal_folder(checkpoint) is not None:
        return
    (native,) = [path for path in checkpoint.glob("global_step*") if path.is_dir()]
    # the lock of training: a session that begins meanwhile would take the folder here for one that a kill has left
    with exclusive(checkpoint.resolve().parents[1], "converting a checkpoint"), whole_folder(checkpoint) as folder:
        shutil.copytree(checkpoint, folder, copy_function=_link_or_copy, dirs_exist_ok=True)
        (folder / MANIFEST).unlink()
        _ds_to_universal(folder / native.name, folder / f"{native.name}{UNIVERSAL}")
        (folder / f"latest{UNIVERSAL}").write_text(f"{native.name}{UNIVERSAL}", encoding="utf-8")
        seal_folder(folder, {name: value for name, value in manifest.items() if name != "files"})


def _link_or_copy(source: str, target: str) -> str:
    """The same file under a second name where the file system can; checkpoints are never written to."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _ds_to_universal(native: Path, converted: Path) -> None:
    """DeepSpeed's own converter; what it prints is of its insides."""
    from deepspeed.checkpoint import ds_to_universal

    workers = max(1, min(4, os.cpu_count() or 1))
    arguments = argparse.Namespace(
        input_folder=str(native),
        output_folder=str(converted),
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # a mark that Megatron writes and others do not; nothing of ours is in it
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(arguments)


def settle_accelerator(
    accelerator: Any, recipe: Recipe, asked: Layout, checkpoint: Path | None, written: Mapping[str, Any] | None
) -> None:
    """What must be said before the model is shared out, and the launcher's file cannot know."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)  # none where Accelerate chose another layout: refused later
    if asked.kind == "fsdp2" and plugin is not None and plugin.mixed_precision_policy is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # instead of the library's, which adds gradients up in bf16 and rounds losses to it (7.6463 to 7.6562)
        dtype = plugin.mixed_precision_policy.param_dtype
        plugin.mixed_precision_policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)
    if asked.sequence_ranks > 1:
        accelerator.parallelism_config.sp_handler.sp_attn_implementation = recipe.model.attention
    if checkpoint is not None and written and asked.kind.startswith("zero") and written["ranks"] != asked.ranks:
        accelerator.state.deepspeed_plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}


def _says(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("1", "true", "yes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert one checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m codetune.sharding", description=convert.__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder checkpoint-<step> of a run under ZeRO")
    options = parser.parse_args(arguments)
    cpu_ranks.settle_deepspeed()
    try:
        convert(options.checkpoint)
    except ValueError as error:
        fail(str(error))
    print(f"{options.checkpoint}: can be read by any number of ranks now")


if __name__ == "__main__":
    main()
