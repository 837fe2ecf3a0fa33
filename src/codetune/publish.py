"""From a finished folder to the Hub: model card, a folder of exactly what goes, one commit.

    python -m codetune.publish --model runs/tiny/lcft/model --dry-run
    python -m codetune.publish --model runs/7b/lcft/model --repository me/my-code-7b --tag v1.0

What comes in: a finished model, an adapter, or a checkpoint of a run in progress (`--model`), and results of that very
checkpoint where there are any. What goes out: a repository on the Hub, private unless asked otherwise, or with `--dry-run`
the list of what would go: the same folder, hashed, and nothing sent. It is a process of its own, which reads the run's
folder and writes beside it (`publish/`): a training run never waits for the Hub and never fails by it, but that a session
which begins while a finished model is being gathered is told to start again.

What goes is decided by a list of names (`ALLOWED`), not by a list of exceptions: optimizer state, random states and whatever
else lies in a checkpoint stay here. What is inside the text files is looked at as well: paths of this machine become their
last part in `manifest.json` and `recipe.yaml`, and anything that looks like a token, a key or a path of this machine
anywhere else is refused.

What it does not do: change weights, or publish what is being written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from codetune.artifacts import MANIFEST, exclusive, fail, read_json, seal_folder, whole_folder, write_json
from codetune.elsewhere import Reading, added_behind_pieces, check_folder, check_parts, older_tokenizer_config
from codetune.lineage import Lineage, Stage, follow
from codetune.model_card import PAPER_GRAMS_PER_KWH, Card, Claim, Score, Words, write_card
from codetune.origins import LLAMA2, Licence
from codetune.paper import Figure, cut_suite, paper_figure, read_paper
from codetune.upload import Entry, Target, Uploaded, entries, upload

README, NOTICE, LICENCE_TEXT, RESULTS = "README.md", "Notice", "LICENSE.txt", "results.json"
ALLOWED = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|tokenizer\.model|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja|recipe\.yaml"
    r"|model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json"
    r"|adapter_config\.json|adapter_model\.safetensors"
)
SOURCES_LICENCE = "LICENSE.md"  # where no base brings one along
WRITTEN_HERE = (README, MANIFEST, RESULTS, NOTICE, LICENCE_TEXT, "USE_POLICY.md", SOURCES_LICENCE)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")  # their pieces may look like anything
SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\bsk-[A-Za-z0-9_-]{20,}|://[^/\s:@]+:[^/\s@]+@"
)
# Absolute paths, of Linux, macOS and Windows, and of home folders. A URL's path and a fraction (a/b) are none.
LOCAL_PATHS = re.compile(r"(?<![\w./:>~-])(?:~|/(?!/)[\w.+-]+)(?:/[\w.+@-]+)+/?|\b[A-Za-z]:\\[\w\\.-]+|\bfile://\S+")
PATHS_IN_CARD = re.compile(r"\]\([^)]*\)|<[^>]*>|https?://\S+")  # links, tags: taken out before the card is searched


@dataclass(frozen=True)
class Options:
    """What the user chose."""

    model: Path
    repository: str | None = None
    revision: str | None = None  # none: main for a finished model, <run>-step-<N> for a checkpoint
    tag: str | None = None
    public: bool = False
    replace: bool = False
    base_repository: str | None = None  # the parent on the Hub, where it was published
    licence: str | None = None  # by the Hub's name, where the lineage does not tell it
    licence_file: Path | None = None  # the licence's text, where it must go along
    results: tuple[Path, ...] = ()
    paper: Path | None = None  # the paper's numbers, typed from its tables
    incomplete_lineage: bool = False
    watts: float | None = None
    grams_per_kwh: float = PAPER_GRAMS_PER_KWH


@dataclass(frozen=True)
class Prepared:
    """A folder that holds exactly what goes, and what was said about it."""

    folder: Path
    target: Target
    stage: Stage
    card: Card
    files: tuple[Entry, ...]
    left_out: tuple[str, ...]  # files of the model's folder that stay here
    readings: tuple[Reading, ...] = ()  # who can read it
    shortened: tuple[str, ...] = field(default=())  # paths of this machine that were cut to their last part


def publish(options: Options, dry_run: bool, say: Any = print) -> Prepared:
    """Write the card, gather what goes, and send it, or say what would be sent.

    Raises:
        ValueError: something is missing, unfinished or private, or the Hub refused; the message says what to do.
    """
    lineage = follow(options.model)
    newest = lineage.newest
    with exclusive(newest.run_dir / ".publishing", "publishing"):
        # a run that is being trained holds the lock of its folder; a checkpoint that it has sealed it writes no more
        with contextlib.nullcontext() if newest.kind == "checkpoint" else exclusive(newest.run_dir, "publishing"):
            prepared = prepare(lineage, options)
        say(describe(prepared))
        if dry_run:
            say("dry run: nothing was sent")
            return prepared
        done = upload(
            prepared.folder, prepared.target, _message(prepared), lambda other: _is_another(other, prepared.stage), say
        )
    say(_said(done, prepared))
    return prepared


def prepare(lineage: Lineage, options: Options) -> Prepared:
    """The folder that goes, beside the run: card, allowed files, manifest.

    Raises:
        ValueError: something is missing, unfinished or private.
    """
    stage = lineage.newest
    refuse_incomplete(lineage, options)
    check_parts(stage.folder, adapter=stage.kind == "adapter")
    name = _repository_name(stage)
    target = Target(
        options.repository or name,
        options.revision or ("main" if stage.kind != "checkpoint" else f"{stage.name}-step-{stage.manifest['steps']}"),
        options.tag,
        options.public,
        options.replace,
    )
    check_names(target)
    scores, results = read_scores(stage, options.results, read_paper(options.paper))
    licence = None if options.licence is None else LLAMA2 if options.licence == LLAMA2.id else Licence(options.licence)
    card = write_card(
        lineage,
        name=(target.repository or name).rpartition("/")[2],
        repository=target.repository if "/" in (target.repository or "") else None,
        base_repository=options.base_repository,
        licence=licence,
        scores=scores,
        grams_per_kwh=options.grams_per_kwh,
        device_watts_given=options.watts,
        revision=target.revision,
    )
    place = stage.run_dir / "publish"
    shortened: list[str] = []
    with whole_folder(place) as folder:
        left_out = gather(stage.folder, folder)
        (folder / README).write_text(card.text, encoding="utf-8")
        add_licence(card.licence, lineage, options.licence_file, folder)
        if results is not None:
            write_json(folder / RESULTS, public(results, shortened))
        make_public(folder, options, shortened)
        manifest = {key: value for key, value in stage.manifest.items() if key != "files"}
        seal_folder(
            folder, public({**manifest, "published": {"hash": stage.hash, "run": stage.name, "kind": stage.kind}}, shortened)
        )
        refuse_private(folder)
        readings = () if stage.kind == "adapter" else tuple(check_folder(folder))
    cut = tuple(sorted(set(shortened)))
    return Prepared(place, target, stage, card, tuple(entries(place)), tuple(left_out), readings, cut)


def refuse_incomplete(lineage: Lineage, options: Options) -> None:
    """Refuse what cannot be told of in full, or does not stand alone."""
    stage = lineage.newest
    if lineage.broken is not None and not options.incomplete_lineage:
        raise ValueError(
            f"the lineage of {stage.folder} breaks off: {lineage.broken}. Put its parent back, or say "
            "--incomplete-lineage: the card will "
            "say that what came before is not on record"
        )
    if stage.kind == "adapter" and not options.base_repository:
        raise ValueError(
            f"{stage.folder} is an adapter, which is of use only with its parent: publish that first, and say where it is "
            "(--base-repository me/parent); or publish the merged model (.../model)"
        )


def check_names(target: Target) -> None:
    """Refuse a repository, branch or tag whose name the Hub does not take."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(target.repository or "")
    except HFValidationError as error:
        raise ValueError(f"REPO={target.repository}: no name for a repository ({error})") from error
    for key, value in (("REVISION", target.revision), ("TAG", target.tag)):
        if value is not None and (
            not re.fullmatch(r"[\w][\w./+-]*", value, re.ASCII) or ".." in value or value.endswith((".lock", "/", "."))
        ):
            raise ValueError(f"{key}={value}: git takes no such name; write letters, digits, dots, dashes and underscores")


