"""Documents of any source, streamed: looked up once, dealt to lanes, read pass after pass.

What comes in: the settings of a source (`codetune.recipe.SourceSettings`) and a number of lanes. What goes out:
`plan_source` gives a `SourcePlan`, a list of read units small enough to be sent to a process on another machine, and
`read_documents` the documents of one lane, in an order that depends on the plan alone. Nothing loads whole: a unit is a
file, a run of row groups, a byte range or a list of small files, and only the document at hand is held.

The trade: a source with fewer files than lanes is looked at once more while planning (parquet footers, the line end
after each cut, or one sharding pass for compressed lines), so that no lane ever reads what another lane keeps.

Every document that is read and not given out has a counted reason (`Drops`). What is left out by its name alone, before
it is opened (ignored by git, no known language, a lock file), is counted in `SourcePlan.facts["left_out"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codetune.artifacts import hash_json
from codetune.recipe import SourceSettings
from data_pipelines import readers
from data_pipelines.readers import ReadUnit, Record

if TYPE_CHECKING:
    from data_pipelines.held_out import HeldOut


@dataclass(frozen=True)
class Document:
    """One text that training may see. `id` depends on neither lanes, workers nor pass; with `source` it is unique."""

    text: str
    id: str
    source: str
    group: str  # repository, package or article: held out as a whole
    language: str
    pass_index: int


class Drops:
    """Counts of documents that were read and not given out, by source and reason."""

    def __init__(self, counts: Mapping[str, Mapping[str, int]] | None = None) -> None:
        """`counts`: what another one's `as_dict` gave."""
        self._counts = {source: dict(reasons) for source, reasons in (counts or {}).items()}

    def add(self, source: str, reason: str, count: int = 1) -> None:
        reasons = self._counts.setdefault(source, {})
        reasons[reason] = reasons.get(reason, 0) + count

    def merge(self, other: Drops) -> None:
        for source, reasons in other._counts.items():
            for reason, count in reasons.items():
                self.add(source, reason, count)

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {source: dict(sorted(self._counts[source].items())) for source in sorted(self._counts)}


@dataclass(frozen=True)
class SourcePlan:
    """A source that was looked up: what there is to read, and what a manifest says about it."""

    name: str
    settings: SourceSettings
    units: tuple[ReadUnit, ...]
    facts: dict[str, Any]  # kind, fingerprint, files, bytes, units, left_out; revision, distributions where they apply


# ---------------------------------------------------------------------------------------------------------------------
# Planning


def plan_source(
    name: str, settings: SourceSettings, lanes: int, work_dir: Path, allow_unpinned: bool, every_lane: bool = True
) -> SourcePlan:
    """Look the source up, list its units, and split it once where it has fewer files than lanes.

    `every_lane` off lets lanes go without a unit, where a source is read once and not in shares.

    Files that have to be made (shards of compressed lines, texts extracted from installed packages) go to `work_dir`,
    whole or not at all, and are found again by their fingerprint.

    Raises:
        ValueError: missing or gated data set, wrong column, empty source, unpinned revision without `allow_unpinned`,
            a package that is not installed, or fewer units than lanes.
    """
    planners: dict[str, Callable[[], tuple[list[ReadUnit], dict[str, Any]]]] = {
        "hub": lambda: _plan_hub(name, settings, lanes, work_dir, allow_unpinned),
        "parquet": lambda: _plan_urls(name, settings, lanes, work_dir),
        "jsonl": lambda: _plan_urls(name, settings, lanes, work_dir),
        "folder": lambda: _plan_folder(name, settings, lanes),
        "installed": lambda: _plan_installed(name, settings, lanes, work_dir),
        "generated": lambda: _plan_generated(lanes),
    }
    _check_filters(name, settings)
    units, facts = planners[settings.kind]()
    if not units:
        raise ValueError(f"data.sources.{name}: nothing to read ({facts.get('left_out') or 'the source is empty'})")
    if every_lane and len(units) < lanes:
        raise ValueError(
            f"data.sources.{name}: {len(units)} {facts.get('unit', 'unit')}s to read for {lanes} lanes, so a lane would get "
            f"none; lower data.lanes to {len(units)}"
        )
    facts |= {"kind": settings.kind, "units": len(units), "bytes": facts.get("bytes", sum(unit.bytes for unit in units))}
    return SourcePlan(name, settings, tuple(units), facts)


