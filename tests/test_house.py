"""The house keeps its order: imports run one way, every recipe loads, and what the pages promise is there."""

import ast
import configparser
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from codetune.recipe import load_recipe, settings_from_file
from codetune.slurm import ClusterSettings
from eval.registry import find as find_benchmark
from eval.tasks import load_suite

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


def test_every_package_that_is_imported_is_named_in_setup_cfg() -> None:
    """One that only comes with another package may go when that one no longer needs it."""
    ours = {*ROOMS.values(), "bench", "tests", *sys.stdlib_module_names}
    names = {name for path in files(".py") for name in imported(path)} - ours
    beside = {path.stem for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py")}
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = [settings["options"]["install_requires"], *settings["options.extras_require"].values()]
    named = {re.split(r"[\[<>=]", line)[0].lower() for text in lines for line in text.split()}
    named |= set(re.findall(r"([\w-]+)==", (ROOT / "Makefile").read_text(encoding="utf-8")))  # wheels without dependencies
    distributions = packages_distributions()
    unnamed = {
        name: distributions[name]
        for name in names - beside
        if name in distributions and not named & {each.lower() for each in distributions[name]}
    }
    assert not unnamed


def test_only_src_is_installed_and_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert "where = src" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT / "recipes"))
)
def test_every_yaml_loads(path: Path) -> None:
    if path.parent.name == "parts":
        users = [other for other in (ROOT / "recipes").rglob("*.yaml") if path.name in str(extends_of(other))]
        assert users, "no recipe extends this part"
        return  # each of those is loaded whole
    if path.parent.name == "eval":
        suite = load_suite(path)
        assert suite.name == path.stem
        for settings in suite.tasks.values():
            find_benchmark(settings.benchmark)  # what is not built is in no suite
        return
    if path.parent.name == "slurm":
        assert settings_from_file(ClusterSettings, path) != ClusterSettings()
        return
    if path.parent.name != "accelerate":
        recipe = load_recipe(path)
        size, arm = size_and_arm(path.stem)
        assert (recipe.name, recipe.size) == (f"{path.parent.name}-{arm}" if arm else path.parent.name, size)
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


def extends_of(path: Path) -> list[str]:
    """The files that a recipe extends, as it names them."""
    found = yaml.safe_load(path.read_text(encoding="utf-8")).get("extends") or []
    return [found] if isinstance(found, str) else found


def size_and_arm(stem: str) -> tuple[str, str]:
    """Example: `smollm2-135m` -> ("smollm2-135m", ""), `7b-same-base` -> ("7b", "same-base")"""
    size = next(size for size in sorted(SIZES, key=len, reverse=True) if stem == size or stem.startswith(f"{size}-"))
    return size, stem.removeprefix(size).removeprefix("-")


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_its_recipes(size: str) -> None:
    parents = {"base": None, "stage1": "base", "python": "stage1", "lcft": "stage1", "python-lcft": "python"}
    # the paper has no python-lcft of 70b; SmolLM2's long-context stages are meant for a GPU
    parents["instruct"] = {"70b": "python", "smollm2-135m": "stage1"}.get(size, "lcft")
    parents["unnatural"] = "python" if size in ("70b", "smollm2-135m") else "python-lcft"
    for stage, parent in parents.items():
        path = ROOT / "recipes" / stage / f"{size}.yaml"
        if (stage, size) == ("python-lcft", "70b"):
            assert not path.exists()  # the paper's Python 70B keeps 4,096 positions
            continue
        recipe = load_recipe(path)
        assert stage == "base" or recipe.parent == parent


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "recipes").glob("instruct/*.yaml"), *(ROOT / "recipes").glob("unnatural/*.yaml")]),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_instruction_tuning_rehearses_the_papers_shares_of_tokens(path: Path) -> None:
    recipe = load_recipe(path)
    data = recipe.need_data()
    shares: dict[str, float] = {}
    for source in data.sources.values():
        shares[source.role] = shares.get(source.role, 0.0) + source.share
        assert (source.conversation is None) == source.role.startswith("rehearsal")
    if not path.stem.endswith("-no-rehearsal"):
        assert (shares["rehearsal_code"], shares["rehearsal_text"]) == pytest.approx((0.06, 0.02), abs=1e-8)
    size, _ = size_and_arm(path.stem)
    assert data.chat is not None and data.chat.template == ("source" if size == "70b" else "llama2")
    if size in ("7b", "13b", "34b", "70b") and recipe.name == "instruct":
        training = recipe.need_training()
        assert (training.train_tokens, training.batch_tokens) == (5_000_000_000, 524_288)
        assert recipe.need_optimizer().learning_rate == 2e-5


