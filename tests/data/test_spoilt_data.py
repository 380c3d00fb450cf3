"""Data folders that were spoilt between the stages."""

import json
import shutil

import pytest
from conftest import ROOT
from forked import start
from safetensors.torch import load_file, save_file
from spoilt import SPOILT, changed, refused, set_, sign, spoil

import sft
from hanorec.data.folder import DataFolder
from hanorec.run.files import UserError

STAGED = ["items.jsonl", "train.jsonl", "val.jsonl", "sequences.jsonl", "manifest.json", "tiny/config.json"]
STAGED += ["encoded/tiny/manifest.json", "encoded/tiny/items.safetensors", "encoded/tiny/image_tokens.safetensors"]
STAGED += ["tiny/model.safetensors", "tiny/tokenizer.json", "tiny/tokenizer_config.json", "tiny/chat_template.jinja"]


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", STAGED)
def test_spoilt_data_folders(name, how, data, capsys):
    if (name, how) == ("tiny/tokenizer_config.json", "missing"):
        pytest.skip("tokenizer.json and the chat template are enough for transformers")
    spoil(data / name, how)
    argv = ["--data", data, "--out", data.parent / "sft", "--max-steps", 1, "--batch-size", 2, "--warmup-steps", 0]
    assert refused(capsys, sft.main, *argv)
    assert not (data.parent / "sft" / "config.json").exists()


TYPES = {  # file, change, a word of the error
    "a title that is a number": ("items.jsonl", set_(title=5), "'title' cannot be 5"),
    "an id that is a number": ("items.jsonl", set_(item=5), "'item' cannot be 5"),
    "an item that is a list": ("items.jsonl", lambda row: [1], "no JSON object"),
    "an item twice": ("items.jsonl", set_(item="101"), "an item twice"),
    "a string for a history": ("train.jsonl", set_(history="101"), "'history' cannot be"),
    "no history": ("train.jsonl", set_(history=[]), "an example has no history"),
    "numbers in a history": ("train.jsonl", set_(history=[101]), "101 is not in items.jsonl"),
    "lists in a history": ("train.jsonl", set_(history=[[]]), "[] is not in items.jsonl"),
    "an unknown id": ("train.jsonl", set_(target="nothing"), "'nothing' is not in items.jsonl"),
    "a user that is a number": ("train.jsonl", set_(user=1), "'user' cannot be 1"),
    "no user": ("train.jsonl", lambda row: {"history": []}, "no 'user'"),
    "a target that is no candidate": (
        "train.jsonl",
        lambda row: row | {"target": row["history"][0]},
        "lack the target",
    ),
    "a rejected target": ("train.jsonl", lambda row: row | {"rejected": row["target"]}, "rejected item is the target"),
    "a rejected item of the history": (
        "train.jsonl",
        lambda row: row | {"rejected": row["history"][0]},
        "the candidates lack the rejected item",
    ),
    "a candidate twice": (
        "train.jsonl",
        lambda row: row | {"candidates": [row["target"], *[row["rejected"]] * 9]},
        "have an item twice",
    ),
    "fewer candidates": ("val.jsonl", lambda row: row | {"candidates": [row["target"]]}, "several lengths"),
    "unknown items of a sequence": ("sequences.jsonl", set_(items=["nothing"]), "'nothing' is not in items.jsonl"),
    "options that are a list": ("manifest.json", set_(options=[]), "'options' cannot be []"),
    "files that are not listed": ("manifest.json", set_(files={}), "not what manifest.json lists"),
    "a backbone that is a number": ("encoded/tiny/manifest.json", set_(backbone=1), "'backbone' cannot be 1"),
    "a backbone that is not there": ("encoded/tiny/manifest.json", set_(backbone="no/such"), "check the name"),
    "pixels that are a string": ("encoded/tiny/manifest.json", set_(max_pixels="9"), "'max_pixels' cannot be"),
    "another model": ("tiny/config.json", set_(model_type="bert"), "cannot be loaded"),
    "a model that is a list": ("tiny/config.json", set_(text_config=[1]), "cannot be loaded"),
}


@pytest.mark.parametrize("name", TYPES)
def test_wrong_types_in_data_folders(name, data, capsys):
    file, change, expected = TYPES[name]
    changed(file, change)(data)
    argv = ["--data", data, "--out", data.parent / "sft", "--max-steps", 1, "--batch-size", 2, "--warmup-steps", 0]
    assert expected in refused(capsys, sft.main, *argv)


def test_what_stands_twice_is_refused(data):
    folder = DataFolder(data)
    shutil.copytree(data / "encoded" / "tiny", data / "encoded" / "copy")
    with pytest.raises(UserError, match=r"copy and .*/tiny are both of tiny; delete one"):
        folder.encodings()
    (data / "encoded" / "copy" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=f"encode again: prepare_data.py --encode-only --out {data}"):
        folder.encodings()
    first, *others = (data / "sequences.jsonl").read_text().splitlines(keepends=True)
    (data / "sequences.jsonl").write_text("".join([first, *others, first]))
    sign(data)
    with pytest.raises(UserError, match=f"sequences.jsonl has user {json.loads(first)['user']} twice"):
        DataFolder(data).sequences()


def test_tensors_of_other_items_are_refused(data, capsys):
    folder, argv = data / "encoded" / "tiny", ["--data", data, "--out", data.parent / "sft"]
    whole = load_file(folder / "items.safetensors")
    for change in (
        {"offsets": whole["offsets"].flip(0)},
        {"offsets": whole["offsets"].double()},
        {"offsets": whole["offsets"][1:]},
        {"offsets": whole["offsets"] + whole["offsets"].eq(whole["offsets"][-1]) * 3},
        {"text": whole["text"][1:]},
        {"grid": whole["grid"][:, :2]},
    ):
        save_file({name: x.contiguous() for name, x in (whole | change).items()}, folder / "items.safetensors")
        assert "encode the data again" in refused(capsys, sft.main, *argv)


def test_the_fuzzer_runs(tmp_path):
    """A hundred of its inputs: a call that has changed would be a finding."""
    process = start(ROOT / "tests" / "fuzz.py", "--inputs", 100, log=tmp_path / "log")
    process.join(120)
    output = (tmp_path / "log").read_text()
    assert process.exitcode == 0 and "100 inputs" in output and " 0 findings" in output, output[-3000:]
