"""HaRS for training: lambda of every pair, and eta of a micro-batch. The equations are in hanorec_loss.py."""

import numpy as np
import torch
import torch.nn.functional as F

import hanorec_loss
from hanorec.model.encoding import Encoding
from hanorec.model.images import mean_embeddings
from hanorec.model.load import load_tokenizer
from hanorec.model.pairs import Pairs
from hanorec.run.files import UserError

CHUNK = 65_536  # pairs whose vectors are in memory at the same time


def cluster_means(item_vectors: torch.Tensor, k: int) -> torch.Tensor:
    """Return for each item the mean of the unit vectors of its k nearest other items, its cluster: [N, d].

    item_vectors: [N, d].
    """
    vectors = F.normalize(item_vectors.float(), dim=-1)
    means = torch.empty_like(vectors)
    for start in range(0, len(vectors), 1024):  # 1024 items at a time
        cosines = vectors[start : start + 1024] @ vectors.T
        cosines[:, start:].fill_diagonal_(-torch.inf)
        means[start : start + 1024] = vectors[cosines.topk(k, dim=-1).indices].mean(dim=1)
    return means


def item_vectors(encoding: Encoding, model) -> torch.Tensor:
    """Return the fused vectors of the items under a model that is not sharded: [N, d]."""
    text = mean_embeddings(model, load_tokenizer(encoding.source, encoding.trust), encoding.items.titles)
    return hanorec_loss.fuse_item_vectors(text, encoding.tokens.means())


def pool_distances(options, vectors: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Return the distance D of each example's target to each item of its pool: [E, P], on the CPU.

    topk and constant: equation (5). clusters: 1 - cosine of the means of the two items' neighbours. cosine: 1 - cosine
    of the two items.

    vectors: [N, d], of the items, on the device that computes D.
    """
    if options.hardness != "cosine" and options.top_k >= len(vectors):
        raise UserError(f"--top-k {options.top_k} needs more items than {len(vectors)}")
    if options.hardness in ("cosine", "clusters"):
        of_items = vectors if options.hardness == "cosine" else cluster_means(vectors, options.top_k)
        distance = hanorec_loss.cosine_distance
    else:
        of_items, distance = hanorec_loss.neighbor_profiles(vectors, options.top_k), hanorec_loss.pair_distance
    pool = torch.tensor(pairs.pool)
    chosen = torch.tensor([example.target for example in pairs.examples]).repeat_interleave(pool.shape[1])
    parts = zip(chosen.split(CHUNK), pool.flatten().split(CHUNK), strict=True)
    distances = [distance(of_items, one.to(vectors.device), other.to(vectors.device)).cpu() for one, other in parts]
    return torch.cat(distances).view(pool.shape)


def lambdas(options, values: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Return lambda of the pairs of one kind with each item of their pools, as `pair_hardness` says: [pairs, P].

    Args:
        values: [pairs, P], the distances D; the reference's margins with margin, 1 with none. NaN does not count.
        among: the part of the values that the pairs reject now. lambda is centred and scaled by them.
    """
    among, sign = among[~among.isnan()], options.hardness_sign
    if options.hardness == "none":
        return values
    if options.hardness == "topk":
        return hanorec_loss.hardness_weight(sign * values, sign * among.mean())
    if options.hardness == "constant":
        return hanorec_loss.hardness_weight(sign * among, sign * among.mean()).mean().expand_as(values)
    standardised = sign * (values - among.mean()) / among.std().clamp_min(1e-8)
    if options.hardness == "margin":
        return 0.5 + standardised.sigmoid()
    return hanorec_loss.hardness_weight(standardised, 0.0)


def pair_hardness(
    options, vectors: torch.Tensor | None, pairs: Pairs, reference: torch.Tensor, accelerator
) -> torch.Tensor:
    """Return lambda of each pair with each item of its pool: [pairs, P], and print its range.

    Smaller is harder, unless --hardness-sign is -1.

    topk: equation (6) of D. clusters and cosine: equation (6) of the standardised D. margin: 0.5 + sigmoid of the
    standardised difference of the reference's log-probabilities, chosen minus rejected. constant: the mean of topk's
    lambda. none: 1. --hardness-sign -1 turns the sign of D, or of the margin. Each kind of pairs has its own mean and
    deviation, over its training pairs (with margin: those that the run reaches). With --rejected-from self those of the
    first epoch stay. A Yes/No pair has NaN from its second column on.

    Args:
        vectors: [N, d], of the items; None for margin and none.
        reference: [pairs, 1 + P], the reference's log-probabilities. Read by margin only.
    """
    kinds = len(pairs.kinds)
    if options.hardness == "none":
        values = torch.ones(len(pairs), len(pairs.pool[0]))
    elif options.hardness == "margin":
        values = reference[:, :1] - reference[:, 1:]
    else:
        values = pool_distances(options, vectors.to(accelerator.device), pairs).repeat_interleave(kinds, dim=0)
    hardness = torch.full_like(values, torch.nan)
    for number, kind in enumerate(pairs.kinds):
        count = values.shape[1] if kind == "rank" else 1  # a Yes/No pair has one rejected answer
        among = pairs.of_pool(values, range(number, len(pairs), kinds))[:, :count]
        hardness[number::kinds, :count] = lambdas(options, values[number::kinds, :count], among)
    rejected = pairs.of_pool(hardness, range(len(pairs)))
    low, high = np.nanpercentile(rejected.numpy(), [1, 99]).tolist()
    accelerator.print(f"lambda ({options.hardness}): mean {rejected.nanmean():.4f}, 1%-99% {low:.4f} to {high:.4f}")
    return hardness


class Responsiveness:
    """Computes eta from the reward gaps of a micro-batch.

    Args:
        kind: `batch`: equation (8). `ema`: the form of DAMA (arXiv 2502.01943), sigmoid(trimmed mean of the reward
            gaps) / sigmoid(moving average of this mean). `none`: 1.
        beta: beta0 of equation (7). dtype: of the model's frozen weights.
    """

    # In nats. Log-ratio gaps of at most this mean size count as rounding errors, as before the first step: eta is 1
    ROUNDING = {torch.float32: 1e-4}
    HALF_ROUNDING = 0.1
    DECAY = 0.9

    def __init__(self, kind: str, beta: float = 0.1, dtype: torch.dtype = torch.float32):
        self.kind, self.rounding = kind, beta * self.ROUNDING.get(dtype, self.HALF_ROUNDING)
        self.average = None

    def __call__(self, reward_gap: torch.Tensor) -> torch.Tensor | float:
        """Return eta, a scalar. reward_gap: R of all processes."""
        if self.kind == "none":
            return 1.0
        if self.kind == "batch":
            return hanorec_loss.responsiveness(reward_gap, self.rounding)
        mean = hanorec_loss.trimmed_mean(reward_gap.float())
        self.average = mean if self.average is None else self.DECAY * self.average + (1 - self.DECAY) * mean
        return mean.sigmoid() / self.average.sigmoid()

    def state_dict(self) -> dict:
        return {"average": None if self.average is None else float(self.average)}

    def load_state_dict(self, state: dict) -> None:
        self.average = None if state["average"] is None else torch.tensor(state["average"])
