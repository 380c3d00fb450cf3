"""Stage 2: HaNoRec preference optimisation, DPO with HaRS (a beta per pair) and NoDO (noise in the LoRA weights).

    accelerate launch dpo_hano.py --sigma 0.05                                           # the demo: after sft.py
    accelerate launch dpo_hano.py --sft runs/ml-1m/sft --out runs/ml-1m/dpo_hano --sigma 0.1
    accelerate launch dpo_hano.py --hardness none --responsiveness none --sigma 0        # plain DPO

Starts from the SFT model and trains a new LoRA on it. The reference is the same model with that LoRA switched off. The
reference's log-probabilities are computed once and kept in reference/ of the SFT run. Writes config.json, metrics.jsonl
and adapter/: the LoRA of the epoch with the best validation metric, in PEFT's format. --export DIR also writes the
models DIR/base, DIR/adapter and DIR/merged, which load without this project. The same command continues an interrupted
run. Equations (5) to (12) of the paper are in hanorec_loss.py: `pair_hardness` calls (5, 6), `take_step` the others.
"""

import argparse
import itertools
from pathlib import Path

from hanorec.run.files import UserError, one_line_errors
from hanorec.run.options import (
    Option,
    Parser,
    complete,
    non_negative_float,
    positive_float,
    positive_int,
    training_options,
)
from hanorec.run.runs import check_out, read_run

