"""Looks up the commits behind `revision: unpinned` and writes them into the recipes: `make pin`.

What comes in: recipe files. What goes out: the same files, every `unpinned` replaced by the commit that the Hub has now,
all else as it was, comments included. Data sets under `data`, models under `base` and of engines. Nothing is downloaded.

    python -m data_pipelines.pin [recipes/stage1/7b.yaml ...]          (none: every recipe)

What it does not do: move a pin that is there already. Write `unpinned` in its place first; it is a change of the data.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from codetune.artifacts import fail

UNPINNED = "unpinned"


@dataclass(frozen=True)
class Unpinned:
    """One `revision: unpinned`: whose, and where in the text."""

    key: str
    repository: str
    is_model: bool
    start: int
    end: int


def pin(path: Path) -> list[str]:
    """Pin one file in place; what was written, in words.

    Raises:
        ValueError: no such file, a revision whose repository stands in another file, or the Hub's refusal.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe")
    text = path.read_text(encoding="utf-8")
    told, pinned = [], text
    once = {item.start: item for item in find_unpinned(text, str(path))}  # an anchor is met again where it is used
    for found in sorted(once.values(), key=lambda item: item.start, reverse=True):
        commit = look_up(found)
        pinned = pinned[: found.start] + commit + pinned[found.end :]
        told.append(f"{path}: {found.key}.revision of {found.repository} is {commit}")
    if told:
        temporary = path.with_name(f".{path.name}.pinned")
        temporary.write_text(pinned, encoding="utf-8")
        os.replace(temporary, path)
    return told[::-1]


def find_unpinned(text: str, where: str) -> Iterator[Unpinned]:
    """Every `revision: unpinned` of a recipe's text, with the repository that stands beside it.

    Example: `base: {path: a/b, revision: unpinned}` gives `Unpinned("base", "a/b", True, 26, 34)`
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not readable as YAML: {error}") from error
    yield from _walk(root, (), where)


def _walk(node: Any, keys: tuple[str, ...], where: str) -> Iterator[Unpinned]:
    if not isinstance(node, yaml.MappingNode):
        return
    entries = {str(key.value): value for key, value in node.value}
    revision = entries.get("revision")
    if revision is not None and revision.value == UNPINNED:
        place = ".".join(keys)
        named = entries.get("path", entries.get("model"))
        if named is None:
            raise ValueError(
                f"{where}: `{place}.revision` is unpinned, but `{place}.path` is not beside it; write both here"
            )
        is_model = keys[:1] == ("base",) or "path" not in entries
        yield Unpinned(place, named.value, is_model, revision.start_mark.index, revision.end_mark.index)
    for name, value in entries.items():
        if name != "<<":  # the anchor is met where it stands
            yield from _walk(value, (*keys, name), where)


def look_up(found: Unpinned) -> str:
    """The commit that the Hub has now.

    Raises:
        ValueError: no such repository, no access, or no Hub.
    """
    import httpx2  # what huggingface_hub 2 speaks with
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        api = HfApi()
        facts = api.model_info(found.repository) if found.is_model else api.dataset_info(found.repository)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{found.key}: {found.repository} does not exist on the Hub, or is private: correct it, or log in"
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(f"{found.key}: the Hub answered for {found.repository}: {error}") from error
    except (OfflineModeIsEnabled, httpx2.HTTPError, OSError) as error:
        raise ValueError(
            f"{found.key}: the Hub cannot be reached for {found.repository} ({type(error).__name__})"
        ) from error
    assert facts.sha is not None, "the Hub names the commit of every repository"
    return facts.sha


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.pin", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", type=Path, help="files; none: every recipe below recipes/")
    options = parser.parse_args()
    paths = options.recipes or [path for path in sorted(Path("recipes").rglob("*.yaml")) if path.parent.name != "accelerate"]
    try:
        told = [line for path in paths for line in pin(path)]
    except ValueError as error:
        fail(str(error))
    else:
        print("\n".join(told) or f"nothing is unpinned in {len(paths)} recipes")


if __name__ == "__main__":
    main()
