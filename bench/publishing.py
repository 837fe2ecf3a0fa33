"""An upload broken once at every call in turn, in five ways: ours beside the library's own `upload_folder`.

Reference: what a script would do with huggingface_hub alone (`create_repo`, `upload_folder`, `create_tag`), under the same
faults on the same Hub, a small one on loopback that speaks the calls the library makes. Waiting between attempts is left
out. Counted: uploads that end whole (one commit, the tag on it), that are told to the user and are whole when started again,
and states in which anybody could have downloaded a part. The wrong token is a refusal, which nobody should try again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MINUTES = 1
ROOT = Path(__file__).parents[1]
os.environ.update({"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
sys.path.insert(0, str(ROOT / "tests" / "codetune"))

from model_hub import (  # noqa: E402  # pyright: ignore[reportMissingImports]  (the tests' Hub)
    ATTRIBUTES,
    FAULTS,
    TOKEN,
    ModelHub,
)

from codetune.upload import Target, entries, upload  # noqa: E402

FILES = {"README.md": b"---\nlicense: apache-2.0\n---\n", "config.json": b"{}", "model.safetensors": bytes(range(256)) * 64}
NAME = "me/model"


def ours(folder: Path) -> None:
    upload(folder, Target(NAME, tag="v1"), "a model", say=lambda line: None)


def librarys(folder: Path) -> None:
    from huggingface_hub import HfApi

    api = HfApi(token=TOKEN)
    api.create_repo(NAME, private=True, exist_ok=True)
    api.upload_folder(repo_id=NAME, folder_path=folder)
    api.create_tag(NAME, tag="v1", exist_ok=True)


def point_at(hub: ModelHub) -> None:
    from huggingface_hub import constants

    constants.ENDPOINT = hub.url


def is_whole(hub: ModelHub) -> bool:
    """One commit with everything, and the tag on it."""
    repository = hub.repositories.get(NAME)
    if repository is None:
        return False
    trees = [commit.files for commit in repository.commits]
    return trees == [ATTRIBUTES, {**ATTRIBUTES, **FILES}] and repository.tags == {"v1": repository.commits[-1].oid}


def shows_a_part(hub: ModelHub) -> bool:
    repository = hub.repositories.get(NAME)
    return repository is not None and any(
        commit.files not in (ATTRIBUTES, {**ATTRIBUTES, **FILES}) for commit in repository.commits
    )


def break_everywhere(way: Callable[[Path], None], folder: Path) -> dict[str, dict[str, int]]:
    """Per fault: how uploads ended."""
    with ModelHub() as hub:
        point_at(hub)
        way(folder)
        assert is_whole(hub)
        calls = len(hub.calls)
    found: dict[str, dict[str, int]] = {}
    for fault in FAULTS:
        counts = found[fault] = {
            "calls": calls,
            "whole": 0,
            "told, whole again": 0,
            "two commits": 0,
            "not whole": 0,
            "parts": 0,
        }
        for number in range(calls):
            with ModelHub(fault=(number, fault)) as hub:
                point_at(hub)
                told = False
                try:
                    way(folder)
                except Exception:  # noqa: BLE001  (the library's own errors are of many kinds)
                    told = True
                    hub.fault = None
                    way(folder)
                counts["parts"] += shows_a_part(hub)
                if is_whole(hub):
                    counts["told, whole again" if told else "whole"] += 1
                elif len(hub.repositories[NAME].commits) > 2:
                    counts["two commits"] += 1
                else:
                    counts["not whole"] += 1
    return found


def main() -> None:
    import logging

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    os.environ["HF_TOKEN"] = TOKEN
    time.sleep = lambda seconds: None  # what is waited for is not measured
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "folder"
        folder.mkdir()
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        assert [entry.path for entry in entries(folder)] == sorted(FILES)
        figures = {"ours": break_everywhere(ours, folder), "upload_folder": break_everywhere(librarys, folder)}
    for who, by_fault in figures.items():
        print(f"\n{who}")
        for fault, counts in by_fault.items():
            print(f"  {fault:<16}" + "".join(f"{count:>4} {name}," for name, count in counts.items()).rstrip(","))
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
