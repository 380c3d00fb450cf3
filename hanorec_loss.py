# SPDX-License-Identifier: MIT
"""The method of HaNoRec on tensors: hardness, responsiveness, the dynamic beta, its DPO loss, and noisy LoRA weights.

This file needs torch and nothing else: copy it into your own project. The equation numbers are those of HaNoRec
(SIGIR 2026, arXiv 2511.18740). N items, d = width of an item vector, K neighbours, B preference pairs; a pair is one
prompt with a chosen and a rejected answer, and a log-probability is summed over the tokens of an answer.

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

    text, image: [N, d]; a zero row (an item without an image) adds nothing. Returns [N, d], float32.
    """
    if text.shape != image.shape:
        raise ValueError(f"text {tuple(text.shape)} and image {tuple(image.shape)} must have the same shape [N, d]")
    return F.normalize(F.normalize(text.float(), dim=-1) + F.normalize(image.float(), dim=-1), dim=-1)


def neighbor_profiles(item_vectors: torch.Tensor, k: int = 10, temperature: float = 1.0) -> torch.Tensor:
    """How closely an item's k nearest neighbours surround it: softmax of its k largest cosines, descending.

    item_vectors: [N, d], need not be normalised. temperature divides the cosines. Returns [N, k], float32; an item is
    not its own neighbour. Computed by blocks of rows, so memory grows with N, not with N squared.
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

    profiles: [N, K]; chosen, rejected: [B], item rows. Returns [B]. Over random pairs it hardly varies (a softmax over
    sorted cosines is almost flat), so lambda is nearly constant: look at its logged spread, and see cosine_distance.
    """
    return (profiles[chosen].float() - profiles[rejected].float()).norm(dim=-1)


