"""LoRA's linear layers in fewer passes over memory: what PEFT computes, and the same weights and files.

With a rank of 8, LoRA's arithmetic is nothing beside that of the frozen layer, but PEFT writes the layer's whole output
three times more (LoRA's part, scaled, added), in float32 where the base is in half precision, and so again in backward.
Here LoRA's part is added to the output in place by one matrix product, the scaling is applied at rank width, and
dropout draws 16 bits an element. In half precision LoRA's products are made in the base's dtype, as under autocast; the
weights, their gradients and the optimizer stay in float32.
"""

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn
from torch.autograd.function import once_differentiable


def keep_mask(x: torch.Tensor, probability: float) -> torch.Tensor | None:
    """A mask like x, False with this probability (rounded to 1/65536); None where that is 0."""
    if not probability:
        return None
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    drop = round(probability * 65536) - 32768
    return (bits.view(torch.int16)[: x.numel()] >= drop).view_as(x)


class LoRASum(torch.autograd.Function):
    """x W' + bias + scaling (x * keep) A' B', x [T, in], A [r, in], B [out, r]; W and bias are frozen."""

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
    """PEFT's LoRA layer, by `LoRASum` where one plain adapter is active on a plain linear layer."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        other = self.disable_adapters or self.merged or self.lora_variant or torch.is_autocast_enabled(x.device.type)
        frozen = type(self.base_layer) is nn.Linear and not any(p.requires_grad for p in self.base_layer.parameters())
        if other or not frozen or len(active) != 1 or args or kwargs:
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
    """`model`, a PeftModel, its LoRA layers computed by `LeanLinear`."""
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = LeanLinear
    return model
