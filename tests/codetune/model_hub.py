"""A small Hub on loopback that takes uploads: the calls `huggingface_hub` makes for repositories, branches, tags and
commits.

It keeps commits as whole trees, so that a test can look at every state that anybody could have downloaded, and breaks one
call, or every call from one on, in a chosen way. Large files go by LFS, in one part or several. It also gives files back, so
that `from_pretrained("me/model")` can be tried on what was uploaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from loopback import Handler, Loopback

TOKEN = "hf_" + "w" * 34
READ_TOKEN = "hf_" + "r" * 34
FAULTS = ("429", "500", "dropped before", "dropped after", "401")
ATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass(frozen=True)
class Commit:
    oid: str
    files: dict[str, bytes]
    large: frozenset[str]
    title: str


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, list[str]] = field(default_factory=dict)  # commits of each, the newest last
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        oid = self.branches[revision][-1] if revision in self.branches else self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def add(self, branch: str, files: dict[str, bytes], large: frozenset[str], title: str) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {title}".encode()).hexdigest()
        self.commits.append(Commit(oid, files, large, title))
        self.branches.setdefault(branch, []).append(oid)
        return self.commits[-1]


@dataclass
class ModelHub(Loopback):
    """`with ModelHub() as hub:` then point HF_ENDPOINT at `hub.url`."""

    user: str = "me"
    organisations: tuple[str, ...] = ("team",)
    fault: tuple[int, str] | None = None  # number of the call, and how it breaks
    lasting: bool = False  # every call from that one on
    part_bytes: int | None = None  # large files go in parts of so many bytes
    repositories: dict[str, Repository] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    bytes_taken: int = 0  # of large files
    lock: Any = field(default_factory=threading.Lock)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def make(self, name: str, files: dict[str, bytes] | None = None, private: bool = True) -> Repository:
        """A repository that is there already."""
        repository = self.repositories[name] = Repository(private)
        repository.add("main", dict(ATTRIBUTES), frozenset(), "initial commit")
        if files:
            repository.add("main", {**ATTRIBUTES, **files}, frozenset(), "files")
        return repository


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(Handler):
    state: ModelHub
    wbufsize = 2**16  # head and body in one packet: in two, each answer waits 40 ms for an acknowledgement

    def do_GET(self) -> None:
        self.take()

    def do_HEAD(self) -> None:
        self.take()

    def do_POST(self) -> None:
        self.take()

    def do_PUT(self) -> None:
        self.take()

    def take(self) -> None:
        hub = self.state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlparse(self.path)
        with hub.lock:
            hub.calls.append(f"{self.command} {urllib.parse.unquote(url.path)}")
            number = len(hub.calls) - 1
            fault = None
            if hub.fault is not None and (number == hub.fault[0] or (hub.lasting and number > hub.fault[0])):
                fault = hub.fault[1]
            if fault == "dropped before":
                return self.drop()
            if fault == "429":
                return self.send(429, b"slow down", {"Retry-After": "1"})
            if fault == "500":
                return self.send(500, b"<html>broken</html>", {"Content-Type": "text/html"})
            if fault == "401":
                return self.send(401, b'{"error": "Invalid credentials"}', {"Content-Type": "application/json"})
            try:
                status, answer, headers = self.route(url, body)
            except _Refused as refused:
                status, headers = refused.status, {"X-Error-Code": refused.code} if refused.code else {}
                answer = {"error": refused.message, "errors": [{"message": refused.message}]}
            if fault == "dropped after":
                return self.drop()
        if isinstance(answer, bytes):
            return self.send(status, answer, headers)
        return self.send(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **headers})

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # -- the calls --------------------------------------------------------------------------------------------------

    def route(self, url: urllib.parse.ParseResult, body: bytes) -> tuple[int, Any, dict[str, str]]:
        hub, path = self.state, urllib.parse.unquote(url.path)
        if path.startswith("/large/"):
            return self.take_large(path, urllib.parse.parse_qs(url.query), body)
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body))
        file = re.fullmatch(r"/(?:spaces/|datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if file:
            return self.give(*file.groups())
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_TOKEN):
            raise _Refused(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            role = "write" if token == TOKEN else "read"
            orgs = [{"name": name, "type": "org"} for name in hub.organisations]
            return 200, {"name": hub.user, "type": "user", "orgs": orgs, "auth": {"accessToken": {"role": role}}}, {}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        batch = re.fullmatch(r"/(?:spaces/|datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if batch:
            return self.batch(json.loads(body))
        call = re.fullmatch(r"/api/(?:models|spaces|datasets)/([^/]+/[^/]+)(?:/([a-z]+)(?:/(.*))?)?", path)
        if call is None:
            raise _Refused(404, f"no such call: {path}", "EntryNotFound")
        name, what, rest = call.groups()
        repository = hub.repositories.get(name)
        if repository is None:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return getattr(self, f"call_{what or 'info'}")(repository, name, rest or "main", body)

    def create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        hub = self.state
        owner = asked.get("organization") or hub.user
        name = f"{owner}/{asked['name']}"
        if owner not in (hub.user, *hub.organisations):
            raise _Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
        if name in hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, {}
        hub.make(name, private=asked.get("visibility") == "private")
        return 200, {"url": f"{hub.url}/{name}", "name": name, "id": name}, {}

    def call_info(self, repository: Repository, name: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        commit = repository.find("main")
        assert commit is not None
        siblings = [{"rfilename": path} for path in commit.files]
        facts = {"id": name, "sha": commit.oid, "private": repository.private, "tags": [], "siblings": siblings}
        return 200, facts | {"gated": False, "disabled": False, "downloads": 0, "likes": 0}, {}

    def call_revision(self, repository: Repository, name: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        return self.call_info(repository, name, rest, body)

    def call_refs(self, repository: Repository, name: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oids[-1]}
            for branch, oids in repository.branches.items()
        ]
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repository.tags.items()]
        return 200, {"branches": branches, "tags": tags, "converts": []}, {}

    def call_commits(self, repository: Repository, name: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        found = [
            {"id": oid, "authors": [], "date": "2026-01-01T00:00:00.000Z", "title": "a commit", "message": ""}
            for oid in reversed(repository.branches[rest])
        ]
        return 200, found, {}

    def call_branch(self, repository: Repository, name: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if rest in repository.branches:
            raise _Refused(409, "Reference already exists")
        start = repository.find(json.loads(body).get("startingPoint", "main"))
        assert start is not None
        repository.branches[rest] = [start.oid]
        return 200, {}, {}

    def call_tag(self, repository: Repository, name: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        tag, commit = json.loads(body)["tag"], repository.find(rest)
        if tag in repository.tags:
            raise _Refused(409, "Tag reference exists already")
        if commit is None:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        repository.tags[tag] = commit.oid
        return 200, {}, {}

    def call_tree(self, repository: Repository, name: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        revision, _, folder = rest.partition("/")
        commit = repository.find(revision)
        if commit is None:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        if folder and not any(path.startswith(f"{folder}/") for path in commit.files):
            raise _Refused(404, "no such folder", "EntryNotFound")
        return 200, [self.entry(commit, path) for path in sorted(commit.files) if path.startswith(folder)], {}

    def entry(self, commit: Commit, path: str) -> dict[str, Any]:
        data = commit.files[path]
        if path not in commit.large:
            return {"type": "file", "path": path, "size": len(data), "oid": blob(data)}
        oid = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
        lfs = {"oid": oid, "size": len(data), "pointerSize": len(pointer)}
        return {"type": "file", "path": path, "size": len(data), "oid": blob(pointer), "lfs": lfs}

    def call_preupload(self, repository: Repository, name: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        commit = repository.find(rest)
        if commit is None:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        modes = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".safetensors", ".parquet")) or file["size"] > 10 * 2**20
            oid = self.entry(commit, file["path"])["oid"] if file["path"] in commit.files else None
            modes.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        return 200, {"files": modes}, {}

    def batch(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        hub, objects = self.state, []
        for item in asked["objects"]:
            if item["oid"] in hub.large_files:
                objects.append(item)
                continue
            upload: dict[str, Any] = {"href": f"{hub.url}/large/{item['oid']}"}
            if hub.part_bytes is not None:
                count = -(-item["size"] // hub.part_bytes)
                parts = {f"{part:05d}": f"{hub.url}/large/{item['oid']}?part={part}" for part in range(1, count + 1)}
                upload["header"] = {"chunk_size": str(hub.part_bytes), **parts}
            objects.append({**item, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/large/verify"}}})
        return 200, {"objects": objects, "transfer": "basic" if hub.part_bytes is None else "multipart"}, {}

    def take_large(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any, dict[str, str]]:
        hub, oid = self.state, path.removeprefix("/large/")
        if oid == "verify":
            asked = json.loads(body)
            if len(hub.large_files.get(asked["oid"], b"")) != asked["size"]:
                raise _Refused(400, "size differs")
            return 200, {}, {}
        if self.command == "POST":  # all parts are there
            parts = hub.parts.pop(oid)
            body = b"".join(parts[part] for part in sorted(parts))
        hub.bytes_taken += len(body) if self.command == "PUT" else 0
        if "part" in query:
            hub.parts.setdefault(oid, {})[int(query["part"][0])] = body
            return 200, {}, {"ETag": f'"{len(body)}"'}
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "content does not match its name")
        hub.large_files[oid] = body
        return 200, {}, {}

    def call_commit(self, repository: Repository, name: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        head = repository.find(rest)
        if head is None or rest not in repository.branches:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        files, large, title = dict(head.files), set(head.large), ""
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise _Refused(412, "The branch has moved")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                large.discard(value["path"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.state.large_files:
                    raise _Refused(400, f"content of {value['path']} was never uploaded")
                files[value["path"]] = self.state.large_files[value["oid"]]
                large.add(value["path"])
            elif item["key"] == "deletedFile":
                del files[value["path"]]
                large.discard(value["path"])
            else:
                raise _Refused(400, f"unknown operation {item['key']}")
        commit = repository.add(rest, files, frozenset(large), title)
        return 200, {"commitUrl": f"{self.state.url}/{name}/commit/{commit.oid}", "commitOid": commit.oid}, {}

    def validate(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        """What the Hub insists on, of what we write: YAML, known keys' types, names of licences that are not on its list."""
        head = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        if head is None:
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}, {}
        try:
            data = yaml.safe_load(head.group(1))
        except yaml.YAMLError as error:
            raise _Refused(400, f"Invalid YAML: {error}") from error
        if data.get("license") == "other" and not (data.get("license_name") and data.get("license_link")):
            raise _Refused(400, '"license_name" and "license_link" are required with license: other')
        for entry in data.get("model-index", []):
            if not entry.get("name") or not all(result.get("dataset") for result in entry["results"]):
                raise _Refused(400, '"model-index" is malformed')
        return 200, {"errors": [], "warnings": []}, {}

    def give(self, name: str, revision: str, path: str) -> tuple[int, Any, dict[str, str]]:
        repository = self.state.repositories.get(name)
        if repository is None:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        commit = repository.find(revision)
        if commit is None:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        if path not in commit.files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit.oid}
        return 200, data, headers | {"Content-Length": str(len(data))}


ModelHub.handler = _Handler


def blob(data: bytes) -> str:
    """git's name of a content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
