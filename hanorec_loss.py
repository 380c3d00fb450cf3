# SPDX-License-Identifier: MIT
"""The method of HaNoRec on tensors: hardness, responsiveness, the dynamic beta, its DPO loss, and noisy LoRA weights.

This file needs torch and nothing else: copy it into your own project. The equation numbers are those of HaNoRec
(SIGIR 2026, arXiv 2511.18740). N items, d = width of an item vector, K neighbours, B preference pairs. A pair is one
prompt with a chosen and a rejected answer. A log-probability is summed over the tokens of an answer.

    vectors  = fuse_item_vectors(text, image)                                  # [N, d], once per training run
    profiles = neighbor_profiles(vectors)                                      # [N, K]
    distance = pair_distance(profiles, chosen_items, rejected_items)           # [pairs], all training pairs
    hardness = hardness_weight(distance, distance.mean())                      # [pairs], constant during training

    with noisy_lora(model, sigma=0.05):                              # around forward AND backward
        losses, metrics = hanorec_loss(chosen, rejected, reference_chosen, reference_rejected, hardness[batch])
        losses.mean().backward()

With hardness 1, eta 1 and sigma 0 this is DPO (arXiv 2305.18290), exactly. Not here: the moving average of DAMA's
responsiveness (arXiv 2502.01943), which is a state and lives with the caller; pass its value as `eta`.
"""

import contextlib
import re

import torch
import torch.nn.functional as F


