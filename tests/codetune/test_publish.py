"""What is published: a card whose every number is in a manifest, the allowed files, and a folder that loads elsewhere."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from model_hub import ATTRIBUTES, TOKEN, ModelHub

from codetune import publish as module
from codetune.artifacts import model_hash, read_json, seal_folder, why_invalid, write_json
from codetune.gpus import GPUS
from codetune.lineage import Stage, follow, metrics_at, read_stage
from codetune.model_card import check_metadata, markdown_text, write_card
from codetune.origins import LLAMA2, Licence
from codetune.paper import Figure
from codetune.publish import Options, Prepared, publish, scores_of

pytestmark = pytest.mark.xdist_group("finished")
PAPER = Path(__file__).parents[2] / "eval" / "paper.csv"
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")


@pytest.fixture(scope="module")
def runs(finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that tests may change and must put back."""
    return Path(shutil.copytree(finished_runs, tmp_path_factory.mktemp("publish") / "runs")) / "smoke"


def dry(model: Path, **options: Any) -> Prepared:
    return publish(Options(model, **options), dry_run=True, say=lambda text: None)


@pytest.fixture(scope="module")
def lcft(runs: Path) -> Prepared:
    return dry(runs / "lcft" / "model")


def card_of(prepared: Prepared) -> str:
    return (prepared.folder / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The card


def prose_of(card: str) -> str:
    """The card without its metadata, code, links and the list of versions."""
    text = card.split("---\n", 2)[2].partition("## Made with")[0]
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)


def test_every_number_of_the_card_is_a_claim_with_a_source(lcft: Prepared) -> None:
    known = {number for claim in lcft.card.claims for number in NUMBER.findall(claim.shown)}
    names = {number for stage in ("stage1", "lcft", "init", "base") for number in NUMBER.findall(stage)}
    fixed = {"2308.12950", "95", "2"} | names  # the paper, an interval's level, "CO2eq"
    for number in NUMBER.findall(prose_of(card_of(lcft))):
        assert number in known | fixed, f"{number} is in the card and not among its claims"
    head = yaml.safe_load(card_of(lcft).split("---\n")[1])
    values = [claim.value for claim in lcft.card.claims if isinstance(claim.value, int | float)]
    for number in numbers_in(head):
        assert any(number == pytest.approx(value, abs=5e-5, rel=1e-9) for value in values), number


