"""The runner of benchmarks: what it finds, what makes a result void, and what it keeps."""

from pathlib import Path

import pytest

from bench import run

SCRIPT = '''"""Nothing, measured."""

import os, tempfile

MINUTES = 0.1
RECIPE = "recipes/lcft/tiny.yaml"
STARTED = ["-m", "data_pipelines.build"]

if __name__ == "__main__":
    print("all well,", os.getcwd() + "/runs, " + tempfile.gettempdir() + "/x")
    print('RESULT {"figure": 1.5}')
'''
FILES = {
    "src/codetune/__init__.py": "",
    "src/codetune/recipe.py": "A = 1\n",
    "src/codetune/publish.py": "B = 1\n",
    "data_pipelines/__init__.py": "",
    "data_pipelines/build.py": "from codetune import recipe\n",
    "recipes/lcft/tiny.yaml": "extends: [../stage1/tiny.yaml]\n",
    "recipes/stage1/tiny.yaml": "seed: 1\n",
    "recipes/eval/tiny.yaml": "seed: 1\n",
    "bench/nothing.py": SCRIPT,
    "bench/run.py": SCRIPT,
    "bench/helper.py": '"""Shared by scripts."""\nMINUTES = 3\n',
    "constraints.txt": "numpy==2.4.6\n",
}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one script, which starts a module by name, which imports another."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(run.code_hash, "__defaults__", (tmp_path,))
    monkeypatch.setattr(run.commit, "__defaults__", (tmp_path,))
    return tmp_path


def only(house: Path) -> run.Benchmark:
    (found,) = run.benchmarks(house / "bench")
    return found


def test_scripts_are_found_by_what_they_say_of_themselves(house: Path) -> None:
    assert (only(house).name, only(house).title, only(house).minutes) == ("nothing", "Nothing, measured.", 0.1)


def test_a_result_keeps_figures_machine_and_code(house: Path) -> None:
    result = run.measure(only(house))
    assert result["figures"] == {"figure": 1.5}
    assert result["printed"] == ["all well, runs, TMP/x"]
    assert result["machine"]["cores"] >= 1
    assert result["commit"] is None  # no git here
    assert run.valid_result(only(house)) == result


@pytest.mark.parametrize(
    "changed",
    [
        "src/codetune/recipe.py",
        "data_pipelines/build.py",
        "constraints.txt",
        "bench/nothing.py",
        "recipes/lcft/tiny.yaml",
        "recipes/stage1/tiny.yaml",
    ],
)
def test_a_result_is_void_once_what_it_depends_on_has_changed(house: Path, changed: str) -> None:
    run.measure(only(house))
    with (house / changed).open("a") as file:
        file.write("# another line\n")
    assert run.valid_result(only(house)) is None


def test_a_result_outlives_changes_elsewhere(house: Path) -> None:
    run.measure(only(house))
    for name in ("README.md", "src/codetune/publish.py", "recipes/eval/tiny.yaml"):
        (house / name).write_text("other = 'words'")
    assert run.valid_result(only(house)) is not None


def test_a_script_that_fails_leaves_no_result(house: Path) -> None:
    (house / "bench" / "nothing.py").write_text(SCRIPT + "    raise SystemExit(3)\n")
    with pytest.raises(ValueError, match="exit code 3"):
        run.measure(only(house))
    assert not (house / "bench" / "results").exists()
