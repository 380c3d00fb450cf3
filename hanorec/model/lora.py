"""LoRA: adapters on the language model, DPO's reference, and LoRA layers with fewer passes over memory.

At rank 8, LoRA's arithmetic is small beside the frozen layer's. But PEFT writes three more tensors of the size of the
layer's output (LoRA's part, the scaled part, the sum), in float32 even if the base is in half precision, and again in
backward. `LoRASum` adds LoRA's part to the output in place, by one matrix product. It scales the narrow product
[T, r], and draws 16 random bits for each element of dropout's mask. In half precision it computes LoRA's products in
the base's dtype, as autocast does. The weights of LoRA, their gradients and the optimizer stay in float32. The names of
weights and the files are PEFT's.

In half precision and on a quantized base, SFT's adapter stays apart below DPO's, frozen: the base's weights are too
coarse to take it in.
"""

import contextlib
import itertools
import math
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

TRAINED = "default"  # the adapter in training; PEFT saves this name without a subfolder
FROZEN = "sft"  # the SFT adapter below DPO's; merging it into a base that is not in float32 would round it
LEVELS = 1 << 16  # dropout compares 16 random bits with a threshold, so probabilities are multiples of 1 / 65536
MAX_DROPOUT = 0.99  # above it PEFT's layer computes; at 1, the scaling in `LeanLinear` would divide by zero

# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def lora_targets(model) -> str:
    """Return a regular expression for the names of the language model's linear layers.

    A list of suffixes, or peft's `all-linear`, would match layers of the vision tower too.
    """
    decoder = model.get_decoder().named_modules()
    last_words = sorted({name.split(".")[-1] for name, module in decoder if isinstance(module, nn.Linear)})
    return rf"{re.escape(families.decoder_name(model))}\.(.*\.)?({'|'.join(last_words)})"


def add_lora(model, rank: int, alpha: int, dropout: float, seed: int):
    """Put a new trainable LoRA on every linear layer of the language model. Returns the PeftModel.

    A FROZEN adapter that the model has already stays, frozen and active.

    Args:
        seed: the only source of the new weights' random numbers.
    """
    frozen = model.peft_config.get(FROZEN) if isinstance(model, PeftModel) else None
    targets = frozen.target_modules if frozen else lora_targets(model)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not frozen:
            return lean(get_peft_model(model, config))
        model.add_adapter(TRAINED, config)
    for module in model.modules():
        if FROZEN in getattr(module, "lora_dropout", {}):
            module.lora_dropout[FROZEN] = nn.Identity()  # a frozen adapter belongs to the base, which has no dropout
    return lean(activate(model))


def load_adapter(model, folder: str | Path, merge: bool = True, name: str = TRAINED):
    """Load a LoRA adapter, frozen. Returns the model.

    Args:
        merge: add the adapter to the model's weights, in their dtype. False keeps it as an adapter of a PeftModel.
        name: the adapter's name, if it is kept.
    """
    with loading(folder, "is not an adapter of this backbone"):
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name)
            model = activate(model)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    model = model.requires_grad_(False).eval()
    return model.merge_and_unload() if merge else model


def activate(model):
    """Make all adapters of a PeftModel active, and all except FROZEN trainable. Returns the model."""
    model.base_model.set_adapter(list(model.peft_config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and f".{FROZEN}." not in name)
    return model


@contextlib.contextmanager
def without_trained_adapter(model) -> Iterator[None]:
    """Switch the adapter in training off inside the `with` block: the model is then DPO's reference."""
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
    """Draw dropout's mask: like x, False with this probability (rounded to 1 / LEVELS). None for probability 0."""
    if not probability:
        return None
    # Each 64-bit number gives four 16-bit numbers, from -LEVELS / 2 to LEVELS / 2 - 1
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    threshold = round(probability * LEVELS) - LEVELS // 2
    return (bits.view(torch.int16)[: x.numel()] >= threshold).view_as(x)


class LoRASum(torch.autograd.Function):
    """Computes x W.T + bias + scaling (x * keep) A.T B.T, a tensor [T, out].

    The shapes: x and keep [T, in], W [out, in], bias [out], A [r, in], B [out, r]. keep may be None. `below` may be
    A, B and scaling of a further adapter, whose part is added too. It is frozen like W and bias: these get no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling, keep, *below):
        dropped = x if keep is None else x * keep.to(x.dtype)
        narrow = dropped @ A.to(x.dtype).T
        ctx.save_for_backward(x, weight, A, B, narrow, keep, *below[:2])
        ctx.scaling, ctx.scaling_below = scaling, below[2:]
        out = F.linear(x, weight, bias)
        if below:
            out.addmm_(x @ below[0].to(x.dtype).T, below[1].to(x.dtype).T, alpha=below[2])
        return out.addmm_(narrow, B.to(x.dtype).T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, A, B, narrow, keep, *below = ctx.saved_tensors
        narrow_grad = (grad @ B.to(x.dtype)) * ctx.scaling
        B_grad = (grad.T @ narrow) * ctx.scaling
        if keep is None:
            A_grad = narrow_grad.T @ x
        else:
            keep = keep.to(x.dtype)
            A_grad = narrow_grad.T @ (x * keep)  # the product has no name, so that its memory is free at once
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ weight
            if below:
                x_grad.addmm_(grad @ below[1].to(x.dtype), below[0].to(x.dtype), alpha=ctx.scaling_below[0])
            if keep is None:
                x_grad.addmm_(narrow_grad, A.to(x.dtype))
            else:
                x_grad.addcmul_(narrow_grad @ A.to(x.dtype), keep)
        return x_grad, None, None, A_grad.to(A.dtype), B_grad.to(B.dtype), *[None] * (2 + 3 * bool(below))


class LeanLinear(Linear):
    """PEFT's LoRA layer. `LoRASum` computes one adapter on a frozen nn.Linear, or two of which the first is frozen.

    PEFT computes everything else.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        unusual = self.disable_adapters or self.merged or self.lora_variant or torch.is_autocast_enabled(x.device.type)
        if unusual or args or kwargs or not x.numel() or not self.fits(active):
            return super().forward(x, *args, **kwargs)
        *below, last = active
        probability = self.dropout_of(last)
        scaling = self.scaling[last] / (1 - round(probability * LEVELS) / LEVELS)
        flat, base = x.flatten(0, -2), self.base_layer
        trained = self.lora_A[last].weight, self.lora_B[last].weight, scaling, keep_mask(flat, probability)
        frozen = [(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]) for name in below]
        out = LoRASum.apply(flat, base.weight, base.bias, *trained, *itertools.chain(*frozen))
        return out.view(*x.shape[:-1], -1)

    def fits(self, active: list[str]) -> bool:
        """Whether `LoRASum` can compute these adapters."""
        base = self.base_layer
        if type(base) is not nn.Linear or any(parameter.requires_grad for parameter in base.parameters()):
            return False
        if not 1 <= len(active) <= 2 or any(self.lora_B[name].bias is not None for name in active):
            return False
        if self.dropout_of(active[-1]) > MAX_DROPOUT:
            return False
        if len(active) == 1:
            return True
        below = active[0]
        trained = self.lora_A[below].weight.requires_grad or self.lora_B[below].weight.requires_grad
        return not trained and not self.dropout_of(below)

    def dropout_of(self, name: str) -> float:
        """Return the probability of an adapter's dropout, 0 in evaluation."""
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def lean(model):
    """Replace the class of a PeftModel's LoRA layers by LeanLinear. Returns the model."""
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = LeanLinear
    return model
