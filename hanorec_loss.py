# SPDX-License-Identifier: MIT
"""The method of HaNoRec on tensors: hardness, responsiveness, the dynamic beta, its DPO loss, and noisy LoRA weights.

This file needs torch alone: copy it into your own project. The equation numbers are those of HaNoRec (SIGIR 2026,
arXiv 2511.18740). Shapes: N items, d numbers in an item vector, k neighbours, B prompts with a chosen answer and one
or K rejected answers. The log-probability of an answer (logp) is the sum over its tokens, in nats.

    vectors  = fuse_item_vectors(text, image)                                  # [N, d], once per training run
    profiles = neighbor_profiles(vectors)                                      # [N, k]
    distance = pair_distance(profiles, chosen_items, rejected_items)           # [pairs], all training pairs
    hardness = hardness_weight(distance, distance.mean())                      # [pairs], constant during training
    with noisy_lora(model, sigma=0.05):                              # around forward AND backward
        losses, metrics = hanorec_loss(chosen, rejected, reference_chosen, reference_rejected, hardness[batch])
        losses.mean().backward()

With hardness 1, eta 1 and sigma 0 the loss is that of DPO (arXiv 2305.18290) or, if K > 1, of S-DPO (arXiv 2406.09215).
"""

import contextlib
import re

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook


