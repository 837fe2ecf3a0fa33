"""The strict loader, and the paper's numbers in the recipes, typed here by hand from the paper."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from codetune.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
STAGE1 = ROOT / "recipes" / "stage1"

MINIMAL = """
name: stage1
size: smoke
parent: base
data:
  sequence_tokens: 128
  sources:
    python: {kind: jsonl, path: code.jsonl, share: 0.85}
    text: {kind: jsonl, path: text.jsonl, share: 0.15}
optimizer: {learning_rate: 3.0e-4}
training: {train_tokens: 4096, batch_tokens: 512}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    """The one error that loading gives."""
    with pytest.raises(ValueError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


# ---------------------------------------------------------------------------------------------------------------------
# What is read


def test_a_minimal_recipe_loads_and_says_where_its_outputs_go(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe.need_data().sources["python"].share == 0.85
    assert recipe.need_training().batch_tokens == 512
    assert recipe.run_dir == Path("runs/smoke/stage1")
    assert recipe.rows_dir == Path("runs/smoke/stage1/rows")
    assert recipe.model_dir == Path("runs/smoke/stage1/model")
    assert recipe.checkpoints_dir == Path("runs/smoke/stage1/checkpoints")


@pytest.mark.parametrize(
    ("parent", "path"),
    [
        ("base", "runs/smoke/base/model"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("./models/mine", "./models/mine"),
    ],
)
def test_a_parent_is_a_run_of_this_size_or_whatever_has_a_slash(minimal: Path, parent: str, path: str) -> None:
    assert load_recipe(minimal, [f"parent={parent}"]).parent_path == path


def test_runs_move_with_the_setting(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["runs=elsewhere"])
    assert (recipe.run_dir, recipe.parent_path) == (Path("elsewhere/smoke/stage1"), "elsewhere/smoke/base/model")


def test_a_recipe_cannot_be_changed_once_loaded(minimal: Path) -> None:
    with pytest.raises(AttributeError):
        load_recipe(minimal).seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_recipe_survives_its_manifest(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["data.sources.python.languages=[Python, C]"])
    written = minimal.with_name("written.yaml")
    written.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    assert load_recipe(written) == recipe


@pytest.mark.parametrize(("key", "value"), [("name", "../../elsewhere"), ("name", "''"), ("size", "a/b"), ("size", "..")])
def test_a_run_stays_below_its_folder(minimal: Path, key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"`{key}` is .*names a folder below `runs`; write letters, digits"):
        load_recipe(minimal, [f"{key}={value}"])


def test_a_whole_number_written_as_text_is_advised_as_one(minimal: Path) -> None:
    with pytest.raises(ValueError, match=r"YAML reads 5e5 as text: write 500000$"):
        load_recipe(minimal, ["training.train_tokens=5e5"])


def test_a_missing_section_is_named_by_the_command_that_needs_it(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "name: base\nsize: tiny\nbase: {origin: hub, path: a/b}\n"))
    for need, section in [
        (recipe.need_data, "data"),
        (recipe.need_training, "training"),
        (recipe.need_optimizer, "optimizer"),
    ]:
        with pytest.raises(ValueError, match=f"tiny/base has no section `{section}`"):
            need()


# ---------------------------------------------------------------------------------------------------------------------
# Overrides


def test_overrides_are_read_as_yaml_and_the_last_one_counts(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["seed=1", "seed=7", "data.fim.rate=0.5", "training.report_to=[tensorboard, wandb]"])
    assert (recipe.seed, recipe.need_data().fim.rate) == (7, 0.5)
    assert recipe.need_training().report_to == ("tensorboard", "wandb")


def test_an_override_of_one_source_leaves_the_others(minimal: Path) -> None:
    sources = load_recipe(minimal, ["data.sources.python.repeat=false"]).need_data().sources
    assert (sources["python"].repeat, sources["python"].share, sources["text"].repeat) == (False, 0.85, True)


def test_a_whole_number_may_stand_for_a_fraction(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["optimizer.weight_decay=0"])
    assert recipe.need_optimizer().weight_decay == 0.0


@pytest.mark.parametrize("override", ["optimizer.learning_rate", "=3", "seed=[1"])
def test_an_override_that_is_none_says_how_to_write_one(minimal: Path, override: str) -> None:
    assert "override" in message(minimal, override)


def test_errors_of_overrides_say_so(minimal: Path) -> None:
    assert message(minimal, "sed=1").startswith(f"{minimal} with overrides: unknown key `sed`; did you mean `seed`?")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused: file, key, what was found, what to write


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.learning_rat=1.0e-5", ["unknown key `optimizer.learning_rat`", "did you mean `learning_rate`?"]),
        ("data.sources.python.colour=red", ["unknown key `data.sources.python.colour`", "known here:", "text_column"]),
        ("optimizer.learning_rate=1e-5", ["`optimizer.learning_rate`", "the text '1e-5'", "write 1.0e-5"]),
        ("optimizer.learning_rate=2e6", ["YAML reads 2e6 as text", "write 2.0e+6"]),
        ("optimizer.learning_rate=true", ["takes a number", "the truth value True"]),
        ("optimizer.learning_rate=-1.0", ["`optimizer.learning_rate` is -1.0", "above 0"]),
        ("optimizer.learning_rate=.nan", ["`optimizer.learning_rate` is nan", "above 0"]),
        ("optimizer.learning_rate=.inf", ["`optimizer.learning_rate` is inf", "above 0"]),
        ("optimizer.learning_rate=0.0", ["`optimizer.learning_rate` is 0.0", "above 0"]),
        ("optimizer.beta1=1.0", ["`optimizer.beta1` is 1.0", "at least 0 and below 1"]),
        ("data.fim.rate=.nan", ["`data.fim.rate` is nan", "at least 0 and at most 1"]),
        ("data.sources.python.max_passes=0", ["`data.sources.python.max_passes` is 0", "at least 1"]),
        ("data.sources.python.max_passes=1.5", ["`data.sources.python.max_passes` takes a whole number"]),
        ("data.sequence_tokens=128.0", ["`data.sequence_tokens` is a whole number", "write 128"]),
        ("data.sequence_tokens=8", ["`data.sequence_tokens` is 8", "at least 16"]),
        ("training.batch_tokens='512'", ["`training.batch_tokens` takes a whole number", "the text '512'", "write 512"]),
        ("seed=true", ["`seed` takes a whole number"]),
        ("embedded=1", ["`embedded` takes true or false", "the number 1"]),
        ("name=3", ["`name` takes text"]),
        ("data.packing.strategy=bestfit", ["`data.packing.strategy` is 'bestfit'", "best_fit, concatenate", "did you mean"]),
        ("data.sources.python.kind=true", ["`data.sources.python.kind` is True", "write one of hub"]),
        ("data.sources.python.extensions=.py", ["`data.sources.python.extensions` is a list", "write [.py]"]),
        ("training.skip_rows=[1, two]", ["`training.skip_rows[1]` takes a whole number", "'two'"]),
        ("data.sources=[a]", ["`data.sources` is a section of named entries", "a list"]),
        ("optimizer=3.0e-4", ["`optimizer` is a section with keys of its own", "the number 0.0003"]),
        ("data.sources.python=code.jsonl", ["`data.sources.python` is a section"]),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_a_remedy(minimal: Path, override: str, parts: list[str]) -> None:
    found = message(minimal, override)
    assert found.startswith(str(minimal))
    for part in parts:
        assert part in found


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.sources.text.share=0.2"], ["add up to 1.05, not 1", "python 0.85, text 0.2"]),
        (["data.sources={}"], ["`data.sources` is empty"]),
        (["data.sources.text.share=0.0", "data.sources.python.share=1.0"], ["`data.sources.text.share` is 0", "text: null"]),
        (["data.sources.python.path=null"], ["`data.sources.python.path` is missing", "kind jsonl"]),
        (["data.sources.python.kind=hub"], ["`data.sources.python.revision` is missing", "`unpinned`"]),
        (["data.sources.python.kind=installed"], ["`data.sources.python.distributions` is empty"]),
        (
            ["data.sources.python.repeat=false", "data.sources.python.max_passes=2"],
            ["`data.sources.python.max_passes` is 2", "`data.sources.python.repeat` is off"],
        ),
        (["data.sources.python.split=test"], ["`data.sources.python.split` does nothing for a source of kind jsonl"]),
        (["data.sources.python.distributions=[numpy]"], ["python.distributions` does nothing", "kind jsonl"]),
        (
            ["data.sources.python={kind: hub, path: a/b, revision: unpinned, share: 0.85, paths: [a/c]}"],
            ["`data.sources.python.paths` does nothing for a source of kind hub"],
        ),
        (
            ["data.sources.python={kind: folder, path: a, share: 0.85, text_column: body}"],
            ["`data.sources.python.text_column` does nothing for a source of kind folder"],
        ),
        (
            ["data.sources.python={kind: installed, distributions: [a], content: prose, extensions: [.md], share: 0.85}"],
            ["`data.sources.python.extensions` does nothing for a source of kind installed with `content: prose`"],
        ),
        (["data.sources.pyton=null"], ["`data.sources.pyton` is null", "did you mean `python`?"]),
        (["data.packing.isolate_documents=false"], ["isolate_documents", "best_fit", "concatenate"]),
        (["training.batch_tokens=500"], ["`training.batch_tokens` is 500, not a multiple", "(128)", "write 384"]),
        (["training.batch_tokens=64"], ["not a multiple of `data.sequence_tokens` (128)", "write 128"]),
        (["training.train_tokens=256"], ["`training.train_tokens` (256) is less than one batch", "512"]),
        (["optimizer.warmup_tokens=4096"], ["`optimizer.warmup_tokens` (4096) is not less than", "(4096)"]),
        (["optimizer=null"], ["`optimizer` is missing"]),
        (["data=null"], ["`training` without `data`"]),
    ],
)
def test_settings_that_contradict_each_other_are_both_named(minimal: Path, overrides: list[str], parts: list[str]) -> None:
    found = message(minimal, *overrides)
    for part in parts:
        assert part in found


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        ("{origin: scratch, vocabulary_size: 512}", ["`base.origin` is scratch", "`base.hidden_size`"]),
        ("{origin: hub, path: a/b, layers: 2}", ["`base.layers` belongs to `base.origin: scratch`"]),
        (
            "{origin: scratch, vocabulary_size: 512, hidden_size: 8, layers: 1, heads: 1, intermediate_size: 8, "
            "context_tokens: 64}\ndata: {sequence_tokens: 128, sources: {a: {kind: generated, share: 1.0}}}",
            ["`data.sequence_tokens` (128) is more than `base.context_tokens` (64)"],
        ),
        ("{origin: folder}", ["`base.path` is missing", "folder"]),
        ("{origin: pypi, path: x}", ["`base.origin` is 'pypi'", "scratch, hub, folder, wheel"]),
        ("{path: x}", ["`base.origin` is missing"]),
    ],
)
def test_a_base_has_what_its_origin_needs_and_no_more(tmp_path: Path, base: str, parts: list[str]) -> None:
    found = message(write(tmp_path, f"name: base\nsize: tiny\nbase: {base}\n"))
    for part in parts:
        assert part in found