def fuse_item_vectors(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """One unit vector per item from its title's and its picture's vector: z = norm(norm(text) + norm(image)).

    text, image: [N, d]; a row of zeros (an item without an image) adds nothing. Returns [N, d], float32.
    """
    if text.shape != image.shape:
        raise ValueError(f"text {tuple(text.shape)} and image {tuple(image.shape)} must have the same shape [N, d]")
    return F.normalize(F.normalize(text.float(), dim=-1) + F.normalize(image.float(), dim=-1), dim=-1)


def neighbor_profiles(item_vectors: torch.Tensor, k: int = 10, temperature: float = 1.0) -> torch.Tensor:
    """How closely an item's k nearest neighbours surround it: softmax of its k largest cosines, descending.

    item_vectors: [N, d], need not be normalised. temperature divides the cosines. Returns [N, k], float32. An item is
    not its own neighbour. Computed in blocks of rows, so memory grows with N, not with N squared.
    """
    count = len(item_vectors)
    if not 1 <= k < count:
        raise ValueError(f"k={k} neighbours need more than k items; there are {count}")
    vectors = F.normalize(item_vectors.float(), dim=-1)
    profiles = vectors.new_empty(count, k)
    for start in range(0, count, 1024):
        cosines = vectors[start : start + 1024] @ vectors.T  # [rows, N]
        rows = torch.arange(len(cosines), device=cosines.device)
        cosines[rows, start + rows] = -torch.inf
        profiles[start : start + 1024] = (cosines.topk(k, dim=-1).values / temperature).softmax(dim=-1)
    return profiles


def pair_distance(profiles: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Equation (5): the Euclidean distance between two items' neighbour profiles.

    profiles: [N, K]; chosen, rejected: [B], item indices. Returns [B]. Over random pairs it hardly varies (a softmax
    over sorted cosines is almost flat), so lambda is nearly constant: see its logged spread, and cosine_distance.
    """
    return (profiles[chosen].float() - profiles[rejected].float()).norm(dim=-1)


def cosine_distance(item_vectors: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """1 - cos of the pair's own vectors: the distance without Top-K clusters (the paper's "w/o SAM").

    item_vectors: [N, d]; chosen, rejected: [B], item indices. Returns [B]. Standardise it over all training pairs
    ((D - mean) / std, then hardness_weight(..., 0)) to give lambda a real spread.
    """
    return 1 - F.cosine_similarity(item_vectors[chosen].float(), item_vectors[rejected].float(), dim=-1)


def hardness_weight(distance: torch.Tensor, mean_distance: float | torch.Tensor) -> torch.Tensor:
    """Equation (6): lambda = sigmoid(D) / sigmoid(mean D); smaller is harder (the two items are alike).

    distance: [B]; mean_distance: over all training pairs, not over the batch. Returns [B], without gradient.
    """
    mean_distance = torch.as_tensor(mean_distance, dtype=torch.float32, device=distance.device)
    return (distance.detach().float().sigmoid() / mean_distance.sigmoid()).detach()


def reward_gains(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    """How much the policy gained on the reference, in nats: (of the chosen answer, of the rejected one).

    All log-probabilities: [B]. Returns [B] each, float32. Equation (7) is beta0 times their difference.
    """
    chosen = policy_chosen_logps.float() - reference_chosen_logps.float().detach()
    rejected = policy_rejected_logps.float() - reference_rejected_logps.float().detach()
    return chosen, rejected


def responsiveness(reward_gap: torch.Tensor, rounding: float = 0.0) -> torch.Tensor:
    """Equation (8): eta = sigmoid(mean of the trimmed r) / sigmoid(mean of r), with r = R / mean(R).

    One smallest and one largest r are dropped if B > 2. If |mean(R)| <= 1e-8, r = R / mean|R| (at least 1e-8). Returns
    a scalar, no gradient. Note: eta(R) = eta(-R), and eta swings widely while mean(R) is near 0, as at DPO's start.

    Args:
        reward_gap: [B], R of equation (7) of the whole batch, the pairs of every process included.
        rounding: if mean|R| is not larger, every R counts as 0, and eta is 1. Before the first step every R is 0 but
            for rounding errors, which eta would magnify.

    >>> responsiveness(torch.tensor([1.0, 2.0, 3.0, 6.0]))   # r = 1/3, 2/3, 1, 2: sigmoid(5/6) / sigmoid(1)
    tensor(0.9535)
    """
    gap = reward_gap.detach().float().flatten()
    gap = gap * (gap.abs().mean() > rounding)
    mean = gap.mean()
    scale = torch.where(mean.abs() > 1e-8, mean, gap.abs().mean().clamp_min(1e-8))
    relative = gap / scale
    return trimmed_mean(relative).sigmoid() / relative.mean().sigmoid()


def trimmed_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean of values [B] without one smallest and one largest if B > 2, as equation (8) filters a batch."""
    return values.sort().values[1:-1].mean() if len(values) > 2 else values.mean()


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
    """Equations (11, 12): DPO with a beta of its own for each pair.

    A smaller beta does not by itself give a hard pair more gradient: beta' * sigmoid(-beta' * gap) falls with beta'
    until the gap exceeds 1.278 / beta' (12.8 nats at 0.1). `hard_gradient_share` is what the harder half really gets.

    Args:
        policy_chosen_logps and the other log-probabilities, hardness (lambda of equation (6)): [B].
        beta: beta0. beta_floor: the least beta'.
        eta: a number; None computes equation (8) from this batch; a function is called with the reward gaps.
        gather: such as `accelerator.gather`; joins the reward gaps of all processes, for the last two.

    Returns losses [B] (average them) and metrics, see `preference_metrics`.
    """
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    shapes = {tuple(x.shape) for x in (*logps, hardness)}
    if len(shapes) != 1 or policy_chosen_logps.dim() != 1:
        raise ValueError(f"log-probabilities and hardness must all be [B], one number a pair; got {sorted(shapes)}")
    chosen_gain, rejected_gain = reward_gains(*logps)
    gap = chosen_gain - rejected_gain  # [B], the bracket of (7)
    if eta is None or callable(eta):
        reward_gap = beta * gap.detach()  # (7)
        eta = (eta or responsiveness)(gather(reward_gap) if gather else reward_gap)  # (8)
    eta = torch.as_tensor(eta, dtype=torch.float32, device=gap.device).detach()
    hardness = hardness.detach().float()
    dynamic_beta = (beta * eta * hardness).clamp_min(beta_floor)  # (11), [B]
    losses = -F.logsigmoid(dynamic_beta * gap)  # (12)
    return losses, preference_metrics(losses, chosen_gain, rejected_gain, hardness, dynamic_beta, beta, eta)


def preference_metrics(losses, chosen_gain, rejected_gain, hardness, dynamic_beta, beta: float, eta) -> dict:
    """What to log of a batch: detached scalars by name. Rewards are in nats times beta.

    losses, chosen_gain, rejected_gain (see `reward_gains`), hardness, dynamic_beta: [B].
    """
    losses, chosen_gain, rejected_gain = losses.detach(), chosen_gain.detach(), rejected_gain.detach()
    gap = chosen_gain - rejected_gain
    pull = dynamic_beta * (-dynamic_beta * gap).sigmoid()  # |d loss / d gap|
    order, half = hardness.argsort(stable=True), (len(hardness) + 1) // 2  # both halves have the middle of odd numbers
    harder, easier = pull[order[:half]].sum(), pull[order[-half:]].sum()
    metrics = {
        "loss": losses.mean(),
        "accuracy": (gap > 0).float().mean(),
        "margin": (beta * gap).mean(),
        "reward_chosen": beta * chosen_gain.mean(),
        "reward_rejected": beta * rejected_gain.mean(),
        "eta": eta,
        "hard_gradient_share": harder / (harder + easier),
    }
    for name, values in (("lambda", hardness), ("beta", dynamic_beta)):
        low, high = values.quantile(values.new_tensor([0.01, 0.99]))
        metrics |= {f"{name}_mean": values.mean(), f"{name}_p01": low, f"{name}_p99": high}
    return metrics


LORA_MATRIX = re.compile(r"(^|\.)lora_(embedding_)?[AB](\.|$)")  # the names of LoRA's weights in PEFT


@contextlib.contextmanager
def noisy_lora(model: torch.nn.Module, sigma: float, relative: bool = True, generator: torch.Generator | None = None):
    """Equations (9, 10), NoDO: A' = A + noise, B' = B + noise in every trainable LoRA matrix while the context is open.

    Open it around forward AND backward: with activation checkpointing the forward runs again in backward, and must see
    the same noise. A backward() after it raises, because autograd sees that the weights changed (but with activation
    checkpointing it computes without the noise). Leave it before optimizer.step(): RuntimeError. The weights come back
    bit for bit, also after an error. ValueError without trainable LoRA weights, or if others hold them (ZeRO-3).

    sigma, relative: the size of the noise, see `draw_noise`. generator: makes the draw repeatable, and equal on every
    process that seeds it alike. Weights sharded by fully_shard (DTensor) need one: each process draws the whole noise
    and takes its part. Yields ||noise|| / ||weights|| over all matrices, a scalar (0 for sigma 0).
    """
    weights = [p for name, p in model.named_parameters() if p.requires_grad and LORA_MATRIX.search(name)]
    if not weights:
        raise ValueError("the model has no trainable LoRA weights (no lora_A or lora_B that requires a gradient)")
    if sigma == 0:
        yield torch.zeros(())
        return
    if any(p.numel() == 0 for p in weights):
        raise ValueError("LoRA weights are sharded away; NoDO needs them whole, or sharded by torch's fully_shard")
    saved = [p.detach().clone() for p in weights]
    try:
        noise_square = weight_square = 0.0
        with torch.no_grad():
            for weight in weights:
                noise = draw_noise(weight, sigma, relative, generator)
                noise_square += noise.square().sum()
                weight_square += weight.float().square().sum()
                weight.add_(noise.to(weight.dtype))  # (9, 10)
        versions = [weight._version for weight in weights]
        ratio = (noise_square / weight_square).sqrt()
        yield ratio.full_tensor() if hasattr(ratio, "full_tensor") else ratio
        if versions != [weight._version for weight in weights]:
            raise RuntimeError("LoRA weights changed under the noise; call optimizer.step() after leaving noisy_lora")
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, saved, strict=True):
                weight.copy_(original)


def draw_noise(
    weight: torch.Tensor, sigma: float, relative: bool = True, generator: torch.Generator | None = None
) -> torch.Tensor:
    """sigma * eps of equations (9, 10) for one matrix, float32, on its device and sharded like it.

    relative: eps ~ N(0, RMS of the matrix), so a matrix of zeros gets no noise; else eps ~ N(0, 1), as in the authors'
    code.
    """
    device = generator.device if generator is not None else weight.device
    noise = torch.randn(weight.shape, generator=generator, device=device, dtype=torch.float32) * sigma
    noise = noise.to(weight.device)
    if hasattr(weight, "device_mesh"):  # each process takes its part
        mesh, placements = weight.device_mesh, weight.placements
        noise = torch.distributed.tensor.distribute_tensor(noise, mesh, placements, src_data_rank=None)
    return noise * weight.float().square().mean().sqrt() if relative else noise