def fuse_item_vectors(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Return one unit vector per item: z = norm(norm(text) + norm(image)), [N, d], float32.

    text, image: [N, d], the vectors of the titles and of the images. An item without an image has a row of zeros.
    """
    if text.shape != image.shape:
        raise ValueError(f"text {tuple(text.shape)} and image {tuple(image.shape)} must have the same shape [N, d]")
    return F.normalize(F.normalize(text.float(), dim=-1) + F.normalize(image.float(), dim=-1), dim=-1)


def neighbor_profiles(item_vectors: torch.Tensor, k: int = 10, temperature: float = 1.0) -> torch.Tensor:
    """Return the profile of each item: softmax of its k largest cosines to other items, descending. [N, k], float32.

    item_vectors: [N, d], of any length. temperature: divides the cosines. Memory grows with N, not with N squared.
    """
    count = len(item_vectors)
    if not 1 <= k < count:
        raise ValueError(f"k={k} neighbours need more than k items; there are {count}")
    vectors = F.normalize(item_vectors.float(), dim=-1)
    profiles = vectors.new_empty(count, k)
    for start in range(0, count, 1024):  # the profiles of 1024 items at a time
        cosines = vectors[start : start + 1024] @ vectors.T  # [rows, N]
        cosines[:, start:].fill_diagonal_(-torch.inf)  # an item is not its own neighbour
        profiles[start : start + 1024] = (cosines.topk(k, dim=-1).values / temperature).softmax(dim=-1)
    return profiles


def pair_distance(profiles: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return equation (5), the Euclidean distance D between the profiles of a pair's two items: [B].

    profiles: [N, k]. chosen, rejected: [B], item indices. Profiles are almost flat, so D hardly varies between pairs.
    """
    return (profiles[chosen].float() - profiles[rejected].float()).norm(dim=-1)


def cosine_distance(item_vectors: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return the distance without neighbours, D = 1 - cosine of the pair's two items: [B]; the paper's "w/o SAM".

    item_vectors: [N, d]. chosen, rejected: [B], item indices. Standardise D over all training pairs before (6).
    """
    return 1 - F.cosine_similarity(item_vectors[chosen].float(), item_vectors[rejected].float(), dim=-1)


def hardness_weight(distance: torch.Tensor, mean_distance: float | torch.Tensor) -> torch.Tensor:
    """Return equation (6), lambda = sigmoid(D) / sigmoid(mean D): [B], without gradient. Smaller means harder.

    distance: [B], D. mean_distance: the mean of D over all training pairs, not over the batch.
    """
    mean_distance = torch.as_tensor(mean_distance, dtype=torch.float32, device=distance.device)
    return (distance.detach().float().sigmoid() / mean_distance.sigmoid()).detach()


def responsiveness(reward_gap: torch.Tensor, rounding: float = 0.0) -> torch.Tensor:
    """Return equation (8), eta = sigmoid(mean of the trimmed r) / sigmoid(mean of r): a scalar without gradient.

    r = R / mean(R), and r = R / max(mean|R|, 1e-8) if |mean(R)| <= 1e-8. If B > 2, one smallest and one largest r are
    trimmed. eta varies strongly while mean(R) is near 0, as at the start of DPO. Elsewhere eta(R) = eta(-R).

    reward_gap: R of equation (7), of the pairs of all processes: [B], or [B, K] with NaN for absent answers. rounding:
    if mean|R| <= rounding, every R counts as 0 and eta is 1. (Before the first step, R is a rounding error.)

    >>> responsiveness(torch.tensor([1.0, 2.0, 3.0, 6.0]))   # r = 1/3, 2/3, 1, 2: sigmoid(5/6) / sigmoid(1)
    tensor(0.9535)
    """
    gap, mean_of = reward_gap.detach().float(), torch.mean if reward_gap.dim() == 1 else torch.nanmean
    gap = torch.where(mean_of(gap.abs()) <= rounding, 0.0, gap)
    mean, mean_size = mean_of(gap), mean_of(gap.abs()).clamp_min(1e-8)
    relative_gap = gap / torch.where(mean.abs() > 1e-8, mean, mean_size)  # r
    return trimmed_mean(relative_gap).sigmoid() / mean_of(relative_gap).sigmoid()


def trimmed_mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean without one smallest and one largest value if B > 2: values [B], or [B, K] with NaN left out."""
    ascending, _ = values.flatten().sort()  # NaN last
    if values.dim() == 1:
        return ascending[1:-1].mean() if len(values) > 2 else values.mean()
    place, count = torch.arange(len(ascending), device=values.device), (~values.isnan()).sum()
    kept = ((place > 0) & (place < count - 1)) | (count <= 2)
    return ascending.where(kept, torch.nan).nanmean()


def hanorec_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    hardness: torch.Tensor,
    beta: float = 0.1,
    eta=None,
    beta_floor: float = 1e-6,
    gather=None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return equations (11, 12): the losses [B] of DPO with one beta per pair (average them), and `preference_metrics`.

    With K rejected answers a loss is softplus(logsumexp over k of -beta'_k * gap_k): S-DPO with a beta' of each pair. A
    smaller beta' gives a pair more gradient only if log_ratio_gap exceeds 1.278 / beta' (12.8 nats at 0.1).

    policy_*_logps, reference_*_logps: [B]; those of rejected answers [B] or [B, K]. Where a prompt has fewer than K
    rejected answers, reference_rejected_logps is NaN, and the values of that place are not used. hardness: lambda of
    equation (6), [B] or [B, K]. beta: beta0. beta_floor: the smallest beta'. eta: a number, None for `responsiveness`,
    or another function of the reward gaps R: [B], or if K > 1 [B, K] with NaN in these places. gather: joins the R of
    all processes, such as `accelerator.gather`.
    """
    check_shapes(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, hardness)
    chosen_ratio = policy_chosen_logps.float() - reference_chosen_logps.float().detach()  # logarithms of ratios
    rejected_ratio = policy_rejected_logps.float() - reference_rejected_logps.float().detach()
    rejected_ratio = rejected_ratio.reshape(len(chosen_ratio), -1)  # [B, K]
    absent = reference_rejected_logps.isnan().reshape(rejected_ratio.shape)
    absent = absent & ~absent.all(1, keepdim=True)  # without any rejected answer the loss is NaN
    hardness = hardness.detach().float().reshape(len(hardness), -1).expand_as(rejected_ratio).masked_fill(absent, 1.0)
    log_ratio_gap = chosen_ratio[:, None] - rejected_ratio  # [B, K], the bracket of (7)
    eta = responsiveness if eta is None else eta
    if callable(eta):
        reward_gap = beta * log_ratio_gap.detach().squeeze(1)  # (7), R, [B] or [B, K]
        eta = eta(reward_gap if gather is None else gather(reward_gap))  # (8)
    eta = eta.detach().to(log_ratio_gap) if torch.is_tensor(eta) else log_ratio_gap.new_full((), eta)
    dynamic_beta = (beta * eta * hardness).clamp_min(beta_floor)  # (11), beta', [B, K]
    scores = (-dynamic_beta * log_ratio_gap).masked_fill(absent, -torch.inf)
    losses = -F.logsigmoid(-torch.logsumexp(scores, dim=1))  # (12), [B]
    return losses, preference_metrics(losses, chosen_ratio, rejected_ratio, hardness, dynamic_beta, scores, beta, eta)


def check_shapes(*logps_and_hardness: torch.Tensor) -> None:
    """Raise ValueError for shapes other than those that `hanorec_loss` documents."""
    one, many, *reference, hardness = shapes = [tuple(tensor.shape) for tensor in logps_and_hardness]
    if reference != [one, many] or hardness not in (one, many) or len(one) != 1 or many[:1] != one or many[2:]:
        raise ValueError(f"log-probabilities and hardness must be [B], of rejected answers [B] or [B, K]; got {shapes}")


@torch.no_grad()
def preference_metrics(losses, chosen_log_ratio, rejected_log_ratio, hardness, dynamic_beta, scores, beta, eta) -> dict:
    """Return the metrics of a batch: scalars without gradient, by name.

    `hard_gradient_share` is the harder half's part of the gradient, after a stable sort by hardness. The middle pair of
    an odd number is in both halves. Without any gradient the share is 0.5.
    losses, chosen_log_ratio: [B]; the other tensors: [B, K]. scores: -beta' * gap, and -inf for an absent answer.
    """
    gradient_size = dynamic_beta * scores.logsumexp(1, keepdim=True).sigmoid() * scores.softmax(1)  # |d loss / d gap|
    pairs = [chosen_log_ratio[:, None] - rejected_log_ratio, rejected_log_ratio, hardness, dynamic_beta]
    pairs = [values.masked_fill(scores.isneginf(), torch.nan).flatten() for values in pairs]
    log_ratio_gap, rejected_log_ratio, hardness, dynamic_beta = pairs
    gradient_size = gradient_size.flatten()[hardness.argsort(stable=True)]  # of the hardest pair first, NaN is last
    place, count = torch.arange(len(hardness), device=hardness.device), (~hardness.isnan()).sum()
    half = (count + 1) // 2
    harder, easier = (gradient_size * (place < half)).sum(), (gradient_size * (place >= count - half)).sum()
    metrics = {
        "loss": losses.mean(),
        "accuracy": (log_ratio_gap > 0).sum() / count,
        "margin": (beta * log_ratio_gap).nanmean(),
        "reward_chosen": beta * chosen_log_ratio.mean(),
        "reward_rejected": beta * rejected_log_ratio.nanmean(),
        "eta": eta,
        "hard_gradient_share": torch.where(harder + easier == 0, 0.5, harder / (harder + easier)),
    }
    for name, values in (("lambda", hardness), ("beta", dynamic_beta)):
        low, high = values.nanquantile(0.01), values.nanquantile(0.99)
        metrics |= {f"{name}_mean": values.nanmean(), f"{name}_p01": low, f"{name}_p99": high}
    return metrics


@contextlib.contextmanager
def noisy_lora(model: torch.nn.Module, sigma: float, relative: bool = True, generator: torch.Generator | None = None):
    """Add noise to every trainable LoRA matrix inside the `with` block: equations (9, 10), NoDO.

    Put forward AND backward into the block, because activation checkpointing repeats the forward during backward. At
    its end the weights get their old values back, bit for bit, also after an error. Call optimizer.step() after the
    block: inside, with sigma > 0, it raises RuntimeError.

    sigma: standard deviation of the noise, in units of each matrix's root mean square if `relative`. generator: makes
    the noise repeatable, and equal on all processes if they give it the same seed; weights that fully_shard has sharded
    need one. Yields ||noise|| / ||weights||, a scalar.
    """
    lora_matrix = re.compile(r"(^|\.)lora_(embedding_)?[AB](\.|$)")  # PEFT's names
    weights = [p for name, p in model.named_parameters() if p.requires_grad and lora_matrix.search(name)]
    if not weights:
        raise ValueError("the model has no trainable LoRA weights (no lora_A or lora_B that requires a gradient)")
    if sigma == 0:
        yield torch.zeros((), device=weights[0].device)
        return
    if any(p.numel() == 0 for p in weights):
        raise ValueError("LoRA weights are sharded away; NoDO needs them whole, or sharded by torch's fully_shard")
    if generator is None and any(hasattr(p, "device_mesh") for p in weights):
        raise ValueError("sharded LoRA weights need a generator with the same seed on all processes")
    values = [p.detach().to_local() if hasattr(p, "device_mesh") else p.detach() for p in weights]  # the same memory
    noisy, old_values = set(weights), [torch.empty_like(value) for value in values]
    torch._foreach_copy_(old_values, values)

    def refuse_step(optimizer, args, kwargs):  # torch calls it before each step of any optimizer
        if any(not noisy.isdisjoint(group["params"]) for group in optimizer.param_groups):
            raise RuntimeError("the LoRA weights carry noise; call optimizer.step() after leaving noisy_lora")

    hook = register_optimizer_step_pre_hook(refuse_step)
    try:
        ratio = add_noise(weights, sigma, relative, generator)
        versions = [weight._version for weight in weights]
        yield ratio
        if versions != [weight._version for weight in weights]:  # changed by something else than an optimizer
            raise RuntimeError("the LoRA weights changed inside noisy_lora, and the change would be lost")
    finally:
        hook.remove()
        torch._foreach_copy_(values, old_values)


@torch.no_grad()
def add_noise(weights: list, sigma: float, relative: bool, generator: torch.Generator | None) -> torch.Tensor:
    """Add sigma * eps to each weight in place: equations (9, 10). Return ||noise|| / ||weights|| over all, a scalar.

    eps is Gaussian with mean 0. Its standard deviation is the matrix's root mean square if `relative`, else 1. One draw
    and few operations serve all the weights, which are often hundreds of small matrices, on one device.
    """
    sizes = [weight.numel() for weight in weights]
    norms = torch.stack(torch._foreach_norm(weights, 2, torch.float32))
    norms = norms.full_tensor() if hasattr(norms, "full_tensor") else norms  # a DTensor has full_tensor
    eps = torch.randn(sum(sizes), generator=generator, device=(generator or weights[0]).device, dtype=torch.float32)
    noise = eps.to(weights[0].device).mul_(sigma)  # of all weights, one after the other
    if relative:
        scales = torch._foreach_div(norms.unbind(), [size**0.5 for size in sizes])  # root mean squares
        noise *= torch.cat([scale.expand(size) for scale, size in zip(scales, sizes, strict=True)])
    parts = [part.view(weight.shape) for part, weight in zip(noise.split(sizes), weights, strict=True)]
    if hasattr(weights[0], "device_mesh"):  # every process has drawn the whole noise, and takes its part
        share = torch.distributed.tensor.distribute_tensor
        parts = [share(p, w.device_mesh, w.placements, src_data_rank=None) for p, w in zip(parts, weights, strict=True)]
    torch._foreach_add_(weights, parts)  # (9, 10)
    return torch.stack(torch._foreach_norm(noise.split(sizes))).norm() / norms.norm()
