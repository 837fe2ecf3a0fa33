"""What is published: a card whose every number is in a manifest, the allowed files, and a folder that loads elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from model_hub import ATTRIBUTES, TOKEN, ModelHub

from codetune import publish as module
from codetune.artifacts import read_json, seal_folder, why_invalid, write_json
from codetune.lineage import Stage, follow, metrics_at, read_stage
from codetune.model_card import LLAMA2, Licence, check_metadata, markdown_text, write_card
from codetune.paper import Figure
from codetune.publish import Options, Prepared, publish, scores_of

pytestmark = pytest.mark.xdist_group("finished")
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
    sources = yaml.safe_load((lcft.folder / "recipe.yaml").read_text())["data"]["sources"].values()
    licences = {number for source in sources for number in NUMBER.findall(str(source["license_note"]))}
    dtype = {"32"}  # F32
    hardware = set(NUMBER.findall(read_json(lcft.stage.folder / "manifest.json")["hardware"]["device"]))
    for number in NUMBER.findall(prose_of(card_of(lcft))):
        assert number in known | fixed | licences | dtype | hardware, f"{number} is in the card and not among its claims"


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
            (one.paper, one.settings) for one in scores_of({"model": model, "tasks": {"humaneval": task}}, stage, [figure])
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
