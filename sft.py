"""Stage 1: supervised fine-tuning on ranking and Yes/No questions.

    accelerate launch sft.py                                            # the demo: data/demo -> runs/demo/sft
    accelerate launch sft.py --data data/ml-1m --out runs/ml-1m/sft     # LoRA on the backbone the data was encoded for

Writes config.json, metrics.jsonl and the weights that validated best: adapter/ (LoRA, PEFT's format) or, with --tune
full, model/. The same command continues a run that was interrupted. The loss is cross-entropy on the answers' tokens,
averaged over all of them in the optimizer step. The vision tower is never trained, so its image tokens are read from
the data folder, unless they are to be computed live.
"""

import argparse
import itertools
from pathlib import Path

from hanorec.run.files import UserError, one_line_errors
from hanorec.run.options import (
    Option,
    Parser,
    bounded,
    complete,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    probability,
    training_options,
)
from hanorec.run.runs import check_out

TASKS = ["rank", "yesno"]
OPTIONS = {
    "": [
        Option("--data", Path, Path("data/demo"), "data folder"),
        Option("--model", str, None, "which of the data's encodings, if there are several"),
        Option("--out", Path, None, "run folder to write", shown="runs/<data>/sft"),
        Option("--start", Path, None, "with --tune full: a finished run to start from", metavar="RUN"),
        Option("--tune", ["lora", "full"], None, "what is trained", shown="lora; tiny: full"),
        Option("--tasks", TASKS, None, "what is asked", nargs="+", shown="both; --prompt cot: yesno"),
        Option("--prompt", ["plain", "cot"], "plain", "cot: MLLM-SRec's chain of thought, see docs/mllm_srec.md"),
        Option("--summaries", str, None, "with --prompt cot: the name of the summaries", shown="the backbone's name"),
        Option(
            "--steps-share",
            bounded(float, 0, 1.01),
            1.0,
            "with --prompt cot: of the examples whose steps are trained beside the answers",
            tiny=0.02,
        ),
        Option("--candidate-images", bool, False, "candidates carry images, not only titles"),
        Option("--blank-images", bool, False, "a neutral image everywhere: the titles-only model"),
        Option("--dropout", probability, 0.0, "of embeddings and layers, with --tune full", tiny=0.05),
        Option("--weight-decay", non_negative_float, 0.01, "AdamW's"),
    ],
    "warm-up: language modelling over the training histories, for an untrained backbone": [
        Option("--warmup-steps", non_negative_int, 0, "optimizer steps before the first answer", tiny=1200),
        Option("--warmup-items", positive_int, 50, "items in a sequence"),
        Option("--warmup-batch-size", positive_int, 4, "sequences per process"),
        Option("--warmup-lr", positive_float, 3e-3, "peak learning rate"),
    ],
    **training_options(lr=(1e-4, 1e-3), epochs=(5, 3), batch_size=(2, 16), grad_accum=(8, 1), eval_limit=(0, 200)),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, OPTIONS)
    options = parser.parse_args(argv)
    cot = options.prompt == "cot"
    tasks = options.tasks or (["yesno"] if cot else TASKS)
    options.tasks = [task for task in TASKS if task in tasks]
    if cot and (options.tasks != ["yesno"] or options.candidate_images):
        parser.error(
            "--prompt cot asks Yes or No about candidates with images: it has no rank task, nor --candidate-images"
        )
    for name in ("summaries", "steps_share"):
        if not cot and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is for --prompt cot")
    options.out = options.out or Path("runs") / options.data.resolve().name / "sft"
    return options