def numbers_in(value: Any) -> Iterator[float]:
    """Every number of a tree."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield value


@dataclasses.dataclass(frozen=True)
class Sources:
    """What the source of a claim says, read from the files again: nothing here is of the module that made the card."""

    published: Path  # the folder that goes
    size: Path  # where the runs lie
    said: dict[str, float] = dataclasses.field(default_factory=dict)  # what the user said

    def resolve(self, source: str) -> Any:
        """The value of a source: references are read, the rest is arithmetic."""
        words = source.partition("; ")[0]
        found: list[Any] = []

        def read(match: re.Match[str]) -> str:
            values = self.reference(match.group(1))
            found.append(values if len(values) > 1 else values[0] if values else None)
            return f"found[{len(found) - 1}]"

        def part(match: re.Match[str]) -> str:
            assert self.reference(match.group(2)) != []  # it is there
            return match.group(2).rpartition("#")[2].split("/")[int(match.group(1))]

        words = re.sub(r"part\((\d), `([^`]*)`\)", part, words)
        words = re.sub(r"`([^`]*)`", read, words).replace(" x ", " * ")
        assert re.fullmatch(r"[\w\[\]()., +*/-]*", words), source
        if words == "found[0]":
            return found[0]
        if None in found:
            return None
        given = {"found": found, "sum": add_up, "elements": elements, "bytes": size_bytes, "types": types}
        return eval(words, {"__builtins__": {}}, given)  # arithmetic on what was read

    def reference(self, text: str) -> Any:
        """The values that a reference finds, or files."""
        if text.startswith("--"):
            return [self.said[text]]
        file, _, key = text.partition("#")
        if not key:
            return sorted(self.published.glob(file))
        if file == "paper.csv":
            lines = list(csv.DictReader(PAPER.open()))
            names = ("table", "benchmark", "form", "metric", "model", "size")
            return [float(line["value"]) for line in lines if "/".join(line[name] for name in names) == key]
        if file == "gpus.py":
            return [gpu.watts for gpu in GPUS.values() if gpu.reported == key]
        path = self.size / file if "/" in file else self.published / file
        return list(walk(yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else read_json(path), key))


def walk(tree: Any, key: str) -> Iterator[Any]:
    """What lies under a dotted key; names may have dots themselves, and `*` is any name.

    Example: {"a.b": {"c": 1}} and `a.b.c` -> 1
    """
    if key == "":
        yield tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, item in items:
        for head in (str(name), "*"):
            if key == head or key.startswith(f"{head}."):
                yield from walk(item, key[len(head) + 1 :])


def add_up(*found: Any) -> float:
    return sum(numbers_in(list(found)))


def headers(files: Path | list[Path]) -> list[dict[str, Any]]:
    from safetensors import safe_open

    tensors = []
    for path in [files] if isinstance(files, Path) else files:
        with safe_open(path, "pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118  (no mapping)
            tensors += [{"shape": one.get_shape(), "type": one.get_dtype()} for one in slices]
    return tensors


def elements(files: Path | list[Path]) -> int:
    return sum(math.prod(tensor["shape"]) for tensor in headers(files))


def types(files: Path | list[Path]) -> str:
    return ", ".join(sorted({tensor["type"] for tensor in headers(files)}))


def size_bytes(files: Path | list[Path]) -> int:
    return sum(path.stat().st_size for path in ([files] if isinstance(files, Path) else files))


def check_claims(prepared: Prepared, runs: Path, **said: float) -> int:
    """Compute every claim of a card from its source, and compare it with what the card shows."""
    sources = Sources(prepared.folder, runs, {f"--{name.replace('_', '-')}": value for name, value in said.items()})
    for claim in prepared.card.claims:
        value = sources.resolve(claim.source)
        if claim.shown == "not known":
            assert value is None, claim
            continue
        if isinstance(claim.value, str) or not re.fullmatch(r"[\d,.e+-]+(?: %)?", claim.shown):
            assert str(value) == claim.shown, (claim, value)
            continue
        assert isinstance(value, int | float), (claim, value)
        number = claim.shown.removesuffix(" %").replace(",", "")
        value *= 100 if claim.shown.endswith(" %") else 1
        decimals = len(number.partition("e")[0].partition(".")[2])
        rounding = 0.5 * 10.0**-decimals if "e" not in number else 0.0  # half of the last digit that is shown
        assert float(number) == pytest.approx(value, abs=1.001 * rounding, rel=5e-6 if "e" in number else 1e-9), (
            claim,
            value,
        )
    return len(prepared.card.claims)


def test_every_claim_is_what_its_source_says(runs: Path, lcft: Prepared, tmp_path: Path) -> None:
    """Cards of all kinds: a model with three ancestors, a checkpoint, an adapter, what `make base` made and trained."""
    assert check_claims(lcft, runs) > 150
    checkpoint = sorted((runs / "stage1" / "checkpoints").glob("checkpoint-*"))[-1]
    for prepared in (
        dry(checkpoint),
        dry(runs / "stage1-lora" / "adapter", base_repository="me/base"),
        dry(runs / "base" / "model"),
        dry(runs / "init" / "model"),
    ):
        assert check_claims(prepared, runs) > 10
    # a lineage that goes through a checkpoint, of which some was never on record
    manifest = read_json(runs / "lcft" / "model" / "manifest.json")
    parent = {"path": str(checkpoint), "hash": model_hash(checkpoint)}
    copy = Path(shutil.copytree(runs, tmp_path / "smoke"))
    seal_folder(copy / "lcft" / "model", {**manifest, "parent": parent, "files": None})
    card = dry(copy / "lcft" / "model")
    assert [row[0] for row in table(card_of(card), "## Lineage")] == ["lcft", "stage1", "base", "init"]
    assert check_claims(card, copy) > 100
    seal_folder(copy / "lcft" / "model", {**manifest, "parent": {**parent, "hash": "lost"}, "files": None})
    assert check_claims(dry(copy / "lcft" / "model", incomplete_lineage=True, licence="mit"), copy) > 80


def test_scores_are_what_their_sources_say(runs: Path, tmp_path: Path) -> None:
    """Two files of results with scores of each kind, the paper's numbers of a size that it has, the user's own figures."""
    copy = Path(shutil.copytree(runs, tmp_path / "7b"))
    manifest = read_json(copy / "lcft" / "model" / "manifest.json")
    manifest["recipe"]["size"] = "7b"
    seal_folder(copy / "lcft" / "model", {key: value for key, value in manifest.items() if key != "files"})
    score = {"value": 0.254321, "low": 0.1, "high": 0.4, "problems": 164, "samples": 1, "decoding": "greedy"}
    settings = {"benchmark": "humaneval", "temperature": 0.0, "samples": 1, "form": "unstripped"}
    whole = {"settings": settings, "scores": {"pass@1": score, "pass@10": None}}
    part = {"settings": settings, "data": {"published": 164, "asked": 20}, "scores": {"pass@1": {**score, "low": None}}}
    losses = {"settings": {"benchmark": "held-out"}, "scores": {"line/python/plain": 4.262184, "key/9/0.2/found": 0.5}}
    hashed = {"name": "m", "hash": read_stage(copy / "lcft" / "model").hash}
    for name, tasks, more in (
        ("one", {"humaneval": whole, "sweep-0.1": part, "held-out": losses}, {}),
        ("two", {"humaneval": whole}, {"rope_base": 1e6}),
    ):
        write_json(tmp_path / name / "results.json", {"format": 1, "model": {**hashed, **more}, "tasks": tasks})
    places = (tmp_path / "one", tmp_path / "two")
    prepared = dry(copy / "lcft" / "model", results=places, paper=PAPER, watts=123.0, grams_per_kwh=45.0)
    check_claims(prepared, copy, watts=123.0, grams_per_kwh=45.0)
    card = card_of(prepared)
    assert (
        "| humaneval | pass@1 | 25.4 | 10.0 to 40.0 | 164 | T 0, n 1, unstripped, greedy | 33.5 |" in card
    )  # the paper's Table 2
    assert "RoPE base 1,000,000 put in" in card and "20 of 164 problems" in card
    assert "power is what its publisher gave, and\nthe carbon of a kilowatt-hour is what its publisher gave." in card
    assert "maker" not in card
    # what goes into the metadata is benchmarks' scores and the plain loss of each source, not all that was measured
    head = yaml.safe_load(card.split("---\n")[1])
    found = [
        (one["dataset"]["name"], metric["type"], metric.get("args", {}).get("settings"))
        for one in head["model-index"][0]["results"]
        for metric in one["metrics"]
    ]
    rope = "T 0, n 1, unstripped, RoPE base 1,000,000 put in, greedy"
    assert found[:3] == [
        ("humaneval", "pass@1", "T 0, n 1, unstripped, greedy"),
        ("humaneval", "pass@1", rope),
        ("sweep-0.1", "pass@1", "T 0, n 1, unstripped, 20 of 164 problems, greedy"),
    ]
    sources = [f"held-out documents of the source {name}" for name in manifest["rows"]["source_names"]]
    assert [name for name, _, _ in found[3:]] == [name for name in sources if name in {name for name, _, _ in found}]
    assert {metric for _, metric, _ in found[3:]} == {"loss"}
    assert "| held-out | line/python/plain | 4.26218 |" in card
    shutil.rmtree(copy / "lcft" / "publish")


def test_a_source_that_says_something_else_is_found(lcft: Prepared, runs: Path) -> None:
    """The test above would fail on a wrong key, a wrong file and a wrong value."""
    claims = lcft.card.claims
    steps = next(claim for claim in claims if claim.source == "`manifest.json#steps`")
    wrongs = (
        "`manifest.json#tokens`",
        "`manifest.json#stepz`",
        "`base/model/manifest.json#steps` x 7",
        "7",
        "`gone.json#steps`",
    )
    for wrong in wrongs:
        card = dataclasses.replace(lcft.card, claims=(dataclasses.replace(steps, source=wrong),))
        with pytest.raises((AssertionError, ValueError)):
            check_claims(dataclasses.replace(lcft, card=card), runs)


def table(card: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading or a line."""
    lines = card[card.index(heading) :].splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\", "") for cell in line.strip("|").split("|")])
    return rows