def test_a_key_that_is_required_is_asked_for(tmp_path: Path) -> None:
    assert "`size` is missing; it has no default" in message(write(tmp_path, "name: stage1\n"))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    found = message(write(tmp_path, "name: a\nsize: tiny\nseed: 1\nseed: 2\n"))
    assert "the key `seed` stands twice" in found
    assert "line 4" in found


def test_a_file_may_lay_one_mapping_under_another(tmp_path: Path) -> None:
    text = MINIMAL.replace("python: {", "python: &code {").replace("text: {kind: jsonl, path", "text: {<<: *code, path")
    sources = load_recipe(write(tmp_path, text)).need_data().sources
    assert (sources["text"].kind, sources["text"].path, sources["text"].share) == ("jsonl", "text.jsonl", 0.15)


def test_a_missing_file_lists_what_is_beside_it(minimal: Path) -> None:
    found = message(minimal.with_name("recipes.yaml"))
    assert "recipes.yaml: no such recipe" in found
    assert "recipe.yaml" in found


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "not readable as YAML"),
        ("- a\n- b\n", "found a list"),
        ("just words", "found the text"),
        ("", "found nothing"),
    ],
)
def test_what_is_not_a_recipe_is_called_by_its_name(tmp_path: Path, text: str, part: str) -> None:
    assert part in message(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    assert "not readable as YAML" in message(path)


def test_a_recipe_changes_a_few_keys_of_the_one_it_extends(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    child = "extends: recipe.yaml\nsize: big\ndata: {sources: {text: null, python: {share: 1.0}}}\noptimizer: {beta1: 0.8}\n"
    recipe = load_recipe(write(tmp_path, child, "child.yaml"))
    assert (recipe.size, recipe.name) == ("big", "stage1")
    assert list(recipe.need_data().sources) == ["python"]
    assert recipe.need_data().sources["python"].path == "code.jsonl"
    assert (recipe.need_optimizer().beta1, recipe.need_optimizer().learning_rate) == (0.8, 3e-4)


def test_a_source_of_another_kind_replaces_the_inherited_one(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL.replace("path: code.jsonl", "path: code.jsonl, id_column: id"))
    child = "extends: recipe.yaml\ndata: {sources: {python: {kind: folder, paths: [a, b], share: 0.85}}}\n"
    source = load_recipe(write(tmp_path, child, "child.yaml")).need_data().sources["python"]
    assert (source.kind, source.path, source.paths, source.id_column) == ("folder", None, ("a", "b"), None)
    same = "extends: recipe.yaml\ndata: {sources: {python: {kind: jsonl, repeat: false}}}\n"
    source = load_recipe(write(tmp_path, same, "same.yaml")).need_data().sources["python"]
    assert (source.path, source.id_column, source.repeat) == ("code.jsonl", "id", False)


def test_taking_away_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    child = write(tmp_path, "extends: recipe.yaml\ndata: {sources: {txt: null}}\n", "child.yaml")
    assert f"{child}: `data.sources.txt` is null, but there is no inherited source of this name; did you mean `text`?" in (
        message(child)
    )
    alone = write(tmp_path, MINIMAL.replace("text: {kind", "more: null\n    text: {kind"), "alone.yaml")
    assert "`data.sources.more` is null" in message(alone)
    recipe = load_recipe(tmp_path / "recipe.yaml", ["data.sources.text=null", "data.sources.python.share=1.0"])
    assert list(recipe.need_data().sources) == ["python"]


def test_extending_goes_on_over_several_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, MINIMAL)
    write(tmp_path, "extends: recipe.yaml\nseed: 5\n", "middle.yaml")
    recipe = load_recipe(write(tmp_path, "extends: ../middle.yaml\nsize: deep\n", "deep/child.yaml"))
    assert (recipe.seed, recipe.size) == (5, "deep")


def test_extending_in_a_circle_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path, "extends: second.yaml\n", "first.yaml")
    write(tmp_path, "extends: first.yaml\n", "second.yaml")
    assert "`extends` goes in a circle" in message(first)


