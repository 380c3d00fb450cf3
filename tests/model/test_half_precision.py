"""DPO in bfloat16: it starts from the model that SFT ended with, because SFT's adapter stays apart below DPO's."""

import contextlib
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import Opened, words
from layouts import lines
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from soak import left
from stages import small_sft, training

import dpo_hano
import evaluate
from hanorec import export
from hanorec.model.finished import load_finished
from hanorec.model.load import load_model
from hanorec.model.lora import FROZEN, TRAINED, LeanLinear, add_lora, load_adapter, without_trained_adapter
from hanorec.model.packing import PackedMLLM
from hanorec_loss import noisy_lora

STEPS = "--max-steps 4 --batch-size 6 --grad-accum 1 --eval-limit 4 --dtype bfloat16 --lr 1e-2".split()


@pytest.fixture(scope="module")
def sft_half(prepared, tmp_path_factory):
    """An SFT run with LoRA in bfloat16, which has learned as little as SFT with the default learning rate does."""
    options = "--tune lora --dtype bfloat16 --lr 1e-4 --max-steps 30 --batch-size 8 --eval-limit 4"
    return small_sft(prepared, tmp_path_factory.mktemp("half") / "sft", options)


@pytest.fixture(scope="module")
def dpo_half(sft_half):
    out = sft_half.parent / "dpo"
    dpo_hano.main(words("--sft", sft_half, "--out", out, *STEPS))
    return out


def test_eta_is_1_before_anything_is_learned(dpo_half):
    """The gaps of the first step are roundings. Later steps have gaps, so eta is not always 1."""
    etas = [line["eta"] for line in training(dpo_half / "metrics.jsonl")]
    assert etas[0] == 1 and any(eta != 1 for eta in etas[1:])


def policy(run, encoding, dtype="bfloat16"):
    """The model that dpo_hano.py trains, before its first step."""
    options = SimpleNamespace(sft=run, dtype=dtype, attn="sdpa", quantize=None, no_pack=False, seed=0)
    vars(options).update(lora_rank=8, lora_alpha=32, lora_dropout=0.0, gradient_checkpointing=False)
    return dpo_hano.load_policy(options, encoding, Accelerator(cpu=True)).eval()


def scores(packed, opened):
    """The log-probabilities of every candidate of a few examples, without gradients."""
    prompts = opened.prompts()
    trees = [prompts.ranking_tree(example, example.candidates) for example in opened.examples("test", 4)]
    with torch.no_grad():
        return packed(packed.collate(trees, opened.tokens))


def layers(packed):
    return {name: module for name, module in packed.named_modules() if isinstance(module, Linear)}


def test_dpo_starts_from_the_model_that_sft_ended_with(prepared, sft_half):
    opened = Opened(prepared)
    evaluated = scores(PackedMLLM(load_finished(sft_half, opened.encoding, torch.bfloat16)), opened)
    packed = policy(sft_half, opened.encoding)
    assert torch.equal(scores(packed, opened), evaluated)
    with without_trained_adapter(packed.model):  # the reference
        assert torch.equal(scores(packed, opened), evaluated)
    merged = PackedMLLM(load_finished(sft_half, opened.encoding).to(torch.bfloat16))
    assert (scores(merged, opened) - evaluated).abs().max() > 1e-3
    # What merging into bfloat16 loses of SFT's change
    lost, learned = 0.0, 0.0
    for layer in layers(packed).values():
        assert type(layer) is LeanLinear and layer.active_adapters == [FROZEN, TRAINED]
        weight, delta = layer.base_layer.weight.double(), layer.get_delta_weight(FROZEN).double()
        lost += float(((weight + delta).bfloat16().double() - weight - delta).square().sum())
        learned += float(delta.square().sum())
    assert (lost / learned) ** 0.5 > 0.05


def test_the_positions_of_a_finished_run_are_not_rounded(prepared, sft_run, sft_half, dpo_half):
    """The frequencies of the positions are in float32 in a model that is loaded in bfloat16."""
    opened = Opened(prepared)
    expected = dict(load_model(prepared / "tiny", torch.bfloat16).named_buffers())
    assert {buffer.dtype for buffer in expected.values()} == {torch.float32}
    for run in (sft_run, sft_half, dpo_half):
        core = PackedMLLM(load_finished(run, opened.encoding, torch.bfloat16)).core
        assert core.dtype == torch.bfloat16
        torch.testing.assert_close(dict(core.named_buffers()), expected, atol=0, rtol=0)
    core = policy(sft_run, opened.encoding).core  # after full tuning
    torch.testing.assert_close(dict(core.named_buffers()), expected, atol=0, rtol=0)


