"""Continued training on packed rows: stage1, python, lcft (paper Sec. 2.2 to 2.4 and 2.6).

What comes in: a recipe, its rows (`make data`) and its parent. What goes out: `runs/<size>/<name>/model`, an ordinary
Hugging Face folder with `recipe.yaml` and `manifest.json`, and beside it `metrics.jsonl`. One path for every stage and every
number of devices:

    python -m codetune.train --recipe recipes/stage1/tiny.yaml
    accelerate launch -m codetune.train --recipe recipes/stage1/7b.yaml --set training.micro_batch_rows=2

Started again, it goes on from the newest whole checkpoint and ends with the same weights, to the bit, as if it had not
stopped (same number of ranks and threads). It ends with code 0 when the model is there, 75 when it was asked to stop and has
saved (start it again), 130 after Ctrl-C, 2 with a message about something to mend. Weight decay is on matrices, embedding
and head included, and not on norms.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from codetune import adapter, cpu_ranks, long_probes, lora, probes, rope, sharding
from codetune.artifacts import (
    FULL_DISK,
    HELD_OUT,
    MANIFEST,
    SKIPPED_STEPS,
    HeldOutSample,
    Rows,
    cannot_write,
    exclusive,
    fail,
    model_hash,
    newest_valid_checkpoint,
    open_rows,
    read_held_out,
    read_json,
    seal_folder,
    software_versions,
    whole_folder,
    why_invalid,
    write_json,
)
from codetune.callbacks import IsolationCheck, MetricsFile, ProgressBar, RunControl, keep_lines_up_to
from codetune.checkpoints import estimated_save_seconds, longest_save_seconds, remove_leftovers
from codetune.collate import RowCollator, RowDataset
from codetune.guard import SpikeWatch
from codetune.lengths import length_table, trained_lengths
from codetune.model import (
    Parent,
    check_parent,
    copy_tokenizer,
    load_model,
    open_parent,
    peak_flops,
    training_flops_per_token,
    use_bf16,
)
from codetune.recipe import DECIDE_NO_ROW, Recipe, load_recipe
from codetune.steps import Steps, derive_steps
from codetune.stopping import ENDED, EXIT_CODES, Interrupted, Requests, StopAgreed, end_of_budget, write_ended
from codetune.trainer import Ledger, RowTrainer, SafeTraining, Session

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# What may change between a run and its continuation: machine settings, how often something is looked at, rows to leave out.
# Everything else is part of what the run is.
FREE_TO_CHANGE = (
    "runs",
    "embedded",
    "probes",
    "model.attention",
    "model.activation_checkpointing",
    "model.loss_head",
    "training.micro_batch_rows",
    "training.loader_workers",
    "training.report_to",
    "training.log_tokens",
    "training.evaluate_tokens",
    "training.save_tokens",
    "training.keep_checkpoints",
    "training.keep_tokens",
    "training.background_saves",
    "training.spike_deviations",
    "training.spikes",
    "training.max_skipped_in_a_row",
    "training.skip_rows",
)


@dataclass(frozen=True)
class StageKind:
    """What one kind of stage adds to the path that all share; the defaults are those of stage1, python and lcft."""

    arguments: Callable[[Recipe, Steps, bool], TrainingArguments] = adapter.training_arguments
    make: Callable[..., SafeTraining] = RowTrainer  # the trainer, from (model, args, train_dataset, data_collator, session)
    # looks at rows and parent before anything is loaded; raises ValueError
    check: Callable[[Recipe, Rows, Parent], None] = lambda recipe, rows, parent: None
    # what is measured besides, at the end, for the manifest
    measure: Callable[[Recipe, SafeTraining, Parent, list[HeldOutSample]], dict[str, Any]] = lambda *_: {}
    complete: Callable[[Recipe, Path], None] = lambda recipe, folder: None  # adds to the folder of the finished model


def train(
    recipe: Recipe,
    minutes: float | None = None,
    grace_seconds: float | None = None,
    kind: StageKind | None = None,
) -> Path:
    """Train as the recipe says, and return the folder of the finished model.

    `minutes` is a budget that began with the process: the run saves and ends before it does. `grace_seconds` is how long
    after a signal the machine waits before it kills: a save that is not sealed by then is given up.

    Raises:
        ValueError: rows, parent, output folder, launcher and recipe do not fit together; the message says which and what
            to do.
        Interrupted: asked to stop; what the run can go on from is whole.
    """
    requests = Requests(recipe.run_dir, is_main_process(), end_of_budget(minutes), grace_seconds)
    with exclusive(recipe.run_dir, "training") if is_main_process() else contextlib.nullcontext(), ended(recipe):
        if is_main_process():
            remove_leftovers(recipe.run_dir, recipe.model_dir.name)
            remove_leftovers(recipe.run_dir, recipe.adapter_dir.name)
        if is_finished(recipe):
            say(f"{recipe.model_dir} is there already, made with this recipe; remove it to train again")
            return recipe.model_dir
        for name in requests.remove_old_files():
            say(f"{recipe.run_dir / name} is from before this run began; removed")
        with requests.listen():
            return run(recipe, requests, kind or StageKind())


@contextlib.contextmanager
def ended(recipe: Recipe) -> Iterator[None]:
    """Leave `ended.json`, which says how the session ended; the main rank's."""
    if not is_main_process():
        yield
        return
    (recipe.run_dir / ENDED).unlink(missing_ok=True)
    try:
        yield
    except Interrupted as end:
        state = "stopped" if end.exit_code == EXIT_CODES["stopped"] else "interrupted"
        checkpoint = None if end.checkpoint is None else end.checkpoint.name
        write_ended(recipe.run_dir, state, reason=end.reason, checkpoint=checkpoint)
        raise
    except KeyboardInterrupt:
        write_ended(recipe.run_dir, "interrupted", reason="SIGINT, twice")
        raise
    except Exception as error:
        with contextlib.suppress(OSError):  # a disk that is full has no room for this either; the error itself is told
            write_ended(recipe.run_dir, "failed", reason=f"{type(error).__name__}: {error}")
        raise
    write_ended(recipe.run_dir, "finished")