def read_scores(stage: Stage, paths: Sequence[Path], paper: Sequence[Figure] = ()) -> tuple[list[Score], Any]:
    """Results as lines of the card, and the file itself; none where none were given.

    Raises:
        ValueError: not results, or results of another checkpoint.
    """
    scores, kept = [], []
    for path in paths:
        place = path / RESULTS if path.is_dir() else path
        results = read_json(place)
        if not isinstance(results, dict) or not isinstance(results.get("tasks"), dict):
            raise ValueError(f"{place}: these are no results of an evaluation")
        model = results.get("model") or {}
        if model.get("hash") != stage.hash:
            raise ValueError(
                f"{place}: results of another checkpoint, {model.get('name')} (hash {model.get('hash')}); this one is "
                f"{stage.folder} "
                f"({stage.hash}). Evaluate this one, or leave the results out"
            )
        place_in_file = RESULTS if len(paths) == 1 else f"{RESULTS}#results.{len(kept)}"
        scores += scores_of(results, stage, paper, place_in_file)
        kept.append(results)
    return scores, None if not kept else kept[0] if len(kept) == 1 else {"results": kept}


def scores_of(results: Mapping[str, Any], stage: Stage, paper: Sequence[Figure] = (), place: str = RESULTS) -> list[Score]:
    """Every score of a results file that has a value, with its settings in a few words.

    Where less than the benchmark was asked, or another RoPE base was put in for it, the words say so, and the paper's number
    does not stand beside it.
    """
    found = []
    rope_base = (results.get("model") or {}).get("rope_base")
    figures = () if rope_base else paper
    top = place + ("." if "#" in place else "#")
    for task, facts in results["tasks"].items():
        where = f"{top}tasks.{task}"
        words = settings_in_words(facts, where)
        if rope_base:
            words.append(("RoPE base ", Claim(f"{rope_base:,.0f}", f"`{top}model.rope_base`", rope_base), " put in"))
        if cut := cut_suite(facts):
            asked, published = (
                Claim(str(count), f"`{where}.data.{key}`", count)
                for key, count in zip(("asked", "published"), cut, strict=True)
            )
            words.append((asked, " of ", published, " problems"))
        for metric, score in (facts.get("scores") or {}).items():
            of_metric = f"{where}.scores.{metric}"
            if isinstance(score, Mapping) and isinstance(score.get("value"), int | float):
                interval = {key: 100 * score[key] for key in ("low", "high") if score.get(key) is not None}
                figure = paper_figure(figures, facts, metric, stage.name, stage.size)
                found.append(
                    Score(
                        task,
                        metric,
                        100 * score["value"],
                        "%",
                        **interval,
                        problems=score.get("problems"),
                        settings=(*words, *([(str(score["decoding"]),)] if score.get("decoding") else [])),
                        paper=None if figure is None else figure.in_hundredths,
                        source=of_metric,
                        nested=True,
                        paper_source="" if figure is None else figure.source,
                    )
                )
            elif isinstance(score, int | float) and not isinstance(score, bool):
                found.append(Score(task, metric, float(score), settings=tuple(words), source=of_metric))
    return found