def test_extending_what_is_not_there_names_it(tmp_path: Path) -> None:
    child = write(tmp_path, "extends: gone.yaml\n", "child.yaml")
    assert "gone.yaml: no such recipe" in message(child)
    for wrong in ("3", "[]", "[a.yaml, 3]", "{a: b}"):
        told = message(write(tmp_path, f"extends: {wrong}\n", "other.yaml"))
        assert "`extends` names a file, or a list of files, relative to this one; found" in told


def test_of_several_files_a_later_one_lies_over_an_earlier(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    write(tmp_path, "seed: 5\ndata: {sequence_tokens: 256}\n", "part.yaml")
    write(tmp_path, "extends: part.yaml\nseed: 6\n", "more.yaml")
    child = "extends: [recipe.yaml, part.yaml, more.yaml]\nsize: big\ndata: {sources: {text: null, python: {share: 1.0}}}\n"
    recipe = load_recipe(write(tmp_path, child, "child.yaml"))
    assert (recipe.seed, recipe.size, recipe.need_data().sequence_tokens) == (6, "big", 256)
    assert list(recipe.need_data().sources) == ["python"]
    assert recipe.optimizer == load_recipe(tmp_path / "recipe.yaml").optimizer


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["model.context_tokens=64"], "`data.sequence_tokens` (128) is more than `model.context_tokens` (64)"),
        (["probes.context_lengths=[512]"], "goes up to 512 tokens, but the held-out documents for it have no length"),
        (
            ["probes.context_lengths=[64, 512]", "data.held_out.long_documents=2", "data.held_out.long_tokens=512"],
            "starts at 64 tokens, not more than the targets (`probes.context_target_tokens` 128)",
        ),
        (["probes.key_lengths=[16]"], "`probes.key_lengths` starts at 16 tokens; write at least 64"),
        (["probes.key_depths=[0.5, 1.5]"], "`probes.key_depths` holds 1.5; write numbers from 0 to 1"),
        (["probes.key_source=pyton"], "`probes.key_source` is no source; did you mean `python`?"),
        (["data.held_out.long_tokens=512"], "`data.held_out.long_documents` and `data.held_out.long_tokens` go together"),
        (
            ["data.held_out.long_documents=2", "data.held_out.long_tokens=512", "data.held_out.long_sources=[txt]"],
            "`data.held_out.long_sources` names 'txt', which is no source; did you mean `text`?",
        ),
        (["data.sources.text.long_share=0.1"], "`data.sources.text.long_share` does nothing without `data.long_documents`"),
        (
            ["data.long_documents={minimum_tokens: 64, first_tokens: 100}"],
            "`data.long_documents.first_tokens` (100) is less than a row (`data.sequence_tokens` 128)",
        ),
    ],
)
def test_settings_of_long_context_that_do_not_fit_are_named(tmp_path: Path, settings: list[str], expected: str) -> None:
    path = write(tmp_path, MINIMAL)
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_recipe(path, settings)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's numbers (arXiv 2308.12950 v3, Sec. 2.1 to 2.3 and 2.6, Table 1), typed here and not read from anywhere