def test_the_claims_are_what_manifests_say(lcft: Prepared, runs: Path) -> None:
    """Recomputed here from the manifests on disk."""
    card = card_of(lcft)
    manifests = {name: read_json(runs / name / "model" / "manifest.json") for name in ("lcft", "stage1", "base", "init")}
    newest = manifests["lcft"]
    lineage = table(card, "## Lineage")
    assert [row[0] for row in lineage] == ["lcft", "stage1", "base", "init"]
    for row, child in zip(lineage[1:], ("lcft", "stage1", "base"), strict=True):
        assert row[2].strip("`") == manifests[child]["parent"]["hash"]
    assert [row[3] for row in lineage] == [f"{manifests[name]['tokens']:,}" for name in ("lcft", "stage1", "base")] + [
        "none"
    ]
    assert lineage[0][4:] == ["512", "1,000,000"] and lineage[1][5] == "10,000"

    read = {name: sum(layouts.values()) for name, layouts in newest["ledger"]["tokens"].items()}
    for name, planned, realised, tokens, epochs, _ in table(card, "## What it was trained on"):
        assert planned == f"{100 * newest['recipe']['data']['sources'][name]['share']:.2f} %"
        assert realised == f"{100 * read[name] / sum(read.values()):.2f} %"
        assert tokens == f"{read[name]:,}"
        source = newest["rows"]["sources"][name]
        estimate = source["epochs"] if source["epochs"] is not None else source.get("epochs_estimated")
        if estimate is None:
            assert epochs == "not known"
        else:
            built = sum(newest["rows"]["sources"][name]["tokens_in_rows"].values())
            assert float(epochs.split()[0]) == pytest.approx(estimate * read[name] / built, rel=5e-3)

    psm, spm = (sum(layouts.get(layout, 0) for layouts in newest["ledger"]["tokens"].values()) for layout in ("psm", "spm"))
    assert (
        f"{100 * psm / sum(read.values()):.2f} % prefix-suffix-middle, {100 * spm / sum(read.values()):.2f} % suffix" in card
    )
    settings = {row[0]: row[1] for row in table(card, "## Hyperparameters")}
    assert float(settings["peak learning rate"]) == newest["recipe"]["optimizer"]["learning_rate"]
    assert settings["steps"] == f"{newest['steps']:,}" and settings["tokens"].startswith(f"{newest['tokens']:,}")

    costs = table(card, "## Hardware")
    hours = {name: manifests[name]["seconds"] / 3600 for name in ("lcft", "stage1", "base")}
    assert [float(row[2]) for row in costs] == pytest.approx(list(hours.values()), rel=1e-2)
    cores = newest["hardware"]["cores"]
    grams = sum(hours.values()) * 8 * cores / 1000 * 228.55e6 / 1.4e6 / 0.4  # 8 W a core, the paper's grams per kWh
    emissions = yaml.safe_load(card.split("---\n")[1])["co2_eq_emissions"]["emissions"]
    assert emissions == pytest.approx(grams, rel=1e-3)

    for row in table(card, "Loss on documents that were kept out"):
        assert row[1] == f"{newest['held_out'][f'held_out/{row[0]}/plain']:.3f}"
        middle = newest["held_out"].get(f"held_out/{row[0]}/psm_middle")
        assert row[2] == ("-" if middle is None else f"{middle:.3f}")
    for length, value in table(card, "more and more context"):
        found = newest["long_context"]["context/" + length.replace(",", "")]
        assert value == f"{found:.3f}"