def settings_in_words(task: Mapping[str, Any], where: str) -> list[Words]:
    """What a reader must know of how a task was asked: temperature, samples, form of the prompt."""
    settings = task.get("settings") or {}
    words: list[Words] = [
        (letter, Claim(f"{settings[key]:g}", f"`{where}.settings.{key}`", settings[key]))
        for letter, key in (("T ", "temperature"), ("n ", "samples"))
        if settings.get(key) is not None
    ]
    if settings.get("form"):
        words.append((Claim(str(settings["form"]), f"`{where}.settings.form`", str(settings["form"])),))
    return words


# ---------------------------------------------------------------------------------------------------------------------
# What goes


def gather(source: Path, folder: Path) -> list[str]:
    """Link (or copy) the allowed files; the names of the others."""
    left_out = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if path.is_dir() or name == MANIFEST:
            continue
        if path.is_symlink() or not ALLOWED.fullmatch(name):
            left_out.append(name)
            continue
        if path.suffix == ".safetensors":  # large, and never changed here
            try:
                os.link(path, folder / name)
                continue
            except OSError:
                pass  # another file system, or one without links
        shutil.copyfile(path, folder / name)
    return left_out


def add_licence(licence: Licence, lineage: Lineage, given: Path | None, folder: Path) -> None:
    """The texts that the base's licence asks copies to carry.

    Raises:
        ValueError: the licence's text must go along, and is nowhere to be found.
    """
    if given is not None:
        if not given.is_file():
            raise ValueError(f"--licence-file {given}: no such file")
        shutil.copyfile(given, folder / LICENCE_TEXT)
    for stage in lineage.stages:
        for name in (LICENCE_TEXT, "USE_POLICY.md"):
            if (stage.folder / name).is_file() and not (folder / name).is_file():
                shutil.copyfile(stage.folder / name, folder / name)
    if licence.needs_text and not (folder / LICENCE_TEXT).is_file():
        raise ValueError(
            f"the licence {licence.id} asks that its text goes with the weights, and no {LICENCE_TEXT} lies in the folders "
            "of this "
            f"lineage; download it from {licence.link} or the base's page and say --licence-file"
        )
    if licence.id == "other":
        (folder / SOURCES_LICENCE).write_text(
            "These weights were made from random ones: no base's licence holds for them. What was learnt from a source "
            "stays under "
            "that source's licence; README.md lists them, manifest.json has the names and versions of everything that was "
            "read.\n",
            encoding="utf-8",
        )
    if licence.notice is not None:
        (folder / NOTICE).write_text(licence.notice, encoding="utf-8")


