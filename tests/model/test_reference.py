"""The reference's log-probabilities in their file."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import Opened

from hanorec.model import reference
from hanorec.model.finished import load_finished
from hanorec.model.lora import add_lora
from hanorec.model.packing import PackedMLLM
from hanorec.model.pairs import Pairs, pools


def logps_of(opened, sft_run, folder, main=True):
    """Return what `reference_logps` returns of six pairs, whose file is in folder/reference."""
    packed = PackedMLLM(add_lora(load_finished(sft_run, opened.encoding), 4, 8, 0.0, 0))
    examples = opened.examples("train")[:2]
    pairs = Pairs(opened.prompts(), examples, ("rank", "yes", "no"), 4096, pools(examples, 1, "data"))
    options = SimpleNamespace(sft=folder, quantize=None)
    accelerator = SimpleNamespace(
        is_main_process=main,
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        wait_for_everyone=lambda: None,
    )
    numbers = list(range(len(pairs)))
    return reference.reference_logps(packed, opened.encoding, pairs, numbers, {}, options, accelerator)


def files(folder):
    return sorted((folder / "reference").iterdir())


@pytest.mark.parametrize("changed", ["tiny/model.safetensors", "an image"])
def test_other_weights_of_the_backbone_and_other_pictures_get_another_file(prepared, data, sft_run, tmp_path, changed):
    shutil.copytree(prepared.parent / "raw", data.parent / "raw")
    opened = Opened(data, images="live" if changed == "an image" else None)
    first = logps_of(opened, sft_run, tmp_path)
    again = logps_of(opened, sft_run, tmp_path)
    assert torch.equal(first, again) and len(files(tmp_path)) == 1
    path = data / (changed if changed != "an image" else next(filter(None, opened.items.images)))
    os.utime(path, (1, 1))
    logps_of(opened, sft_run, tmp_path)
    assert len(files(tmp_path)) == 2


def test_the_main_process_decides_whether_there_is_a_file(prepared, sft_run, tmp_path, monkeypatch):
    """The others take its values, whatever their disk shows; without a file all of them compute."""
    opened = Opened(prepared)
    expected = logps_of(opened, sft_run, tmp_path)
    sent = []
    monkeypatch.setattr(reference, "broadcast_object_list", lambda values: sent.append(list(values)) or values)
    logps_of(opened, sft_run, tmp_path)
    assert torch.equal(sent[0][0], expected)
    scored = []
    score = reference.score_pairs
    monkeypatch.setattr(reference, "score_pairs", lambda *args: scored.append(1) or score(*args))
    for here in (tmp_path, tmp_path / "late"):  # this process sees the file, or does not see it yet
        monkeypatch.setattr(reference, "broadcast_object_list", lambda values: [expected + 1])
        assert torch.equal(logps_of(opened, sft_run, here, main=False), expected + 1) and not scored
        monkeypatch.setattr(reference, "broadcast_object_list", lambda values: [None])
        assert torch.equal(logps_of(opened, sft_run, here, main=False), expected) and scored.pop()
    assert not (tmp_path / "late").exists()