def run(recipe: Recipe, requests: Requests, kind: StageKind) -> Path:
    """Train from the newest whole checkpoint, or from the parent, to the end."""
    rows = open_rows(recipe.rows_dir)
    check_rows(recipe, rows)
    parent = open_parent(recipe)
    check_parent(recipe, parent, rows)
    kind.check(recipe, rows, parent)
    layout = sharding.asked_layout()
    sharding.check_recipe(layout, recipe)
    steps = derive_steps(recipe, layout.data_ranks)
    claim_output_folder(recipe)
    checkpoint = find_checkpoint(recipe)
    written = None
    if checkpoint is not None:
        manifest = read_json(checkpoint / MANIFEST)
        refuse_other_inputs(recipe, checkpoint, manifest["parent"], parent.describe(), manifest["rows"], rows.manifest)
        written = manifest.get("layout")
        sharding.check_continuation(checkpoint, written, layout)

    # before the model is loaded: they tell the library how its weights are to be shared out
    bf16 = use_bf16(recipe)
    adapter.check_reporters(recipe.need_training().report_to)
    arguments = kind.arguments(recipe, steps, bf16)
    adapter.check_arguments(arguments, layout.ranks, bf16)
    if recipe.model.lora is not None:
        lora.check_layout(recipe.model.lora, parent.codec, layout.kind)
    check_spikes(recipe, layout.kind)

    dataset = RowDataset(rows, recipe.seed, steps.rows)
    collator = make_collator(recipe, rows, parent, rows_are_shared=layout.sequence_ranks > 1)
    samples = read_held_out(rows.path / HELD_OUT)
    model = load_model(recipe, parent)
    trainer = make_trainer(kind, recipe, steps, layout, rows, parent, model, arguments, dataset, collator, samples, requests)
    restore_session(recipe, trainer.session, checkpoint)
    sharding.settle_accelerator(trainer.accelerator, recipe, layout, checkpoint, written)
    prepare_to_stop(recipe, trainer)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.finish_save()
        newest = recipe.checkpoints_dir / f"checkpoint-{trainer.state.global_step}"
        if requests.stop is not None:
            raise Interrupted(requests.stop, newest)
        assert trainer.state.global_step == steps.total, f"made {trainer.state.global_step} steps of {steps.total}"
        rows_read = None if recipe.need_training().loader_workers else dataset.rows_read  # workers count for themselves
        return export(kind, recipe, trainer, rows, parent, samples, resumed_from=checkpoint, rows_read=rows_read)
    except StopAgreed:  # while the finished model was being measured
        assert requests.stop is not None
        requests.answer()()
        raise Interrupted(requests.stop, recipe.checkpoints_dir / f"checkpoint-{steps.total}") from None
    except KeyboardInterrupt:
        trainer.writer.abandon()
        raise
    finally:
        if sys.exc_info()[0] is not KeyboardInterrupt:
            trainer.writer.wait()  # also after an error: nothing is written once the folder is another session's