MILLIONS_4 = 4_194_304  # "4M" read as 2^22
PAPER = {
    # size: (tokens, peak learning rate, infill rate, rows of the vocabulary grow)
    "7b": (500_000_000_000, 0.0003, 0.9, True),
    "13b": (500_000_000_000, 0.0003, 0.9, True),
    "34b": (500_000_000_000, 0.00015, 0.0, False),
    "70b": (1_000_000_000_000, 0.00015, 0.9, True),
}


def stage1(size: str) -> Recipe:
    return load_recipe(STAGE1 / f"{size}.yaml")


@pytest.mark.parametrize("size", PAPER)
def test_stage1_has_the_papers_numbers(size: str) -> None:
    tokens, rate, infill, _ = PAPER[size]
    recipe = stage1(size)
    data, optimizer, training = recipe.need_data(), recipe.need_optimizer(), recipe.need_training()
    assert (recipe.name, recipe.size, recipe.parent) == ("stage1", size, "base")
    assert training.train_tokens == tokens
    assert training.batch_tokens == MILLIONS_4
    assert data.sequence_tokens == 4096
    assert optimizer.learning_rate == rate
    assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.95)
    assert optimizer.schedule == "cosine"
    assert optimizer.final_rate_fraction == pytest.approx(1 / 30, abs=1e-12)
    assert optimizer.warmup_tokens == 1000 * MILLIONS_4
    assert (optimizer.epsilon, optimizer.weight_decay, optimizer.max_gradient_norm) == (1e-5, 0.1, 1.0)  # Llama 2's
    assert data.fim.rate == infill
    assert data.fim.spm_rate == 0.5
    assert recipe.model.rope_base is None  # stays at Llama 2's 10,000