def test_metadata_is_what_the_hub_takes_and_says_what_the_manifest_says(lcft: Prepared) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard.load(lcft.folder / "README.md").data
    assert (data.pipeline_tag, data.library_name, data.license) == ("text-generation", "transformers", "other")
    assert data.eval_results is not None
    held_out = read_json(lcft.stage.folder / "manifest.json")["held_out"]
    for result in data.eval_results:
        assert result.metric_value == pytest.approx(held_out[f"held_out/{result.dataset_config}/plain"], abs=1e-6)
    with pytest.raises(ValueError, match="the card's metadata would be refused by the Hub"):
        check_metadata("---\nmodel-index:\n- name: x\n  results:\n  - task: {}\n---\n")


def test_the_cards_code_runs_and_builds_the_ids_that_were_trained(lcft: Prepared) -> None:
    from codetune.tokens import open_codec

    blocks = re.findall(r"```python\n(.*?)```", card_of(lcft), re.DOTALL)
    assert len(blocks) == 2
    namespace: dict[str, Any] = {"print": lambda text: None}
    for block in blocks:
        exec(re.sub(r'REPOSITORY = ".*"', f"REPOSITORY = {str(lcft.folder)!r}", block), namespace)
    codec = open_codec(lcft.folder)
    for prefix, suffix in (("a = ", "\n"), ("", ""), ("x <s> ▁<MID>", "</s>")):
        assert namespace["infill_ids"](prefix, suffix) == codec.psm_prompt(prefix, suffix)


