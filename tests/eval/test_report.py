"""The report: what it shows is what the doors say, nothing in it runs that it did not bring, and a browser draws it."""

from __future__ import annotations

import copy
import fcntl
import functools
import html
import json
import math
import operator
import os
import random
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.report import write_log
from codetune.artifacts import read_json, write_json
from eval import report as module
from eval.runs import Curve, find_runs, read_run, thin_out

pytestmark = pytest.mark.xdist_group("finished")


@pytest.fixture(scope="module")
def runs(finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of finished runs, with results of one of them, and one that was never finished."""
    folder = Path(shutil.copytree(finished_runs, tmp_path_factory.mktemp("report") / "runs")) / "smoke"
    add_results(folder / "stage1")
    stopped = folder / "python"
    stopped.mkdir()
    shutil.copyfile(folder / "stage1" / "metrics.jsonl", stopped / "metrics.jsonl")
    write_json(stopped / "ended.json", {"state": "stopped", "exit_code": 75})
    return folder


def add_results(run: Path) -> None:
    from codetune.artifacts import model_hash

    score = {"value": 0.25, "low": 0.1, "high": 0.4, "problems": 12, "samples": 1, "decoding": "greedy"}
    tasks = {
        "humaneval": {
            "state": "done",
            "settings": {"benchmark": "humaneval", "temperature": 0.0},
            "scores": {"pass@1": score},
        },
        "mbpp": {"state": "refused", "why": "its data is not here <b>", "settings": {"benchmark": "mbpp"}},
    }
    for temperature, value in ((0.1, 0.3), (0.8, 0.2)):
        settings = {"benchmark": "humaneval", "temperature": temperature, "samples": 10}
        tasks[f"sweep-{temperature}"] = {
            "state": "done",
            "settings": settings,
            "scores": {"pass@1": {**score, "value": value}},
        }
    results = {"format": 1, "model": {"name": "m", "hash": model_hash(run / "model")}, "tasks": tasks}
    write_json(run / "eval" / "tiny" / "results.json", results)
    lines = [
        {"prompt_id": f"HumanEval/{number}", "sample": 0, "passed": number == 0, "reason": reason, "cut": text, "detail": ""}
        for number, (reason, text) in enumerate(
            [
                ("passed", "    return 1\n"),
                ("wrong-answer", "<script>document.title = 'broken'</script>"),
                ("syntax", "def ("),
            ]
        )
    ]
    path = run / "eval" / "tiny" / "humaneval.grades.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')


@pytest.fixture(scope="module")
def page(runs: Path) -> Path:
    return module.write_report(runs, runs / "report.html")


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def test_a_curve_is_thinned_to_its_extremes() -> None:
    values = [math.sin(place / 300) for place in range(10_000)]
    values[6_543] = 40.0
    values[1_234] = -7.0
    points = thin_out([float(place) for place in range(10_000)], values, 400)
    assert len(points) <= 400
    assert (6_543.0, 40.0) in points and (1_234.0, -7.0) in points
    assert points[0] == (0.0, values[0]) and points[-1] == (9_999.0, values[-1])
    assert points == sorted(points)
    assert thin_out([1.0, 2.0], [3.0, 4.0], 400) == [(1.0, 3.0), (2.0, 4.0)]


def test_numbers_that_are_not_finite_are_left_out_and_counted() -> None:
    curve = Curve()
    for value in (1.0, float("nan"), float("inf"), None, "3", 10**400, True, 2):
        curve.add(0, value)
    assert (curve.values, curve.not_finite) == ([1.0, 2.0], 6)


def test_a_log_in_the_middle_of_being_written_is_read(tmp_path: Path) -> None:
    run = tmp_path / "tiny" / "stage1"
    run.mkdir(parents=True)
    ledger = {"tokens": {"python": {"plain": 60, "psm": 30, "spm": 10}}}
    more = {"tokens": {"python": {"plain": 70, "psm": 70, "spm": 60}}}
    lines = [
        {"step": 1, "tokens": 100, "loss": 3.0, "ledger": ledger},
        {"step": 2, "tokens": 200, "loss": float("nan"), "ledger": more},
        {"step": 2, "tokens": 200, "held_out/python/plain": 2.5, "context/128": 4.0, "key/256/0.2/found": 0.5},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "tok')
    facts = read_run(run)
    assert (facts.state, facts.steps, facts.tokens) == ("killed", 2, 200)
    assert facts.curves["loss"].values == [3.0]
    left_out = ["value left out that is no finite number", "line left out that is no record"]
    assert facts.notes == [f"metrics.jsonl: 1 {words}" for words in left_out]
    assert facts.infilled["psm"].values == [0.3, 0.4] and facts.infilled["spm"].values == [0.1, 0.5]  # of 100 tokens each
    assert facts.held_out["python", "plain"].values == [2.5]
    assert facts.context == {128: 4.0} and facts.keys == {(256, 0.2): 0.5}


def test_the_state_of_a_run_is_told_from_its_folder(runs: Path, tmp_path: Path) -> None:
    states = {run.name: run.state for run in find_runs(runs)}
    assert (
        states["stage1"] == states["lcft"] == states["base"] == states["init"] == "finished"
        and states["python"] == "stopped"
    )
    broken = Path(shutil.copytree(runs / "lcft", tmp_path / "smoke" / "lcft"))
    (broken / "model" / "config.json").unlink()
    assert read_run(broken).notes == ["model: config.json is missing"]
    descriptor = os.open(broken / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert read_run(broken).state == "running"
    os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_says_what_the_manifests_say(page: Path, runs: Path) -> None:
    text = page.read_text(encoding="utf-8")
    manifest = read_json(runs / "lcft" / "model" / "manifest.json")
    assert f"{manifest['tokens']:,}" in text and "1,000,000" in text
    specs = json.loads(re.findall(r'<script type="application/json" id="specs">(.*?)</script>', text, re.DOTALL)[0])
    mix = next(spec for spec in specs if spec.get("mark", {}).get("type") == "bar")
    shares = {(value["n"], value["s"]): value["v"] for value in mix["data"]["values"]}
    first = next(run for run in find_runs(runs) if run.rows and run.ledger)
    read = {name: sum(layouts.values()) for name, layouts in first.ledger["tokens"].items()}
    for name, count in read.items():
        assert shares[name, "realised"] == pytest.approx(count / sum(read.values()), rel=1e-4)
        assert shares[name, "planned"] == first.rows["sources"][name]["share"]
    assert "25.0 <span" in text and "10.0 to 40.0, n 12" in text
    assert page.stat().st_size < 3e6


def test_the_picture_names_the_data_that_other_commands_make(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "smoke"
    for name in ("base", "stage1"):
        shutil.copytree(runs / name, folder / name)
    boxes = {box.name: box for box in module.pipeline(*module.find_all(folder, ()))}
    assert "curate" not in boxes and boxes["self_instruct"].state == "missing"
    assert boxes["self_instruct"].fed == ((boxes["instruct"].x, boxes["instruct"].y),)
    (folder / "self_instruct" / "work").mkdir(parents=True)
    source = {"documents_read": 1200, "documents": 1100}
    (folder / "curate" / "dataset").mkdir(parents=True)
    write_json(folder / "curate" / "dataset" / "curate.json", {"sources": {"python": source, "cpp": source}})
    manifest = read_json(folder / "stage1" / "model" / "manifest.json")
    manifest["recipe"]["data"]["sources"]["python"]["path"] = "runs/smoke/curate/dataset/python/*.parquet"
    write_json(folder / "stage1" / "model" / "manifest.json", manifest)
    boxes = {box.name: box for box in module.pipeline(*module.find_all(folder, ()))}
    assert (boxes["self_instruct"].state, boxes["curate"].state) == ("stopped", "finished")
    assert boxes["curate"].words == "2,200 of 2,400 kept"
    assert boxes["curate"].fed == ((boxes["stage1"].x, boxes["stage1"].y),)
    (folder / "self_instruct" / "triplets").mkdir()
    write_json(folder / "self_instruct" / "triplets" / "manifest.json", {"funnel": {"asked": 30, "kept": 2}})
    text = module.render(*module.find_all(folder, ()), folder.name)
    assert "2 of 30 kept" in text and text.count('class="edge data"') == 2
    assert len({(box.x, box.y) for box in boxes.values()}) == len(boxes)  # no two in one place


def test_languages_are_correlated_over_the_runs_that_have_them(runs: Path, tmp_path: Path) -> None:
    scores = {  # three runs with three languages, of which one has a fourth; a fourth run with one
        "stage1": {"cpp": 0.1, "java": 0.2, "js": 0.3, "sh": 0.4},
        "lcft": {"cpp": 0.2, "java": 0.3, "js": 0.1},
        "base": {"cpp": 0.4, "java": 0.5, "js": 0.2},
        "python": {"cpp": 0.9},
    }
    for name, row in scores.items():
        run = tmp_path / "smoke" / name
        run.mkdir(parents=True)
        shutil.copyfile(runs / "stage1" / "metrics.jsonl", run / "metrics.jsonl")
        tasks = {
            f"mpl-{language}": {
                "state": "done",
                "settings": {"benchmark": f"multipl-e-{language}", "temperature": 0.0},
                "scores": {"pass@1": {"value": value, "low": 0.0, "high": 1.0, "problems": 161, "decoding": "greedy"}},
            }
            for language, value in row.items()
        }
        (run / "eval" / "table4").mkdir(parents=True)
        write_json(run / "eval" / "table4" / "results.json", {"format": 1, "model": {"name": name}, "tasks": tasks})
    text = module.render(*module.find_all(tmp_path / "smoke", ()), "smoke")
    specs = json.loads(re.findall(r'<script type="application/json" id="specs">(.*?)</script>', text, re.DOTALL)[0])
    cells = next(spec for spec in specs if "layer" in spec and {"a", "b", "v"} <= set(spec["data"]["values"][0]))
    found = {frozenset((cell["a"], cell["b"])): cell["v"] for cell in cells["data"]["values"]}
    assert set().union(*found) == {"cpp", "java", "js"}
    # cpp and java rise by the same steps. From their means, 7/30 and 0.2, cpp and js are off by (-4, -1, 5)/30 and
    # (1, -1, 0)/10: r = -3 / sqrt(42 x 2)
    assert found[frozenset(("cpp", "java"))] == 1.0 and found[frozenset(("cpp", "js"))] == -0.33
    assert "Languages that rise and fall together" in text


def test_words_of_recipes_and_models_are_shown_and_never_run(page: Path, runs: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;document.title = &#39;broken&#39;&lt;/script&gt;" in text
    assert "its data is not here &lt;b&gt;" in text
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    run = folder / "</script><script>alert(2)</script>".replace("/", "\u2215")
    run.mkdir(parents=True)
    shutil.copyfile(runs / "stage1" / "metrics.jsonl", run / "metrics.jsonl")
    found = module.render(find_runs(folder), (), folder.name).replace(module.library(), "")
    assert "<img" not in found and "<script>alert" not in found and "\\u003cscript\\u003ealert(2)" in found


def test_nothing_is_fetched(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0])
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy
    outside = text.replace(module.library(), "")
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", outside)


def test_results_of_another_checkpoint_are_not_shown(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs / "stage1", tmp_path / "smoke" / "stage1"))
    results = read_json(copy / "eval" / "tiny" / "results.json")
    results["model"]["hash"] = "another"
    write_json(copy / "eval" / "tiny" / "results.json", results)
    facts = read_run(copy)
    assert facts.results == {} and facts.notes == ["eval/tiny: results of another checkpoint (hash another), not shown"]


def test_a_folder_without_runs_is_refused(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(ValueError, match="no such folder; a report needs runs"):
        module.write_report(tmp_path / "tiny", tmp_path / "x.html")
    with pytest.raises(ValueError, match="no run in it; make one first"):
        module.write_report(tmp_path, tmp_path / "x.html")
    with pytest.raises(ValueError, match="no run lcftt there; there are init, base, stage1"):
        module.write_report(runs, tmp_path / "x.html", ["lcftt"])


def test_a_run_of_a_hundred_thousand_logged_steps_is_a_small_page_in_seconds(tmp_path: Path) -> None:
    run = tmp_path / "tiny" / "stage1"
    run.mkdir(parents=True)
    write_log(run / "metrics.jsonl", 100_000)
    start = time.process_time()
    out = module.write_report(run.parent, tmp_path / "report.html")
    assert time.process_time() - start < 10 and out.stat().st_size < 5e6
    facts = read_run(run)
    assert facts.steps == 100_000 and len(facts.curves["loss"].values) == 100_000


# ---------------------------------------------------------------------------------------------------------------------
# Damaged


def append(run: Path, *lines: str, name: str = "metrics.jsonl") -> None:
    with (run / name).open("a") as file:
        file.write("".join(f"{line}\n" for line in lines).removesuffix("\n"))


def rewrite(path: Path, **changes: Any) -> None:
    write_json(path, {**read_json(path), **changes})


def unfinish(run: Path, recipe: str) -> None:
    """Without a model, and with another recipe in its newest checkpoint."""
    shutil.rmtree(run / "model")
    (run / "checkpoints" / "checkpoint-20" / "recipe.yaml").write_text(recipe)


def odd_steps(run: Path) -> None:
    append(run, *(f'{{"step": {step}, "tokens": 9, "loss": 1.0}}' for step in ("NaN", "Infinity", '"nine"', "[]")))


def half_a_manifest(run: Path) -> None:
    path = run / "model" / "manifest.json"
    path.write_text(path.read_text()[:700])


def odd_ledger(run: Path) -> None:
    ledger = read_json(run / "model" / "manifest.json")["ledger"]
    rewrite(run / "model" / "manifest.json", ledger={**ledger, "tokens": {"python": {"psm": "many", "spm": 40}}})


def log_is_a_folder(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()


def odd_results(run: Path) -> None:
    tasks = {"a": 3, "b": {"state": [], "scores": {"pass@1": {"value": "0.5"}, "loss": 2.5}}}
    rewrite(run / "eval" / "tiny" / "results.json", tasks=tasks)


DAMAGES: dict[str, tuple[Any, tuple[str, ...]]] = {  # what is done to a run, and what its section says
    "steps": (odd_steps, ("metrics.jsonl: 4 values left out that are no finite numbers",)),
    "yaml": (lambda run: unfinish(run, "a: [b: {"), ("checkpoint-20/recipe.yaml: not readable (ParserError",)),
    "yaml-list": (
        lambda run: unfinish(run, "- a"),
        ("checkpoint-20/recipe.yaml: all of it is a list instead of a mapping",),
    ),
    "yaml-bytes": (lambda run: unfinish(run, "\x00"), ("checkpoint-20/recipe.yaml: not readable (ReaderError",)),
    "yaml-tokens": (
        lambda run: unfinish(run, "training: {train_tokens: .nan}\nparent: [x]"),
        (
            "checkpoint-20/recipe.yaml: training.train_tokens is nan instead of a finite number; left out",
            "checkpoint-20/recipe.yaml: parent is a list instead of a text; left out",
        ),
    ),
    "half-manifest": (half_a_manifest, ("model: its manifest.json is damaged",)),
    "list-manifest": (
        lambda run: (run / "model" / "manifest.json").write_text("[1]"),
        ("model: its manifest.json is damaged",),
    ),
    "odd-files": (
        lambda run: rewrite(run / "model" / "manifest.json", files={"config.json": 3}),
        ("model: its manifest.json is damaged",),
    ),
    "odd-parts": (
        lambda run: rewrite(run / "model" / "manifest.json", rope={"base": "x"}, hardware=3, tokens=[1], recipe="no"),
        (
            "rope.base is &#39;x&#39; instead of a finite number; left out",
            "hardware is 3 instead of a mapping; left out",
            "tokens is a list instead of a finite number; left out",
            "recipe is &#39;no&#39; instead of a mapping; left out",
        ),
    ),
    "ledger": (odd_ledger, ("ledger.tokens.python.psm is &#39;many&#39; instead of a finite number; left out",)),
    "log-ledger": (
        lambda run: append(
            run, '{"step": 9, "tokens": 9, "ledger": {"tokens": [1]}}', '{"step": 9, "tokens": 9, "ledger": 3}'
        ),
        ("metrics.jsonl: 2 values left out that are no finite numbers",),
    ),
    "rows": (
        lambda run: (run / "rows" / "manifest.json").write_text('{"rows": 3'),
        ("rows/manifest.json: not readable as JSON", "rows: not readable (ValueError"),
    ),
    "half-line": (lambda run: append(run, '{"step": 9, "tok'), ("metrics.jsonl: 1 line left out that is no record",)),
    "deep-line": (lambda run: append(run, "[" * 100_000), ("metrics.jsonl: 1 line left out that is no record",)),
    "bytes": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n{}\n"),
        ("metrics.jsonl: 2 lines left out that are no records",),
    ),
    "folder": (log_is_a_folder, ("metrics.jsonl cannot be read to its end (IsADirectoryError",)),
    "context": (
        lambda run: append(run, '{"tokens": 9, "context/x": 1.0, "key/9/found": 1.0, "held_out/a/plain": "low"}'),
        ("metrics.jsonl: 3 values left out that are no finite numbers",),
    ),
    "skipped": (
        lambda run: append(run, '{"loss": NaN}', '{"step": "x"}', "3", name="skipped_steps.jsonl"),
        (
            "skipped_steps.jsonl: 2 values left out that are no finite numbers",
            "skipped_steps.jsonl: 1 line left out that is no record",
        ),
    ),
    "results": (
        odd_results,
        (
            "eval/tiny/results.json: tasks.a is 3 instead of a mapping; left out",
            "tasks.b.scores.pass@1.value is &#39;0.5&#39; instead of a finite number; left out",
            "tasks.b.state is a list instead of a text; left out",
        ),
    ),
    "no-results": (
        lambda run: (run / "eval" / "tiny" / "results.json").write_text("[]"),
        ("eval/tiny: not readable (ValueError: eval/tiny/results.json: no results of this version",),
    ),
    "circle": (lambda run: rewrite(run / "model" / "manifest.json", parent={"path": "runs/smoke/circle/model"}), ()),
}


def test_what_is_damaged_is_said_in_its_section_and_the_rest_is_drawn(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "smoke"
    for name, (damage, _) in DAMAGES.items():
        run = Path(shutil.copytree(runs / "stage1", folder / name))
        (run / "checkpoints" / "recipe.json").unlink()
        (run / "eval" / "tiny" / "humaneval.grades.jsonl").unlink()  # half-written, for other tests
        damage(run)
    shutil.copytree(runs / "lcft", folder / "sound")
    text = module.render(*module.find_all(folder, ()), "smoke")
    sections = dict(re.findall(r'<section id="run-\d+" class="run">\s*<h2>([\w-]+) (.*?)</section>', text, re.DOTALL))
    assert set(sections) == {*DAMAGES, "sound"}
    for name, (_, wanted) in DAMAGES.items():
        notes = re.findall(r'<p class="warning">(.*?)</p>', sections[name])
        assert len(notes) == len(wanted) and all(words in "\n".join(notes) for words in wanted), (name, notes)
        assert str(tmp_path) not in "".join(notes)
        assert name in ("folder", "bytes") or "data-chart" in sections[name], name
    assert "warning" not in sections["sound"] and "data-chart" in sections["sound"]
    assert text.count('<text x="') == 2 * len(re.findall(r'<g class="stage', text)) and "circle" in text


def test_data_of_other_commands_that_is_damaged_is_said(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "python", tmp_path / "smoke" / "python")
    for place in ("curate/dataset/curate.json", "self_instruct/triplets/manifest.json"):
        (tmp_path / "smoke" / place).parent.mkdir(parents=True)
    (tmp_path / "smoke" / "curate/dataset/curate.json").write_text('{"sources": {"a": {"documents": "x"}}}')
    (tmp_path / "smoke" / "self_instruct/triplets/manifest.json").write_text('{"funnel": ')
    text = module.render(*module.find_all(tmp_path / "smoke", ()), "smoke")
    assert "curate: dataset/curate.json: sources.a.documents is &#39;x&#39; instead of a finite number; left out" in text
    assert "self_instruct: triplets/manifest.json: not readable as JSON" in text
    assert text.count("finished, not known how much") == 2


ODD: tuple[Any, ...] = (None, "text", float("nan"), float("inf"), 10**400, -1, True, [], {}, [{}], {"a": []})


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys of everything in a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*place, key)
        yield from leaves(item, (*place, key))


def test_no_odd_value_at_any_place_ends_the_report(runs: Path, tmp_path: Path) -> None:
    """Places and values are drawn with a fixed seed; text of rows and answers, which no value changes, is left out."""
    draw, run = random.Random(0), tmp_path / "smoke" / "stage1"
    shutil.copytree(runs / "stage1", run, ignore=shutil.ignore_patterns("lane-*", "checkpoint-*", "*.grades.jsonl"))
    files = {name: read_json(run / name) for name in ("model/manifest.json", "rows/manifest.json", "eval/tiny/results.json")}
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for _ in range(60):
        name = draw.choice([*files, "metrics.jsonl"])
        tree = copy.deepcopy(files.get(name) or log[-2:])
        *path, last = draw.choice([place for place in leaves(tree) if place[:1] != ("files",)])
        functools.reduce(operator.getitem, path, tree)[last] = draw.choice(ODD)
        before = (run / name).read_text()
        (run / name).write_text("\n".join(map(json.dumps, tree)) if name not in files else json.dumps(tree))
        found = module.render([read_run(run)], (), "smoke")
        assert "stage1" in found, (name, path, last)
        (run / name).write_text(before)


# ---------------------------------------------------------------------------------------------------------------------
# Watching


@pytest.fixture
def watching(runs: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "smoke"
    shutil.copytree(runs / "python", folder / "python")
    server = module.serve(folder, (), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert server.server_address[0] == "127.0.0.1"
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def fetch(address: str, host: str | None = None) -> str:
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def test_the_watched_page_follows_the_run(watching: tuple[str, Path]) -> None:
    address, folder = watching
    assert "stopped, goes on" in fetch(address) and "connect-src &#39;self&#39;" in fetch(address)
    before = fetch(f"{address}/version")
    with (folder / "python" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9_999, "tokens": 98_765_432, "loss": 1.0}) + "\n")
    assert fetch(f"{address}/version") != before
    assert "98,765,432" in fetch(address)


def test_the_watched_page_is_for_this_machine_alone(watching: tuple[str, Path]) -> None:
    address, _ = watching
    with pytest.raises(urllib.error.HTTPError, match="403"):
        fetch(address, host="evil.example:80")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(f"{address}/../../etc/passwd")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


def open_page(browser: Any, address: str, scheme: str = "light", width: int = 1200) -> tuple[Any, list[str]]:
    """The page, drawn, and everything that was said on its console or asked of a network."""
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 800}, offline=address.startswith("file")
    )
    tab = context.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url) if not request.url.startswith(("data:", address)) else None)
    tab.goto(address)
    tab.wait_for_selector("body[data-drawn]", timeout=120_000)
    return tab, said


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_a_browser_draws_every_chart_without_a_word(browser: Any, page: Path, scheme: str, width: int) -> None:
    tab, said = open_page(browser, page.as_uri(), scheme, width)
    assert said == []
    wanted = tab.locator("[data-chart]").count()
    assert wanted >= 10 and tab.locator("[data-chart] svg").count() == wanted
    assert tab.locator("[data-chart] svg path[d]").count() > wanted
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # a phone scrolls tables, not the page
    assert tab.title() == "smoke: codetune report"  # the completion's script did not run
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 21, 27)"
    assert dark == (scheme == "dark")
    tab.locator("#scheme").click()
    tab.wait_for_selector(f"html[data-scheme={'light' if dark else 'dark'}]")
    tab.context.close()


def test_first_paint_is_within_a_second_and_tables_sort(browser: Any, page: Path) -> None:
    tab, _ = open_page(browser, page.as_uri())
    paint = tab.evaluate(
        "performance.getEntriesByType('paint').find((entry) => entry.name === 'first-contentful-paint').startTime"
    )
    assert paint < 1000 or os.getloadavg()[0] > 2 * (os.cpu_count() or 1)  # of a machine that has time for it
    table = tab.locator("#pipeline table")
    heading = table.locator("th", has_text="last loss")

    def column() -> list[str]:
        return [row.locator("td").nth(6).inner_text() for row in table.locator("tbody tr").all()]

    heading.click()
    numbers = [float(text) for text in column() if text != "-"]
    assert numbers == sorted(numbers) and len(set(numbers)) > 1 and column()[-1] == "-"
    heading.click()
    assert [float(text) for text in column() if text != "-"] == sorted(numbers, reverse=True) and column()[-1] == "-"
    tab.context.close()


def test_answers_are_found_by_verdict_and_words(browser: Any, page: Path) -> None:
    tab, _ = open_page(browser, page.as_uri())
    answers = tab.locator("details.browser", has_text="Answers: tiny/humaneval")
    answers.locator("summary").click()
    assert answers.locator("article:visible").count() == 3
    answers.locator("select").select_option("wrong-answer")
    assert answers.locator("article:visible").count() == 1
    answers.locator("select").select_option("")
    answers.locator("input").fill("def (")
    assert answers.locator("article:visible").all_inner_texts()[0].startswith("HumanEval/2")
    tab.context.close()
