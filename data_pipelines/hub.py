"""A data set on the Hub: looked up through `datasets`, then streamed file by file at one commit.

What comes in: `owner/name`, configuration, split, revision. What goes out: the files behind them, at a commit, and their
format. `datasets` says which files a split is made of (its README, folders and names decide); reading them is ours for
parquet and lines of JSON, so that a lane can take row groups or a byte range, and `datasets`' own streaming for any other
format. huggingface_hub asks again when a connection breaks in the middle of a range.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from codetune.recipe import SourceSettings
from data_pipelines.readers import RemoteFile, compression_of, is_input_error

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFiles:
    """What a split of a data set is made of."""

    files: list[RemoteFile]
    format: str  # parquet, jsonl, or stream for any other
    revision: str  # the commit that is read


def look_up(name: str, settings: SourceSettings, allow_unpinned: bool) -> HubFiles:
    """The files of a data set's split at one commit.

    Raises:
        ValueError: missing, gated or private; a revision that is no commit, without `allow_unpinned`; no such
            configuration or split; the Hub cannot be reached.
    """
    key, repository = f"data.sources.{name}", settings.path
    assert repository is not None, "the recipe's loader asks for it"
    commit = _commit(key, repository, settings.revision, allow_unpinned)
    builder = _with_clear_errors(key, repository, lambda: _builder(repository, settings, commit))
    splits: dict[str, list[str]] = {str(split): list(urls) for split, urls in (builder.config.data_files or {}).items()}
    if settings.split not in splits:
        raise ValueError(
            f"{key}.split is `{settings.split}`, but {repository} has the splits {', '.join(splits) or '(none)'}"
        )
    urls = splits[settings.split]
    return HubFiles(_with_clear_errors(key, repository, lambda: _files(urls)), _format_of(builder, urls), commit)


def _commit(key: str, repository: str, revision: str | None, allow_unpinned: bool) -> str:
    from huggingface_hub import HfApi

    named = None if revision in (None, "unpinned") else revision
    if named is None and not allow_unpinned:
        raise ValueError(
            f"{key}.revision of {repository} is unpinned: what it holds can change. `make pin` looks the commit up and "
            f"writes it; or read it as it is with data.allow_unpinned=true"
        )
    if named is not None and COMMIT.fullmatch(named):
        _with_clear_errors(key, repository, lambda: HfApi().dataset_info(repository, revision=named))
        return named
    commit = _with_clear_errors(key, repository, lambda: HfApi().dataset_info(repository, revision=named)).sha
    if not allow_unpinned:
        raise ValueError(
            f"{key}.revision is `{named}`, a name that can move; write the commit it means now, {commit}, or set "
            f"data.allow_unpinned=true"
        )
    return commit


def _builder(repository: str, settings: SourceSettings, commit: str) -> Any:
    import datasets

    return datasets.load_dataset_builder(repository, name=settings.config, data_dir=settings.data_dir, revision=commit)


def _files(urls: list[str]) -> list[RemoteFile]:
    from huggingface_hub import HfFileSystem

    fs = HfFileSystem()
    for folder in sorted({url.rpartition("/")[0] for url in urls}):
        fs.ls(folder, detail=True)  # one listing per folder; without it every file costs a request of its own
    found = []
    for url in sorted(urls):
        info = fs.info(url)
        # hf://datasets/<owner>/<name>@<commit>/<path in the repository>
        path = url.partition("@")[2].partition("/")[2]
        found.append(RemoteFile(url, path, info["size"], str(info.get("blob_id") or "")))
    return found


def _format_of(builder: Any, urls: list[str]) -> str:
    kind = type(builder).__module__.rpartition(".")[2]
    if kind == "parquet":
        return "parquet"
    lines = all(url.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".ndjson")) for url in urls)
    known = all(compression_of(url) or not url.endswith((".bz2", ".xz", ".zip")) for url in urls)
    return "jsonl" if kind == "json" and lines and known else "stream"


def _with_clear_errors(key: str, repository: str, ask: Any) -> Any:
    """`ask()`, its many ways to fail put into words."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"https://huggingface.co/datasets/{repository}"
    gated = (
        f"{key}: {repository} is gated; accept its terms at {page} while logged in, then run `hf auth login` here (or set "
        f"HF_TOKEN)"
    )
    try:
        return ask()
    except GatedRepoError as error:
        raise ValueError(gated) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{key}.revision: {repository} has no such revision; look at {page}/commits/main") from error
    except RepositoryNotFoundError as error:
        raise ValueError(_missing(key, repository)) from error
    except DataFilesNotFoundError as error:
        raise ValueError(f"{key}: {repository} has no data file that can be read ({error})") from error
    except DatasetNotFoundError as error:
        message = gated if "gated" in str(error) else _missing(key, repository)
        raise ValueError(message) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        message = gated if status in (401, 403) else f"{key}: the Hub answered for {repository}: {error}"
        raise ValueError(message) from error
    except ValueError as error:  # of `datasets`: no such configuration
        raise ValueError(f"{key}: {repository}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if not is_input_error(error):
            raise
        raise ValueError(f"{key}: the Hub cannot be reached for {repository} ({type(error).__name__}: {error})") from error


def _missing(key: str, repository: str) -> str:
    return (
        f"{key}: there is no data set {repository} on the Hub, or it is private; check the spelling, or `hf auth login` "
        f"with an account that may read it"
    )