INHERITED = ("data", "model", "tasks", "summaries", "candidate_images", "blank_images")  # from the SFT run only
NOISES = ["relative", "absolute"]
SIGMA_HELP = "size of NoDO's noise; the paper: 0.05 (MicroLens), 0.1 (Netflix, MovieLens-1M); 0: no noise (w/o NoDO)"
HARDNESS_HELP = "lambda from neighbour profiles (the paper), from the cosine of the pair's items (w/o SAM), or 1"
RESPONSIVENESS_HELP = "eta of equation (8), eta with DAMA's moving average, or 1 (w/o HaRS, with --hardness none)"
OPTIONS = {
    "": [
        Option("--sft", Path, Path("runs/demo/sft"), "finished SFT run"),
        Option("--out", Path, None, "run folder to write", shown="dpo_hano beside the SFT run"),
        Option("--export", Path, None, "also write the models to DIR, loadable without this project", metavar="DIR"),
    ],
    "method": [
        Option("--beta", positive_float, 0.1, "beta0 of equation (7)"),
        Option("--sigma", non_negative_float, 0.05, SIGMA_HELP),
        Option("--noise", NOISES, "relative", "unit of sigma: a matrix's root mean square, or 1 (the authors' code)"),
        Option("--hardness", ["topk", "cosine", "none"], "topk", HARDNESS_HELP),
        Option("--top-k", positive_int, 10, "number K of neighbours in a profile"),
        Option("--responsiveness", ["batch", "ema", "none"], "batch", RESPONSIVENESS_HELP),
    ],
    **training_options(
        inherits=("images", "max_length", "no_pack", "attn", "quantize", "lora_rank", "lora_alpha", "lora_dropout"),
        lr=(1e-4, 1e-4),
        epochs=(5, 1),
        max_steps=(None, 120),
        batch_size=(4, 24),
        grad_accum=(8, 1),
        eval_limit=(0, 200),
    ),
}
PAIR_KINDS = {"rank": ["rank"], "yesno": ["yes", "no"]}  # the kinds of pairs of each task, see Prompts.pair_tree


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, without those that come from the SFT run."""
    options = Parser(__doc__, OPTIONS).parse_args(argv)
    options.out = options.out or options.sft.parent / "dpo_hano"
    return options


@one_line_errors
def checked_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """Parse the options, check --out and read the SFT run. Return (options, the SFT run's config.json)."""
    options = parse(argv)
    check_out(options.out, "dpo_hano")
    return options, read_run(options.sft, ["sft"])


if __name__ == "__main__":
    checked_options()  # prints --help and errors before the slow imports

import numpy as np
import torch

import hanorec_loss
from hanorec.data.folder import DataFolder, Example
from hanorec.model.check import load_packed
from hanorec.model.encoding import Encoding
from hanorec.model.export import export
from hanorec.model.finished import load_finished, save_trained
from hanorec.model.images import mean_embeddings
from hanorec.model.load import TINY, load_tokenizer, pick_dtype
from hanorec.model.lora import add_lora
from hanorec.model.packing import PackedMLLM, check_attention
from hanorec.model.reference import check_start, planned_pairs, reference_logps
from hanorec.model.samples import Samples
from hanorec.ranking.scoring import validate
from hanorec.run import checkpoints, training
from hanorec.run.launch import start_accelerator
from hanorec.run.log import started
from hanorec.run.runs import weights_hash
from mllm_srec.chain_of_thought import load_prompts, training_hash


def pair_hardness(options: argparse.Namespace, encoding: Encoding, model, examples: list[Example]) -> torch.Tensor:
    """Return equation (6), lambda of each example's pair (target, rejected item): [E]."""
    if options.hardness == "none":
        return torch.ones(len(examples))
    chosen = torch.tensor([example.target for example in examples])
    rejected = torch.tensor([example.rejected for example in examples])
    text = mean_embeddings(model, load_tokenizer(encoding.source, encoding.trust), encoding.items.titles)
    vectors = hanorec_loss.fuse_item_vectors(text, encoding.tokens.means())
    if options.hardness == "cosine":
        distance = hanorec_loss.cosine_distance(vectors, chosen, rejected)
        distance = (distance - distance.mean()) / distance.std().clamp_min(1e-8)
        return hanorec_loss.hardness_weight(distance, 0.0)
    if options.top_k >= len(vectors):
        raise UserError(f"--top-k {options.top_k} needs more items than {len(vectors)}")
    profiles = hanorec_loss.neighbor_profiles(vectors, options.top_k)
    distance = hanorec_loss.pair_distance(profiles, chosen, rejected)
    return hanorec_loss.hardness_weight(distance, distance.mean())


class Responsiveness:
    """Computes eta from the reward gaps of a micro-batch.

    kind: `batch`: equation (8). `ema`: the form of DAMA (arXiv 2502.01943), sigmoid(trimmed mean of the reward gaps) /
    sigmoid(moving average of this mean). `none`: 1.
    """

    ROUNDING = 1e-5  # if mean|R| is not larger, eta is 1: such an R is a rounding error, as at the first step
    DECAY = 0.9

    def __init__(self, kind: str):
        self.kind = kind
        self.average = None

    def __call__(self, reward_gap: torch.Tensor) -> torch.Tensor | float:
        """Return eta, a scalar. reward_gap: [B], R of all processes."""
        if self.kind == "none":
            return 1.0
        if self.kind == "batch":
            return hanorec_loss.responsiveness(reward_gap, self.ROUNDING)
        mean = hanorec_loss.trimmed_mean(reward_gap.float())
        self.average = mean if self.average is None else self.DECAY * self.average + (1 - self.DECAY) * mean
        return mean.sigmoid() / self.average.sigmoid()

    def state_dict(self) -> dict:
        return {"average": None if self.average is None else float(self.average)}

    def load_state_dict(self, state: dict) -> None:
        self.average = None if state["average"] is None else torch.tensor(state["average"])


def load_policy(options, encoding: Encoding, examples: list[Example], accelerator) -> tuple[PackedMLLM, torch.Tensor]:
    """Load the SFT model with a new LoRA. Return (policy, hardness [E] of the examples)."""
    dtype = pick_dtype(options.dtype, accelerator)
    if options.quantize:
        base = load_finished(options.sft, encoding, dtype, options.attn)  # the SFT run's LoRA stays a frozen adapter
    else:
        base = load_finished(options.sft, encoding, None, options.attn).to(dtype)  # the LoRA is merged in float32
    hardness = pair_hardness(options, encoding, base, examples)
    model = add_lora(base, options.lora_rank, options.lora_alpha, options.lora_dropout, options.seed)
    packed = load_packed(model, encoding, not options.no_pack, training.first_device(model, accelerator))
    if options.gradient_checkpointing:
        packed.enable_checkpointing()
    count = sum(weight.numel() for weight in training.trained_weights(packed).values())
    accelerator.print(f"{encoding.backbone}: {count:,} trained weights, {dtype}")
    low, high = float(hardness.quantile(0.01)), float(hardness.quantile(0.99))
    accelerator.print(f"lambda ({options.hardness}): mean {hardness.mean():.4f}, 1%-99% {low:.4f} to {high:.4f}")
    return packed, hardness


def perturbation(packed: PackedMLLM, options: argparse.Namespace, step: int, number: int):
    """Return NoDO's context manager for one micro-batch, equations (9, 10). It yields ||noise|| / ||weights||.

    To replace NoDO by another perturbation, change this function only. The noise depends on the seed, the step and the
    number of the micro-batch in the step, so it is the same on all processes.
    """
    seed = np.random.SeedSequence([options.seed, step, number]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
    return hanorec_loss.noisy_lora(packed, options.sigma, options.noise == "relative", generator)


def take_step(step: int, micro_batches, model, packed, optimizer, schedule, responsiveness, options, accelerator):
    """Make one optimizer step. Return its metrics, as means over micro-batches and processes.

    Args:
        step: the number of the step, from 1. With options.seed it decides the noise.
        micro_batches: this process's part of the step, a list of (batch, reference [B, 2], hardness [B]).
        model: the module that accelerator.prepare returned for `packed`. packed: holds the LoRA weights.
        optimizer, schedule: of the LoRA weights.
        responsiveness: a function from the reward gaps of all processes to eta.
    """
    model.train()
    sums = {}
    for number, (batch, reference, hardness) in enumerate(micro_batches, 1):
        last = number == len(micro_batches)
        with training.micro_step(model, accelerator, last), perturbation(packed, options, step, number) as noise:
            policy = model(batch.to(accelerator.device)).view(-1, 2)
            reference, hardness = reference.to(accelerator.device), hardness.to(accelerator.device)
            logps = (*policy.T, *reference.T)  # chosen and rejected of the policy, chosen and rejected of the reference
            losses, metrics = hanorec_loss.hanorec_loss(  # (7, 8, 11, 12)
                *logps, hardness, options.beta, responsiveness, gather=accelerator.gather
            )
            accelerator.backward(losses.mean() / len(micro_batches))
        metrics["noise"] = noise.to(accelerator.device)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value / len(micro_batches)
    norm = accelerator.clip_grad_norm_(training.trained_weights(packed).values(), 1.0)
    rate = schedule.get_last_lr()[0]
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    means = accelerator.reduce(torch.stack(list(sums.values())), "mean")
    return dict(zip(sums, means.unbind(), strict=True)) | {"grad_norm": norm, "lr": rate}


def open_data(options: argparse.Namespace, sft: dict) -> tuple[DataFolder, Encoding, dict]:
    """Open the SFT run's data, and complete `options` in place from the SFT run's config.json, `sft`.

    Returns (data, encoding, hashes of the data and the SFT weights).
    """
    all_epochs = options.epochs and not options.max_steps  # --epochs alone: no limit of steps for the tiny backbone
    complete(options, OPTIONS, sft["options"]["model"] == TINY, sft["options"], options.sft, INHERITED)
    if all_epochs:
        options.max_steps = None
    check_attention(options.attn, not options.no_pack)
    data = DataFolder(Path(options.data))
    encoding = Encoding(data, options.model, options.blank_images, options.images, options.trust_remote_code)
    hashes = {"data": training_hash(data, encoding, options.summaries), "sft_weights": weights_hash(options.sft)}
    if hashes["data"] != sft["data"]:
        raise UserError(f"{options.sft} was trained on an earlier {options.data}; run sft.py again")
    return data, encoding, hashes


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    options, sft = checked_options(argv)
    data, encoding, hashes = open_data(options, sft)
    accelerator = start_accelerator(report_to=options.report_to, out=options.out)
    if options.sigma and accelerator.distributed_type.value == "DEEPSPEED":
        raise UserError("DeepSpeed cannot train with NoDO's noise; use --config_file configs/fsdp2.yaml, or --sigma 0")
    if options.responsiveness == "batch" and options.batch_size * accelerator.num_processes < 3:
        raise UserError("eta of fewer than 3 pairs is always 1; give a larger --batch-size, or --responsiveness ema")
    checkpoints.check(options, accelerator, **hashes)

    # Model and pairs
    examples, val_examples = data.examples("train"), data.examples("val", options.eval_limit)
    prompts = load_prompts(data, encoding, options.candidate_images, options.summaries)
    packed, hardness = load_policy(options, encoding, examples, accelerator)
    kinds = [kind for task in options.tasks for kind in PAIR_KINDS[task]]
    pairs = Samples(prompts, prompts.pair_tree, examples, kinds, options.max_length)
    accelerator.print(f"{data.folder}: {len(examples)} examples x {len(kinds)} pairs ({', '.join(kinds)})")
    batches, steps, steps_per_epoch = training.plan_steps(len(examples), len(kinds), options, accelerator)
    optimizer = torch.optim.AdamW(training.trained_weights(packed).values(), lr=options.lr, fused=True)
    schedule = training.cosine(optimizer, steps)
    model, optimizer = accelerator.prepare(packed, optimizer)

    # Reference
    planned = planned_pairs(pairs, steps, steps_per_epoch, options, accelerator)
    reference = reference_logps(packed, encoding, pairs, planned, hashes, options, accelerator)
    response = Responsiveness(options.responsiveness)
    torch.manual_seed(options.seed + accelerator.process_index)  # for the dropout of LoRA

    def load_batches(step: int, numbers: list[list[int]]) -> list[tuple]:
        micro_batches = []
        for batch in numbers:
            trees = [pairs.tree(number) for number in batch]
            lambdas = hardness[[number // len(kinds) for number in batch]]
            micro_batches.append((packed.collate(trees, encoding.tokens), reference[batch], lambdas))
        return micro_batches

    # Train
    with started(options, "dpo_hano", accelerator, steps, hashes) as log:
        state = response if options.responsiveness == "ema" else None  # the other kinds have no state
        steps_done = log.resume(packed, optimizer, pairs.shortened, schedule=schedule, eta=state)
        for step, numbers, micro_batches in training.loaded(load_batches, batches, steps_done, accelerator.device):
            if step == 1:
                check_start(packed, *micro_batches[0][:2], accelerator.device)
            metrics = take_step(step, micro_batches, model, packed, optimizer, schedule, response, options, accelerator)
            log.step(step, metrics, [pairs.users[number] for number in itertools.chain(*numbers)])

            validation_due = step % steps_per_epoch == 0 or step == steps
            if validation_due:
                log.flush()
                values = validate(packed, encoding, prompts, val_examples, options, accelerator, pairs.shortened)
                if log.validation(step, step / steps_per_epoch, values):  # the best so far
                    save_trained(model, packed, encoding, options.out, accelerator)
            log.end_step(step, validation_due)
        if options.export and accelerator.is_main_process:
            export(options, encoding, options.out / "adapter")
        log.finish()


if __name__ == "__main__":
    main()
