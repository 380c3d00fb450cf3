"""Stage 1: supervised fine-tuning on ranking and Yes/No questions.

    python sft.py                                               # the demo: data/demo -> runs/demo/sft
    python sft.py --data data/ml-1m --out runs/ml-1m/sft        # LoRA on the backbone the data was encoded for
    accelerate launch --num_processes 4 sft.py --data data/ml-1m   # on four GPUs

Writes config.json, metrics.jsonl and the weights with the best validation metric: adapter/ (LoRA, PEFT's format) or,
with --tune full, model/. The same command continues an interrupted run. The loss is the mean cross-entropy of all
answer tokens in the optimizer step. The vision tower is never trained, so the image tokens are read from the data
folder (--images live computes them in each step).
"""

if __name__ == "__main__":
    from hanorec.run import interrupts

    interrupts.stop_at_once()  # before the other imports

import argparse
import itertools
from pathlib import Path

from hanorec.run.files import UserError, one_line_errors
from hanorec.run.options import (
    DATA,
    ENCODING,
    TUNE,
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
STEPS_SHARE_HELP = "with --prompt cot: share of the examples whose steps of thought are trained, not only their answers"
OPTIONS = {
    "": [
        DATA,
        ENCODING,
        Option("--out", Path, None, "run folder to write", shown="runs/<data>/sft"),
        Option("--start", Path, None, "with --tune full: a finished run to start from", metavar="RUN"),
        TUNE,
        Option("--tasks", TASKS, None, "questions to train on", nargs="+", shown="both; --prompt cot: yesno"),
        Option("--prompt", ["plain", "cot"], "plain", "cot: the chain of thought of MLLM-SRec, see docs/mllm_srec.md"),
        Option("--summaries", str, None, "with --prompt cot: the summaries folder", shown="the backbone's name"),
        Option("--steps-share", bounded(float, 0, 1, "[]"), 1.0, STEPS_SHARE_HELP, tiny=0.02),
        Option("--candidate-images", bool, False, "candidates carry images, not only titles"),
        Option("--history-first", bool, False, "in the ranking prompt the history comes before the candidates"),
        Option("--blank-images", bool, False, "one neutral image for all items: a model of titles only"),
        Option("--dropout", probability, 0.0, "dropout of embeddings and layers, with --tune full", tiny=0.05),
        Option("--weight-decay", non_negative_float, 0.01, "weight decay of AdamW"),
    ],
    "warm-up: language modelling over the training histories, for an untrained backbone": [
        Option("--warmup-steps", non_negative_int, 0, "optimizer steps before the training on answers", tiny=1200),
        Option("--warmup-items", positive_int, 50, "items in a sequence"),
        Option("--warmup-batch-size", positive_int, 4, "sequences per process"),
        Option("--warmup-lr", positive_float, 3e-3, "peak learning rate"),
    ],
    **training_options(lr=(1e-4, 1e-3), epochs=(5, 3), batch_size=(2, 16), grad_accum=(8, 1), eval_limit=(0, 200)),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, without the defaults that depend on the backbone."""
    parser = Parser(__doc__, OPTIONS)
    options = parser.parse_args(argv)
    cot = options.prompt == "cot"
    tasks = options.tasks or (["yesno"] if cot else TASKS)
    options.tasks = [task for task in TASKS if task in tasks]
    if cot and (options.tasks != ["yesno"] or options.candidate_images or options.history_first):
        parser.error("--prompt cot asks Yes or No only, always with images: no --candidate-images, no --history-first")
    if options.history_first and "rank" not in options.tasks:
        parser.error("--history-first is for the ranking question; leave it out, or add rank to --tasks")
    for name in ("summaries", "steps_share"):
        if not cot and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is for --prompt cot")
    options.out = options.out or Path("runs") / options.data.resolve().name / "sft"
    return options


@one_line_errors
def checked_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options and check --out."""
    options = parse(argv)
    check_out(options.out, "sft", options.overwrite)
    return options


if __name__ == "__main__":
    checked_options()  # prints --help and errors before the slow imports

import torch

from hanorec.data.folder import DataFolder
from hanorec.model.encoding import Encoding
from hanorec.model.finished import save_trained
from hanorec.model.packing import check_attention
from hanorec.model.samples import Samples, WarmUp
from hanorec.model.supervised import check_tuning, mixed_precision, supervised_step, trainable_model
from hanorec.ranking.scoring import validate
from hanorec.run import checkpoints, training
from hanorec.run.launch import start_accelerator
from hanorec.run.log import started
from mllm_srec.chain_of_thought import load_prompts, summaries_folder, training_hash


def open_data(options: argparse.Namespace) -> tuple[DataFolder, Encoding]:
    """Open the data, and complete `options` in place with the defaults that depend on the backbone."""
    data = DataFolder(options.data)
    encoding = Encoding(data, options.model, options.blank_images, options.images, options.trust_remote_code)
    check_tuning(options, encoding)
    if options.tune == "lora":  # not the tiny backbone's defaults, which are for full training
        options.warmup_steps = options.warmup_steps or 0
        options.dropout = 0.0
    complete(options, OPTIONS, encoding.tiny)
    if options.prompt == "cot":
        options.summaries = summaries_folder(data, encoding, options.summaries).name
    check_attention(options.attn, not options.no_pack)
    return data, encoding


def plan_batches(warmup: WarmUp, samples: Samples, options: argparse.Namespace, accelerator):
    """Plan the steps of the warm-up and of the training on answers, and print them.

    Returns (the sample numbers of this process in each step, steps after the warm-up, steps per epoch).
    """
    examples, tasks = len(samples.examples), len(samples.kinds)
    accelerator.print(f"{options.data}: {examples} training examples x {tasks} tasks = {len(samples)} samples")
    batches, steps, steps_per_epoch = training.plan_steps(examples, tasks, options, accelerator)
    size, warmup_steps = options.warmup_batch_size, options.warmup_steps
    if warmup_steps:
        processes, rank = accelerator.num_processes, accelerator.process_index
        if len(warmup) < size * processes:
            raise UserError(f"{len(warmup)} warm-up sequences do not fill a step: lower --warmup-batch-size")
        accelerator.print(f"{warmup_steps} warm-up steps of {size} sequences per process come first")
        first = training.micro_batches(len(warmup), 1, size, 1, processes, rank, options.seed)
        batches = itertools.chain(itertools.islice(first, warmup_steps), batches)
    return batches, steps, steps_per_epoch


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = checked_options(argv)
    data, encoding = open_data(options)
    accelerator = start_accelerator(mixed_precision(options), options.report_to, options.out)
    layout = {"candidate_images": options.candidate_images, "history_first": options.history_first}
    prompts = load_prompts(data, encoding, summaries=options.summaries, steps_share=options.steps_share, **layout)
    hashes = {"data": training_hash(data, encoding, options.summaries), "prompts": prompts.hash()}
    checkpoints.check(options, accelerator, **hashes)

    # Data: the sequences of the warm-up, and a sample for each task of each example
    examples, val_examples = data.examples("train"), data.examples("val", options.eval_limit)
    warmup = WarmUp(prompts, examples, data.sequences(), options)
    samples = Samples(prompts, prompts.sft_tree, examples, options.tasks, options.max_length)
    batches, steps, steps_per_epoch = plan_batches(warmup, samples, options, accelerator)

    # Model
    packed = trainable_model(options, encoding, accelerator)
    torch.manual_seed(options.seed + accelerator.process_index)  # for dropout
    count = sum(weight.numel() for weight in training.trained_weights(packed).values())
    accelerator.print(f"{encoding.backbone}: {count:,} trained weights (--tune {options.tune})")
    optimizer = torch.optim.AdamW(
        training.trained_weights(packed).values(), lr=options.lr, weight_decay=options.weight_decay, fused=True
    )
    schedule = training.cosine(optimizer, steps, options.warmup_steps, options.warmup_lr / options.lr)
    model, optimizer = accelerator.prepare(packed, optimizer)
    weights = list(training.trained_weights(packed).values())  # again: `prepare` may shard them

    def samples_of(step: int) -> WarmUp | Samples:
        return warmup if step <= options.warmup_steps else samples

    def load_batches(step: int, numbers: list[list[int]]) -> list:
        tree = samples_of(step).tree
        return [packed.collate([tree(number) for number in batch], encoding.tokens) for batch in numbers]

    # Train
    with started(options, "sft", accelerator, options.warmup_steps + steps, hashes, every=10) as log:
        steps_done = log.resume(packed, optimizer, samples.shortened, schedule=schedule)
        for step, numbers, micro_batches in training.loaded(load_batches, batches, steps_done, accelerator.device):
            model.train()
            rate = schedule.get_last_lr()[0]
            loss, norm = supervised_step(model, micro_batches, weights, optimizer, schedule, accelerator)
            metrics = {"loss": loss, "grad_norm": norm, "lr": rate, "warmup": step <= options.warmup_steps}
            users = samples_of(step).users
            log.step(step, metrics, [users[number] for number in itertools.chain(*numbers)])

            answer_step = step - options.warmup_steps
            validation_due = answer_step > 0 and (answer_step % steps_per_epoch == 0 or answer_step == steps)
            if validation_due:
                log.flush()
                values = validate(packed, encoding, prompts, val_examples, options, accelerator, samples.shortened)
                if log.validation(step, answer_step / steps_per_epoch, values):  # the best so far
                    save_trained(model, packed, encoding, options.out, accelerator)
            log.end_step(step, validation_due)
        log.finish()


if __name__ == "__main__":
    main()
