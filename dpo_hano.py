"""Stage 2: HaNoRec preference optimisation, DPO with HaRS (a beta per pair) and NoDO (noise in the LoRA weights).

    accelerate launch dpo_hano.py --sigma 0.05                                           # the demo: after sft.py
    accelerate launch dpo_hano.py --sft runs/ml-1m/sft --out runs/ml-1m/dpo_hano --sigma 0.1
    accelerate launch dpo_hano.py --hardness none --responsiveness none --sigma 0        # plain DPO

Starts from the SFT model and trains a new LoRA on it. The reference is the same model with that LoRA switched off. The
reference's log-probabilities are computed once and kept in reference/ of the SFT run. Writes config.json, metrics.jsonl
and adapter/: the LoRA of the epoch with the best validation metric, in PEFT's format. `python -m hanorec.export` turns
a run into a model that loads without this project. The same command continues an interrupted run. Equations (5) to (12)
of the paper are in hanorec_loss.py. (5, 6, 8) are called in hanorec/model/hars.py, (9, 10) in hanorec/model/noise.py,
the others here in `preference_loss`.
"""

if __name__ == "__main__":
    from hanorec.run import interrupts

    interrupts.stop_at_once()  # before the other imports

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
    sign,
    training_options,
)
from hanorec.run.runs import check_out, read_run

