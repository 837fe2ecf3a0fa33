"""A folder onto the Hub in one commit: whole or not at all, started again where it broke, and checked afterwards.

What comes in: a folder in which every file is meant to go, and where to (`Target`). What goes out: the commit, or one
`ValueError` that says what stands on the Hub now (always: what was there before, or all of it) and what to do.

The order is what makes it safe. Everything that can be refused is refused before the first byte is sent: the token, whose
name the repository is in, whether it is public, what is in it already, a tag that is taken. Then contents are sent, which
nobody sees yet; the Hub keeps them, so that the next attempt sends only the rest. Then one commit adds every file and
deletes what is no longer there, upon the commit that we looked at (another one in between is refused by the Hub). An answer
that was lost is not asked for twice: the next attempt compares the repository with the folder first. The tag comes last.

What it does not do: wait for more than `ATTEMPTS` failures of one call in a row, or delete a repository, a branch or a tag.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from codetune.artifacts import MANIFEST, hash_file

ATTEMPTS = 6
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 2.0, 300.0
TRANSIENT = (408, 429, 500, 502, 503, 504, 520, 522, 524)
KEPT_ON_HUB = (".gitattributes",)  # the Hub's own: which files it stores as large ones
HASH_BYTES = 2**20

Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """Where a folder goes."""

    repository: str | None  # owner/name; without an owner: the token's; none: for listing only
    revision: str = "main"  # a branch; made where it is missing
    tag: str | None = None  # given to the commit once it is whole
    public: bool = False  # a new repository is private without it, and one that is public already is refused
    replace: bool = False  # write over what is there, whatever it is
    kind: str = "model"  # or dataset, or space


@dataclass(frozen=True)
class Entry:
    """One file that goes."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Uploaded:
    """What became of it."""

    address: str
    commit: str
    unchanged: bool  # the repository held exactly this already


