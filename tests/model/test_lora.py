"""The layers of hanorec.model.lora compared with PEFT's own."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from hanorec.model import lora


def layer(dropout=0.0, bias=True, dtype=torch.float32):
    """A PEFT model of one linear layer, 24 -> 16, whose LoRA is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=bias)).to(dtype)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def two_adapters(dropout=0.0):
    """The model of `layer` with a frozen adapter of rank 2 below the trained one."""
    torch.manual_seed(1)
    model = layer(dropout)
    model.add_adapter(lora.FROZEN, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and f".{lora.FROZEN}." not in name)
    model.base_model.model[0]._active_adapter = [lora.FROZEN, lora.TRAINED]
    return model


def outcome(model, x, signs):
    """Output, gradient of the input, and gradients of the trainable weights."""
    x = x.clone().requires_grad_(True)
    out = model(x)
    (out * signs).sum().backward()
    return [out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("bias", [True, False])
def test_lean_layer_equals_pefts_layer(bias):
    own, lean = layer(bias=bias), lora.lean(layer(bias=bias))
    assert type(lean.base_model.model[0]) is lora.LeanLinear and type(own.base_model.model[0]) is Linear
    x, signs = torch.randn(2, 5, 24), torch.randn(2, 5, 16)
    for one, other in zip(outcome(own, x, signs), outcome(lean, x, signs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_two_adapters_equal_pefts(training, monkeypatch):
    own, lean = two_adapters().train(training), lora.lean(two_adapters(dropout=0.0 if training else 0.5))
    lean.train(training)
    x, signs = torch.randn(2, 5, 24), torch.randn(2, 5, 16)
    expected = outcome(own, x, signs)
    monkeypatch.setattr(Linear, "forward", None)  # LoRASum computes both
    for one, other in zip(outcome(lean, x, signs), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(expected) == 4  # the frozen adapter has no gradient


def test_half_precision_is_as_good_as_autocast():
    """Compare with PEFT's layer in float64."""
    x, signs = torch.randn(64, 24).bfloat16(), torch.randn(64, 16).bfloat16()
    exact = outcome(layer(dtype=torch.bfloat16).double(), x.double(), signs.double())
    lean = lora.lean(layer(dtype=torch.bfloat16))
    assert all(p.dtype == torch.float32 for p in lean.parameters() if p.requires_grad)
    for one, other in zip(outcome(lean, x, signs), exact, strict=True):
        assert float(((one.double() - other).norm() / other.norm()).detach()) < 1e-2


@pytest.mark.parametrize("make", [layer, two_adapters])
def test_dropout_has_its_probability_and_the_right_gradient(make):
    lean = lora.lean(make(dropout=0.25)).double()
    x = torch.randn(6, 24, dtype=torch.float64, requires_grad=True)
    weights = [p for p in lean.parameters() if p.requires_grad]

    def run(x, *weights):
        torch.manual_seed(3)  # the same mask each time
        return lean(x)

    assert torch.autograd.gradcheck(run, (x, *weights))
    plain = lean.base_model.model[0].base_layer  # without the part of the frozen adapter, which has no dropout
    many = torch.stack([lean(x.detach()) - plain(x.detach()) for _ in range(4000)])
    expected = lean.eval()(x.detach()) - plain(x.detach())
    error = (many.mean(0) - expected).abs() / (many.std(0) / 4000**0.5)
    assert float(many.std()) > 1e-2 and float(error.max()) < 5  # the largest of 96 errors, in standard errors
    mask = lora.keep_mask(torch.empty(100_003), 0.05)
    assert abs(float(mask.float().mean()) - 0.95) < 0.003  # four standard errors


def test_unsupported_settings_are_left_to_peft():
    """LoRA with its own biases, a base layer that is trained, two trained adapters."""
    both = lora.lean(two_adapters())
    for name, parameter in both.named_parameters():
        parameter.requires_grad_("lora_" in name)
    assert len(outcome(both, torch.randn(5, 24), torch.ones(5, 16))) == 6
    x, outcomes = torch.randn(5, 24), []
    for wrap in (lambda model: model, lora.lean):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["0"], lora_bias=True, bias="all")
        model = wrap(get_peft_model(nn.Sequential(nn.Linear(24, 16)), config))
        nn.init.ones_(model.base_model.model[0].lora_B["default"].bias)
        outcomes.append(outcome(model, x, torch.ones(5, 16)))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other)


def test_adapters_off_merged_or_saved_are_pefts(tmp_path):
    model, x = lora.lean(layer()), torch.randn(3, 24)
    base = model.base_model.model[0].base_layer(x)
    out = model(x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base)
    assert (out - base).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), out, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_a_linear_layer_directly_under_the_language_model_is_a_target():
    class Core(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.ModuleDict({"proj_in": nn.Linear(4, 4), "block": nn.ModuleDict({"up": nn.Linear(4, 4)})})
            self.vision = nn.ModuleDict({"up": nn.Linear(4, 4)})

        def get_decoder(self):
            return self.decoder

    targets = lora.lora_targets(Core())
    names = [name for name, _ in Core().named_modules() if re.fullmatch(targets, name)]
    assert names == ["decoder.proj_in", "decoder.block.up"]