def make_public(folder: Path, options: Options, shortened: list[str]) -> None:
    """Take paths of this machine out of recipe and configuration."""
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        tree = public(yaml.safe_load(recipe.read_text(encoding="utf-8")), shortened)
        recipe.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    if (folder / "config.json").is_file() and "rope_theta" not in read_json(folder / "config.json"):
        from codetune.rope import write_older_dialect

        write_older_dialect(folder)
    positions = (
        read_json(folder / "config.json").get("max_position_embeddings") if (folder / "config.json").is_file() else None
    )
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        tree = read_json(path)
        before = json.dumps(tree)
        for key in ("_name_or_path", "name_or_path"):
            tree.pop(key, None)
        if name == "tokenizer_config.json":
            tree = older_tokenizer_config(tree)
            if added := added_behind_pieces(folder):
                tree["added_tokens_decoder"] = added
            if positions:
                tree["model_max_length"] = positions  # a lengthened model's tokenizer is its parent's, and says the parent's
        if name == "adapter_config.json":
            tree["base_model_name_or_path"] = options.base_repository
        if json.dumps(tree) != before:
            write_json(path, tree)


def public(value: Any, shortened: list[str]) -> Any:
    """The value with every path of this machine cut to its last part; those are added to `shortened`.

    Example: `/data/me/corpora/code` -> `code`
    """
    if isinstance(value, Mapping):
        return {key: public(item, shortened) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item, shortened) for item in value]
    if not isinstance(value, str):
        return value

    def cut(found: re.Match[str]) -> str:
        shortened.append(found.group(0))
        return re.split(r"[/\\]", found.group(0).rstrip("/\\"))[-1]

    return LOCAL_PATHS.sub(cut, value)


def refuse_private(folder: Path) -> None:
    """Refuse a folder in which a file is not allowed, or holds what looks like a secret or a path of this machine."""
    from huggingface_hub import get_token

    token = get_token()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if not ALLOWED.fullmatch(name) and name not in WRITTEN_HERE:
            raise ValueError(f"{name} is not among the files that are published")
        if path.suffix == ".safetensors" or path.name == "tokenizer.model":
            continue
        text = path.read_text(encoding="utf-8")
        found = SECRETS.search(text)
        if found or (token and token in text):
            shown = f"{found.group(0)[:6]}..." if found else "the token that is in use"
            raise ValueError(
                f"{name} holds what looks like a token or a key ({shown}); take it out of the recipe or the folder first"
            )
        if name in VOCABULARIES or name in (LICENCE_TEXT, "USE_POLICY.md"):
            continue
        found = LOCAL_PATHS.search(PATHS_IN_CARD.sub(" ", text) if name == README else text)
        if found:
            raise ValueError(f"{name} holds a path of this machine ({found.group(0)}); take it out of the recipe first")


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def _repository_name(stage: Stage) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"codetune-{stage.size}-{stage.name}").strip("-.")


