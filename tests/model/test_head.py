"""The output head of a model in half precision."""

import contextlib

import pytest
import torch
from conftest import Opened

from hanorec.model import head, packing
from hanorec.model.finished import load_finished
from hanorec.model.packing import PackedMLLM


class Core(torch.nn.Module):
    """A model that is only a head."""

    def __init__(self, dtype, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(32, 50, bias=bias, dtype=dtype).requires_grad_(False)

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("bias", [False, True])
def test_logits_and_gradients_are_those_of_a_float32_head(monkeypatch, bias):
    monkeypatch.setattr(head, "CHUNK", 16)
    core = Core(torch.bfloat16, bias)
    hidden = torch.randn(2, 7, 32, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    mine, wide = hidden.clone().requires_grad_(), hidden.float().requires_grad_()
    with head.float32_logits(core):
        logits = core.head(mine)
    expected = torch.nn.functional.linear(wide, core.head.weight.float(), core.head.bias.float() if bias else None)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, wide.grad.bfloat16())
    assert core.head(hidden).dtype == torch.bfloat16  # outside the block it is the old head


def test_float32_and_trained_heads_are_left_alone():
    for core in (Core(torch.float32), Core(torch.bfloat16)):
        core.head.requires_grad_(core.head.weight.dtype == torch.bfloat16)
        with head.float32_logits(core):
            assert "forward" not in vars(core.head)


def test_autocast_rounds_no_logits_in_validation():
    """A model that is trained whole has a float32 head under autocast. Training's own logits are autocast's."""
    core = Core(torch.float32, bias=True)
    core.head.requires_grad_()
    hidden = torch.randn(2, 7, 32, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    expected = core.head(hidden.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad(), head.float32_logits(core):
            assert torch.equal(core.head(hidden), expected)
        with head.float32_logits(core):
            assert core.head(hidden).dtype == torch.bfloat16


@pytest.mark.parametrize("pack", [True, False])
def test_answers_in_half_precision_are_not_rounded(prepared, sft_run, pack, monkeypatch):
    """The log-probabilities are those of a float32 head on the same hidden states; with rounded logits they are not."""
    opened = Opened(prepared)
    packed = PackedMLLM(load_finished(sft_run, opened.encoding, torch.bfloat16), pack)
    output = packed.core.get_output_embeddings()
    output.weight.data *= 8  # as sure as a trained model
    prompts, examples = opened.prompts(), opened.examples("test")[:2]
    batch = packed.collate([prompts.evaluation_tree(example, "yesno") for example in examples], opened.tokens)

    def rounding() -> float:
        """The largest difference to a float32 head."""
        with torch.no_grad(), monkeypatch.context() as patch:
            logps = packed(batch)
            patch.setattr(output, "forward", lambda x: x.float() @ output.weight.float().T)
            patch.setattr(packing, "float32_logits", lambda core: contextlib.nullcontext())
            return float((packed(batch) - logps).abs().max())

    assert rounding() < 1e-4
    monkeypatch.setattr(packing, "float32_logits", lambda core: contextlib.nullcontext())
    assert rounding() > 1e-2