def test_a_recipes_words_cannot_become_markup() -> None:
    assert markdown_text("<b>x</b>|`y`\n_z_") == r"&lt;b&gt;x&lt;/b&gt;\|\`y\` \_z\_"


def test_a_note_with_markup_stays_in_its_cell(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "stage1", tmp_path / "smoke" / "stage1")) / "model"
    manifest = read_json(folder / "manifest.json")
    manifest["recipe"]["data"]["sources"]["python"]["license_note"] = "<img src=x onerror=alert(1)> | MIT"
    seal_folder(folder, {key: value for key, value in manifest.items() if key != "files"})
    card = card_of(dry(folder, incomplete_lineage=True, licence="mit"))
    assert "<img" not in card and "&lt;img src=x onerror=alert(1)&gt; \\| MIT" in card


# ---------------------------------------------------------------------------------------------------------------------
# The files


def test_only_allowed_files_go_and_a_checkpoints_other_files_stay(runs: Path) -> None:
    checkpoint = sorted((runs / "stage1" / "checkpoints").glob("checkpoint-*"))[-1]
    assert (checkpoint / "optimizer.pt").is_file() and (checkpoint / "rng_state.pth").is_file()
    prepared = dry(checkpoint)
    assert {entry.path for entry in prepared.files} == {
        "LICENSE.md", "README.md", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
        "recipe.yaml", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"} <= set(
        prepared.left_out
    )
    assert prepared.target.revision == f"stage1-step-{checkpoint.name.removeprefix('checkpoint-')}"
    assert "at a checkpoint within its training" in card_of(prepared)


def test_paths_of_this_machine_do_not_go(lcft: Prepared, finished_runs: Path) -> None:
    place = str(finished_runs)
    assert (
        place in (lcft.stage.folder / "manifest.json").read_text()
        and place in (lcft.stage.folder / "recipe.yaml").read_text()
    )
    for path in lcft.folder.iterdir():
        assert place.encode() not in path.read_bytes(), path.name
    assert place in lcft.shortened and why_invalid(lcft.folder) is None
    assert read_json(lcft.folder / "manifest.json")["recipe"]["runs"] == finished_runs.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf_" + "a" * 34, "holds what looks like a token or a key"),
        ("AKIA" + "A" * 16, "holds what looks like a token or a key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "holds what looks like a token or a key"),
        ("s3://user:secret@bucket/x", "holds what looks like a token or a key"),
        ("see /srv/somebody/data", r"holds a path of this machine \(/srv/somebody/data\)"),
        ("C:\\Users\\me\\x", "holds a path of this machine"),
    ],
)
def test_what_looks_private_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write_json(tmp_path / "config.json", {"note": text} if "\\" not in text else {})
    if "\\" in text:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        module.refuse_private(tmp_path)


