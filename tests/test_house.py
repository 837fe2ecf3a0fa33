"""The house keeps its order: imports run one way, every recipe loads, and what the pages promise is there."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from codetune.recipe import load_recipe

ROOT = Path(__file__).parents[1]
ROOMS = {"src/codetune": "codetune", "data_pipelines": "data_pipelines", "eval": "eval"}
# Which rooms a room may import. Bench scripts and tests may import all of them, and nobody imports those.
MAY_IMPORT = {"codetune": set(), "data_pipelines": {"codetune"}, "eval": {"codetune"}}
SIZES = ("smoke", "tiny", "smollm2-135m", "7b", "13b", "34b", "70b")
SKIPPED = {".git", ".venv", ".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__", "runs", "build"}


def files(*endings: str) -> list[Path]:
    """Files of the repository, what tools leave behind taken away."""
    found = (path for path in ROOT.rglob("*") if path.is_file() and (not endings or path.suffix in endings))
    return sorted(path for path in found if not SKIPPED & set(path.relative_to(ROOT).parts) and ".egg-info" not in str(path))


def imported(path: Path) -> Iterator[str]:
    """The first word of everything a file imports, at whatever depth in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("folder", ROOMS)
def test_imports_run_one_way(folder: str) -> None:
    room = ROOMS[folder]
    forbidden = ({*MAY_IMPORT, "bench", "tests"} - MAY_IMPORT[room]) - {room}
    for path in (ROOT / folder).rglob("*.py"):
        wrong = forbidden & set(imported(path))
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_only_src_is_installed_and_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert "where = src" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT / "recipes"))
)
def test_every_yaml_loads(path: Path) -> None:
    if path.parent.name != "accelerate":
        recipe = load_recipe(path)
        if path.stem in SIZES:
            assert (recipe.name, recipe.size) == (path.parent.name, path.stem)
        return
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(path))  # refuses unknown keys
    assert not {"optimizer", "training", "data", "seed"} & set(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT / "recipes"))
)
def test_every_yaml_begins_with_its_command_and_hardware(path: Path) -> None:
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert re.search(r"make \w+|accelerate launch", header)
    assert re.search(r"GPU|CPU|[Nn]ot run", header)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_its_recipes(size: str) -> None:
    for stage in ("base", "stage1"):
        assert (ROOT / "recipes" / stage / f"{size}.yaml").is_file()


def test_embedded_recipes_read_only_what_set_up_installs() -> None:
    pinned = re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    wheels = re.findall(r"([A-Za-z0-9_.-]+)==", makefile_variable("DATA_WHEELS"))
    known = {name.lower().replace("_", "-") for name in [*pinned, *wheels, "python-stdlib"]}
    for path in (ROOT / "recipes").glob("*/*.yaml"):
        if path.parent.name == "accelerate" or (recipe := load_recipe(path)).data is None:
            continue
        for name, source in recipe.data.sources.items():
            missing = {item.lower().replace("_", "-") for item in source.distributions} - known
            assert not missing, f"{path.relative_to(ROOT)}: {name} reads {missing}, which set-up does not install"


# ---------------------------------------------------------------------------------------------------------------------
# Make, README and pages


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def makefile_variable(name: str) -> str:
    found = re.search(rf"^{name} [:?]?= *(.*(?:\\\n.*)*)", makefile(), re.MULTILINE)
    assert found, f"the Makefile has no {name}"
    return found.group(1)


def phony() -> set[str]:
    return {name for line in re.findall(r"^\.PHONY: *(.*)", makefile(), re.MULTILINE) for name in line.split()}


def targets() -> set[str]:
    """Targets a user may name: those with words of their own, and no file."""
    return set(re.findall(r"^([a-z0-9-]+):", makefile(), re.MULTILINE))


def test_make_alone_lists_every_target() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    internal = {name for name in targets() if name.startswith("need-")}
    for name in targets() - internal:
        assert re.search(rf"^  {name} +\S", listed, re.MULTILINE), f"make help says nothing of {name}"


def test_targets_are_no_files() -> None:
    assert targets() == phony()


def test_pages_name_only_targets_that_exist() -> None:
    for path in [path for path in files(".md", ".yaml", ".py") if "tests" not in path.parts]:
        for name in re.findall(r"(?:^ *|`|# +|\$ )make ([a-z][a-z0-9-]*)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert name in targets(), f"{path.relative_to(ROOT)} says `make {name}`, which does not exist"


def test_modules_that_pages_and_make_run_exist() -> None:
    for path in [ROOT / "Makefile", *files(".md", ".yaml")]:
        for module in re.findall(r"-m ((?:codetune|data_pipelines|eval|bench)\.[\w.]+)", path.read_text(encoding="utf-8")):
            name = module.rstrip(".").replace(".", "/")
            places = [ROOT / f"{name}.py", ROOT / "src" / f"{name}.py"]
            assert any(place.is_file() for place in places), f"{path.relative_to(ROOT)} runs {module}, which does not exist"


def test_readme_is_short_and_begins_with_a_command() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200
    first = next(number for number, line in enumerate(lines, 1) if re.match(r" *make \w+", line))
    assert first <= 30


def test_the_tree_in_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [
        *(ROOT / "src" / "codetune").glob("*.py"),
        *(ROOT / "data_pipelines").glob("*.py"),
        *(ROOT / "docs").glob("*.md"),
    ]:
        if path.name != "__init__.py":
            assert path.name in text, f"README.md's tree lacks {path.relative_to(ROOT)}"


def test_links_between_pages_lead_somewhere() -> None:
    for path in files(".md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.relative_to(ROOT)} links to {link}"


def test_no_page_or_recipe_names_a_place_on_someones_machine() -> None:
    places = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+|opt/pypi|opt/wheels|tmp/\w+)\b")
    for path in files(".py", ".md", ".yaml", ".cfg", ".toml", ".txt", ".json", "") + [ROOT / "Makefile"]:
        if path == Path(__file__):
            continue
        found = places.search(path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path.relative_to(ROOT)} names {found.group(0)}"


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [line.strip() for line in script.splitlines() if re.match(r" *make ", line)]
    assert commands == ["make test", "make check"]