def groups_of(path: Path) -> dict[str, float]:
    """Share of each group of sources."""
    shares: dict[str, float] = {}
    for name, source in load_recipe(path).need_data().sources.items():
        shares[source.group or name] = shares.get(source.group or name, 0.0) + source.share
    return shares


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("python*/*.yaml")), ids=lambda path: str(path.parent.name))
def test_the_python_stage_has_the_papers_shares(path: Path) -> None:
    recipe = load_recipe(path)
    expected = {"python": 0.75, "code": 0.10, "code_text": 0.10, "text": 0.05}
    assert groups_of(path) == pytest.approx(expected, abs=1e-8)
    assert recipe.need_data().fim.rate == 0.0
    if recipe.name.startswith("python-lcft") or recipe.embedded:
        return
    assert (recipe.need_optimizer().learning_rate, recipe.need_training().train_tokens) == (1e-4, 100_000_000_000)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*lcft/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_long_context_keeps_its_parents_mix_and_infill_rate(path: Path) -> None:
    recipe = load_recipe(path)
    size, arm = size_and_arm(path.stem)
    stage, _, before = str(recipe.parent).partition("-")
    parent = load_recipe(ROOT / "recipes" / stage / f"{size}{f'-{before}' if before else ''}.yaml")
    shares, theirs = ({name: source.share for name, source in one.need_data().sources.items()} for one in (recipe, parent))
    assert shares == theirs
    assert recipe.need_data().fim.rate == (0.0 if arm == "no-infill" else parent.need_data().fim.rate)
    longer = 16_384 if size in ("7b", "13b", "34b", "70b") else 4 * parent.need_data().sequence_tokens
    longer = 32_768 if size == "smollm2-135m" else longer
    assert (recipe.need_data().sequence_tokens, recipe.model.context_tokens) == (longer, longer)
    base = {"linear": None, "same-base": None}.get(arm, 1e7 if size == "smollm2-135m" else 1e6)
    assert (recipe.model.rope_base, recipe.model.rope_linear_factor) == (base, 4.0 if arm == "linear" else None)


@pytest.mark.parametrize(
    ("recipe", "steps", "batch_tokens"),
    [
        ("lcft/7b", 3_000, 2**21),
        ("lcft/13b", 10_000, 2**21),
        ("lcft/34b", 11_000, 2**20),
        ("lcft/70b", 10_000, 2**21),
        ("python-lcft/7b", 10_000, 2**21),
        ("python-lcft/34b", 11_000, 2**20),
    ],
)
def test_long_context_has_the_papers_steps(recipe: str, steps: int, batch_tokens: int) -> None:
    loaded = load_recipe(ROOT / "recipes" / f"{recipe}.yaml")
    training = loaded.need_training()
    assert (training.train_tokens, training.batch_tokens) == (steps * batch_tokens, batch_tokens)
    assert loaded.need_optimizer().learning_rate == 2e-5


def test_the_lineage_without_infilling_never_meets_it() -> None:
    """Code Llama - Python 7B and 13B: 32,000 rows, so no infill tokens from the base on."""
    for size in ("7b", "13b"):
        assert not load_recipe(ROOT / "recipes" / "base" / f"{size}-plain.yaml").need_base().infill_tokens
        for stage, parent in (("stage1", "base"), ("python", "stage1"), ("python-lcft", "python")):
            recipe = load_recipe(ROOT / "recipes" / stage / f"{size}-plain.yaml")
            assert (recipe.parent, recipe.need_data().fim.rate) == (f"{parent}-plain", 0.0)


@pytest.mark.parametrize(
    ("arm", "plain", "changed"),
    [
        ("stage1/7b-scratch", "stage1/7b", {"parent": "base-scratch"}),
        ("stage1/tiny-scratch", "stage1/tiny", {"parent": "init"}),
        ("stage1/smollm2-135m-scratch", "stage1/smollm2-135m", {"parent": "base-scratch"}),
        ("base/7b-scratch", "base/7b", {"base.random_weights": True}),
        ("base/smollm2-135m-scratch", "base/smollm2-135m", {"base.random_weights": True}),
        ("stage1/tiny-plain", "stage1/tiny", {"data.fim.rate": 0.0, "probes.infill_prompts": 0}),
        ("stage1/smollm2-135m-plain", "stage1/smollm2-135m", {"data.fim.rate": 0.0, "probes.infill_prompts": 0}),
        ("lcft/7b-same-base", "lcft/7b", {"model.rope_base": None}),
        ("lcft/7b-linear", "lcft/7b", {"model.rope_base": None, "model.rope_linear_factor": 4.0}),
    ],
)
def test_an_ablation_differs_in_what_it_is_about_and_in_nothing_else(
    arm: str, plain: str, changed: dict[str, object]
) -> None:
    def flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in tree.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    one, other = (flat(load_recipe(ROOT / "recipes" / f"{name}.yaml").to_dict()) for name in (arm, plain))
    assert {key: one[key] for key in one if one[key] != other.get(key) and key != "name"} == changed
    assert one.keys() == other.keys()


@pytest.mark.parametrize("size", ["tiny", "7b", "13b"])
def test_without_self_instruct_its_tokens_go_to_the_other_conversations(size: str) -> None:
    one, other = (
        load_recipe(ROOT / "recipes" / "instruct" / f"{size}{arm}.yaml").need_data().sources
        for arm in ("-no-self-instruct", "")
    )
    assert other.keys() - one.keys() == {"triplets"} and one.keys() <= other.keys()
    assert sum(source.share for source in one.values()) == pytest.approx(1.0)
    assert all(one[name].share == other[name].share for name in one if one[name].role.startswith("rehearsal"))


