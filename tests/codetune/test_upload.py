"""A folder onto a Hub on loopback: one commit or none, whichever call breaks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from model_hub import ATTRIBUTES, FAULTS, READ_TOKEN, TOKEN, ModelHub

from codetune import upload as module
from codetune.upload import Target, entries, upload

CARD = b"---\nlicense: apache-2.0\n---\n\n# a model\n"
FILES = {
    "README.md": CARD,
    "config.json": b"{}",
    "manifest.json": b'{"run": 1}',
    "model.safetensors": bytes(range(256)) * 40,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of four files, one of them large."""
    target = tmp_path / "folder"
    target.mkdir()
    for name, content in FILES.items():
        (target / name).write_bytes(content)
    return target


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[ModelHub], None]:
    """Point `huggingface_hub` at a Hub of ours, with a token and without waiting."""
    from huggingface_hub import constants

    def point(hub: ModelHub, token: str = TOKEN) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)

    return point


@pytest.fixture
def hub(online: Callable[..., None]) -> Iterator[ModelHub]:
    with ModelHub() as server:
        online(server)
        yield server


def send(folder: Path, repository: str = "me/model", said: list[str] | None = None, **settings: Any) -> Any:
    say = (said if said is not None else []).append
    return upload(folder, Target(repository, **settings), "a model", say=say)


def states(hub: ModelHub, name: str = "me/model") -> list[dict[str, bytes]]:
    """Every tree of the repository that anybody could have downloaded."""
    repository = hub.repositories.get(name)
    return [] if repository is None else [commit.files for commit in repository.commits]


def test_one_commit_holds_exactly_the_folder_and_is_private(hub: ModelHub, folder: Path) -> None:
    done = send(folder, tag="v1")
    repository = hub.repositories["me/model"]
    assert states(hub) == [ATTRIBUTES, {**ATTRIBUTES, **FILES}]
    assert repository.private and repository.tags == {"v1": done.commit} and not done.unchanged
    assert [entry.path for entry in entries(folder)] == sorted(FILES)
    assert repository.commits[-1].large == {"model.safetensors"}


def test_what_is_there_already_is_not_sent_again(hub: ModelHub, folder: Path) -> None:
    first = send(folder)
    again = send(folder, tag="v1")
    assert (again.commit, again.unchanged, len(states(hub))) == (first.commit, True, 2)
    assert hub.repositories["me/model"].tags == {"v1": first.commit}


def test_a_file_that_is_gone_here_is_gone_there_in_the_same_commit(hub: ModelHub, folder: Path) -> None:
    send(folder)
    (folder / "config.json").unlink()
    (folder / "manifest.json").write_text('{"run": 2}')
    send(folder)
    assert states(hub)[2] == {
        **ATTRIBUTES,
        "README.md": CARD,
        "manifest.json": b'{"run": 2}',
        "model.safetensors": FILES["model.safetensors"],
    }
    assert hub.bytes_taken == len(FILES["model.safetensors"])  # the weights went once


def test_a_branch_starts_from_nothing_and_leaves_main_alone(hub: ModelHub, folder: Path) -> None:
    send(folder)
    (folder / "config.json").write_text('{"other": 1}')
    (folder / "README.md").unlink()
    send(folder, revision="lcft-step-10")
    repository = hub.repositories["me/model"]
    main, branch = repository.find("main"), repository.find("lcft-step-10")
    assert main and branch and main.files == {**ATTRIBUTES, **FILES}
    assert set(branch.files) == {*ATTRIBUTES, "config.json", "manifest.json", "model.safetensors"}
    assert all(set(files) in ({*ATTRIBUTES}, set(main.files), set(branch.files)) for files in states(hub))