@pytest.mark.parametrize("size", [*PAPER, "tiny", "smoke", "smollm2-135m"])
def test_stage1_reads_85_percent_code_8_about_code_7_natural_language(size: str) -> None:
    shares: dict[str, float] = {}
    for name, source in stage1(size).need_data().sources.items():
        shares[source.group or name] = shares.get(source.group or name, 0.0) + source.share
    assert shares == pytest.approx({"code": 0.85, "code_text": 0.08, "text": 0.07}, abs=1e-9)


@pytest.mark.parametrize("size", PAPER)
def test_the_base_of_every_size_is_llama_2_and_grows_where_the_stage_infills(size: str) -> None:
    base = load_recipe(ROOT / "recipes" / "base" / f"{size}.yaml")
    assert (base.name, base.size) == ("base", size)
    assert base.need_base().infill_tokens is PAPER[size][3]
    if size == "34b":  # never released: the user supplies a folder
        assert (base.need_base().origin, base.need_base().revision) == ("folder", None)
    else:
        assert (base.need_base().origin, base.need_base().path) == ("hub", f"meta-llama/Llama-2-{size}-hf")


@pytest.mark.parametrize("size", PAPER)
def test_sources_of_cluster_sizes_say_licence_revision_and_where_from(size: str) -> None:
    for name, source in stage1(size).need_data().sources.items():
        assert source.kind == "hub", name
        assert source.path is not None and source.path.count("/") == 1, name
        assert source.license_note, name
        assert source.revision == "unpinned" or (len(source.revision or "") == 40 and int(source.revision or "", 16)), name


