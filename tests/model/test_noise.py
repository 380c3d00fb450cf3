"""The perturbations of training, and the measurement of what they do."""

import contextlib

import pytest
import torch
from conftest import Opened

from hanorec.model import noise
from hanorec.model.finished import load_finished
from hanorec.model.lora import add_lora
from hanorec.model.packing import PackedMLLM
from hanorec.model.pairs import Pairs, pools


@pytest.fixture
def policy(prepared, sft_run):
    """A policy whose LoRA is not zero, and a batch of pairs."""
    opened = Opened(prepared)
    packed = PackedMLLM(add_lora(load_finished(sft_run, opened.encoding), 4, 8, 0.0, 0))
    for name, weight in packed.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    examples = opened.examples("train")
    pairs = Pairs(opened.prompts(), examples, ("rank", "yes", "no"), 4096, pools(examples, 2, "data"))
    reference = torch.zeros(len(pairs), 3)
    return packed, pairs.batch([0, 1, 2, 3], packed, opened.tokens, reference, torch.ones(len(pairs), 2))


def test_noise_on_embeddings_has_its_size_and_ends_with_the_block(policy):
    packed, batch = policy
    seen = []
    hook = packed.core.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    with torch.no_grad():
        clean = packed(batch.trees)
        hook.remove()
        with noise.noisy_embeddings(packed, 0.2, torch.Generator().manual_seed(0)):
            hook = packed.core.get_decoder().register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
            )
            noisy = packed(batch.trees)
            hook.remove()
        assert torch.equal(packed(batch.trees), clean)
    assert not torch.equal(noisy, clean)
    added = seen[1] - seen[0]
    assert float(added.square().mean().sqrt() / seen[0].square().mean().sqrt()) == pytest.approx(0.2, rel=0.02)
    assert float(added.abs().max() / added.square().mean().sqrt()) == pytest.approx(3**0.5, rel=0.01)  # uniform


def test_the_effect_of_noise_by_hand(policy):
    """KL and margins from the whole distributions of two forwards."""
    packed, batch = policy

    @contextlib.contextmanager
    def shifted():
        weight = next(p for name, p in packed.named_parameters() if "lora_B" in name)
        weight.data += 0.5
        yield
        weight.data -= 0.5

    found = noise.noise_effect(packed, batch, shifted())
    packed.eval()
    with torch.no_grad():
        with shifted():
            q, noisy = packed(batch.trees, tokens=True).double(), batch.lay_out(packed(batch.trees))
        p, clean = packed(batch.trees, tokens=True).double(), batch.lay_out(packed(batch.trees))
    expected = sum(float((row.exp() * (row - other)).sum()) for row, other in zip(q, p, strict=True)) / len(q)
    assert float(found["noise_kl"]) == pytest.approx(expected, rel=1e-3) and expected > 1e-3
    for name, table in (("noisy", noisy), ("clean", clean)):
        gaps = [float(row[0] - value) for row in table for value in row[1:] if not value.isnan()]
        assert len(gaps) == 2 * 2 + 2 * 1
        size = sum(map(abs, gaps)) / len(gaps)
        assert float(found[f"{name}_margin_size"]) == pytest.approx(size, rel=1e-4)


def test_whole_distributions_agree_with_the_answers(policy):
    packed, batch = policy
    with torch.no_grad():
        logps, answers = packed(batch.trees, tokens=True), packed(batch.trees)
    torch.testing.assert_close(logps.exp().sum(1), torch.ones(len(logps)))
    own = logps.gather(1, batch.trees.target[:, None])[:, 0]
    for number in range(len(answers)):
        torch.testing.assert_close(own[batch.trees.answer == number].sum(), answers[number])
