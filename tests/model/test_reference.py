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
from hanorec.run.files import UserError


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


def start(prepared, sft_run, dtype):
    """A policy whose largest logit is about 25, a batch of three pairs, and by how much their gaps may differ."""
    opened = Opened(prepared)
    packed = PackedMLLM(load_finished(sft_run, opened.encoding, dtype))
    examples = opened.examples("train")[:1]
    pairs = Pairs(opened.prompts(), examples, ("rank", "yes", "no"), 4096, pools(examples, 2, "data"))
    packed.eval()
    batch = pairs.batch([0, 1, 2], packed, opened.tokens)
    with torch.no_grad():
        logits = packed.packed_logits(batch.trees)
        packed.core.get_output_embeddings().weight.data *= 25 / float(logits.abs().max())
        logps = packed(batch.trees, tokens=True)
        batch.reference = batch.lay_out(packed(batch.trees))
    half_spread = float((logps.amax(1) - logps.amin(1)).max()) / 2
    assert 15 < half_spread < 30
    counts = batch.lay_out(batch.trees.answers.float())
    return packed, batch, 2**-8 * half_spread * (counts[0, 0] + counts[0, 1])


def test_the_start_may_differ_by_roundings_in_half_precision(prepared, sft_run):
    packed, batch, allowed = start(prepared, sft_run, torch.bfloat16)
    reference.check_start(packed, batch)
    own = batch.reference
    assert own[1:, 2].isnan().all()  # Yes/No pairs have one rejected answer
    assert 0.1 * 0.9 * allowed > 5e-2
    batch.reference = own + torch.tensor([0.9 * allowed, 0, 0]) * torch.tensor([[1.0], [0], [0]])
    reference.check_start(packed, batch)
    batch.reference = own + torch.tensor([1.1 * allowed, 0, 0]) * torch.tensor([[1.0], [0], [0]])
    with pytest.raises(UserError, match="policy and reference differ"):
        reference.check_start(packed, batch)


def test_a_sure_policy_whose_sums_are_rounded_in_another_order_is_accepted(prepared, sft_run):
    """Plain forwards stand for a GPU's other batches; on a CPU other packed batches give equal bits."""
    opened, (packed, _, _) = Opened(prepared), start(prepared, sft_run, torch.bfloat16)
    examples = opened.examples("train")[:8]
    pairs = Pairs(opened.prompts(), examples, ("rank",), 4096, pools(examples, 2, "data"))
    plain = PackedMLLM(packed.core, pack=False).eval()
    batch, rows = (pairs.batch(range(8), model, opened.tokens) for model in (packed, plain))
    with torch.no_grad():
        batch.reference = rows.lay_out(plain(rows.trees))
        log_ratios = batch.lay_out(packed(batch.trees)) - batch.reference
    assert 0.1 * (log_ratios[:, :1] - log_ratios[:, 1:]).abs().max() > reference.TOLERANCE
    reference.check_start(packed, batch)


def test_the_start_is_close_in_float32(prepared, sft_run):
    packed, batch, _ = start(prepared, sft_run, torch.float32)
    reference.check_start(packed, batch)
    own = batch.reference
    batch.reference = own + torch.tensor([2e-3, 0, 0])
    with pytest.raises(UserError, match=r"the reward gap is 2.0.e-04, not 0"):
        reference.check_start(packed, batch)
    batch.reference = own
    packed.core.get_output_embeddings().weight.data[0] = torch.nan
    with pytest.raises(UserError, match="the reward gap is nan, not 0"):
        reference.check_start(packed, batch)