def test_urls_and_fractions_are_no_paths() -> None:
    for text in (
        "https://huggingface.co/a/b",
        "85/8/7 %",
        "runs/tiny/lcft",
        "bigcode/starcoderdata",
        "and/or",
        "s3://bucket/x",
    ):
        assert not module.LOCAL_PATHS.search(text), text


def test_a_file_that_is_not_allowed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"optimizer.pt is not among the files that are published"):
        module.refuse_private(tmp_path)


def test_adapter_and_merged_model_are_published_apart(runs: Path) -> None:
    merged = dry(runs / "stage1-lora" / "model")
    assert "model.safetensors" in {entry.path for entry in merged.files}
    with pytest.raises(ValueError, match=r"is an adapter, .*--base-repository me/parent"):
        dry(runs / "stage1-lora" / "adapter")
    adapter = dry(runs / "stage1-lora" / "adapter", base_repository="me/base")
    names = {entry.path for entry in adapter.files}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names and "model.safetensors" not in names
    assert read_json(adapter.folder / "adapter_config.json")["base_model_name_or_path"] == "me/base"
    head = yaml.safe_load(card_of(adapter).split("---\n")[1])
    assert (head["library_name"], head["base_model"], head["base_model_relation"]) == ("peft", "me/base", "adapter")


# ---------------------------------------------------------------------------------------------------------------------
# Onto a Hub and back


def run_publish(hub: ModelHub, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, as `make publish` starts it."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "codetune.publish", *words],
        env=environment | {"PYTHONPATH": str(Path(module.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_lists_what_an_upload_sends_and_it_loads_from_there(runs: Path, tmp_path: Path) -> None:
    with ModelHub() as hub:
        words = ["--model", str(runs / "lcft" / "model"), "--repository", "me/tiny-lcft", "--tag", "v1"]
        listed = run_publish(hub, *words, "--dry-run")
        assert listed.returncode == 0 and hub.calls == [], listed.stderr
        sent = run_publish(hub, *words)
        assert sent.returncode == 0, sent.stderr
        repository = hub.repositories["me/tiny-lcft"]
        files = {path: data for path, data in repository.commits[-1].files.items() if path not in ATTRIBUTES}
        lines = re.findall(r"^ +([\d,]+)  [0-9a-f]{12}  (\S+)$", listed.stdout, re.MULTILINE)
        assert {name: int(size.replace(",", "")) for size, name in lines} == {
            name: len(data) for name, data in files.items()
        }
        assert repository.private and len(repository.commits) == 2 and "v1" in repository.tags
        assert "is there, whole and compared file by file" in sent.stdout
        loaded = load_from(hub, "me/tiny-lcft", "v1", tmp_path)
        assert loaded == {"rope": [1e6, 1_000_000], "positions": 512, "length": 512, "stops": True}


LOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
name, revision = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, revision=revision)
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
text = pipeline("text-generation", model=model, tokenizer=tokenizer)("def add(", max_new_tokens=4)[0]["generated_text"]
assert text.startswith("def add(")
end = tokenizer.convert_tokens_to_ids("\\u2581<EOT>")
frequencies = model.model.rotary_emb.inv_freq.double()
base = float(frequencies[1]) ** -len(frequencies)  # the second of n is base^(-1/n)
print(json.dumps({
    "rope": [model.config.rope_parameters["rope_theta"], round(base)],
    "positions": model.config.max_position_embeddings, "length": tokenizer.model_max_length,
    "stops": {tokenizer.eos_token_id, end} <= set(model.generation_config.eos_token_id),
}))
"""


def load_from(hub: ModelHub, name: str, revision: str, cache: Path) -> Any:
    """What another process, which knows nothing of codetune, makes of the repository."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(cache),
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD, name, revision], env=environment, capture_output=True, text=True, check=False, cwd=cache
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_another_runs_repository_is_not_written_over(runs: Path) -> None:
    stage = read_stage(runs / "stage1" / "model")
    manifest = read_json(runs / "lcft" / "model" / "manifest.json")
    assert module._is_another(manifest, stage) == "the model of another run, smoke/lcft"
    assert module._is_another(None, stage) == "files that codetune did not publish"
    assert module._is_another(dict(stage.manifest), stage) is None


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def test_what_is_not_finished_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder; train it first"):
        dry(runs / "python" / "model")
    folder = Path(shutil.copytree(runs / "stage1" / "model", tmp_path / "model"))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"it has no manifest.json: it was never finished"):
        dry(folder)
    folder = Path(shutil.copytree(runs / "stage1" / "model", tmp_path / "changed"))
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json has 2 bytes instead of"):
        dry(folder)


def test_a_manifest_that_lost_a_part_is_refused(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "stage1" / "model", tmp_path / "stage1" / "model"))
    manifest = read_json(folder / "manifest.json")
    seal_folder(folder, {key: manifest[key] for key in manifest if key not in ("files", "parent", "ledger")})
    with pytest.raises(ValueError, match=r"manifest.json: no parent, ledger in it; it was cut"):
        dry(folder)
    write_json(folder / "manifest.json", {"files": {"config.json": 3}})
    with pytest.raises(ValueError, match=r"its manifest.json is damaged"):
        dry(folder)
    write_json(folder / "manifest.json", {"files": {}, "recipe": {}})
    with pytest.raises(ValueError, match=r"no parent, rows, .*, recipe.name, recipe.size in it"):
        dry(folder)