def entries(folder: Path) -> list[Entry]:
    """Every file of the folder, by path: exactly what `upload` sends."""
    return [
        Entry(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def upload(
    folder: Path,
    target: Target,
    message: str,
    identity: Callable[[dict[str, Any] | None], str | None] = lambda manifest: None,
    say: Callable[[str], None] = print,
) -> Uploaded:
    """Make the revision hold exactly the folder.

    `identity` is given the manifest that the revision holds (None: it has none) and returns why it must not be written over,
    or None.

    Raises:
        ValueError: it was refused, or failed `ATTEMPTS` times; the message says what stands on the Hub.
    """
    from huggingface_hub import HfApi, constants, get_token

    # by plain HTTP, on which every fault was tried; Xet's own client breaks with errors that tell nothing of what to do
    constants.HF_HUB_DISABLE_XET = True
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so that nothing can be uploaded; unset it, or list with --dry-run")
    token = get_token()
    if token is None:
        raise ValueError("no token for the Hub here: log in (`hf auth login`), or set HF_TOKEN; --dry-run needs none")
    api = HfApi(token=token, library_name="codetune")
    repository = owned_name(api, target, say)
    wanted = entries(folder)
    session = _Session(api, repository, target, say)
    session.open()
    head = session.prepare_revision(identity)
    commit, unchanged = session.commit(folder, wanted, head, message)
    if target.tag is not None:
        session.tag(target.tag, commit)
    return Uploaded(f"{api.endpoint}/{prefix_of(target)}{repository}/tree/{target.revision}", commit, unchanged)


def prefix_of(target: Target) -> str:
    """What stands before a repository's name in addresses of pages and files."""
    return {"model": "", "dataset": "datasets/", "space": "spaces/"}[target.kind]


def owned_name(api: Any, target: Target, say: Callable[[str], None]) -> str:
    """`owner/name`, where the token may write.

    Raises:
        ValueError: the token is wrong or may only read, or the owner is somebody else.
    """
    me = retried("asking whose token this is", api.whoami, say)
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ValueError("the token may only read; make one that may write, on the Hub's page of access tokens")
    owner, _, name = (target.repository or "").rpartition("/")
    mine = [me["name"], *(group["name"] for group in me.get("orgs", []))]
    if owner and owner not in mine:
        raise ValueError(
            f"repository {target.repository}: the token is {me['name']}'s, who may write to {', '.join(mine)}; choose a "
            "name "
            f"there, or log in as {owner}"
        )
    return f"{owner or me['name']}/{name}"


class _Session:
    """One upload: the calls it makes, each tried again while the reason may pass."""

    def __init__(self, api: Any, repository: str, target: Target, say: Callable[[str], None]) -> None:
        self.api, self.repository, self.target, self.say = api, repository, target, say
        self.of = {"repo_id": repository, "repo_type": target.kind}

    def call(self, what: str, function: Callable[[], Result], state: str = "nothing was changed there") -> Result:
        return retried(f"{self.repository}: {what}", function, self.say, state)

    def open(self) -> None:
        """The repository is there, and as public as was asked for."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def look() -> Any:
            try:
                return self.api.repo_info(**self.of)
            except RepositoryNotFoundError:
                return None

        info = self.call("looking it up", look)
        if info is None:
            settings: dict[str, Any] = {"space_sdk": "gradio"} if self.target.kind == "space" else {}
            self.call(
                "making the repository",
                lambda: self.api.create_repo(**self.of, private=not self.target.public, exist_ok=True, **settings),
            )
            info = self.call("looking it up", lambda: self.api.repo_info(**self.of))
        if not info.private and not self.target.public:
            raise ValueError(
                f"{self.repository} is public; nothing was uploaded. Say --public if that is meant, make it private on its "
                "page, or choose another name"
            )

    def prepare_revision(self, identity: Callable[[dict[str, Any] | None], str | None]) -> str:
        """The branch is there, nothing of another run is in it, the tag is free; its newest commit."""
        refs = self.call("looking up branches and tags", lambda: self.api.list_repo_refs(**self.of))
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        if self.target.revision not in heads:
            first = self.call("reading its history", lambda: self.api.list_repo_commits(**self.of))[-1].commit_id
            self.call(
                f"making branch {self.target.revision}",
                lambda: self.api.create_branch(**self.of, branch=self.target.revision, revision=first, exist_ok=True),
            )
            heads[self.target.revision] = first
        head = heads[self.target.revision]
        if not self.target.replace:
            self.refuse_others(head, identity)
        return head

    def refuse_others(self, head: str, identity: Callable[[dict[str, Any] | None], str | None]) -> None:
        """Refuse to write over files that are not an earlier state of the same run."""
        files = [path for path in self.files(head) if path not in KEPT_ON_HUB]
        if not files:
            return
        manifest = None
        if MANIFEST in files:
            try:
                manifest = json.loads(self.call("reading its manifest", lambda: self.content(MANIFEST, head)))
            except (UnicodeDecodeError, json.JSONDecodeError):
                manifest = None  # not one of ours
        reason = identity(manifest)
        if reason is not None:
            raise ValueError(
                f"{self.repository}, revision {self.target.revision}, holds {reason}; nothing was uploaded. Choose another "
                "repository or revision, or say --replace"
            )

    def content(self, path: str, revision: str) -> bytes:
        """One small file of a commit; not by way of the cache, which would keep what is private."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        url = f"{self.api.endpoint}/{prefix_of(self.target)}{self.repository}/resolve/{revision}/{path}"
        answer = get_session().get(url, headers={"authorization": f"Bearer {self.api.token}"}, follow_redirects=True)
        hf_raise_for_status(answer)
        return answer.content

    def files(self, revision: str) -> dict[str, Any]:
        """Files of a commit by path."""
        tree = self.call(
            "listing its files",
            lambda: list(self.api.list_repo_tree(**self.of, revision=revision, recursive=True)),
        )
        return {item.path: item for item in tree if hasattr(item, "blob_id")}

    def commit(self, folder: Path, wanted: list[Entry], head: str, message: str) -> tuple[str, bool]:
        """One commit upon `head` that makes the revision hold exactly the folder; whether there was nothing to do."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        first = True
        started = head

        def attempt() -> str:
            nonlocal first, head
            if not first:  # an answer may have been lost: what stands there now?
                refs = self.api.list_repo_refs(**self.of)
                head = next(ref.target_commit for ref in refs.branches if ref.name == self.target.revision)
            first = False
            there = {item.path: item for item in self.api.list_repo_tree(**self.of, revision=head, recursive=True)}
            there = {path: item for path, item in there.items() if hasattr(item, "blob_id") and path not in KEPT_ON_HUB}
            if same(folder, wanted, there):
                return head
            if head != started:
                raise ValueError(
                    f"{self.repository}: somebody else committed to {self.target.revision} meanwhile ({head[:12]}); "
                    "nothing of "
                    "ours was. Look at it, then run the same command again"
                )
            adds = [CommitOperationAdd(entry.path, folder / entry.path) for entry in wanted]
            gone = sorted(set(there) - {entry.path for entry in wanted})
            operations = [*adds, *(CommitOperationDelete(path) for path in gone)]
            self.api.create_commit(
                **self.of, operations=operations, commit_message=message, revision=self.target.revision, parent_commit=head
            )
            raise _LookAgain  # what counts is what stands there

        state = f"{self.target.revision} is as it was, contents that were sent are kept: run the same command again"
        while True:
            try:
                commit = self.call("uploading", attempt, state)
                return commit, commit == started
            except _LookAgain:
                continue

    def tag(self, name: str, commit: str) -> None:
        """Name the commit; a tag of this name on it already is fine, on another is refused."""

        def attempt() -> None:
            tags = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(**self.of).tags}
            if name not in tags:
                self.api.create_tag(**self.of, tag=name, revision=commit)
            elif tags[name] != commit:
                raise ValueError(
                    f"{self.repository}: tag {name} names another commit ({tags[name][:12]}); the upload is whole "
                    f"({commit[:12]}), the tag was not moved. Choose another"
                )

        self.call(f"making tag {name}", attempt, f"the upload is whole (commit {commit[:12]}), only the tag is missing")


class _LookAgain(Exception):
    """The commit was accepted; compare before saying so."""


def same(folder: Path, wanted: Iterable[Entry], there: dict[str, Any]) -> bool:
    """Whether the files of a commit are those of the folder, by their hashes."""
    wanted = list(wanted)
    if set(there) != {entry.path for entry in wanted}:
        return False
    for entry in wanted:
        item = there[entry.path]
        stored = item.lfs.sha256 == entry.sha256 if item.lfs else item.blob_id == git_blob(folder / entry.path)
        if item.size != entry.size_bytes or not stored:
            return False
    return True


def git_blob(path: Path) -> str:
    """The name that git gives to a file's content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def retried(
    what: str, function: Callable[[], Result], say: Callable[[str], None], state: str = "nothing was changed there"
) -> Result:
    """Call until it works, with longer and longer waits while the reason may pass.

    Raises:
        ValueError: it will not pass, or has not after `ATTEMPTS`; `state` is what stands on the Hub then.
    """
    from httpx2 import TransportError  # what huggingface_hub speaks HTTP with
    from huggingface_hub.errors import HfHubHTTPError

    wait = FIRST_WAIT_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function()
        # subtle: uploads wrap their errors in RuntimeError, and a page of HTML instead of an answer (a proxy's, a 502's) is
        # a JSONDecodeError in the check of metadata
        except (HfHubHTTPError, TransportError, RuntimeError, json.JSONDecodeError) as error:
            cause = _cause(error, (HfHubHTTPError, TransportError, json.JSONDecodeError))
            if cause is None:
                raise
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) and cause.response is not None else None
            if status is not None and status not in TRANSIENT:
                raise ValueError(f"{what} was refused: {_explained(cause, status)}; {state}") from error
            reason = f"status {status}" if status is not None else f"{type(cause).__name__}: {cause}".rstrip(": ")
            if attempt == ATTEMPTS:
                raise ValueError(f"{what} failed {ATTEMPTS} times ({reason}); {state}") from error
            pause = min(max(wait, _asked_to_wait(cause)), LONGEST_WAIT_SECONDS)
            say(f"{what}: {reason}; again in {pause:g} s")
            time.sleep(pause)
            wait *= 2
    raise AssertionError("unreachable")


def _cause(error: BaseException | None, kinds: tuple[type[BaseException], ...]) -> Any:
    """The error itself or the one it was raised from that tells what the Hub answered."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error


def _asked_to_wait(error: Any) -> float:
    answer = getattr(error, "response", None)
    value = answer.headers.get("Retry-After", "") if answer is not None else ""
    return float(value) if value.isdigit() else 0.0


def _explained(error: Any, status: int) -> str:
    """What the user can do about a refusal."""
    said = str(getattr(error, "server_message", None) or str(error).strip().partition("\n")[0])
    if status == 401:
        return "the token is not valid (401); log in again (`hf auth login`), or correct HF_TOKEN"
    if status == 403:
        return f"the token may not do that (403: {said}); use one that may write there"
    if status in (409, 412):
        return f"somebody else changed it meanwhile ({status}: {said}); run the same command again"
    return f"{said} (status {status})"