def test_large_files_go_in_parts_where_the_hub_asks_for_it(online: Callable[..., None], folder: Path) -> None:
    with ModelHub(part_bytes=3000) as hub:
        online(hub)
        send(folder)
        assert states(hub)[-1] == {**ATTRIBUTES, **FILES}
        assert sum("PUT /large" in call for call in hub.calls) == 4  # 10,240 bytes


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.fixture(scope="module")
def calls_of_a_whole_upload(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What an upload asks for, in order."""
    folder = tmp_path_factory.mktemp("clean") / "folder"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, ModelHub() as hub:
        from huggingface_hub import constants

        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": hub.url}.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", TOKEN)
        send(folder, revision="release", tag="v1")
        return hub.calls


def test_every_kind_of_call_is_broken_below(calls_of_a_whole_upload: list[str]) -> None:
    said = "\n".join(calls_of_a_whole_upload)
    for part in ("whoami", "repos/create", "/refs", "/commits/", "/branch/", "validate-yaml", "preupload", "objects/batch"):
        assert part in said, part
    for part in ("PUT /large", "/large/verify", "/commit/release", "/tree/", "/tag/"):
        assert part in said, part


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_anywhere_is_overcome_or_told(
    fault: str, calls_of_a_whole_upload: list[str], online: Callable[..., None], folder: Path
) -> None:
    whole = {**ATTRIBUTES, **FILES}
    for number, call in enumerate(calls_of_a_whole_upload):
        with ModelHub(fault=(number, fault)) as hub:
            online(hub)
            if fault == "401" and "validate" not in call and "/large" not in call:  # a refusal is not asked for twice
                with pytest.raises(ValueError, match=r"the token is not valid \(401\)"):
                    send(folder, revision="release", tag="v1")
                assert all(state in (ATTRIBUTES, whole) for state in states(hub)), call
            elif fault == "401":
                with pytest.raises(ValueError, match=r"401"):
                    send(folder, revision="release", tag="v1")
                assert states(hub) == [ATTRIBUTES], call
            send(folder, revision="release", tag="v1")
            assert states(hub) == [ATTRIBUTES, whole], f"{fault} at {call}"
            repository = hub.repositories["me/model"]
            assert list(repository.tags) == ["v1"] and repository.find("v1") == repository.find("release"), call


@pytest.mark.parametrize("fault", ["500", "dropped before"])
def test_a_hub_that_stays_broken_is_told_and_the_next_attempt_sends_only_the_rest(
    fault: str,
    calls_of_a_whole_upload: list[str],
    online: Callable[..., None],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    whole = {**ATTRIBUTES, **FILES}
    for number, call in enumerate(calls_of_a_whole_upload):
        with ModelHub(fault=(number, fault), lasting=True) as hub:
            online(hub)
            said: list[str] = []
            with pytest.raises(ValueError, match="failed 2 times") as told:
                send(folder, revision="release", tag="v1", said=said)
            assert any("again in" in line for line in said)
            assert (
                "nothing was changed there" in str(told.value)
                or "is as it was" in str(told.value)
                or "is whole" in str(told.value)
            )
            assert all(state in (ATTRIBUTES, whole) for state in states(hub)), call
            hub.fault = None
            send(folder, revision="release", tag="v1")
            assert states(hub) == [ATTRIBUTES, whole], call
            assert hub.bytes_taken == len(FILES["model.safetensors"]), call  # what had been sent was not sent again


# ---------------------------------------------------------------------------------------------------------------------
# Refused before anything is sent


def test_without_a_token_nothing_is_asked(hub: ModelHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"no token for the Hub here: log in \(`hf auth login`\), or set HF_TOKEN"):
        send(folder)
    assert hub.calls == []


def test_a_wrong_token_and_one_that_may_only_read_are_told_apart(
    hub: ModelHub, online: Callable[..., None], folder: Path
) -> None:
    online(hub, "hf_" + "x" * 34)
    with pytest.raises(ValueError, match=r"the token is not valid \(401\)"):
        send(folder)
    online(hub, READ_TOKEN)
    with pytest.raises(ValueError, match="the token may only read"):
        send(folder)
    assert hub.repositories == {}


def test_somebody_elses_name_is_refused_and_an_organisation_of_ours_is_not(hub: ModelHub, folder: Path) -> None:
    with pytest.raises(ValueError, match="the token is me's, who may write to me, team; choose a name there"):
        send(folder, "stranger/model")
    assert hub.calls == ["GET /api/whoami-v2"]
    send(folder, "team/model")
    assert states(hub, "team/model")[-1] == {**ATTRIBUTES, **FILES}


def test_a_public_repository_is_written_to_only_where_that_is_said(hub: ModelHub, folder: Path) -> None:
    hub.make("me/model", private=False)
    with pytest.raises(ValueError, match="me/model is public; nothing was uploaded. Say --public"):
        send(folder)
    send(folder, public=True)
    assert states(hub)[-1] == {**ATTRIBUTES, **FILES}


def test_a_name_that_is_taken_by_something_else_is_refused(hub: ModelHub, folder: Path) -> None:
    hub.make("me/model", {"weights.bin": b"1"})

    def identity(manifest: dict[str, Any] | None) -> str | None:
        return "somebody's weights" if manifest is None else None

    with pytest.raises(ValueError, match="me/model, revision main, holds somebody's weights; nothing was uploaded"):
        upload(folder, Target("me/model"), "a model", identity, lambda line: None)
    upload(folder, Target("me/model", replace=True), "a model", identity, lambda line: None)
    assert states(hub)[-1] == {**ATTRIBUTES, **FILES}


def test_a_tag_is_never_moved(hub: ModelHub, folder: Path) -> None:
    send(folder, tag="v1")
    first = dict(hub.repositories["me/model"].tags)
    (folder / "config.json").write_text('{"new": 1}')
    with pytest.raises(ValueError, match="tag v1 names another commit .* the upload is whole"):
        send(folder, tag="v1")
    assert hub.repositories["me/model"].tags == first


def test_somebody_elses_commit_in_between_is_not_written_over(
    hub: ModelHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    repository = hub.make("me/model")
    commit = HfApi.create_commit

    def late(self: HfApi, *arguments: Any, **settings: Any) -> Any:
        repository.add("main", {**ATTRIBUTES, "theirs": b"1"}, frozenset(), "theirs")
        return commit(self, *arguments, **settings)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(ValueError, match="somebody else changed it meanwhile"):
        send(folder)
    assert states(hub)[-1] == {**ATTRIBUTES, "theirs": b"1"}


def test_metadata_that_the_hub_refuses_is_told_before_the_weights_are_sent(hub: ModelHub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    with pytest.raises(ValueError, match="license_name"):
        send(folder)
    assert hub.bytes_taken == 0 and states(hub) == [ATTRIBUTES]