def test_a_run_that_is_being_trained_is_not_published(runs: Path) -> None:
    from codetune.artifacts import exclusive

    with exclusive(runs / "stage1", "training"), pytest.raises(ValueError, match="publishing: another session"):
        dry(runs / "stage1" / "model")


def test_a_broken_lineage_is_refused_and_told_where_that_is_accepted(runs: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(runs / "lcft", tmp_path / "elsewhere" / "lcft")) / "model"
    manifest = read_json(moved / "manifest.json")
    manifest["parent"]["path"] = str(tmp_path / "gone" / "model")
    seal_folder(moved, {key: value for key, value in manifest.items() if key != "files"})
    with pytest.raises(
        ValueError, match=r"the lineage of .* breaks off: .*gone/model is not here any more.*--incomplete-lineage"
    ):
        dry(moved)
    with pytest.raises(ValueError, match=r"look it up and say it by the Hub's name: --licence"):
        dry(moved, incomplete_lineage=True)
    card = card_of(dry(moved, incomplete_lineage=True, licence="mit"))
    assert "**What came before is not on record**" in card and manifest["parent"]["hash"] in card


def test_a_parent_that_was_made_again_is_not_the_parent(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs, tmp_path / "smoke"))
    manifest = read_json(copy / "lcft" / "model" / "manifest.json")
    manifest["parent"]["path"] = str(copy / "stage1" / "model")
    seal_folder(copy / "lcft" / "model", {key: value for key, value in manifest.items() if key != "files"})
    assert follow(copy / "lcft" / "model").broken is None
    shutil.rmtree(copy / "stage1" / "model")
    shutil.copytree(copy / "base" / "model", copy / "stage1" / "model")
    assert "was made again since, with other weights" in str(follow(copy / "lcft" / "model").broken)