def prepare_to_stop(recipe: Recipe, trainer: SafeTraining) -> None:
    """What the time budget needs to know of saves, and what is to be done when one is given up."""
    requests, folder, model = trainer.session.requests, recipe.checkpoints_dir, trainer.model
    if not is_main_process():
        return
    requests.save_seconds = longest_save_seconds(folder)
    if requests.end is not None and not requests.save_seconds and model is not None:
        requests.save_seconds = estimated_save_seconds(folder, adapter.checkpoint_bytes(model))

    def give_up() -> str:
        trainer.writer.abandon()
        for name in (recipe.model_dir.name, recipe.adapter_dir.name):
            remove_leftovers(recipe.run_dir, name)
        newest, _ = newest_valid_checkpoint(folder, check_hashes=False)  # there is no time left to read them
        write_ended(
            recipe.run_dir, "stopped", reason=f"{requests.reason()}, and given up", checkpoint=newest and newest.name
        )
        goes_on = f"goes on from {newest}" if newest is not None else "begins anew"
        return f"given up: the time ran out before the run had ended by itself; the same command {goes_on}"

    requests.on_give_up = give_up


# ---------------------------------------------------------------------------------------------------------------------
# What must fit before anything is loaded


def check_rows(recipe: Recipe, rows: Rows) -> None:
    """Whether the rows are those of the recipe.

    Raises:
        ValueError: they were built from other settings, which the message names, or rows to skip are not there.
    """
    built, wanted = rows.manifest["recipe"], recipe.to_dict()
    differences = differing(
        {"data": built["data"], "seed": built["seed"]}, {"data": wanted["data"], "seed": wanted["seed"]}, free=FREE_TO_CHANGE
    )
    if differences:
        raise ValueError(
            f"{rows.path} was built from other settings: "
            f"{describe_differences(differences, 'in the rows', 'in the recipe')}. Build them "
            "again with `make data`, or put the recipe back"
        )
    missing = [number for number in recipe.need_training().skip_rows if not 0 <= number < len(rows)]
    if missing:
        raise ValueError(
            f"`training.skip_rows` names {', '.join(map(str, missing[:4]))}, but the rows in {rows.path} are numbered 0 to "
            f"{len(rows) - 1}; take it out"
        )


def check_spikes(recipe: Recipe, layout: str) -> None:
    """Whether steps whose loss leaps can be left out here.

    Raises:
        ValueError: DeepSpeed's engine has updated by the time a leap is known.
    """
    if recipe.need_training().spikes == "skip" and layout.startswith("zero"):
        raise ValueError(
            "`training.spikes` is skip, which DeepSpeed cannot do: its engine updates before the gradient norm is known; "
            "write record, or launch with recipes/accelerate/fsdp2.yaml"
        )


def claim_output_folder(recipe: Recipe) -> None:
    """Write the recipe into the folder of checkpoints, or refuse a folder that holds those of another.

    Raises:
        ValueError: other settings than the run was started with, or no permission to write.
    """
    folder = recipe.checkpoints_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_main_process():
            remove_leftovers(folder, "checkpoint")
        known = folder / "recipe.json"
        if known.is_file() and any(folder.glob("checkpoint-*")):
            refuse_other_recipe(recipe, read_json(known), folder)
        if is_main_process():
            write_json(known, recipe.to_dict())
    except OSError as error:
        raise ValueError(cannot_write(folder, error)) from error


