"""`make pin` writes the Hub's commits into recipes and touches nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.pin import find_unpinned

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import COMMIT, HubServer, Repository

ROOT = Path(__file__).parents[2]
RECIPE = """# A header that stays.
name: stage1
data:
  sources:
    code: &code {kind: hub, path: me/code, revision: unpinned}  # a comment that stays
    text:
      <<: *code
      path: me/text
      revision: 'unpinned'
    old:
      kind: hub
      path: me/old
      revision: 89abcdef0123456789abcdef0123456789abcdef
"""


def run(endpoint: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "-m", "data_pipelines.pin", *map(str, paths)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_unpinned_revisions_are_found_with_their_repositories() -> None:
    found = list(find_unpinned(RECIPE, "recipe.yaml"))
    assert [(item.key, item.repository, item.is_model) for item in found] == [
        ("data.sources.code", "me/code", False),
        ("data.sources.text", "me/text", False),
    ]
    (model,) = find_unpinned("base: {path: a/b, revision: unpinned}", "recipe.yaml")
    assert (model.is_model, "base: {path: a/b, revision: unpinned}"[model.start : model.end]) == (True, "unpinned")


def test_commits_are_written_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    with HubServer({"me/code": Repository({}), "me/text": Repository({}, commit="f" * 40)}) as hub:
        done = run(hub.url, path)
        assert done.returncode == 0, done.stderr
        assert path.read_text() == RECIPE.replace("unpinned}", COMMIT + "}").replace("'unpinned'", "f" * 40)
        assert f"data.sources.code.revision of me/code is {COMMIT}" in done.stdout
        assert "nothing is unpinned in 1 recipes" in run(hub.url, path).stdout
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("served", [True, False])
def test_a_refusal_leaves_the_file_as_it_was(tmp_path: Path, served: bool) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    with HubServer({"me/code": Repository({})}) as hub:
        done = run(hub.url if served else "http://127.0.0.1:9", path)
    assert done.returncode == 2
    assert "me/text does not exist" in done.stderr if served else "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert path.read_text() == RECIPE


def test_a_revision_without_its_repository_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`data\.sources\.a\.path` is not beside it"):
        list(find_unpinned("data: {sources: {a: {revision: unpinned}}}", "recipe.yaml"))