@pytest.mark.parametrize("size", PAPER)
def test_issues_commits_and_notebooks_are_not_read(size: str) -> None:
    """The paper's code set has no meta-data (Sec. 5); in StarCoderData those are folders of their own."""
    for source in stage1(size).need_data().sources.values():
        if source.path == "bigcode/starcoderdata":
            assert source.data_dir and "jupyter" not in source.data_dir and not source.data_dir.startswith("git")


@pytest.mark.parametrize("size", ["smoke", "tiny", "smollm2-135m"])
def test_embedded_sizes_need_no_network_and_say_so(size: str) -> None:
    for stage in ("base", "stage1"):
        recipe = load_recipe(ROOT / "recipes" / stage / f"{size}.yaml")
        assert recipe.embedded
        kinds = {source.kind for source in recipe.data.sources.values()} if recipe.data else set()
        assert kinds <= {"installed", "generated"}


# ---------------------------------------------------------------------------------------------------------------------
# What the manuals say


def yaml_blocks(folder: Path) -> list[str]:
    """Every fenced yaml block of the manuals that is a recipe."""
    blocks = []
    for path in sorted(folder.glob("*.md")):
        blocks += re.findall(r"(?ms)^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"))
    return [block for block in blocks if block.startswith("extends:")]


def test_recipes_in_the_manuals_load(tmp_path: Path) -> None:
    blocks = yaml_blocks(ROOT / "docs")
    assert blocks
    shutil.copytree(ROOT / "recipes", tmp_path, dirs_exist_ok=True)
    for block in blocks:
        load_recipe(write(tmp_path / "stage1", block, "from_the_manual.yaml"))


def test_the_table_of_sizes_agrees_with_the_recipes() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    sizes = {row[0].strip("`"): row for row in rows if len(row) == 6}
    assert {path.stem for path in STAGE1.glob("*.yaml") if load_recipe(path).size == path.stem} == set(sizes)
    units = {"500B": 500_000_000_000, "1T": 1_000_000_000_000, "2^22": MILLIONS_4}
    for size, (_, _, tokens, batch, peak, infill) in sizes.items():
        recipe = stage1(size)
        training = recipe.need_training()
        assert (units.get(tokens) or int(tokens.replace(",", ""))) == training.train_tokens, size
        assert (units.get(batch) or int(batch.replace(",", ""))) == training.batch_tokens, size
        assert float(peak) == recipe.need_optimizer().learning_rate, size
        assert (0.0 if infill == "none" else float(infill)) == recipe.need_data().fim.rate, size
    later = {row[0].strip("`"): row for row in rows if len(row) == 7}
    assert set(later) == set(sizes)
    for size, (_, tokens, peak, row, lcft_tokens, batch, lcft_peak) in later.items():
        python, lcft = (load_recipe(ROOT / "recipes" / stage / f"{size}.yaml") for stage in ("python", "lcft"))
        training = lcft.need_training()
        said = (100_000_000_000 if tokens == "100B" else int(tokens.replace(",", "")), float(peak))
        assert said == (python.need_training().train_tokens, python.need_optimizer().learning_rate), size
        assert int(row.replace(",", "")) == lcft.need_data().sequence_tokens, size
        steps = re.match(r"([\d,]+) steps", lcft_tokens)
        count = int((steps.group(1) if steps else lcft_tokens).replace(",", ""))
        assert count * (training.batch_tokens if steps else 1) == training.train_tokens, size
        power = re.match(r"2\^(\d+)", batch)
        assert (2 ** int(power.group(1)) if power else int(batch.replace(",", ""))) == training.batch_tokens, size
        assert float(lcft_peak) == lcft.need_optimizer().learning_rate, size