def is_finished(recipe: Recipe) -> bool:
    """Whether the finished model is there, whole.

    Raises:
        ValueError: it was made from another recipe, parent or rows.
    """
    folder = recipe.model_dir
    if not (folder / MANIFEST).is_file() or why_invalid(folder, check_hashes=False) is not None:
        return False
    manifest = read_json(folder / MANIFEST)
    refuse_other_recipe(recipe, manifest["recipe"], folder)
    parent, rows = Path(recipe.parent_path), recipe.rows_dir / MANIFEST
    refuse_other_inputs(
        recipe,
        folder,
        manifest["parent"],
        {"hash": model_hash(parent)} if parent.is_dir() else {},  # a finished model outlives what it was made of
        manifest["rows"]["fingerprint"],
        read_json(rows) if rows.is_file() else {},
    )
    return True


def refuse_other_inputs(
    recipe: Recipe,
    folder: Path,
    parent_then: Mapping[str, Any],
    parent_now: Mapping[str, Any],
    rows_then: str,
    rows_manifest_now: Mapping[str, Any],
) -> None:
    """Whether `folder` was made from the parent and the rows at hand; what is not known is not compared.

    Raises:
        ValueError: one of them has changed since.
    """
    changed = [
        f"another parent than {recipe.parent_path} is now ({name} {parent_then[name]} then, {parent_now[name]} now)"
        for name in ("hash", "commit")
        if parent_then.get(name) and parent_now.get(name) and parent_then[name] != parent_now[name]
    ]
    if rows_manifest_now and rows_then != rows_manifest_now["fingerprint"]:
        changed.append(f"other rows than those in {recipe.rows_dir} now")
    if changed:
        raise ValueError(
            f"{folder} was trained on {' and on '.join(changed)}; put back what was there, or remove {recipe.model_dir} and "
            f"{recipe.checkpoints_dir} to start anew"
        )


def refuse_other_recipe(recipe: Recipe, known: Mapping[str, Any], folder: Path) -> None:
    differences = differing(known, recipe.to_dict(), free=FREE_TO_CHANGE)
    if differences:
        raise ValueError(
            f"{folder} belongs to another recipe: {describe_differences(differences, 'there', 'here')}. Put the recipe "
            "back, give "
            f"this run another `name`, or remove {folder}"
        )


def differing(known: Any, wanted: Any, free: Sequence[str], key: str = "") -> list[tuple[str, Any, Any]]:
    """Keys with other values, but for those in `free`.

    Example: {"a": {"b": 1}}, {"a": {"b": 2}} -> [("a.b", 1, 2)]
    """
    if key in free or (key.startswith("data.") and key.rpartition(".")[2] in DECIDE_NO_ROW):
        return []
    if isinstance(known, Mapping) and isinstance(wanted, Mapping):
        names = sorted({*known, *wanted})
        found = (differing(known.get(name), wanted.get(name), free, f"{key}.{name}" if key else name) for name in names)
        return [difference for part in found for difference in part]
    return [] if known == wanted else [(key, known, wanted)]


