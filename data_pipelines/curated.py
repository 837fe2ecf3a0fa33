"""What a curated data set says of itself: manifest, dataset card, page of statistics, and a look at what was dropped.

What comes in: the sums of a curation (`ledger.Ledger`). What goes out: `curate.json` and `README.md` in the data set,
as the Hub shows them, and `statistics.md` beside it, with examples of what each rule threw away. Every document that was
read is kept or counted under one reason, by source; `manifest_of` refuses sums that do not come out exactly.
"""

from __future__ import annotations

import difflib
import heapq
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from codetune import artifacts
from codetune.artifacts import as_bytes, read_json, write_json
from codetune.recipe import CurateSettings, Recipe
from data_pipelines.clean import measured
from data_pipelines.documents import SourcePlan
from data_pipelines.ledger import KEPT_CHARACTERS, Ledger, by, dropped_documents, examples
from data_pipelines.redact import redact

MANIFEST, PAGE, SUMMARY, PAIRS = "curate.json", "statistics.md", "summary.txt", "pairs.jsonl"
EXCERPT_CHARACTERS = 300  # of an example on the page
BAR_CHARACTERS = 30  # of the longest bar
SHOWN_LINES = 60  # of a document, or of a difference, on the terminal


def manifest_of(
    recipe: Recipe,
    sources: tuple[SourcePlan, ...],
    ledger: Ledger,
    files: dict[str, list[str]],
    benchmarks: dict[str, Any] | None,
    near: dict[str, int] | None,
) -> dict[str, Any]:
    """All counts by source, checked: documents in = documents out + drops by reason."""
    found: dict[str, Any] = {}
    kept, dropped = by(ledger.kept, 0), by(ledger.dropped, 0)
    reasons, languages = by(ledger.dropped, 0, 1), by(ledger.kept, 0, 1)
    for source in sources:
        name = source.name
        read, out, gone = ledger.read[(name,)], kept.get((name,), 0), dropped.get((name,), 0)
        assert read == out + gone, f"documents of {name} were lost: {read} read, {out} kept, {gone} dropped"
        found[name] = {
            "documents_read": read,
            "bytes_read": ledger.read_bytes[(name,)],
            "documents": out,
            "bytes": by(ledger.kept_bytes, 0).get((name,), 0),
            "tokens": by(ledger.kept_tokens, 0).get((name,), 0),
            "groups": ledger.kept_groups[(name,)],
            "drops": _of(reasons, name),
            "dropped_bytes": _of(by(ledger.dropped_bytes, 0, 1), name),
            "dropped_tokens": _of(by(ledger.dropped_tokens, 0, 1), name),
            "drops_by_language": _nested(ledger.dropped, name, 1, 2),
            "dropped_bytes_by_language": _nested(ledger.dropped_bytes, name, 1, 2),
            "dropped_tokens_by_language": _nested(ledger.dropped_tokens, name, 1, 2),
            "languages": _of(languages, name),
            "language_bytes": _of(by(ledger.kept_bytes, 0, 1), name),
            "language_tokens": _of(by(ledger.kept_tokens, 0, 1), name),
            "licenses": _of(by(ledger.kept, 0, 2), name),
            "redacted": {kind: count for (own, kind), count in sorted(ledger.redacted.items()) if own == name},
            "redacted_documents": ledger.redacted_documents[(name,)],
            "repeated_ids": ledger.repeated_ids[(name,)],
            "lengths": {when: _lengths(ledger, name, when) for when in ("read", "kept")},
            "files": files[name],
            "facts": source.facts,
        }
    return {
        "recipe": recipe.to_dict()["curate"],
        "sources": found,
        "contaminated": {benchmark: count for (benchmark,), count in sorted(ledger.contaminated.items())},
        "benchmarks": benchmarks,
        "near_copies": near,
        "versions": artifacts.software_versions(),
    }


def _of(sums: dict[tuple[str, ...], int], source: str) -> dict[str, int]:
    """What belongs to a source. Example: {(a, x): 1, (b, x): 2} of a -> {x: 1}"""
    return {rest: count for (own, rest), count in sums.items() if own == source}


def _nested(counter: Any, source: str, first: int, second: int) -> dict[str, dict[str, int]]:
    tree: dict[str, dict[str, int]] = {}
    for (own, a, b), count in by(counter, 0, first, second).items():
        if own == source:
            tree.setdefault(a, {})[b] = count
    return tree


