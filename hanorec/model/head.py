"""The output head in float32, also if the model or autocast is in half precision.

Logits near 25 in bfloat16 have steps of 0.125. Then many candidates tie, and log-probabilities that should be equal
differ. The hidden states stay in half precision, but their product with the head is not rounded.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd.function import once_differentiable

CHUNK = 16384  # rows of the head's weight that are in float32 at the same time


class Float32Product(torch.autograd.Function):
    """Computes x W.T in float32, [..., out]. x [..., in] and W [out, in] are in half precision; W is frozen."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return torch.cat([x.float() @ rows.float().T for rows in weight.split(CHUNK)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        parts = zip(grad.split(CHUNK, dim=-1), weight.split(CHUNK), strict=True)
        return sum(part @ rows.float() for part, rows in parts).to(ctx.dtype), None


@contextlib.contextmanager
def float32_logits(core) -> Iterator[None]:
    """Let the output head of `core` return float32 inside the `with` block.

    Two kinds of heads are changed: those with a frozen weight in half precision, and, in a forward without gradients
    under autocast, those with a float32 weight, which autocast would round. Other heads are left as they are.
    """
    head = core.get_output_embeddings()
    weight = getattr(head, "weight", None)
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward  # also if fully_shard has its class
    half = plain and weight.dtype in (torch.bfloat16, torch.float16) and not weight.requires_grad
    autocast = plain and weight.dtype == torch.float32 and torch.is_autocast_enabled(weight.device.type)
    rounded = autocast and not torch.is_grad_enabled()
    if not (half or rounded):
        yield
        return

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if rounded:
                return nn.functional.linear(x.float(), head.weight, head.bias)
            logits = Float32Product.apply(x, head.weight)
            return logits if head.bias is None else logits + head.bias.float()

    head.forward = forward  # replaced, not bypassed: hooks on the head still run, and gather sharded weights
    try:
        yield
    finally:
        del head.forward