def describe_differences(differences: Sequence[tuple[str, Any, Any]], known: str, wanted: str, most: int = 4) -> str:
    told = [f"`{key}` is {old!r} {known}, {new!r} {wanted}" for key, old, new in differences[:most]]
    more = len(differences) - most
    return "; ".join(told) + (f"; and {more} more" if more > 0 else "")


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The newest whole checkpoint of the run; says which were passed over and why."""
    checkpoint, skipped = newest_valid_checkpoint(recipe.checkpoints_dir)
    for sentence in skipped:
        say(sentence)
    if checkpoint is None and skipped:
        reasons = dict.fromkeys(sentence.partition(": skipped, ")[2] for sentence in skipped)
        raise ValueError(
            f"none of the {len(skipped)} checkpoint(s) in {recipe.checkpoints_dir} is whole ({', '.join(reasons)}); "
            "put back what is missing, or remove that folder to begin anew from the parent"
        )
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# The trainer and its session


def make_collator(recipe: Recipe, rows: Rows, parent: Parent, rows_are_shared: bool) -> RowCollator:
    data = recipe.need_data()
    return RowCollator(
        sequence_tokens=data.sequence_tokens,
        pad_id=parent.codec.pad_id,
        isolate_documents=data.packing.isolate_documents,
        sources=len(rows.manifest["source_names"]),
        layouts=len(rows.manifest["layout_names"]),
        skip_rows=frozenset(recipe.need_training().skip_rows),
        rows_are_shared=rows_are_shared,
    )


def make_trainer(
    kind: StageKind,
    recipe: Recipe,
    steps: Steps,
    layout: sharding.Layout,
    rows: Rows,
    parent: Parent,
    model: Any,
    arguments: TrainingArguments,
    dataset: RowDataset,
    collator: RowCollator,
    samples: list[HeldOutSample],
    requests: Requests,
) -> SafeTraining:
    """A stock trainer with the mixin, the shared callbacks and a session."""
    bf16 = arguments.bf16
    training, optimizer = recipe.need_training(), recipe.need_optimizer()
    trained = None if recipe.model.lora is None else lora.trained_weights(model)
    if trained is not None:
        say(str(trained))
    peak = peak_flops(bf16)
    say(f"precision {'bf16' if bf16 else 'fp32'}; MFU against {peak.origin}: {_tera(peak.flops)}")
    session = Session(
        steps=steps,
        ledger=Ledger(
            rows.manifest["source_names"],
            rows.manifest["layout_names"],
            torch.zeros(collator.sources * collator.layouts).long(),
        ),
        sequence_tokens=collator.sequence_tokens,
        checkpoints_dir=recipe.checkpoints_dir,
        skipped_path=recipe.run_dir / SKIPPED_STEPS,
        keep_checkpoints=training.keep_checkpoints,
        max_skipped_in_a_row=training.max_skipped_in_a_row,
        schedule=optimizer.schedule,
        final_rate_fraction=optimizer.final_rate_fraction,
        fused_loss=recipe.model.loss_head == "fused",
        manifest={
            "parent": parent.describe(),
            "rows": rows.manifest["fingerprint"],
            "layout": layout.describe(),
        },
        layout=layout,
        flops_per_token=training_flops_per_token(
            model.config, collator.sequence_tokens, None if trained is None else trained.adapter
        ),
        peak_flops=peak.flops,
        complete=partial(add_tokenizer_and_recipe, recipe, parent),
        requests=requests,
        spikes=SpikeWatch(training.spike_deviations),
        spike_action=training.spikes,
        background_saves=training.background_saves,
    )
    trainer = kind.make(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        session=session,
    )
    if samples:
        session.evaluate = partial(measure, recipe, trainer, rows, parent, samples)
    adapter.drop_default_printers(trainer)
    if collator.isolate_documents or layout.sequence_ranks > 1:
        first = collator([dataset[place] for place in range(min(2, steps.micro_batch_rows))])
        dataset.rows_read = 0
        trainer.add_callback(IsolationCheck(trainer, first, bf16))
    for callback in (ProgressBar(session), MetricsFile(recipe.run_dir / "metrics.jsonl", session), RunControl(trainer)):
        trainer.add_callback(callback)
    return trainer


def measure(
    recipe: Recipe,
    trainer: SafeTraining,
    rows: Rows,
    parent: Parent,
    samples: list[HeldOutSample],
    model: Any,
    poll: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Held-out losses; at the end of the stage, or each time where the recipe says so, what a long context is worth too."""
    session, accelerator = trainer.session, trainer.accelerator
    tokens = max(session.steps.micro_batch_rows * session.sequence_tokens, 4096)
    groups = probes.source_groups(rows.manifest)
    figures = probes.held_out_losses(model, samples, groups, tokens_per_batch=tokens, accelerator=accelerator, poll=poll)
    if recipe.probes.long_context_at == "evaluations" or trainer.state.global_step >= session.steps.total:
        settings = recipe.probes
        figures |= long_probes.long_context_figures(model, parent.codec, samples, settings, tokens, accelerator, poll)
    return figures