# From the SFT run only
INHERITED = ("data", "model", "tasks", "summaries", "candidate_images", "history_first", "blank_images")
HARDNESS = ["topk", "clusters", "cosine", "margin", "constant", "none"]
SIGMA_HELP = "size of NoDO's noise; the paper: 0.05 (MicroLens), 0.1 (Netflix, MovieLens-1M); 0: no noise (w/o NoDO)"
NOISE_HELP = "unit of sigma: a matrix's root mean square, or 1 (the authors' code); embeddings: noise on them instead"
HARDNESS_HELP = "lambda from neighbour profiles (the paper), neighbour sets, the pair's two items (w/o SAM), or the "
HARDNESS_HELP += "reference's margin; constant: topk's mean; none: 1"
RESPONSIVENESS_HELP = "eta of equation (8), eta with DAMA's moving average, or 1 (w/o HaRS, with --hardness none)"
REJECTED_FROM_HELP = "the data's own; or drawn among the negatives: from the half that the reference ranks higher, by "
REJECTED_FROM_HELP += "popularity, or in each epoch from the half that the policy ranks higher"
OBJECTIVE_HELP = "dpo; or a control: softmax over the answers without a reference, or sft of the chosen answers"
SFT_WEIGHT_HELP = "weight of the chosen answers' mean negative log-likelihood of a token, added to the loss"
OPTIONS = {
    "": [
        Option("--sft", Path, Path("runs/demo/sft"), "finished SFT run"),
        Option("--out", Path, None, "run folder to write", shown="dpo_hano beside the SFT run"),
    ],
    "method": [
        Option("--beta", positive_float, 0.1, "beta0 of equation (7)"),
        Option("--sigma", non_negative_float, 0.05, SIGMA_HELP),
        Option("--noise", ["relative", "absolute", "embeddings"], "relative", NOISE_HELP),
        Option("--hardness", HARDNESS, "topk", HARDNESS_HELP),
        Option("--hardness-sign", sign, 1, "-1: harder pairs get a larger lambda"),
        Option("--top-k", positive_int, 10, "number of neighbours in a profile or set"),
        Option("--responsiveness", ["batch", "ema", "none"], "batch", RESPONSIVENESS_HELP),
        Option("--rejected", positive_int, 1, "number of rejected items of a ranking pair; more than 1 is S-DPO"),
        Option("--rejected-from", ["data", "model", "popular", "self"], "data", REJECTED_FROM_HELP),
        Option("--objective", ["dpo", "softmax", "sft"], "dpo", OBJECTIVE_HELP),
        Option("--sft-weight", non_negative_float, 0.0, SFT_WEIGHT_HELP),
    ],
    **training_options(
        inherits=("images", "max_length", "no_pack", "attn", "quantize", "lora_rank", "lora_alpha"),
        lora_dropout=(0.0, 0.0),
        lr=(1e-4, 1e-4),
        epochs=(5, 1),
        max_steps=(None, 120),
        batch_size=(4, 24),
        grad_accum=(8, 1),
        eval_limit=(0, 200),
    ),
}
NOISE_EFFECT_EVERY = 50  # steps between two measurements of what the noise does


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, without those that come from the SFT run."""
    options = Parser(__doc__, OPTIONS).parse_args(argv)
    options.out = options.out or options.sft.parent / "dpo_hano"
    return options


@one_line_errors
def checked_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """Parse the options, check --out and read the SFT run. Return (options, the SFT run's config.json)."""
    options = parse(argv)
    check_out(options.out, "dpo_hano", options.overwrite)
    sft = read_run(options.sft, ["sft"])
    if options.quantize and not sft["options"].get("quantize"):
        raise UserError(f"--quantize: {options.sft} was trained without it; leave it out, or run sft.py with it too")
    return options, sft


if __name__ == "__main__":
    checked_options()  # prints --help and errors before the slow imports

import torch

import hanorec_loss
from hanorec.data.folder import DataFolder, Example
from hanorec.model.check import load_packed
from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished, save_trained
from hanorec.model.hars import Responsiveness, item_vectors, pair_hardness
from hanorec.model.load import TINY, pick_dtype
from hanorec.model.lora import add_lora
from hanorec.model.noise import noise_effect, perturbation
from hanorec.model.packing import PackedMLLM, check_attention
from hanorec.model.pairs import KINDS, PairBatch, Pairs, draw_by_popularity, draw_from_the_harder, pools
from hanorec.model.prompts import Prompts
from hanorec.model.reference import check_start, planned_pairs, reference_logps, score_pairs
from hanorec.ranking.scoring import validate
from hanorec.run import checkpoints, training
from hanorec.run.launch import start_accelerator
from hanorec.run.log import started
from hanorec.run.runs import weights_hash
from mllm_srec.chain_of_thought import load_run_prompts, training_hash


def load_policy(options, encoding: Encoding, accelerator) -> PackedMLLM:
    """Load the SFT model with a new LoRA.

    The SFT run's own LoRA is merged in float32. In half precision or on a quantized backbone it stays a frozen adapter.
    """
    dtype = pick_dtype(options.dtype, accelerator)
    apart = options.quantize or dtype != torch.float32
    base = load_finished(options.sft, encoding, dtype if apart else None, options.attn)
    model = add_lora(base, options.lora_rank, options.lora_alpha, options.lora_dropout, options.seed)
    packed = load_packed(model, encoding, not options.no_pack, training.first_device(model, accelerator))
    if options.gradient_checkpointing:
        packed.enable_checkpointing()
    count = sum(weight.numel() for weight in training.trained_weights(packed).values())
    accelerator.print(f"{encoding.backbone}: {count:,} trained weights, {dtype}")
    return packed


def load_pairs(prompts, examples: list[Example], options: argparse.Namespace, accelerator) -> Pairs:
    """Return the preference pairs of the examples, and print their number."""
    kinds = [kind for task in options.tasks for kind in KINDS[task]]
    accelerator.print(f"{options.data}: {len(examples)} examples x {len(kinds)} pairs ({', '.join(kinds)})")
    pool = pools(examples, options.rejected, options.rejected_from)
    return Pairs(prompts, examples, kinds, options.max_length, pool)


def choose_rejected(pairs: Pairs, logps: torch.Tensor, data: DataFolder, options, epoch: int = 0) -> None:
    """Set the items that the ranking pairs reject, out of their pools.

    logps: [pairs, 1 + P], of the reference, or with --rejected-from self of the policy at the start of the epoch.
    """
    if options.rejected_from == "popular":
        pairs.columns = draw_by_popularity(pairs, data.sequences(), options.rejected, options.seed)
    elif options.rejected_from != "data":
        of_rank = logps[pairs.kinds.index("rank") :: len(pairs.kinds), 1:]
        pairs.columns = draw_from_the_harder(of_rank, options.rejected, options.seed, epoch)


def preference_loss(policy: torch.Tensor, batch: PairBatch, responsiveness, options, accelerator):
    """Return (loss of a micro-batch, metrics): equations (7, 11, 12), with eta from `responsiveness`, or a control.

    Args:
        policy: [B, 1 + K], log-probabilities of the chosen and of the rejected answers.
        responsiveness: a function from the reward gaps of all processes to eta.
    """
    reference, hardness = batch.reference, batch.hardness
    if options.objective == "softmax":  # -log of the chosen answer's share, if beta is 1
        reference, hardness, responsiveness = reference * 0, torch.ones_like(hardness), 1.0  # NaN stays NaN
    logps = (policy[:, 0], policy[:, 1:], reference[:, 0], reference[:, 1:])
    losses, metrics = hanorec_loss.hanorec_loss(
        *logps, hardness, options.beta, responsiveness, gather=accelerator.gather
    )
    chosen_nll = -(policy[:, 0] / batch.lengths).mean()  # per token
    change = (policy[:, 0] - batch.reference[:, 0]).mean()
    metrics |= {"chosen_nll": chosen_nll.detach(), "chosen_change": change.detach()}
    loss = chosen_nll if options.objective == "sft" else losses.mean() + options.sft_weight * chosen_nll
    return loss, metrics | {"loss": loss.detach()}


def take_step(step: int, micro_batches, model, packed, optimizer, schedule, responsiveness, options, accelerator):
    """Make one optimizer step. Return its metrics, as means over micro-batches and processes.

    Args:
        step: the number of the step, from 1. With options.seed it decides the noise.
        micro_batches: this process's part of the step, a list of PairBatch.
        model: the module that accelerator.prepare returned for `packed`. packed: holds the LoRA weights.
        optimizer, schedule: of the LoRA weights.
        responsiveness: a function from the reward gaps of all processes to eta.
    """
    model.train()
    sums, effect = {}, {}
    for number, batch in enumerate(micro_batches, 1):
        batch = batch.to(accelerator.device)
        if step % NOISE_EFFECT_EVERY == 0 and number == 1:
            effect = noise_effect(model, batch, perturbation(packed, options, step, number))
        last = number == len(micro_batches)
        with training.micro_step(model, accelerator, last), perturbation(packed, options, step, number) as noise:
            policy = batch.lay_out(model(batch.trees))
            loss, metrics = preference_loss(policy, batch, responsiveness, options, accelerator)
            accelerator.backward(loss / len(micro_batches))
        metrics["noise"] = noise
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value / len(micro_batches)
    sums |= effect
    norm = accelerator.clip_grad_norm_(training.trained_weights(packed).values(), 1.0)
    rate = schedule.get_last_lr()[0]
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    means = accelerator.reduce(torch.stack(list(sums.values())), "mean")
    return dict(zip(sums, means.unbind(), strict=True)) | {"grad_norm": norm, "lr": rate}


def open_data(options: argparse.Namespace, sft: dict) -> tuple[DataFolder, Encoding, Prompts, dict]:
    """Open the SFT run's data and prompts, and complete `options` in place from the SFT run's config.json, `sft`.

    Returns (data, encoding, prompts, hashes of the data, the SFT weights and the prompts).
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
    prompts = load_run_prompts(options.sft, sft, data, encoding)
    return data, encoding, prompts, hashes | {"prompts": prompts.hash()}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    options, sft = checked_options(argv)
    data, encoding, prompts, hashes = open_data(options, sft)
    accelerator = start_accelerator(report_to=options.report_to, out=options.out)
    if options.sigma and accelerator.distributed_type.value == "DEEPSPEED":
        raise UserError("DeepSpeed cannot train with NoDO's noise; use --config_file configs/fsdp2.yaml, or --sigma 0")
    if options.sigma and options.noise == "embeddings" and options.no_pack:
        raise UserError("--noise embeddings needs packed prompts: with --no-pack each answer's prompt gets other noise")
    if options.responsiveness == "batch" and options.batch_size * accelerator.num_processes < 3:
        raise UserError("eta of fewer than 3 pairs is always 1; give a larger --batch-size, or --responsiveness ema")
    if "rank" not in options.tasks and (options.rejected > 1 or options.rejected_from != "data"):
        raise UserError("--rejected and --rejected-from are for ranking pairs, and the SFT run was not trained to rank")
    checkpoints.check(options, accelerator, **hashes)

    # Model and pairs
    examples, val_examples = data.examples("train"), data.examples("val", options.eval_limit)
    packed = load_policy(options, encoding, accelerator)
    by_items = options.hardness not in ("margin", "none")
    vectors = item_vectors(encoding, packed.core) if by_items else None  # before the weights are sharded
    pairs = load_pairs(prompts, examples, options, accelerator)
    batches, steps, steps_per_epoch = training.plan_steps(len(examples), len(pairs.kinds), options, accelerator)
    optimizer = torch.optim.AdamW(training.trained_weights(packed).values(), lr=options.lr, fused=True)
    schedule = training.cosine(optimizer, steps)
    model, optimizer = accelerator.prepare(packed, optimizer)

    # Reference, rejected items, hardness
    planned = planned_pairs(pairs, steps, steps_per_epoch, options, accelerator)
    reference = reference_logps(packed, encoding, pairs, planned, hashes, options, accelerator)
    choose_rejected(pairs, reference, data, options)
    hardness = pair_hardness(options, vectors, pairs, reference, accelerator)
    response = Responsiveness(options.responsiveness, options.beta, packed.core.dtype)
    torch.manual_seed(options.seed + accelerator.process_index)  # for the dropout of LoRA

    def load_batches(step: int, numbers: list[list[int]]) -> list[PairBatch]:
        return [pairs.batch(batch, packed, encoding.tokens, reference, hardness) for batch in numbers]

    # Train
    with started(options, "dpo_hano", accelerator, steps, hashes) as log:
        stateful = {"eta": response if options.responsiveness == "ema" else None}  # the other kinds have no state
        stateful["pairs"] = pairs if options.rejected_from == "self" else None
        steps_done = log.resume(packed, optimizer, pairs.shortened, schedule=schedule, **stateful)
        ahead = 0 if options.rejected_from == "self" else 2  # the policy must choose before the pairs are loaded
        loaded = training.loaded(load_batches, batches, steps_done, accelerator.device, ahead)
        for step, numbers, micro_batches in loaded:
            if step == 1:
                check_start(packed, micro_batches[0].to(accelerator.device))
            metrics = take_step(step, micro_batches, model, packed, optimizer, schedule, response, options, accelerator)
            log.step(step, metrics, [pairs.users[number] for number in itertools.chain(*numbers)])

            epoch_ends = step % steps_per_epoch == 0
            if epoch_ends or step == steps:
                log.flush()
                values = validate(packed, encoding, prompts, val_examples, options, accelerator, pairs.shortened)
                if log.validation(step, step / steps_per_epoch, values):  # the best so far
                    save_trained(model, packed, encoding, options.out, accelerator)
            if epoch_ends and step < steps and options.rejected_from == "self":
                logps = score_pairs(packed, encoding, pairs.whole(), planned, accelerator)
                choose_rejected(pairs, logps, data, options, step // steps_per_epoch)
            log.end_step(step, epoch_ends or step == steps)
        log.finish()


if __name__ == "__main__":
    main()