def _message(prepared: Prepared) -> str:
    stage = prepared.stage
    step = f", step {stage.manifest['steps']}" if stage.kind == "checkpoint" else ""
    return f"{stage.size}/{stage.name} ({stage.kind}{step}), {stage.hash}"


def _is_another(manifest: Mapping[str, Any] | None, stage: Stage) -> str | None:
    """What a revision holds, if it is not an earlier state of the same run."""
    recipe = (manifest or {}).get("recipe")
    if not isinstance(recipe, Mapping):
        return "files that codetune did not publish"
    kind = ((manifest or {}).get("published") or {}).get("kind", "model")
    if (recipe.get("size"), recipe.get("name"), kind) != (stage.size, stage.name, stage.kind):
        return f"the {kind} of another run, {recipe.get('size')}/{recipe.get('name')}"
    return None


def describe(prepared: Prepared) -> str:
    """The list of what goes, and what does not."""
    target = prepared.target
    visible = "public" if target.public else "private"
    where = f"{target.repository} ({visible}), revision {target.revision}" + (f", tag {target.tag}" if target.tag else "")
    total = sum(file.size_bytes for file in prepared.files)
    lines = [f"publish: {prepared.stage.folder} to {where}", ""]
    lines += [f"  {file.size_bytes:>14,}  {file.sha256[:12]}  {file.path}" for file in prepared.files]
    lines += [f"  {total:>14,}  bytes in {len(prepared.files)} files, from {prepared.folder}", ""]
    lines += [f"{reading.reader}: {reading.words}" for reading in prepared.readings]
    if prepared.left_out:
        lines.append(f"stays here: {', '.join(prepared.left_out)}")
    if prepared.shortened:
        lines.append(f"cut to their last part: {', '.join(prepared.shortened)}")
    return "\n".join(lines)


def _said(done: Uploaded, prepared: Prepared) -> str:
    state = "was there already, unchanged" if done.unchanged else "is there, whole and compared file by file"
    tag = f", tag {prepared.target.tag}" if prepared.target.tag else ""
    return f"publish: {done.address} {state} (commit {done.commit[:12]}{tag})"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m codetune.publish", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", required=True, type=Path, help="runs/SIZE/STAGE/model, .../adapter or .../checkpoints/checkpoint-N"
    )
    parser.add_argument("--repository", help="owner/name on the Hub; none: codetune-SIZE-STAGE of the token's owner")
    parser.add_argument("--revision", help="branch; none: main, or STAGE-step-N for a checkpoint")
    parser.add_argument("--tag", help="name the commit, as for a release")
    parser.add_argument("--public", action="store_true", help="a new repository is private without this")
    parser.add_argument("--replace", action="store_true", help="write over a revision that holds something else")
    parser.add_argument("--base-repository", help="where the parent was published")
    parser.add_argument("--licence", help="the Hub's name of the base's licence, where the lineage does not tell it")
    parser.add_argument("--licence-file", type=Path, help="the licence's text, where copies must carry it")
    parser.add_argument("--results", type=Path, action="append", default=[], help="results.json of this very checkpoint")
    parser.add_argument(
        "--paper", type=Path, help="the paper's numbers, to stand beside results of the same size and variant"
    )
    parser.add_argument("--incomplete-lineage", action="store_true", help="publish although a parent is missing")
    parser.add_argument("--watts", type=float, help="power of a device, for the carbon estimate")
    parser.add_argument("--grams-per-kwh", type=float, default=PAPER_GRAMS_PER_KWH, help="of your electricity")
    parser.add_argument("--dry-run", action="store_true", help="list what would go; no token, no network")
    parser.add_argument("--claims", action="store_true", help="print every number of the card with where it is from")
    given = vars(parser.parse_args(arguments))
    dry_run, claims = given.pop("dry_run"), given.pop("claims")
    given["results"] = tuple(given["results"])
    try:
        prepared = publish(Options(**given), dry_run)
    except ValueError as error:
        fail(str(error))
    if claims:
        for claim in prepared.card.claims:
            print(f"{claim.shown:>24}  {claim.source}")


if __name__ == "__main__":
    main()
