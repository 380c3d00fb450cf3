"""The perturbations of training: NoDO, its rival on the embeddings, and what either does to the policy."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

import hanorec_loss
from hanorec.model.packing import PackedMLLM, answer_sums
from hanorec.model.pairs import PairBatch
from hanorec.run.training import reshard


@contextlib.contextmanager
def noisy_embeddings(packed: PackedMLLM, sigma: float, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Add uniform noise to the inputs of the language model inside the `with` block, as NEFTune (arXiv 2310.05914).

    The noise's root mean square is sigma times that of the inputs, which are text embeddings and image tokens. Yields
    sigma, a scalar.
    """

    def add_noise(_, args, kwargs):
        embeds = kwargs["inputs_embeds"]
        noise = torch.rand(embeds.shape, generator=generator, device=generator.device).to(embeds.device)
        noise = noise * 2 - 1  # its mean square is 1 / 3
        size = sigma * embeds.detach().float().square().mean().sqrt() * 3**0.5
        return args, kwargs | {"inputs_embeds": embeds + (size * noise).to(embeds.dtype)}

    hook = packed.core.get_decoder().register_forward_pre_hook(add_noise, with_kwargs=True)
    try:
        yield torch.full((), sigma, device=packed.core.device)
    finally:
        hook.remove()


def perturbation(packed: PackedMLLM, options, step: int, number: int):
    """Return the context manager of --noise for one micro-batch: NoDO, equations (9, 10), or noise on the embeddings.

    It yields the relative size of the noise: ||noise|| / ||weights||, or sigma on the embeddings. To use another
    perturbation, change this function only. The noise depends on the seed, the step and the number of the micro-batch
    in the step. It is drawn on the device, so it is the same on all processes whose GPUs are of one type.
    """
    seed = np.random.SeedSequence([options.seed, step, number]).generate_state(1)[0]
    generator = torch.Generator(packed.core.device).manual_seed(int(seed))
    if options.noise == "embeddings":
        return noisy_embeddings(packed, options.sigma, generator)
    return hanorec_loss.noisy_lora(packed, options.sigma, options.noise == "relative", generator)


@torch.no_grad()
def noise_effect(model, batch: PairBatch, noise) -> dict[str, torch.Tensor]:
    """Compare the policy in training, with noise and dropout, to the clean policy on the answers of a micro-batch.

    Args:
        model: the module that accelerator.prepare returned.
        noise: the context manager of the perturbation.

    Returns scalars by name. `noise_kl`: KL(noisy || clean) of the next token, in nats, mean over the answers' tokens.
    `noisy_margin_size`, `clean_margin_size`: mean size of the log-ratio gap, in nats.
    """
    sizes, distributions = {}, {}
    model.train()
    device = batch.trees.input_ids.device
    for name, context in (("noisy", noise), ("clean", contextlib.nullcontext())):
        with context, torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout's next masks stay
            logps = model(batch.trees, tokens=True)  # [S, V]
        reshard(model)  # else the clean forward of sharded weights would find the noisy ones
        of_targets = logps.gather(1, batch.trees.target[:, None])[:, 0]
        log_ratio = batch.lay_out(answer_sums(batch.trees, of_targets)) - batch.reference
        gap = log_ratio[:, :1] - log_ratio[:, 1:]
        sizes[f"{name}_margin_size"] = gap.abs().nanmean()
        distributions[name] = logps
        model.eval()  # without dropout
    model.train()
    noisy, clean = distributions["noisy"], distributions["clean"]
    return {"noise_kl": (noisy.exp() * (noisy - clean)).sum(1).mean(), **sizes}
