"""Spoilt run folders are refused."""

import json
import shutil

import pytest
from spoilt import SPOILT, refused, spoil

import evaluate
from hanorec.run.runs import RUN_OPTIONS

RUN_FILES = ["config.json", "result.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"]


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", [*RUN_FILES, "model/model.safetensors", "model/config.json"])
def test_spoilt_run_folders(name, how, sft_run, lora_run, tmp_path, capsys):
    evaluated = shutil.ignore_patterns("*metrics.json", "*predictions.jsonl")  # files that other tests wrote
    shutil.copytree(sft_run if name.startswith("model") else lora_run, tmp_path / "run", ignore=evaluated)
    spoil(tmp_path / "run" / name, how)
    error = refused(capsys, evaluate.main, "--run", tmp_path / "run", "--limit", 2)
    assert str(tmp_path / "run") in error and not list((tmp_path / "run").glob("*metrics.json"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"options": []}, "'options' cannot be []"),
        ({"stage": ["sft"]}, "is no run of"),
        ({"data": 5}, "'data' cannot be 5"),
        ({"data": "other"}, "was trained on"),
        ({"tasks": "rank"}, "'tasks' cannot be"),
        ({"tasks": []}, "unknown tasks"),
        ({"tasks": [["rank"]]}, "unknown tasks"),
        ({"lora_rank": "8"}, "'lora_rank' cannot be"),
        ({"max_length": None}, "'max_length' cannot be null"),
        ({"tune": None}, "'tune' cannot be null"),
    ],
)
def test_wrong_types_in_a_runs_config(change, expected, lora_run, tmp_path, capsys):
    shutil.copytree(lora_run, tmp_path / "run")
    config = json.loads((lora_run / "config.json").read_text())
    options = set(RUN_OPTIONS) - {"data"} | {"tune"}  # "data" is also a field beside the options
    fields = config["options"] if set(change) < options else config
    fields.update(change)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert expected in refused(capsys, evaluate.main, "--run", tmp_path / "run", "--limit", 2)