def restore_session(recipe: Recipe, session: Session, checkpoint: Path | None) -> None:
    """Put the ledger and the log files where the checkpoint was."""
    step = 0
    if checkpoint is not None:
        manifest = read_json(checkpoint / MANIFEST)
        step = manifest["step"]
        session.ledger.restore(manifest["ledger"])
        session.spikes.restore(manifest.get("spikes", {}))
        session.evaluation_due = manifest.get("evaluation_due", False)
    if is_main_process():
        for path in (recipe.run_dir / "metrics.jsonl", session.skipped_path):
            keep_lines_up_to(path, step)


# ---------------------------------------------------------------------------------------------------------------------
# The finished model


def export(
    kind: StageKind,
    recipe: Recipe,
    trainer: SafeTraining,
    rows: Rows,
    parent: Parent,
    samples: list[HeldOutSample],
    resumed_from: Path | None,
    rows_read: int | None,
) -> Path:
    """Write the finished checkpoint whole: what `from_pretrained` loads, tokenizer, recipe and manifest."""
    accelerator, session = trainer.accelerator, trainer.session
    if not session.held_out and session.evaluate is not None:
        session.held_out = session.evaluate(trainer.model, poll=trainer.poll)
    if session.held_out:
        say(probes.losses_table(session.held_out))
        say(long_probes.long_context_table(session.held_out, session.sequence_tokens))
    lengths = trained_lengths(rows, recipe.seed, session.steps.rows, recipe.need_training().skip_rows)
    lengths = lengths.describe(rows.manifest["source_names"])
    say(length_table(lengths))
    ledger = trainer.settle_ledger().to_dict(session.sequence_tokens)
    infilling = measure_infilling(recipe, trainer, rows, parent, samples)
    more = kind.measure(recipe, trainer, parent, samples)
    logits = None
    ids_BT = torch.as_tensor(rows.row(0)["input_ids"][: lora.CHECK_TOKENS].astype("int64"))[None]
    if recipe.model.lora is not None:
        logits = lora.adapter_logits(trainer.model_wrapped, accelerator.unwrap_model(trainer.model_wrapped), ids_BT)
    state: Any = accelerator.get_state_dict(trainer.model_wrapped)
    failure: list[str | None] = [f"{recipe.model_dir} was not written; the main process says why"]
    try:
        if accelerator.is_main_process:
            model: Any = accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            model.config.use_cache = True  # off while training; whoever loads the model wants it
            manifest = {
                "recipe": recipe.to_dict(),
                "parent": parent.describe(),
                "rows": {name: value for name, value in rows.manifest.items() if name not in ("recipe", "files")},
                "tokenizer": parent.codec.fingerprint,
                "rope": rope.describe(model.config, recipe, parent.manifest),
                "steps": session.steps.total,
                "tokens": session.steps.total * session.steps.batch_tokens,
                "ledger": ledger,
                "held_out": {name: v for name, v in session.held_out.items() if name.startswith("held_out/")},
                "long_context": {name: v for name, v in session.held_out.items() if not name.startswith("held_out/")},
                "lengths": lengths,
                "infilling": infilling,
                **more,
                "seconds": ledger["seconds"],
                "session": {
                    "resumed_from": None if resumed_from is None else resumed_from.name,
                    "rows_read_by_main_rank": rows_read,
                },
                "versions": software_versions(),
                "hardware": hardware(accelerator.num_processes),
            }
            if logits is not None:
                with whole_folder(recipe.adapter_dir) as folder:
                    lora.save_adapter(model, state, folder)
                    seal_finished(kind, recipe, parent, folder, manifest)
            with whole_folder(recipe.model_dir) as folder:
                if logits is not None:
                    check = lora.save_merged(model, state, folder, ids_BT, logits, exact=not trainer.args.bf16)
                    manifest["merged"] = check.to_dict()
                    say(str(check))
                else:
                    model.save_pretrained(folder, state_dict=state, max_shard_size=adapter.EXPORT_SHARD_SIZE)
                seal_finished(kind, recipe, parent, folder, manifest)
                rope.check_saved(model, folder)  # before the folder gets its name
            failure = [None]
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(recipe.run_dir).free / 2**20
        failure = [
            f"{recipe.model_dir} could not be written ({error}); {free:,.0f} MB are free there. Nothing half-written was "
            "kept, and the last checkpoint is whole: make room and start again"
        ]
    finally:
        broadcast_object_list(failure)  # whatever happened on the main process, the others must not wait for it
    if failure[0] is not None:
        raise ValueError(failure[0])
    say(f"finished: {recipe.model_dir}")
    return recipe.model_dir