def _check_filters(name: str, settings: SourceSettings) -> None:
    tabular = settings.kind in ("hub", "parquet", "jsonl")
    if tabular and settings.languages and not settings.language_column:
        raise ValueError(f"data.sources.{name}.languages is set; say in `language_column` which column to compare")
    if settings.licenses and not (tabular and settings.license_column):
        raise ValueError(f"data.sources.{name}.licenses is set; say in `license_column` which column to compare")


def _plan_hub(
    name: str, settings: SourceSettings, lanes: int, work_dir: Path, allow_unpinned: bool
) -> tuple[list[ReadUnit], dict[str, Any]]:
    from data_pipelines import hub

    found = hub.look_up(name, settings, allow_unpinned)
    units, facts = readers.plan_files(name, settings, found.files, found.format, lanes, work_dir)
    return units, facts | {"revision": found.revision}


def _plan_urls(name: str, settings: SourceSettings, lanes: int, work_dir: Path) -> tuple[list[ReadUnit], dict[str, Any]]:
    files = readers.list_urls(name, settings)
    return readers.plan_files(name, settings, files, settings.kind, lanes, work_dir)


def _plan_folder(name: str, settings: SourceSettings, lanes: int) -> tuple[list[ReadUnit], dict[str, Any]]:
    from data_pipelines import source_files

    files, left_out = source_files.list_folders(name, settings)
    facts = {"left_out": left_out, "files": len(files), "unit": "file", "fingerprint": source_files.fingerprint(files)}
    return readers.deal_files(files, lanes), facts


def _plan_installed(
    name: str, settings: SourceSettings, lanes: int, work_dir: Path
) -> tuple[list[ReadUnit], dict[str, Any]]:
    from data_pipelines import installed

    return installed.plan(name, settings, lanes, work_dir)


def _plan_generated(lanes: int) -> tuple[list[ReadUnit], dict[str, Any]]:
    from data_pipelines.generated import DOCUMENTS_PER_PASS, LENGTHS, NAMES, STEPS

    units = [ReadUnit("generated", "", start=lane, bytes=1) for lane in range(lanes)]
    fingerprint = hash_json([STEPS, NAMES, LENGTHS, DOCUMENTS_PER_PASS])
    return units, {"bytes": 0, "files": 0, "fingerprint": fingerprint}


def lane_units(plan: SourcePlan, lane: int, lanes: int) -> list[ReadUnit]:
    """The units of one lane, in the plan's order: each unit, largest first, goes to the lane that has least so far.

    Example: sizes 5, 3, 3, 1 in two lanes -> lane 0 has 5 and 1, lane 1 has 3 and 3
    """
    if lanes == 1:
        return list(plan.units)
    by_size = sorted(range(len(plan.units)), key=lambda index: (-plan.units[index].bytes, index))
    loads = [0] * lanes
    mine = []
    for index in by_size:
        lightest = loads.index(min(loads))
        loads[lightest] += max(plan.units[index].bytes, 1)
        if lightest == lane:
            mine.append(index)
    return [plan.units[index] for index in sorted(mine)]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_documents(
    plan: SourcePlan, lane: int, lanes: int, pass_index: int, drops: Drops, held_out: HeldOut | None
) -> Iterator[Document]:
    """The documents of one lane, once through, without those held out and near copies of those measured on.

    `held_out` None reads everything, which only the search for held-out documents should do. Generated functions are
    held out by template family where they are made, so neither rule applies to them.
    """
    settings, source = plan.settings, plan.name
    guard = held_out if settings.kind != "generated" else None
    for record in _records(plan, lane, lanes, pass_index):
        text = _checked_text(record, settings, source, drops)
        if text is None:
            continue
        if guard is not None and guard.excludes(record.group):
            drops.add(source, "held_out_group")
            continue
        for document in _segmented(record, text, settings, source, pass_index):
            if guard is not None and guard.is_near_copy(document.text):
                drops.add(source, "near_copy_of_held_out")
            elif document.text.strip() == "":
                drops.add(source, "empty")
            else:
                yield document