def cosine_distance(item_vectors: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """1 - cos of the pair's own vectors: the distance without Top-K clusters (the paper's "w/o SAM").

    item_vectors: [N, d]; chosen, rejected: [B], item rows. Returns [B]. Standardise it over all training pairs
    ((D - mean) / std, then hardness_weight(..., 0)) to give lambda a real spread.
    """
    return 1 - F.cosine_similarity(item_vectors[chosen].float(), item_vectors[rejected].float(), dim=-1)


def hardness_weight(distance: torch.Tensor, mean_distance: float | torch.Tensor) -> torch.Tensor:
    """Equation (6): lambda = sigmoid(D) / sigmoid(mean D); smaller is harder (the two items are alike).

    distance: [B]; mean_distance: over all training pairs, not over the batch. Returns [B], without gradient.
    """
    mean_distance = torch.as_tensor(mean_distance, dtype=torch.float32, device=distance.device)
    return (distance.detach().float().sigmoid() / mean_distance.sigmoid()).detach()


def responsiveness(reward_gap: torch.Tensor) -> torch.Tensor:
    """Equation (8): eta = sigmoid(mean of the trimmed r) / sigmoid(mean of r), with r = R / mean(R).

    reward_gap: [B], R of equation (7) of the whole batch, every process's pairs included. One smallest and one
    largest r are dropped when B > 2; where |mean(R)| <= 1e-8, r = R / mean|R| (at least 1e-8). Returns a scalar, no
    gradient.

    Two properties to know: eta(R) = eta(-R), and eta swings widely while mean(R) is near zero, as at the start of DPO.

    >>> responsiveness(torch.tensor([1.0, 2.0, 3.0, 6.0]))   # r = 1/3, 2/3, 1, 2: sigmoid(5/6) / sigmoid(1)
    tensor(0.9535)
    """
    gap = reward_gap.detach().float().flatten()
    mean = gap.mean()
    scale = torch.where(mean.abs() > 1e-8, mean, gap.abs().mean().clamp_min(1e-8))
    relative = gap / scale
    return trimmed_mean(relative).sigmoid() / relative.mean().sigmoid()


def trimmed_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean of values [B] without one smallest and one largest where B > 2, as equation (8) filters a batch."""
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
    """Equations (7), (8), (11), (12): DPO with a beta of its own for each pair.

    The log-probabilities and hardness (lambda of equation (6)): [B]. eta: None computes equation (8) from this batch, a
    number is used as it is, a function is called with the (gathered) reward gaps. beta_floor: the least beta'. gather:
    a function such as `accelerator.gather` that joins a tensor over all processes, so that eta is the same on each.
    Returns losses [B] (average them) and metrics: detached scalars of this process's pairs, except eta. Rewards are in
    nats times beta.

    A smaller beta does not by itself give a hard pair more gradient: beta' * sigmoid(-beta' * gap) falls with beta'
    until the gap exceeds 1.278 / beta' (12.8 nats at 0.1). `hard_gradient_share` is what the harder half really gets.
    """
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    shapes = {tuple(x.shape) for x in (*logps, hardness)}
    if len(shapes) != 1 or policy_chosen_logps.dim() != 1:
        raise ValueError(f"log-probabilities and hardness must all be [B], one number a pair; got {sorted(shapes)}")
    chosen_gain = policy_chosen_logps.float() - reference_chosen_logps.float().detach()
    rejected_gain = policy_rejected_logps.float() - reference_rejected_logps.float().detach()
    gap = chosen_gain - rejected_gain  # [B], the bracket of (7)
    reward_gap = beta * gap.detach()  # (7)
    hardness = hardness.detach().float()
    if eta is None or callable(eta):
        eta = (eta or responsiveness)(gather(reward_gap) if gather else reward_gap)  # (8)
    eta = torch.as_tensor(eta, dtype=torch.float32, device=gap.device).detach()
    dynamic_beta = (beta * eta * hardness).clamp_min(beta_floor)  # (11), [B]
    losses = -F.logsigmoid(dynamic_beta * gap)  # (12)

    pull = dynamic_beta * (-dynamic_beta * gap.detach()).sigmoid()  # |d loss / d gap|
    order, half = hardness.argsort(stable=True), (len(hardness) + 1) // 2  # of odd numbers both halves have the middle
    harder, easier = pull[order[:half]].sum(), pull[order[-half:]].sum()
    metrics = {
        "loss": losses.detach().mean(),
        "accuracy": (gap.detach() > 0).float().mean(),
        "margin": reward_gap.mean(),
        "reward_chosen": beta * chosen_gain.detach().mean(),
        "reward_rejected": beta * rejected_gain.detach().mean(),
        "eta": eta,
        "hard_gradient_share": harder / (harder + easier),
    }
    for name, values in (("lambda", hardness), ("beta", dynamic_beta)):
        low, high = values.quantile(values.new_tensor([0.01, 0.99]))
        metrics |= {f"{name}_mean": values.mean(), f"{name}_p01": low, f"{name}_p99": high}
    return losses, metrics


@contextlib.contextmanager
def noisy_lora(model: torch.nn.Module, sigma: float, relative: bool = True, generator: torch.Generator | None = None):
    """Equations (9, 10), NoDO: A' = A + noise, B' = B + noise in every trainable LoRA matrix while the context is open.

    relative: the noise's standard deviation is sigma times the root mean square of that matrix (so a B of zeros stays
    zero); otherwise it is sigma itself, as in the authors' code. generator: makes the draw repeatable, and equal on
    every process that seeds it alike. Yields ||noise|| / ||weights|| over all matrices, a scalar (0 for sigma 0).

    Keep it open until backward() has ended: with activation checkpointing the forward runs again there, and must see
    the same noise. Leave it before optimizer.step(), which would be undone: RuntimeError. Weights come back bit for
    bit, also after an error; a backward() after that raises, because autograd sees that the weights changed (but not
    with activation checkpointing, which then computes without the noise). Of weights sharded by fully_shard (DTensor)
    each process draws the whole noise and takes its part, so give a generator. Raises ValueError for a model without
    trainable LoRA weights, or with ones that are elsewhere (ZeRO-3).
    """
    matrix = re.compile(r"(^|\.)lora_(embedding_)?[AB](\.|$)")
    weights = [p for name, p in model.named_parameters() if p.requires_grad and matrix.search(name)]
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
                place = generator.device if generator is not None else weight.device
                noise = torch.randn(weight.shape, generator=generator, device=place, dtype=torch.float32) * sigma
                noise = noise.to(weight.device)
                if hasattr(weight, "device_mesh"):  # each process takes its part
                    lies = weight.device_mesh, weight.placements
                    noise = torch.distributed.tensor.distribute_tensor(noise, *lies, src_data_rank=None)
                if relative:
                    noise *= weight.float().square().mean().sqrt()
                noise_square += noise.square().sum()
                weight_square += weight.float().square().sum()
                weight.add_(noise.to(weight.dtype))
        versions = [weight._version for weight in weights]
        ratio = (noise_square / weight_square).sqrt()
        yield ratio.full_tensor() if hasattr(ratio, "full_tensor") else ratio
        if versions != [weight._version for weight in weights]:
            raise RuntimeError("LoRA weights changed under the noise; call optimizer.step() after leaving noisy_lora")
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, saved, strict=True):
                weight.copy_(original)