def seal_finished(kind: StageKind, recipe: Recipe, parent: Parent, folder: Path, manifest: dict[str, Any]) -> None:
    """Put beside finished weights what makes them a checkpoint, its manifest last."""
    add_tokenizer_and_recipe(recipe, parent, folder)
    kind.complete(recipe, folder)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "recipe.yaml", weights)  # safetensors lets nobody else read them
    seal_folder(folder, manifest, hash_all=True)


def add_tokenizer_and_recipe(recipe: Recipe, parent: Parent, folder: Path) -> None:
    """What makes a folder of weights a checkpoint that stands alone."""
    copy_tokenizer(parent.path, folder)
    rope.write_older_dialect(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")


def measure_infilling(
    recipe: Recipe, trainer: SafeTraining, rows: Rows, parent: Parent, samples: list[HeldOutSample]
) -> dict[str, Any]:
    """Infilling prompts on the trained model; nothing where several ranks hold it, as it may be shared out over them."""
    settings = recipe.probes
    if not samples or settings.infill_prompts == 0:
        return {}
    if trainer.accelerator.distributed_type != DistributedType.NO:
        say("infilling is not measured by a run of several ranks; `make probes` measures it on the finished model")
        return {}
    groups = probes.source_groups(rows.manifest)
    report = probes.infill_report(
        trainer.model,
        parent.codec,
        samples,
        groups,
        settings.infill_prompts,
        settings.infill_new_tokens,
        poll=trainer.poll,
    )
    if report:
        say(probes.infill_table(report))
    return report


def hardware(world: int) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "devices": world, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


# ---------------------------------------------------------------------------------------------------------------------
# Ranks and printing


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    if text and is_main_process():
        print(text, flush=True)


def _tera(flops: float | None) -> str:
    return "unknown" if flops is None else f"{flops / 1e12:.3g} TFLOPS"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    command("python -m codetune.train", __doc__ or "", train, arguments)


def command(prog: str, text: str, run_stage: Callable[..., Path], arguments: Sequence[str] | None) -> None:
    """What every training command does: options, messages, exit codes."""
    parser = argparse.ArgumentParser(prog=prog, description=text.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="YAML file, such as recipes/stage1/tiny.yaml")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="section.key=value", help="settings to override"
    )
    parser.add_argument("--minutes", type=float, help="time budget, from the command's start: save and end before it does")
    parser.add_argument(
        "--grace-seconds",
        type=float,
        help="how long the machine waits after a signal before it kills: give a save up by then",
    )
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()  # of loading and saving; the bar of the run is ours
    adapter.hush_libraries()
    atexit.unregister(leave_process_group)
    try:
        cpu_ranks.settle()
        run_stage(load_recipe(options.recipe, options.set), options.minutes, options.grace_seconds)
        atexit.register(leave_process_group)
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        fail(f"no disk space is left ({error}); make room and start again: the run goes on from its newest checkpoint")
    except Interrupted as end:
        say(str(end))
        atexit.register(leave_process_group)
        sys.exit(end.exit_code)
    except KeyboardInterrupt:
        say("stopped at once; the same command goes on from the newest whole checkpoint")
        sys.exit(EXIT_CODES["interrupted"])


def leave_process_group() -> None:
    """Join the threads of torch's process groups while Python still runs: left to the end, they may abort a finished one.

    For ends that all ranks reach together; elsewhere it could wait for a rank that is gone.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
