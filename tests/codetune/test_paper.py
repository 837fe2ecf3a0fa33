"""The paper's number stands beside ours only where size, variant, benchmark, form and metric are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from codetune.paper import paper_value, read_paper

ROWS = """table,benchmark,form,metric,model,size,value
T2,humaneval,unstripped,pass@1,Code Llama,7B,33.5
T2,humaneval,unstripped,pass@1,Code Llama - Python,7B,38.4
T2,humaneval,unstripped,pass@1,Code Llama,13B,36.0
T10,humaneval,unstripped,pass@1,Code Llama [LCFT=no],7B,32.3
"""


def test_only_the_same_is_beside_ours(tmp_path: Path) -> None:
    (tmp_path / "paper.csv").write_text(ROWS)
    figures = read_paper(tmp_path / "paper.csv")
    task = {"settings": {"benchmark": "humaneval", "temperature": 0.0}, "form": "unstripped"}

    def value(stage: str, size: str, metric: str = "pass@1", **changes: object) -> float | None:
        return paper_value(figures, {**task, **changes}, metric, stage, size)

    assert value("lcft", "7b") == 33.5 and value("lcft-mine", "7b") == 33.5  # an arm of the stage
    assert value("lcft-linear", "7b") is None  # an ablation, which has a row of its own
    assert value("stage1", "7b") == 32.3  # before long context
    assert value("python-lcft", "7b") == 38.4 and value("lcft", "13b") == 36.0
    assert value("lcft", "tiny") is None and value("lcft", "7b", "pass@10") is None
    assert value("lcft", "7b", form="chat") is None
    assert value("lcft", "7b", data={"published": 164, "asked": 164}) == 33.5
    assert value("lcft", "7b", data={"published": 164, "asked": 20}) is None
    assert value("lcft", "7b", settings={"benchmark": "humaneval", "temperature": 0.2}) is None
    assert read_paper(None) == [] == read_paper(tmp_path / "none.csv")


def test_a_line_that_is_no_figure_is_told(tmp_path: Path) -> None:
    (tmp_path / "paper.csv").write_text(ROWS + "T2,humaneval,unstripped,pass@1,Code Llama,34B,many\n")
    with pytest.raises(ValueError, match=r"paper.csv, line 6: not a figure of the paper"):
        read_paper(tmp_path / "paper.csv")