def documents_of_groups(plan: SourcePlan, wanted: Callable[[str], bool], drops: Drops) -> Iterator[Document | None]:
    """Every document of the groups wanted, over all lanes; None for each document of another group that was passed over.

    Files whose group is known from their place are not opened for nothing.
    """
    for record in _records(plan, 0, 1, 0, wanted):
        if not wanted(record.group):
            yield None
            continue
        text = _checked_text(record, plan.settings, plan.name, drops)
        if text is not None:
            found = _segmented(record, text, plan.settings, plan.name, 0)
            yield from (document for document in found if document.text.strip())


def read_records(plan: SourcePlan, lane: int, lanes: int) -> Iterator[Record]:
    """Everything that stands in one lane of a source, before any check: documents, and why what is none is none."""
    return _records(plan, lane, lanes, 0)


def _records(
    plan: SourcePlan, lane: int, lanes: int, pass_index: int, wanted: Callable[[str], bool] | None = None
) -> Iterator[Record]:
    for unit in lane_units(plan, lane, lanes):
        if unit.format == "generated":
            from data_pipelines.generated import generated_documents

            for text, place, family in generated_documents(lane, lanes, pass_index):
                yield Record(text, place, family, "Python")
        else:
            yield from readers.read_unit(unit, plan.settings, plan.name, wanted)


def text_or_reason(record: Record, settings: SourceSettings) -> tuple[str | None, str | None]:
    """The text of a record that may be used and no reason, or no text and the reason why not."""
    if record.reason is not None:
        return None, record.reason
    if not _kept(record.language, settings.languages, settings):
        return None, "language_not_kept"
    if settings.licenses and not _all_kept(record.licenses, settings.licenses):
        return None, "license_not_kept"
    return readers.text_of(record.text, settings.max_document_bytes)


def _checked_text(record: Record, settings: SourceSettings, source: str, drops: Drops) -> str | None:
    """The text of a record that may be used; None, and one more drop, for any other."""
    text, reason = text_or_reason(record, settings)
    if reason is not None:
        drops.add(source, reason)
        return None
    return text


def _kept(language: str, languages: tuple[str, ...], settings: SourceSettings) -> bool:
    if not languages or settings.kind in ("folder", "installed", "generated"):
        return True  # files were chosen by language while planning
    return language.lower() in {kept.lower() for kept in languages}


def _all_kept(found: tuple[str, ...], kept: tuple[str, ...]) -> bool:
    """A file under several licences is kept when every one of them is; one without a licence is not."""
    return bool(found) and {item.lower() for item in found} <= {item.lower() for item in kept}


def _segmented(record: Record, text: str, settings: SourceSettings, source: str, pass_index: int) -> Iterator[Document]:
    if settings.segment_characters is None:
        yield Document(text, record.id, source, record.group, record.language, pass_index)
        return
    for number, segment in enumerate(segments(text, settings.segment_characters)):
        yield Document(segment, f"{record.id}#{number}", source, record.group, record.language, pass_index)


def segments(text: str, characters: int) -> list[str]:
    r"""Cut at blank lines into pieces of about `characters`; put together they are the text again.

    A paragraph longer than that is cut at line ends; a longer line stays whole. A short rest joins the piece before it.

    Example: "a\n\nb\n\nc\n", 4 -> ["a\n\n", "b\n\nc\n"] (each blank line stays with the text before it)
    """
    pieces: list[str] = []
    current = ""
    for block in _blocks(text, characters):
        if current and len(current) + len(block) > characters:
            pieces.append(current)
            current = ""
        current += block
    if current and pieces and len(current) < characters // 4:
        pieces[-1] += current
    elif current:
        pieces.append(current)
    return pieces


def _blocks(text: str, characters: int) -> Iterator[str]:
    """Paragraphs with the blank lines that follow them; long ones line by line."""
    block: list[str] = []
    blank = False
    for line in text.splitlines(keepends=True):
        empty = not line.strip()
        if blank and not empty:
            yield from _whole_or_lines(block, characters)
            block = []
        block.append(line)
        blank = empty
    yield from _whole_or_lines(block, characters)


def _whole_or_lines(block: list[str], characters: int) -> Iterator[str]:
    text = "".join(block)
    if len(text) <= characters:
        yield text
    else:
        yield from block
