"""Log lines, and the metrics file on resume."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from codetune.callbacks import held_out_line, keep_lines_up_to, progress_line
from codetune.trainer import Ledger


def test_lines_of_steps_that_are_made_again_are_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (0, 1, 2, 3)]
    path.write_text("\n".join([*lines, '{"step": 4, "lo']))
    keep_lines_up_to(path, 2)
    assert path.read_text().splitlines() == lines[:3]
    keep_lines_up_to(path, 0)  # from the start: nothing is kept, not even what the parent scored
    assert path.read_text() == ""
    keep_lines_up_to(tmp_path / "not-there.jsonl", 2)
    assert list(tmp_path.iterdir()) == [path]


def test_a_log_line_has_speed_utilisation_and_time_left() -> None:
    logs = {"loss": 3.21, "learning_rate": 1e-3, "tokens_per_second": 1000.0, "mfu_percent": 12.34}
    line = progress_line(10, 100, 2048, logs)
    assert line == "step 10/100  20,480 tokens  loss 3.2100  rate 1.00e-03  1,000 tokens/s  MFU 12.3 %  3 min 4 s left"
    assert "MFU unknown" in progress_line(10, 100, 2048, {"loss": 3.21, "tokens_per_second": 1000.0})


def test_the_held_out_line_names_the_sources() -> None:
    logs = {"held_out/python/plain": 1.5, "held_out/python/psm_middle": 0.5, "held_out/group:code/plain": 1.25}
    assert held_out_line(4, logs) == "step 4  held-out nats/token  python 1.5000  group:code 1.2500"


def test_the_ledger_survives_a_checkpoint() -> None:
    ledger = Ledger(["a", "b"], ["plain", "psm"], torch.tensor([5, 0, 7, 1]), rows=2, skipped_steps=1, seconds=1.5)
    saved = json.loads(json.dumps(ledger.to_dict(sequence_tokens=8)))
    assert saved["tokens"] == {"a": {"plain": 5}, "b": {"plain": 7, "psm": 1}}
    assert (saved["document_tokens"], saved["padding"]) == (13, 3)
    other = Ledger(["a", "b"], ["plain", "psm"], torch.zeros(4, dtype=torch.int64))
    other.restore(saved)
    assert other.to_dict(8) == saved