def _lengths(ledger: Ledger, source: str, when: str) -> dict[str, int]:
    """Documents by length: `512` counts those of 512 to 1,023 characters."""
    found = {key[2]: count for key, count in ledger.lengths.items() if key[:2] == (source, when)}
    return {str(2 ** (int(bits) - 1)): count for bits, count in sorted(found.items())}


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def summary(manifest: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [f"{'source':<14}{'read':>10}{'kept':>10}{'dropped':>10}{'kept bytes':>13}{'tokens':>13}{'groups':>8}"]
    for name, source in manifest["sources"].items():
        lines.append(
            f"{name:<14}{source['documents_read']:>10,}{source['documents']:>10,}{sum(source['drops'].values()):>10,}"
            f"{as_bytes(source['bytes']):>13}{source['tokens']:>13,}{source['groups']:>8,}"
        )
    for name, source in manifest["sources"].items():
        if source["drops"]:
            lines.append(
                f"dropped from {name}: " + ", ".join(f"{reason} {count:,}" for reason, count in source["drops"].items())
            )
    for name, source in manifest["sources"].items():
        if not source["documents"]:
            lines.append(
                f"nothing is left of {name}: " + ("all of it was dropped" if source["drops"] else "it has no document")
            )
    if manifest["benchmarks"] is not None:
        read, missing = manifest["benchmarks"]["read"], manifest["benchmarks"]["missing"]
        lines.append(f"kept out of {len(read)} benchmarks ({', '.join(read) or 'none'}); not here: {len(missing)}")
    return "\n".join(lines)


def card(manifest: dict[str, Any]) -> str:
    """The dataset card: what the Hub shows, and how `load_dataset` finds each source."""
    sources = manifest["sources"]
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train-*.parquet"}], "default": place == 0}
        for place, name in enumerate(name for name, source in sources.items() if source["files"])
    ]
    known = sorted({licence for source in sources.values() for licence in source["licenses"]})
    licence = {"license": "other", "license_name": "various", "license_link": "README.md"}  # the Hub asks for all three
    head = {"configs": configs, **licence, "tags": ["code"]}
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", "# Curated with codetune", ""]
    lines += [
        "Each source is a configuration of its own. Columns: `text`, `id`, `group` (repository, package or article),",
        "`language`, `license` (a list), `content_hash`. Files of one group stand one after another in one shard.",
        "",
    ]
    lines += _counts_table(sources)
    lines += ["", "## What was dropped", ""] + _drops_table(sources)
    lines += ["", "## Licences", "", f"Documents under {len(known)} licences; each names its own in `license`.", ""]
    lines += _table(
        ["source", "licence", "documents"],
        [[name, licence, f"{count:,}"] for name, source in sources.items() for licence, count in source["licenses"].items()],
    )
    lines += ["", "## Redacted", ""]
    lines += _table(
        ["source", "kind", "marks put in", "documents changed"],
        [
            [name, kind, f"{count:,}", f"{source['redacted_documents']:,}"]
            for name, source in sources.items()
            for kind, count in source["redacted"].items()
        ],
    )
    lines += ["", "## Benchmarks kept out", ""] + _benchmark_lines(manifest)
    lines += [
        "",
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(_without_places(manifest["recipe"]), sort_keys=False).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings without paths of the machine that curated; manifest and card may be published."""
    sources = {
        name: {
            key: value
            for key, value in source.items()
            if value not in (None, [], "")
            and (key not in ("path", "paths", "share") or (key == "path" and source["kind"] == "hub"))
        }
        for name, source in recipe["sources"].items()
    }
    decontamination = {key: value for key, value in recipe["decontamination"].items() if key != "data"}
    return {**recipe, "sources": sources, "decontamination": decontamination}


def _counts_table(sources: dict[str, Any]) -> list[str]:
    return _table(
        ["source", "documents read", "kept", "bytes read", "bytes kept", "tokens", "groups"],
        [
            [
                name,
                f"{source['documents_read']:,}",
                f"{source['documents']:,}",
                f"{source['bytes_read']:,}",
                f"{source['bytes']:,}",
                f"{source['tokens']:,}",
                f"{source['groups']:,}",
            ]
            for name, source in sources.items()
        ],
    )


def _drops_table(sources: dict[str, Any]) -> list[str]:
    return _table(
        ["source", "reason", "documents", "bytes", "tokens"],
        [
            [
                name,
                reason,
                f"{count:,}",
                f"{source['dropped_bytes'].get(reason, 0):,}",
                f"{source['dropped_tokens'].get(reason, 0):,}",
            ]
            for name, source in sources.items()
            for reason, count in sorted(source["drops"].items(), key=lambda item: -item[1])
        ],
    )


def _benchmark_lines(manifest: dict[str, Any]) -> list[str]:
    facts = manifest["benchmarks"]
    if facts is None:
        return ["None: decontamination was off."]
    rows = []
    for name, source in facts["read"].items():
        texts = facts["benchmarks"].get(name, {})
        dropped = manifest["contaminated"].get(name, 0)
        rows.append([name, source, f"{texts.get('texts', 0):,}", f"{texts.get('too_short', 0):,}", f"{dropped:,}"])
    lines = _table(["benchmark", "read from", "texts", "texts too short to be told", "documents dropped"], rows)
    if facts["missing"]:
        lines += ["", f"Not looked for, since they were not there: {', '.join(facts['missing'])}."]
    return lines


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return ["None."]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]


def write_page(curation: Path, manifest: dict[str, Any], settings: CurateSettings) -> None:
    """The page of statistics: counts, drops by reason and language, lengths, and examples of every drop."""
    sources = manifest["sources"]
    lines = ["# Statistics of a curation", "", "Tokens are words, numbers and single marks.", ""]
    lines += _counts_table(sources)
    lines += ["", "## Drops", ""] + _drops_table(sources)
    lines += ["", "## Drops by language", ""]
    lines += _table(
        ["source", "reason", "language", "documents", "bytes", "tokens"],
        [
            [
                name,
                reason,
                language,
                f"{count:,}",
                f"{source['dropped_bytes_by_language'][reason][language]:,}",
                f"{source['dropped_tokens_by_language'][reason][language]:,}",
            ]
            for name, source in sources.items()
            for reason, languages in source["drops_by_language"].items()
            for language, count in sorted(languages.items(), key=lambda item: -item[1])
        ],
    )
    lines += ["", "## Kept, by language", ""]
    lines += _table(
        ["source", "language", "documents", "bytes", "tokens"],
        [
            [
                name,
                language,
                f"{count:,}",
                f"{source['language_bytes'][language]:,}",
                f"{source['language_tokens'][language]:,}",
            ]
            for name, source in sources.items()
            for language, count in source["languages"].items()
        ],
    )
    lines += ["", "## Lengths in characters", ""]
    for name, source in sources.items():
        lines += [f"### {name}", ""] + _length_lines(source["lengths"]) + [""]
    lines += ["## Benchmarks", ""] + _benchmark_lines(manifest)
    if manifest["near_copies"] is not None:
        near = manifest["near_copies"]
        lines += ["", "## Near copies", ""]
        lines += [
            f"{near['candidates']:,} candidates, {near['pairs']:,} pairs alike, {near['dropped']:,} documents dropped."
        ]
        lines += [f"Every pair: `{PAIRS}`; two texts side by side: `--show near_copy`."]
    lines += ["", "## Examples of what was dropped", "", "Chosen by a hash; keys and addresses in them are marks.", ""]
    for (source, reason), rows in examples(curation / "dropped", settings.examples).items():
        lines += [f"### {source}: {reason}", ""]
        for row in rows:
            text = redact(row["text"], ("keys", "emails", "ip_addresses"))[0]  # whole: half a key would not be known
            start = measured(text, reason)[1]
            text = _visible(text[start : start + EXCERPT_CHARACTERS])
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            said = why(row)
            lines += [f"`{row['id']}`{': ' if said else ''}{said}", "", f"{fence}text", text, fence, ""]
    (curation / PAGE).write_text("\n".join(lines), encoding="utf-8")
    (curation / SUMMARY).write_text(summary(manifest) + "\n", encoding="utf-8")


def _length_lines(lengths: dict[str, dict[str, int]]) -> list[str]:
    rows, most = [], max(lengths["read"].values(), default=1)
    for start in sorted({*lengths["read"], *lengths["kept"]}, key=int):
        read, kept = lengths["read"].get(start, 0), lengths["kept"].get(start, 0)
        full, all_of_it = -(-BAR_CHARACTERS * kept // most), -(-BAR_CHARACTERS * max(read, kept) // most)
        bar = "█" * full + "░" * (all_of_it - full)
        rows.append([f"{int(start):,} to {2 * int(start) - 1:,}", f"{read:,}", f"{kept:,}", bar])
    return _table(["characters", "read", "kept", "█ kept, ░ dropped"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Looking, and the Hub


def show(recipe: Recipe, reason: str, count: int) -> str:
    """Documents dropped for a reason, as text; a near copy as its difference from the document that is kept.

    Raises:
        ValueError: nothing was curated yet, or nothing was dropped for this reason.
    """
    curation = recipe.curated_dir.with_name("curation")
    if not (curation / PAGE).is_file():
        raise ValueError(f"{curation}: nothing was curated there yet; run the same command without --show first")
    drops = Counter[str]()
    for source in read_json(recipe.curated_dir / MANIFEST)["sources"].values():
        drops.update(source["drops"])
    if not drops[reason]:
        known = sorted(drops)
        raise ValueError(f"nothing was dropped for {reason!r}; there are {', '.join(known) or 'no drops'}")
    rows = dropped_documents(curation / "dropped", [reason])
    shown = heapq.nsmallest(count, rows, key=lambda row: (row["source"], row["id"]))
    kept = _kept_texts(
        recipe.curated_dir, {tuple(json.loads(row["detail"])[:2]) for row in shown} if reason == "near_copy" else set()
    )
    parts = [f"{drops[reason]:,} documents were dropped for {reason}; {len(shown)} of them:"]
    for row in shown:
        if reason == "near_copy":
            source, identity, _ = json.loads(row["detail"])
            parts.append(f"--- {row['source']} {row['id']}, {why(row)}")
            other = kept[source, identity][:KEPT_CHARACTERS]  # as much as there is of the other
            parts.append(
                _clipped(
                    "\n".join(
                        difflib.unified_diff(other.splitlines(), row["text"].splitlines(), "kept", "dropped", lineterm="")
                    )
                )
            )
        elif reason == "contaminated":
            parts += [
                f"--- {row['source']} {row['id']} {why(row)}",
                _problem_text(recipe, json.loads(row["detail"])[0]),
            ]
            parts += ["--- the document:", _clipped(row["text"])]
        else:
            parts += [f"--- {row['source']} {row['id']} {why(row)}".rstrip(), _clipped(row["text"])]
    return "\n".join(parts)


def why(row: dict[str, Any]) -> str:
    """What a dropped document's entry says beside its reason, in words."""
    if row["reason"] == "near_copy":
        source, identity, similarity = json.loads(row["detail"])
        return f"{similarity:.2f} alike to {source} {identity}, which is kept"
    if row["reason"] == "contaminated":
        hits = json.loads(row["detail"])
        return "holds " + "; ".join(
            f"{hit['share']:.0%} of the {hit['kind']} of {hit['benchmark']} {hit['problem']}" for hit in hits
        )
    return f"content hash {row['detail']}, as one that is kept" if row["reason"] == "exact_copy" else row["detail"]


def _problem_text(recipe: Recipe, hit: dict[str, Any]) -> str:
    from codetune.problems import benchmark_texts

    settings = recipe.need_curate().decontamination
    texts = benchmark_texts(settings.data, names=[hit["benchmark"]], hub=settings.hub).texts
    kinds = hit["kind"].split(" and ")
    return _clipped("\n".join(text.text for text in texts if text.problem == hit["problem"] and text.kind in kinds))


def _clipped(text: str) -> str:
    lines = _visible(text).splitlines()
    return "\n".join(
        lines[:SHOWN_LINES] + ([f"... {len(lines) - SHOWN_LINES} lines more"] if len(lines) > SHOWN_LINES else [])
    )


def _visible(text: str) -> str:
    r"""A text without characters that a terminal obeys. Example: an escape becomes `\x1b`; tabs and line ends stay."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)", lambda match: f"\\x{ord(match[0]):02x}", text)


def _kept_texts(dataset: Path, wanted: set[tuple[Any, ...]]) -> dict[tuple[str, str], str]:
    import pyarrow.parquet as pq

    found: dict[tuple[str, str], str] = {}
    for source in sorted({str(item[0]) for item in wanted}):
        for path in sorted((dataset / source).glob("*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(256, columns=["id", "text"]):
                for row in batch.to_pylist():
                    if (source, row["id"]) in wanted:
                        found[source, row["id"]] = row["text"]
    return found


def push(folder: Path, repository: str, public: bool = False, replace: bool = False, dry_run: bool = False) -> str:
    """The data set onto the Hub in one commit, private unless said, and where it is now; or the list of what would go.

    What goes: card, shards, and the counts as `manifest.json`, without places of this machine.

    Raises:
        ValueError: the Hub refused, or holds something else under this name; the message says what stands there now.
    """
    from codetune.upload import Target, entries, upload

    manifest = read_json(folder / MANIFEST)
    names = [name for source in manifest["sources"].values() for name in source["files"]]
    target = Target(repository, public=public, replace=replace, kind="dataset")

    def identity(known: dict[str, Any] | None) -> str | None:
        if known is None or "settings_fingerprint" not in known:
            return "files that no curation has put there"
        same = known["settings_fingerprint"] == manifest["settings_fingerprint"]
        return None if same else "a data set curated by other settings"

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="push.") as place:  # nothing that lies beside them goes along
        staged = Path(place)
        for name in ("README.md", *names):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).symlink_to((folder / name).resolve())
        write_json(staged / artifacts.MANIFEST, for_others(manifest))
        if dry_run:
            lines = [f"  {entry.size_bytes:>14,}  {entry.path}" for entry in entries(staged)]
            return "\n".join([f"{repository}, {'public' if public else 'private'}:", *lines, "dry run: nothing was sent"])
        documents = sum(source["documents"] for source in manifest["sources"].values())
        done = upload(staged, target, f"{documents:,} documents", identity)
    return f"curate: {done.address}{' (held exactly this already)' if done.unchanged else ''}"


def for_others(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without places of the machine that curated."""
    return {**manifest, "recipe": _without_places(manifest["recipe"])}