def test_a_half_written_line_of_the_log_says_nothing_of_a_sealed_step(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 4, "held_out/python/plain": 2.5}\n{"step": 4, "held_')
    assert metrics_at(log, 4) == {"held_out/python/plain": 2.5}


def test_scores_say_what_was_not_as_the_benchmark_has_it(tmp_path: Path) -> None:
    figure = Figure("T2", "humaneval", "", "pass@1", "Code Llama", "7B", 33.5)
    stage = Stage("lcft", "7b", tmp_path, "hash", {}, "model")

    def scores(asked: int, **model: float) -> list[Any]:
        task = {
            "settings": {"benchmark": "humaneval", "temperature": 0.0},
            "data": {"published": 164, "asked": asked},
            "scores": {"pass@1": {"value": 0.25}},
        }
        return [
            (one.paper, ", ".join("".join(getattr(part, "shown", part) for part in words) for words in one.settings))
            for one in scores_of({"model": model, "tasks": {"humaneval": task}}, stage, [figure])
        ]

    assert scores(164) == [(33.5, "T 0")]
    assert scores(20) == [(None, "T 0, 20 of 164 problems")]
    assert scores(164, rope_base=1e6) == [(None, "T 0, RoPE base 1,000,000 put in")]


def test_results_of_another_checkpoint_are_refused_and_ours_are_shown(runs: Path, tmp_path: Path) -> None:
    stage = read_stage(runs / "lcft" / "model")
    score = {"value": 0.25, "low": 0.1, "high": 0.4, "problems": 164, "samples": 1, "decoding": "greedy"}
    task = {"state": "done", "settings": {"temperature": 0.0, "samples": 1}, "scores": {"pass@1": score, "pass@10": None}}
    results: dict[str, Any] = {"format": 1, "model": {"name": "m", "hash": "other"}, "tasks": {"humaneval": task}}
    write_json(tmp_path / "results.json", results)
    with pytest.raises(ValueError, match=r"results of another checkpoint, m \(hash other\)"):
        dry(runs / "lcft" / "model", results=(tmp_path,))
    results["model"]["hash"] = stage.hash
    write_json(tmp_path / "results.json", results)
    prepared = dry(runs / "lcft" / "model", results=(tmp_path / "results.json",))
    assert "| humaneval | pass@1 | 25.0 | 10.0 to 40.0 | 164 |" in card_of(prepared)
    assert "results.json" in {entry.path for entry in prepared.files}
    index = yaml.safe_load(card_of(prepared).split("---\n")[1])["model-index"][0]["results"][0]
    assert (index["dataset"]["name"], index["metrics"][0]["value"]) == ("humaneval", 25.0)
    dry(runs / "lcft" / "model")  # as the others expect it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repository": "a/b/c"}, "REPO=a/b/c: no name for a repository"),
        ({"repository": "me/über"}, "REPO=me/über: no name for a repository"),
        ({"tag": "v 1"}, "TAG=v 1: git takes no such name"),
        ({"revision": "a..b"}, r"REVISION=a..b: git takes no such name"),
    ],
)
def test_names_that_cannot_be_are_refused(runs: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dry(runs / "lcft" / "model", **options)


def test_llama_2s_licence_goes_along(runs: Path, tmp_path: Path) -> None:
    model = runs / "lcft" / "model"
    with pytest.raises(ValueError, match=r"asks that its text goes with the weights.*--licence-file"):
        dry(model, licence="llama2")
    (tmp_path / "agreement").write_text("the agreement")
    prepared = dry(model, licence="llama2", licence_file=tmp_path / "agreement")
    assert (prepared.folder / "LICENSE.txt").read_text() == "the agreement"
    assert (prepared.folder / "Notice").read_text() == LLAMA2.notice
    assert yaml.safe_load(card_of(prepared).split("---\n")[1])["license"] == "llama2"
    dry(model)


def test_a_number_that_is_not_finite_is_not_shown_as_one(runs: Path) -> None:
    lineage = follow(runs / "lcft" / "model")
    lineage.newest.manifest["held_out"]["held_out/python/plain"] = float("nan")  # pyright: ignore[reportIndexIssue]
    card = write_card(lineage, name="x", licence=Licence("mit"))
    assert "nan" not in card.text.lower().replace("finance", "") and "| python | not known |" in card.text