@one_line_errors
def checked_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, and refuse a folder --out that holds something else."""
    options = parse(argv)
    check_out(options.out, "sft")
    return options


if __name__ == "__main__":
    checked_options()  # --help and mistakes are answered before the slow imports

import torch

from hanorec.data.folder import DataFolder
from hanorec.model.encoding import Encoding
from hanorec.model.packing import check_attention
from hanorec.model.samples import Samples, WarmUp
from hanorec.model.supervised import (
    check_tuning,
    mixed_precision,
    save_trained,
    supervised_step,
    trainable_model,
)
from hanorec.ranking.scoring import validate
from hanorec.run import checkpoints, training
from hanorec.run.launch import start_accelerator
from hanorec.run.log import started
from mllm_srec.chain_of_thought import load_prompts, summaries_folder, training_hash


def open_data(options: argparse.Namespace) -> tuple[DataFolder, Encoding]:
    """Open the data, and complete the options with the values that depend on the backbone."""
    data = DataFolder(options.data)
    encoding = Encoding(data, options.model, options.blank_images, options.images, options.trust_remote_code)
    check_tuning(options, encoding)
    if options.tune == "lora":  # the tiny backbone's warm-up and dropout are for full training
        options.warmup_steps, options.dropout = options.warmup_steps or 0, 0.0
    complete(options, OPTIONS, encoding.tiny)
    if options.prompt == "cot":
        options.summaries = summaries_folder(data, encoding, options.summaries).name
    check_attention(options.attn, not options.no_pack)
    return data, encoding


def plan_batches(warmup: WarmUp, samples: Samples, options: argparse.Namespace, accelerator):
    """Plan the steps of the warm-up and of the samples, and print them.

    Returns (this process's micro-batches of every step, steps after the warm-up, steps in an epoch).
    """
    examples, tasks = len(samples.examples), len(samples.kinds)
    accelerator.print(f"{options.data}: {examples} training examples x {tasks} tasks = {len(samples)} samples")
    steps, steps_per_epoch = training.plan_steps(len(samples), options, accelerator)
    size, warmup_steps = options.warmup_batch_size, options.warmup_steps
    if warmup_steps and len(warmup) < size * accelerator.num_processes:
        raise UserError(f"{len(warmup)} warm-up sequences do not fill a step: lower --warmup-batch-size")
    accelerator.print(f"{warmup_steps} warm-up steps of {size} sequences per process come first")
    first = training.own_micro_batches(len(warmup), 1, size, 1, warmup_steps, options, accelerator)
    then = training.own_micro_batches(
        examples, tasks, options.batch_size, options.grad_accum, steps, options, accelerator
    )
    return itertools.chain(first, then), steps, steps_per_epoch


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = checked_options(argv)
    data, encoding = open_data(options)
    accelerator = start_accelerator(mixed_precision(options), options.report_to, options.out)
    hashes = {"data": training_hash(data, encoding, options.summaries)}
    checkpoints.check(options, accelerator, **hashes)

    # Data: the warm-up's sequences, and a sample for each task of each example
    examples, val_examples = data.examples("train"), data.examples("val", options.eval_limit)
    prompts = load_prompts(data, encoding, options.candidate_images, options.summaries)
    prompts.steps_share = options.steps_share
    warmup = WarmUp(prompts, examples, data.sequences(), options)
    samples = Samples(prompts, prompts.sft_tree, examples, options.tasks, options.max_length)
    batches, steps, steps_per_epoch = plan_batches(warmup, samples, options, accelerator)

    # Model
    packed = trainable_model(options, encoding, accelerator)
    torch.manual_seed(options.seed + accelerator.process_index)  # dropout
    count = sum(parameter.numel() for parameter in training.trainable(packed))
    accelerator.print(f"{encoding.backbone}: {count:,} trained weights (--tune {options.tune})")
    optimizer = training.adamw(packed, options.lr, options.weight_decay)
    schedule = training.cosine(optimizer, steps, options.warmup_steps, options.warmup_lr / options.lr)
    model, optimizer = accelerator.prepare(packed, optimizer)
    parameters = training.trainable(packed)

    def load(step: int, numbers: list[list[int]]) -> list:
        source = warmup if step <= options.warmup_steps else samples
        return [packed.collate([source.tree(number) for number in batch], encoding.tokens) for batch in numbers]

    # Train
    with started(options, "sft", accelerator, options.warmup_steps + steps, hashes, every=10) as log:
        done = log.resume(packed, optimizer, samples.shortened, schedule=schedule)
        for step, numbers, micro in training.loaded(load, batches, done, accelerator.device):
            model.train()
            in_warmup, rate = step <= options.warmup_steps, schedule.get_last_lr()[0]
            loss, norm = supervised_step(model, micro, parameters, optimizer, schedule, accelerator)
            metrics = {"loss": loss, "grad_norm": norm, "lr": rate, "warmup": in_warmup}
            log.step(step, metrics, (warmup if in_warmup else samples).users(itertools.chain(*numbers)))

            answered = step - options.warmup_steps
            validated = answered > 0 and (answered % steps_per_epoch == 0 or answered == steps)
            if validated:
                log.flush()
                values = validate(packed, encoding, prompts, val_examples, options, accelerator, samples.shortened)
                if log.validation(step, answered / steps_per_epoch, values):
                    weights = training.whole_weights(model, accelerator)
                    if accelerator.is_main_process:
                        save_trained(packed.model, weights, encoding, options)
            log.end_step(step, validated)
        log.finish()


if __name__ == "__main__":
    main()
