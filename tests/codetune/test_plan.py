import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codetune.gpus import GIB, parse_cluster
from codetune.plan import Plan, as_values, layout_of_accelerate, main, make_plan, report
from codetune.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


def plan_of(recipe: str, gpus: str, overrides: tuple[str, ...] = (), **settings: Any) -> Plan:
    loaded = load_recipe(RECIPES / f"{recipe}.yaml", ["runs=nowhere", *overrides])
    return make_plan(loaded, parse_cluster(gpus), recipes=RECIPES, **settings)


def test_the_papers_stage1_at_7b_on_one_machine() -> None:
    plan = plan_of("stage1/7b", "8xH100", layout="zero3")
    assert plan.shape.parameters == 6_738_546_688
    assert plan.steps is not None
    assert (plan.steps.total, plan.steps.warmup, plan.steps.batch_rows) == (119_209, 1_000, 1_024)  # 500e9 / 2^22
    assert plan.steps.accumulation * plan.steps.micro_batch_rows == 128
    # 16 bytes a parameter over eight GPUs are 12.6 GiB; activations of two checkpointed rows are a few more
    assert plan.fits and 14 * GIB < plan.here.total < 40 * GIB
    # 6 x 6.7e9 x 5e11 operations and attention at 40 % of 989e12: 14,000 to 17,000 GPU-hours
    assert plan.gpu_hours is not None and 14_000 < plan.gpu_hours < 17_000
    assert plan.disk["rows"] == pytest.approx(1.0e12, rel=0.1)  # two bytes a token
    assert plan.verdict.startswith("fits: ZeRO-3 needs")


def test_hours_are_arithmetic() -> None:
    plan = plan_of("stage1/7b", "16xA100-80", layout="zero3", mfu=0.5, price_per_gpu_hour=2.0)
    flops = plan.shape.training_flops_per_token(4096) * 500_000_000_000
    assert plan.hours == pytest.approx(flops / (16 * 312e12 * 0.5) / 3600)
    assert plan.hours is not None
    assert f"{plan.hours * 16 * 2.0:,.0f} at 2 per GPU-hour" in report(plan)
    measured = plan_of("stage1/7b", "16xA100-80", layout="zero3", tokens_per_second=4_000)
    assert measured.hours == pytest.approx(500e9 / (4_000 * 16) / 3600)


def test_what_does_not_fit_is_told_what_to_change() -> None:
    plan = plan_of("stage1/70b", "8xA100-80", layout="zero3")
    assert not plan.fits and "on the same GPUs" in plan.verdict
    alone = plan_of("stage1/7b", "8xA100-80", layout="ddp")
    assert not alone.fits and "ZeRO-2 on the same GPUs" in alone.verdict
    wide = plan_of("stage1/7b", "8xA100-40", ("training.micro_batch_rows=16",), layout="zero3")
    assert not wide.fits and 'SET="training.micro_batch_rows=8"' in wide.verdict


def test_a_narrow_fit_is_called_one() -> None:
    plan = plan_of("stage1/7b", "8xA10", layout="zero3")
    assert plan.fits and "error band" in plan.verdict and "fits narrowly" in report(plan)
    assert "error band" not in plan_of("stage1/7b", "8xH100", layout="zero3").verdict


def test_what_the_advice_says_is_true() -> None:
    wide = plan_of("stage1/7b", "8xA100-40", ("training.micro_batch_rows=16",), layout="zero3")
    rows = wide.verdict.partition("micro_batch_rows=")[2].partition('"')[0]
    assert plan_of("stage1/7b", "8xA100-40", (f"training.micro_batch_rows={rows}",), layout="zero3").fits
    more = plan_of("stage1/70b", "8xA100-80", layout="zero3")
    assert not more.fits and "on at least" in more.verdict
    count = more.verdict.partition("on at least ")[2].split()[0]
    micro = ("training.micro_batch_rows=1",) if "micro_batch_rows=1" in more.verdict else ()
    assert plan_of("stage1/70b", f"{count}xA100-80", micro, layout="zero3").fits
    assert not plan_of("stage1/70b", f"{int(count) // 2}xA100-80", micro, layout="zero3").fits


