"""A small Hub on loopback: the answers that `datasets` and `huggingface_hub` ask a data set repository for.

Serves files with range requests, refuses what is gated or missing as the real one does (status and `X-Error-Code`), and
breaks the connection in the middle of chosen bodies. It keeps every request, so that a test can count bytes.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from loopback import Handler, Loopback

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Files by path; a gated one shows its name and list of files and refuses the files."""

    files: dict[str, bytes]
    gated: bool = False
    commit: str = COMMIT


@dataclass
class HubServer(Loopback):
    """`with HubServer({"me/code": Repository({...})}) as hub:` then `HF_ENDPOINT=hub.url` in another process."""

    repositories: dict[str, Repository]
    break_bodies: int = 0  # this many bodies of data files end in the middle, the first ones asked for of those below
    break_below: int | None = None  # only ranges that begin before this byte, such as row groups and not the footer
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    bytes_sent: int = 0  # of data files
    broken: int = 0


class _Handler(Handler):
    state: HubServer

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        state = self.state
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        state.requests.append((self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None:
            return self._refuse(404, "EntryNotFound")
        repository = state.repositories.get(found.group(1))
        if repository is None:
            return self._refuse(401, "RepoNotFound")
        revision = found.group(3) if api else found.group(2)
        if revision not in (None, "main", repository.commit):
            return self._refuse(404, "RevisionNotFound")
        if file:
            return self._send_file(repository, found.group(3), with_body)
        if found.group(2) == "tree":
            return self._send_json(_tree(repository, found.group(4) or "", "recursive=true" in self.path.lower()))
        if found.group(2) == "paths-info":
            wanted = urllib.parse.parse_qs(posted.decode()).get("paths")
            if wanted is None:
                wanted = json.loads(posted)["paths"]
            return self._send_json([entry for place in wanted for entry in _entry(repository, place)])
        siblings = [{"rfilename": name} for name in sorted(repository.files)]
        facts = {"id": found.group(1), "sha": repository.commit, "private": False, "tags": [], "siblings": siblings}
        return self._send_json(facts | {"gated": "auto" if repository.gated else False, "disabled": False, "downloads": 0})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "refused"}', {"X-Error-Code": code, "Content-Type": "application/json"})

    def _send_file(self, repository: Repository, name: str, with_body: bool) -> None:
        state = self.state
        if repository.gated:
            return self._refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        if name not in repository.files:
            return self._refuse(404, "EntryNotFound")
        data = repository.files[name]
        headers = {"ETag": f'"{len(data):x}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self._send(200, data, headers, with_body, data_file=True)
        start = int(asked.group(1))
        stop = min(int(asked.group(2) or len(data) - 1) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        chosen = state.break_below is None or start < state.break_below
        return self._send(206, data[start:stop], headers, with_body, data_file=True, may_break=chosen)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str],
        with_body: bool = True,
        data_file: bool = False,
        may_break: bool = False,
    ) -> None:
        state = self.state
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body or self.command == "HEAD":
            return
        breaks = may_break and len(body) > 1000 and state.broken < state.break_bodies
        if breaks:
            state.broken += 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        if data_file:
            state.bytes_sent += len(body)
        self.wfile.write(body)


HubServer.handler = _Handler


def _entry(repository: Repository, place: str) -> list[dict[str, object]]:
    if place in repository.files:
        return [_file_entry(place, repository.files[place])]
    if any(name.startswith(f"{place}/") for name in repository.files):
        return [{"type": "directory", "path": place, "oid": "1" * 40, "size": 0}]
    return []


def _tree(repository: Repository, folder: str, recursive: bool) -> list[dict[str, object]]:
    prefix = f"{folder}/" if folder else ""
    inside = [name for name in sorted(repository.files) if name.startswith(prefix)]
    deep = [name for name in inside if "/" in name[len(prefix) :]]
    folders = sorted({prefix + name[len(prefix) :].partition("/")[0] for name in deep})
    files = inside if recursive else [name for name in inside if name not in deep]
    return [
        *({"type": "directory", "path": name, "oid": "1" * 40, "size": 0} for name in folders),
        *(_file_entry(name, repository.files[name]) for name in files),
    ]


def _file_entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": f"{len(data):040x}"}
