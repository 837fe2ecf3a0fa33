"""The runner of benchmarks: what it finds, what makes a result void, and what it keeps."""

from pathlib import Path

import pytest

from bench import run

SCRIPT = '''"""Nothing, measured."""

MINUTES = 0.1

if __name__ == "__main__":
    print("all well")
    print('RESULT {"figure": 1.5}')
'''


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one source file and one script."""
    for folder in ("src", "data_pipelines", "eval", "recipes", "bench"):
        (tmp_path / folder).mkdir()
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\n")
    (tmp_path / "src" / "a.py").write_text("A = 1\n")
    (tmp_path / "bench" / "nothing.py").write_text(SCRIPT)
    (tmp_path / "bench" / "helper.py").write_text('"""Shared by scripts."""\nMINUTES = 3\n')
    (tmp_path / "bench" / "run.py").write_text(SCRIPT)
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
    assert result["printed"] == ["all well"]
    assert result["machine"]["cores"] >= 1
    assert result["commit"] is None  # no git here
    assert run.valid_result(only(house)) == result


@pytest.mark.parametrize("changed", ["src/a.py", "constraints.txt", "bench/nothing.py", "bench/helper.py"])
def test_a_result_is_void_once_what_it_depends_on_has_changed(house: Path, changed: str) -> None:
    run.measure(only(house))
    with (house / changed).open("a") as file:
        file.write("# another line\n")
    assert run.valid_result(only(house)) is None


def test_a_result_outlives_changes_elsewhere(house: Path) -> None:
    run.measure(only(house))
    (house / "README.md").write_text("words")
    assert run.valid_result(only(house)) is not None


def test_a_script_that_fails_leaves_no_result(house: Path) -> None:
    (house / "bench" / "nothing.py").write_text(SCRIPT + "    raise SystemExit(3)\n")
    with pytest.raises(ValueError, match="exit code 3"):
        run.measure(only(house))
    assert not (house / "bench" / "results").exists()