def test_in_float32_sfts_adapter_is_merged(prepared, sft_half):
    model = policy(sft_half, Opened(prepared).encoding, "float32").model
    assert list(model.peft_config) == [TRAINED]


def gradients(packed, opened, kind):
    """The gradients of DPO's adapter with layers of this class."""
    for layer in layers(packed).values():
        layer.__class__ = kind
    prompts = opened.prompts()
    trees = [prompts.pair_tree(example, "rank") for example in opened.examples("train", 3)]
    logps = packed(packed.collate(trees, opened.tokens)).view(-1, 2)
    (logps[:, 1] - logps[:, 0]).sum().backward()
    found = {name: p.grad.clone() for name, p in packed.named_parameters() if p.requires_grad}
    packed.zero_grad()
    assert found and all(f".{TRAINED}." in name for name in found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_are_those_of_pefts_two_adapters(prepared, sft_half, dtype):
    opened = Opened(prepared)
    model = load_adapter(load_model(prepared / "tiny", dtype), sft_half / "adapter", merge=False, name=FROZEN)
    packed = PackedMLLM(add_lora(model, 8, 32, 0.0, 1))
    torch.manual_seed(0)
    for name, parameter in packed.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # both adapters matter
    own, pefts = gradients(packed, opened, LeanLinear), gradients(packed, opened, Linear)
    assert any("lora_B" in name for name in own)
    for name, gradient in own.items():
        error = float((gradient - pefts[name]).norm() / pefts[name].norm())
        assert error < (1e-5 if dtype == torch.float32 else 0.1), name


def test_the_noise_is_put_on_dpos_adapter_alone(prepared, sft_half):
    packed = policy(sft_half, Opened(prepared).encoding)
    before = {name: parameter.detach().clone() for name, parameter in packed.named_parameters()}
    with noisy_lora(packed, 0.5, relative=False, generator=torch.Generator().manual_seed(0)):
        changed = {name for name, p in packed.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name and f".{TRAINED}." in name}
    assert any(f".{FROZEN}." in name for name in before)


def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(sft_half, dpo_half, tmp_path, monkeypatch):
    def step_with_signal(step, *args):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(step, *args)

    take_step, out = dpo_hano.take_step, tmp_path / "dpo"
    argv = words("--sft", sft_half, "--out", out, *STEPS)
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(dpo_hano, "take_step", step_with_signal)
        dpo_hano.main(argv)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    dpo_hano.main(argv)
    assert left(out) == left(dpo_half)
    assert training(out / "metrics.jsonl")[-1]["step"] == 4


def test_the_evaluated_and_the_exported_model_are_the_trained_one(prepared, sft_half, dpo_half, tmp_path):
    opened = Opened(prepared)
    trained = policy(sft_half, opened.encoding)
    start = scores(trained, opened)
    saved = load_file(dpo_half / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name.replace(f".{TRAINED}.", ".")])
    expected = scores(trained, opened)
    assert not torch.allclose(expected, start, atol=0.1)
    assert torch.equal(scores(PackedMLLM(load_finished(dpo_half, opened.encoding, torch.bfloat16)), opened), expected)
    shutil.copytree(dpo_half, tmp_path / "run")
    evaluate.main(words("--run", tmp_path / "run", "--dtype", "bfloat16"))
    predicted = [line["scores"] for line in lines(tmp_path / "run" / "predictions.jsonl")[:4]]
    torch.testing.assert_close(torch.tensor(predicted).flatten(), expected, atol=0.05, rtol=0)

    export.main(words("--run", dpo_half, "--to", tmp_path / "export"))
    weights = load_model(tmp_path / "export" / "merged").state_dict()
    backbone = load_model(prepared / "tiny").state_dict()
    for name, layer in layers(trained).items():
        key = name.removeprefix("model.base_model.model.") + ".weight"
        delta = layer.get_delta_weight(FROZEN) + layer.get_delta_weight(TRAINED)
        torch.testing.assert_close(weights[key], backbone[key] + delta, atol=1e-6, rtol=0)  # in float32