def test_without_a_layout_the_simplest_that_fits_is_taken() -> None:
    assert plan_of("stage1/smollm2-135m", "8xA100-80").chosen.layout == "ddp"
    assert plan_of("stage1/7b", "8xA100-80").chosen.layout == "zero2"
    assert plan_of("stage1/34b", "8xA100-80").chosen.layout == "zero3"


def test_a_world_that_cannot_share_the_batch_is_a_conflict() -> None:
    plan = plan_of("stage1/7b", "3x4xH100", layout="zero3")
    assert plan.steps is None and "12 ranks cannot share evenly" in plan.conflicts[0]
    assert plan.verdict.startswith("does not run as it is")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.sequence_tokens=8192", "4096 positions"),
        ("training.micro_batch_rows=3", "write one of 1, 2, 4"),
        ("model.attention=flash_attention_2", "one row at a time"),
    ],
)
def test_settings_that_conflict_are_named(override: str, said: str) -> None:
    plan = plan_of("stage1/7b", "8xH100", (override,), layout="zero3")
    assert any(said in conflict for conflict in plan.conflicts), plan.conflicts


def test_infilling_without_its_tokens_is_a_conflict() -> None:
    plan = plan_of("stage1/34b", "64xH100", ("data.fim.rate=0.9",), layout="zero3")
    assert any("no infilling tokens" in conflict for conflict in plan.conflicts)


def test_qlora_on_shared_weights_is_a_conflict() -> None:
    assert not plan_of("stage1/34b-qlora", "H100").conflicts
    plan = plan_of("stage1/34b-qlora", "8xH100", layout="zero3")
    assert any("cannot be shared out" in conflict for conflict in plan.conflicts)


def test_adapters_need_a_fraction() -> None:
    full, lora, qlora = (plan_of(f"stage1/7b{arm}", "H100", layout="single").here.total for arm in ("", "-lora", "-qlora"))
    assert qlora < lora < full / 4
    assert qlora < 16 * GIB  # 3.3 GB of 4-bit weights, half a GB of tables, 160M adapter weights of 16 bytes


def test_epochs_are_shares_over_sizes() -> None:
    plan = plan_of("stage1/7b", "8xH100", source_tokens={"python": 20e9})
    assert plan.epochs["python"] == pytest.approx(0.13 * 500e9 / 20e9)
    text = report(plan_of("stage1/7b", "8xH100", ("data.sources.text.size_tokens=100000000000",)))
    assert "text 0.35" in text
    with pytest.raises(ValueError, match="did you mean `python`"):
        plan_of("stage1/7b", "8xH100", source_tokens={"pyton": 20e9})


def test_the_parents_own_configuration_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / "7b" / "base" / "model"
    folder.mkdir(parents=True)
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 512, "max_position_embeddings": 4096}))
    plan = make_plan(load_recipe(RECIPES / "stage1/7b.yaml", [f"runs={tmp_path}"]), parse_cluster("H100"), recipes=RECIPES)
    assert plan.shape.hidden == 64 and str(folder) in plan.shape_origin


def test_an_unknown_size_without_a_parent_is_refused(tmp_path: Path) -> None:
    recipe = dataclasses.replace(load_recipe(RECIPES / "stage1/7b.yaml", [f"runs={tmp_path}"]), size="8b")
    with pytest.raises(ValueError, match="shape of size `8b` is not known"):
        make_plan(recipe, parse_cluster("H100"), recipes=RECIPES)


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_file_is_understood(path: Path) -> None:
    if path.stem == "ulysses":
        with pytest.raises(ValueError, match="rows shared between ranks"):
            layout_of_accelerate(path)
        return
    assert layout_of_accelerate(path)[0] == {"cpu": "single", "gpu": "single"}.get(path.stem, path.stem)


def test_a_layout_that_is_not_known_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tpu.yaml"
    file.write_text("distributed_type: XLA\nnum_processes: 8\n")
    with pytest.raises(ValueError, match="XLA is a layout the plan does not know"):
        layout_of_accelerate(file)