def test_embedded_recipes_read_only_what_set_up_installs() -> None:
    pinned = re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    wheels = re.findall(r"([A-Za-z0-9_.-]+)==", makefile_variable("DATA_WHEELS"))
    known = {name.lower().replace("_", "-") for name in [*pinned, *wheels, "python-stdlib"]}
    for path in (ROOT / "recipes").glob("*/*.yaml"):
        if path.parent.name in ("accelerate", "eval", "parts", "slurm") or (recipe := load_recipe(path)).data is None:
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


def make_says(*words: str) -> str:
    """What make would do, or why it does nothing; no package is installed for it."""
    done = subprocess.run(
        ["make", "-n", "-o", "setup", *words, "SET_UP="], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_long_context_after_python_has_a_folder_of_its_own() -> None:
    said = make_says("lcft", "FROM=python", "SIZE=smoke", "SET=runs=elsewhere")
    assert "test -f elsewhere/smoke/python/model/manifest.json || make --no-print-directory python ARM=''" in said
    assert "-m codetune.train --recipe recipes/python-lcft/smoke.yaml --set 'runs=elsewhere'" in said
    assert "--recipe recipes/lcft/smoke.yaml" in make_says("lcft", "SIZE=smoke")


def test_an_arm_starts_from_the_arm_of_its_name_where_there_is_one() -> None:
    assert "test -f runs/7b/stage1-plain/model" in make_says("python", "SIZE=7b", "ARM=plain")
    assert "test -f runs/7b/stage1/model" in make_says("lcft", "SIZE=7b", "ARM=linear")


def test_a_checkpoint_is_evaluated_by_its_step_apart_from_the_model() -> None:
    """Its results are where neither a model card nor a report takes them for the finished model's."""
    said = make_says("eval", "SIZE=tiny", "STAGE=lcft", "CHECKPOINT=40", "SUITE=smoke")
    assert "--model runs/tiny/lcft/checkpoints/checkpoint-40 --out runs/tiny/lcft/eval/checkpoint-40/smoke " in said
    said = make_says("eval", "SIZE=tiny", "STAGE=lcft", "SUITE=smoke", "ROPE_BASE=1e6")
    assert "--model runs/tiny/lcft/model --out runs/tiny/lcft/eval/smoke-rope-1e6 " in said
    code, said = run_make("eval", "SIZE=tiny", "CHECKPOINT=123456789")
    assert code != 0 and "runs/tiny/stage1/checkpoints/checkpoint-123456789 is not there; the run keeps" in said
    code, said = run_make("eval", "MODEL=me/model", "CHECKPOINT=4")
    assert code != 0 and "give one of them" in said


def test_loss_curves_of_several_runs_are_named() -> None:
    said = make_says("eval-table", "SIZE=tiny", "RUN=stage1 stage1-scratch", "PICTURES=p")
    assert "--runs runs/tiny/stage1 runs/tiny/stage1-scratch" in said


def run_make(*words: str) -> tuple[int, str]:
    done = subprocess.run(["make", *words, "SET_UP="], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_large_sizes_say_what_is_missing(tmp_path: Path) -> None:
    code, said = run_make("python", "SIZE=7b", f"SET=runs={tmp_path}")
    assert code != 0
    assert f"{tmp_path}/7b/stage1/model is not there; make it first: make stage1 SIZE=7b SET=runs={tmp_path}" in said
    _, said = run_make("lcft", "FROM=python", "SIZE=13b", "ARM=plain", f"SET=runs={tmp_path}")
    assert f"{tmp_path}/13b/python-plain/model is not there; make it first: make python SIZE=13b ARM=plain" in said
    assert (
        "there is no recipes/python-lcft/70b.yaml; recipes/python-lcft has:"
        in run_make("lcft", "FROM=python", "SIZE=70b")[1]
    )
    assert "FROM is 'base'; lcft starts from stage1 or from python" in run_make("lcft", "FROM=base")[1]


def test_the_demo_runs_every_stage() -> None:
    rule = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile(), re.MULTILINE)
    assert rule
    for stage in ("stage1", "python", "lcft"):
        assert re.search(rf"\$\(MAKE\) --no-print-directory {stage}\b", rule.group(1))


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


def test_the_tree_of_the_house_is_the_tree() -> None:
    text = (ROOT / "docs/house.md").read_text(encoding="utf-8")
    for path in [
        *(ROOT / "src" / "codetune").glob("*.py"),
        *(ROOT / "data_pipelines").glob("*.py"),
        *(ROOT / "eval").glob("*.py"),
        *(ROOT / "eval").glob("*.py"),
        *(ROOT / "docs").glob("*.md"),
    ]:
        if path.name != "__init__.py":
            assert path.name in text, f"docs/house.md lacks {path.relative_to(ROOT)}"


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in text, f"README.md does not lead to docs/{path.name}"


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


@pytest.mark.xdist_group("canary")
def test_tests_of_a_group_share_a_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist keeps a group together by a suffix of the test's name; fixtures of `test_ranks.py` need it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("not among several workers (pytest -n)")
    assert request.node.nodeid.endswith("@canary")
