"""What a launcher asks for, and which checkpoints a layout may go on from. Real ranks: test_ranks.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from codetune import cpu_ranks
from codetune.artifacts import seal_folder
from codetune.recipe import load_recipe
from codetune.sharding import Layout, asked_layout, check_continuation, check_recipe, convert, main

ZERO = {"WORLD_SIZE": "4", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP = {"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "layout"),
    [
        ({}, Layout("single", 1)),
        ({"WORLD_SIZE": "2"}, Layout("ddp", 2)),
        (ZERO, Layout("zero3", 4)),
        ({**ZERO, "PARALLELISM_CONFIG_SP_SIZE": "2"}, Layout("zero3", 4, 2)),
        (FSDP, Layout("fsdp2", 4)),
    ],
)
def test_the_layout_is_what_the_launcher_s_environment_says(environment: dict[str, str], layout: Layout) -> None:
    assert asked_layout(environment) == layout
    assert Layout(**layout.describe()) == layout


def test_ranks_that_share_rows_count_once_as_readers() -> None:
    assert Layout("zero3", 8, 2).data_ranks == 4


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, "fsdp_version 1, .*; write fsdp_version: 2"),
        ({**FSDP, "PARALLELISM_CONFIG_CP_SIZE": "2"}, "cp_size above 1: context parallelism drops the mask between packed"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage 0, which shares nothing out; write 2 or 3"),
        ({**ZERO, "PARALLELISM_CONFIG_SP_SIZE": "3"}, "shares each row between 3 ranks .* 4 ranks cannot be dealt into"),
        ({**FSDP, "PARALLELISM_CONFIG_SP_SIZE": "2"}, "shares rows between ranks .* which needs DeepSpeed"),
    ],
)
def test_a_launch_that_would_train_something_else_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked_layout(environment)


def test_rows_are_shared_only_where_documents_stay_apart(make_run: Callable[..., Path]) -> None:
    shared = Layout("zero3", 2, 2)
    path = make_run(rows=False)
    with pytest.raises(ValueError, match="`model.attention` is sdpa, for which DeepSpeed drops the mask"):
        check_recipe(shared, load_recipe(path))
    check_recipe(Layout("zero3", 2), load_recipe(path))
    check_recipe(shared, load_recipe(path, ["model.attention=flash_attention_2"]))
    full = ["data.packing.isolate_documents=false", "data.packing.strategy=concatenate"]
    check_recipe(shared, load_recipe(path, full))
    with pytest.raises(ValueError, match="`data.sequence_tokens` is 64, which the 3 ranks that share a row"):
        check_recipe(Layout("zero3", 3, 3), load_recipe(path, full))


def test_whole_files_and_fsdp2_go_on_with_any_number_of_ranks(tmp_path: Path) -> None:
    for then, now in (("single", "ddp"), ("ddp", "single"), ("fsdp2", "fsdp2")):
        check_continuation(tmp_path, Layout(then, 1 if then == "single" else 8).describe(), Layout(now, 2))
    check_continuation(tmp_path, None, Layout("ddp", 2))  # written before layouts were recorded


def test_another_kind_of_layout_is_refused_with_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"under fsdp2, whose optimizer files ddp cannot read; go on under fsdp2\.yaml"):
        check_continuation(tmp_path, Layout("fsdp2", 2).describe(), Layout("ddp", 2))
    with pytest.raises(ValueError, match=r"under ddp, whose optimizer files zero3 .*; go on under one process or ddp\.yaml"):
        check_continuation(tmp_path, Layout("ddp", 2).describe(), Layout("zero3", 2))
    with pytest.raises(ValueError, match="under zero2, whose optimizer files zero3 cannot read"):
        check_continuation(tmp_path, Layout("zero2", 2).describe(), Layout("zero3", 2))


def test_zero_s_files_go_on_with_their_number_of_ranks_or_converted(tmp_path: Path) -> None:
    written = Layout("zero2", 8).describe()
    check_continuation(tmp_path, written, Layout("zero2", 8))
    with pytest.raises(ValueError, match=r"by 8 rank\(s\) under zero2, and this is 4: .*codetune.sharding .*start 8 rank"):
        check_continuation(tmp_path, written, Layout("zero2", 4))
    (tmp_path / "global_step3_universal").mkdir()
    check_continuation(tmp_path, written, Layout("zero2", 4))


def test_only_a_whole_checkpoint_of_zero_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(SystemExit):
        main([str(folder)])
    assert "not a whole checkpoint, it has no manifest.json" in capsys.readouterr().err
    folder.mkdir()
    seal_folder(folder, {"layout": Layout("fsdp2", 2).describe()})
    with pytest.raises(ValueError, match="was written under fsdp2, and any number of ranks can read it"):
        convert(folder)
    shutil.rmtree(folder)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is here")
def test_ranks_on_the_cpu_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "ACCELERATE_USE_CPU", cpu_ranks.ASKED):
        monkeypatch.delenv(name, raising=False)
    cpu_ranks.settle()  # one process without a launcher
    assert cpu_ranks.device_arguments() == {"use_cpu": True}
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="is one for GPUs, and this machine shows none .* set CODETUNE_CPU_RANKS=1"):
        cpu_ranks.settle()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # a launch file for the CPU
    cpu_ranks.settle()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv(cpu_ranks.ASKED, "1")
    assert cpu_ranks.device_arguments() == {"use_cpu": True, "ddp_backend": "gloo"}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert cpu_ranks.device_arguments() == {"use_cpu": False, "ddp_backend": "gloo"}
    for name in ("LOCAL_RANK", cpu_ranks.ASKED, "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # as gpu.yaml makes `accelerate launch` say of a single process
    with pytest.raises(ValueError, match="is one for GPUs"):
        cpu_ranks.settle()