def test_one_process_on_many_gpus_is_refused() -> None:
    with pytest.raises(ValueError, match="one process alone"):
        plan_of("stage1/7b", "8xH100", layout="single")


@pytest.mark.parametrize(
    "recipe", sorted(path.relative_to(RECIPES).with_suffix("") for path in RECIPES.glob("*/*.yaml")), ids=str
)
def test_every_recipe_that_trains_has_a_plan(recipe: Path) -> None:
    if recipe.parent.name in ("accelerate", "eval", "parts", "slurm"):
        return
    loaded = load_recipe(RECIPES / f"{recipe}.yaml")
    if loaded.training is None:
        return
    small = loaded.embedded or loaded.size == "tiny"  # curated sources are files, for which a recipe is not embedded
    rows = loaded.training.batch_tokens // loaded.need_data().sequence_tokens
    many = f"{min(64, rows // loaded.training.micro_batch_rows)}xH100"  # no more than a batch has work for
    gpus = "cpu" if small else many if loaded.model.lora is None else "8xH100"
    plan = plan_of(str(recipe), gpus)
    assert not plan.conflicts
    assert plan.here.total < 16 * GIB if small else plan.fits
    assert plan.verdict in report(plan)
    assert json.loads(json.dumps(as_values(plan)))["verdict"] == plan.verdict


def test_the_command_prints_the_plan_and_imports_no_torch() -> None:
    program = (
        "import sys; from codetune.plan import main; "
        "main(['--recipe', 'recipes/stage1/7b.yaml', '--gpus', '8xH100', '--accelerate', 'recipes/accelerate/zero3.yaml']); "
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith("fits: ZeRO-3")


def test_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([], "say on which GPUs"),
        (["--gpus", "8xH100", "--mfu", "40"], "--mfu is 40"),
        (["--gpus", "8xH100", "--tokens-per-second", "0"], "--tokens-per-second is 0; write a number above 0"),
        (["--gpus", "8xH100", "--price-per-gpu-hour", "-2"], "--price-per-gpu-hour is -2; write a number above 0"),
        (["--gpus", "8xH100", "--accelerate", "recipes/accelerate/zero4.yaml"], "no such file"),
        (["--gpus", "8xH100", "--source-tokens", "python"], "write NAME=TOKENS"),
    ):
        with pytest.raises(SystemExit):
            main(["--recipe", str(RECIPES / "stage1/7b.yaml"), *arguments])
        assert said in capsys.readouterr().err


def test_a_recipe_of_one_s_own_is_planned_as_one_of_the_repository(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my").mkdir()
    for stage, size, gpus in (("instruct", "7b", ["--gpus", "8xH100"]), ("stage1", "tiny", [])):
        file = tmp_path / "my" / f"{size}.yaml"
        file.write_text(f"extends: {RECIPES / stage / size}.yaml\nname: mine\n")
        answers = []
        for path in (file, RECIPES / stage / f"{size}.yaml"):
            main(["--recipe", str(path), *gpus, "--json"])
            answers.append({name: v for name, v in json.loads(capsys.readouterr().out).items() if name != "recipe"})
        assert answers[0] == answers[1]


def test_the_command_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--recipe", str(RECIPES / "stage1/tiny.yaml"), "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["gpus"]["name"] == "cpu" and values["fits"] and values["parameters"] == 1_315_968


def test_long_context_at_7b_on_one_machine() -> None:
    plan = plan_of("lcft/7b", "8xH100", layout="zero3")
    assert plan.steps is not None and plan.steps.total == 3_000  # Sec. 2.6
    assert plan.shape.context == 16_384 and not plan.conflicts and plan.fits
    # 32 inputs of layers, bf16: 4.3 GB; the mask as truth values: 0.27 GB; one layer at a time: a few more
    kept = 32 * 16_384 * 4_096 * 2 + 16_384**2
    assert kept < plan.here.terms["activations"] < kept + 6 * GIB
    assert any("mask of 16384 x 16384" in note for note in plan.notes)
    # 6.3e9 tokens of 4.0e10 weight operations, and of 1.3e10 in attention: 200 to 260 GPU-hours
    assert plan.gpu_hours is not None and 200 < plan.gpu_hours < 260
