"""LoRA: adapters on the language model, DPO's reference, and LoRA's layers in fewer passes over memory.

With a rank of 8, LoRA's arithmetic is nothing beside that of the frozen layer, but PEFT writes the layer's whole output
three times more (LoRA's part, scaled, added), in float32 if the base is in half precision, and so again in backward.
Here LoRA's part is added to the output in place by one matrix product, the scaling is applied at rank width, and
dropout draws 16 bits an element. In half precision LoRA's products are computed in the base's dtype, as under autocast;
the weights, their gradients and the optimizer stay in float32. Weights and files are PEFT's.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable

from hanorec.model import families
from hanorec.model.load import loading

TRAINED = "default"  # the adapter in training; PEFT writes the one of this name to the folder itself
FROZEN = "sft"  # the SFT adapter on a quantized base, into which it cannot be merged without rounding

# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def lora_targets(model) -> str:
    """A regular expression for the language model's linear layers. Suffix lists and peft's `all-linear` also match the
    vision tower."""
    decoder = families.decoder_name(model)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{decoder}.")]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    return rf"{re.escape(decoder)}\..*\.({'|'.join(leaves)})"


def add_lora(model, rank: int, alpha: int, dropout: float, seed: int):
    """Put a fresh, trainable LoRA on every linear layer of the language model. Its draw depends on seed alone.

    An adapter that the model has already stays, frozen and active.
    """
    first = model.peft_config.get(FROZEN) if isinstance(model, PeftModel) else None
    targets = first.target_modules if first else lora_targets(model)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not first:
            return lean(get_peft_model(model, config))
        model.add_adapter(TRAINED, config)
    for module in model.modules():
        if FROZEN in getattr(module, "lora_dropout", {}):
            module.lora_dropout[FROZEN] = nn.Identity()  # it is part of the base now, and of the reference
    return activate(model)


def load_adapter(model, folder: str | Path, merge: bool = True, name: str = TRAINED):
    """Load a LoRA adapter: merged into the model's weights (in their dtype), or beside them and earlier adapters."""
    with loading(folder, "is no adapter of this backbone"):
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name)
            model = activate(model)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    model = model.requires_grad_(False).eval()
    return model.merge_and_unload() if merge else model


def activate(model):
    """Let all adapters of a PeftModel add up, with only the one in training trainable."""
    model.base_model.set_adapter(list(model.peft_config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and f".{FROZEN}." not in name)
    return model


@contextlib.contextmanager
def without_trained_adapter(model) -> Iterator[None]:
    """Inside, a PeftModel computes without the adapter in training: it is DPO's reference."""
    if FROZEN not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.base_model.set_adapter([FROZEN])
    try:
        yield
    finally:
        activate(model)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def keep_mask(x: torch.Tensor, probability: float) -> torch.Tensor | None:
    """A mask like x, False with this probability (rounded to 1/65536); None for probability 0."""
    if not probability:
        return None
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    threshold = round(probability * 65536) - 32768
    return (bits.view(torch.int16)[: x.numel()] >= threshold).view_as(x)


class LoRASum(torch.autograd.Function):
    """x W' + bias + scaling (x * keep) A' B', with x [T, in], A [r, in], B [out, r]; W and bias are frozen."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling, keep):
        dropped = x if keep is None else x * keep.to(x.dtype)
        narrow = dropped @ A.to(x.dtype).T
        ctx.save_for_backward(x, weight, A, B, narrow, keep)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(narrow, B.to(x.dtype).T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, A, B, narrow, keep = ctx.saved_tensors
        keep = None if keep is None else keep.to(x.dtype)
        narrow_grad = (grad @ B.to(x.dtype)) * ctx.scaling
        A_grad = narrow_grad.T @ (x if keep is None else x * keep)
        B_grad = (grad.T @ narrow) * ctx.scaling
        x_grad = None
        if ctx.needs_input_grad[0] and keep is None:
            x_grad = (grad @ weight).addmm_(narrow_grad, A.to(x.dtype))
        elif ctx.needs_input_grad[0]:
            x_grad = (grad @ weight).addcmul_(narrow_grad @ A.to(x.dtype), keep)
        return x_grad, None, None, A_grad.to(A.dtype), B_grad.to(B.dtype), None, None


class LeanLinear(Linear):
    """PEFT's LoRA layer, computed by `LoRASum` if one plain adapter is active on a frozen, plain linear layer."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        unusual = self.disable_adapters or self.merged or self.lora_variant or torch.is_autocast_enabled(x.device.type)
        frozen = type(self.base_layer) is nn.Linear and not any(p.requires_grad for p in self.base_layer.parameters())
        if unusual or not frozen or len(active) != 1 or args or kwargs:
            return super().forward(x, *args, **kwargs)
        A, B, dropout = (part[active[0]] for part in (self.lora_A, self.lora_B, self.lora_dropout))
        probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        if B.bias is not None or probability > 0.99 or not x.numel():
            return super().forward(x, *args, **kwargs)
        flat, scaling = x.flatten(0, -2), self.scaling[active[0]] / (1 - round(probability * 65536) / 65536)
        base = self.base_layer
        out = LoRASum.apply(flat, base.weight, base.bias, A.weight, B.weight, scaling, keep_mask(flat, probability))
        return out.view(*x.shape[:-1], -1)


def lean(model):
    """Let the LoRA layers of a PeftModel be computed by `LeanLinear`. Returns the model."""
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = LeanLinear
    return model
