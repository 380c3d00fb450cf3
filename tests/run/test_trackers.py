"""Trackers for real: trackio's local database, and TensorBoard's one folder. Their packages are for development."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT
from layouts import lines

STEPS = "--max-steps 6 --batch-size 8 --eval-limit 4 --warmup-steps 3".split()


def train(prepared, out, tracker, **variables):
    """Run sft.py with this tracker in a process of its own. Returns the logged lines of its metrics.jsonl."""
    command = [sys.executable, "sft.py", "--data", prepared, "--out", out, *STEPS, "--report-to", tracker]
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    subprocess.run([*map(str, command), "--overwrite"], check=True, cwd=ROOT, env=environment, capture_output=True)
    return lines(out / "metrics.jsonl")


def test_trackio_gets_every_logged_number_under_the_runs_name(prepared, tmp_path):
    pytest.importorskip("trackio")
    logged = train(prepared, tmp_path / "sft", "trackio", TRACKIO_DIR=tmp_path / "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "hanorec.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {str(tmp_path / "sft")}
    found = [{"step": step} | json.loads(metrics) for _, step, metrics in rows]
    assert found == logged and {"loss", "val_select"} <= {name for line in found for name in line}


def test_tensorboard_writes_one_folder_also_when_the_run_is_replaced(prepared, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        logged = train(prepared, tmp_path / "sft", "tensorboard")
        (file,) = (tmp_path / "sft" / "tensorboard").rglob("*")
        events = EventAccumulator(str(file)).Reload()
        losses = [(event.step, event.value) for event in events.Scalars("loss")]
        expected = [(line["step"], line["loss"]) for line in logged if "loss" in line]
        assert losses == [(step, pytest.approx(loss)) for step, loss in expected]
        assert not [path for path in (tmp_path / "sft").iterdir() if path.is_dir() and path.name == "hanorec"]
