"""Stage 1: supervised fine-tuning on ranking and Yes/No questions.

    accelerate launch sft.py                                            # the demo: data/demo -> runs/demo/sft
    accelerate launch sft.py --data data/ml-1m --out runs/ml-1m/sft     # LoRA on the backbone the data was encoded for

Writes config.json, metrics.jsonl and the weights that validated best: adapter/ (LoRA, PEFT's format) or, with --tune
full, model/. The same command continues a run that was interrupted. The loss is cross-entropy on the answer's tokens
only, over their number in the whole optimizer step. The vision tower is never trained, so its image tokens are read
from the data folder, unless they are to be made live.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path

from hanorec.run import checkpoints, runs, training
from hanorec.run.runs import UserError

TINY_RECIPE = {"lr": 1e-3, "epochs": 3, "batch_size": 16, "grad_accum": 1, "max_length": 4096, "eval_limit": 200}
TINY_RECIPE |= {"warmup_steps": 1200, "dropout": 0.05, "steps_share": 0.02}
RECIPE = {"lr": 1e-4, "epochs": 5, "batch_size": 2, "grad_accum": 8, "max_length": 4096, "eval_limit": 0}  # the paper
RECIPE |= {"warmup_steps": 0, "dropout": 0.0, "steps_share": 1.0}
LORA = {"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05}  # the paper


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = runs.Parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="data folder [data/demo]")
    parser.add_argument("--model", help="which of the data's encodings, where there are several")
    parser.add_argument("--out", type=Path, help="run folder to write [runs/<data>/sft]")
    share = "of the rows whose steps are trained beside the answers, --prompt cot [1; tiny: 0.02]"
    parser.add_argument("--steps-share", type=runs.bounded(float, 0, 1.01), help=share)
    start = "a finished run to go on from, with --tune full: teach.py's [the backbone]"
    parser.add_argument("--start", type=Path, metavar="RUN", help=start)
    parser.add_argument("--tune", choices=["lora", "full"], help="what is trained [full for tiny, else lora]")
    parser.add_argument("--tasks", nargs="+", choices=["rank", "yesno"], help="[both; --prompt cot: yesno]")
    parser.add_argument(
        "--prompt", choices=["plain", "cot"], default="plain", help="cot: MLLM-SRec's, see README [plain]"
    )
    parser.add_argument(
        "--summaries", metavar="NAME", help="what summarize.py wrote, for --prompt cot [the backbone's]"
    )
    parser.add_argument("--candidate-images", action="store_true", help="candidates carry images, not only titles")
    parser.add_argument("--blank-images", action="store_true", help="a neutral image everywhere: the titles-only model")
    warmup = parser.add_argument_group(
        "warm-up: language modelling over the training histories, for an untrained backbone"
    )
    warmup.add_argument(
        "--warmup-steps", type=runs.non_negative_int, help="steps before the first answer [0; tiny: 1200]"
    )
    warmup.add_argument("--warmup-items", type=runs.positive_int, default=50, help="items to a sequence [50]")
    warmup.add_argument("--warmup-batch-size", type=runs.positive_int, default=4, help="sequences per process [4]")
    warmup.add_argument("--warmup-lr", type=runs.positive_float, default=3e-3, help="peak learning rate [3e-3]")
    parser.add_argument(
        "--dropout", type=runs.probability, help="of embeddings and layers, --tune full [0; tiny: 0.05]"
    )
    parser.add_argument("--weight-decay", type=runs.non_negative_float, default=0.01, help="AdamW's [0.01]")
    training.add_training_options(parser, batch_size=2, grad_accum=8)
    options = parser.parse_args(argv)
    cot = options.prompt == "cot"
    options.tasks = [task for task in ("rank", "yesno") if task in (options.tasks or ("yesno", "rank")[: 2 - cot])]
    if cot and (options.tasks != ["yesno"] or options.candidate_images):
        parser.error(
            "--prompt cot asks Yes or No about candidates with images: it has no rank task, nor --candidate-images"
        )
    for name in () if cot else ("summaries", "steps_share"):
        if getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is for --prompt cot")
    options.summaries = options.summaries or ("" if cot else None)
    options.out = options.out or Path("runs") / options.data.resolve().name / "sft"
    return options


def training_samples(prompts, rows, sequences, options) -> tuple[list, list]:
    """(warm-up, answers): lists of functions that build the prompt tree of a sample. The warm-up's are stretches of the
    histories, every second one with the ranking question before it; of answers, r * tasks + t is task t of row r."""
    asked = {(row.user, row.target): row.candidates for row in rows} if "rank" in options.tasks else {}
    warmup, size = [], options.warmup_items
    step = max(size // 4, 1)
    for user, items in sequences.items():
        for start in range(step - size, len(items), step):
            stretch = items[max(start, 0) : start + size]
            candidates = asked.get((user, stretch[-1]), ()) if len(warmup) % 2 else ()
            if set(candidates) & set(stretch[:-1]):  # other positives, with --protocol official
                candidates = ()
            if len(stretch) > 1:
                warmup.append(partial(prompts.language_tree, stretch, options.max_length, candidates))
    builds = [partial(prompts.sft_tree, task=task) for task in options.tasks]
    prompts.check_fit(builds, rows, options.max_length)
    answers = [partial(prompts.fitting, build, row, options.max_length) for row in rows for build in builds]
    return warmup, answers


def trainable_model(options, data, accelerator):
    """The backbone with what --tune says made trainable, in a PackedMLLM."""
    import torch

    import evaluate
    from hanorec.model import mllm, packing

    if options.tune == "full":
        if options.start:
            model = evaluate.load_result(options.start, data, attn=options.attn)  # adapters merged
        else:
            model = mllm.load_model(data.source, torch.float32, options.attn, trust=data.trust)  # master weights
        for part in (model.get_decoder(), model.get_output_embeddings()):
            part.requires_grad_(True)
    else:
        dtype = mllm.pick_dtype(options.dtype, accelerator)
        model = mllm.load_model(data.source, dtype, options.attn, options.quantize, data.trust)
        model = mllm.add_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout, options.seed)
    packed = packing.load_packed(model, data, not options.no_pack, training.first_device(model, accelerator))
    if options.tune == "full":
        packed.set_dropout(options.dropout)
    if options.gradient_checkpointing:
        packed.enable_checkpointing()
    return packed


def save_weights(model, weights: dict, data, options) -> None:
    """Write what was trained: adapter/, or model/ with its tokenizer. weights: the model's, whole."""
    from hanorec.model import mllm

    name = "model" if options.tune == "full" else "adapter"
    with runs.replacing(options.out / name) as beside:
        model.save_pretrained(beside, state_dict=weights)
        if options.tune == "full":
            mllm.load_tokenizer(data.source, data.trust).save_pretrained(beside)
            mllm.load_image_processor(data.source, data.encoding["max_pixels"], data.trust).save_pretrained(beside)


def take_step(model, micro: list, parameters, optimizer, schedule, accelerator):
    """One optimizer step over this process's micro-batches. Returns the loss (nats per answer token, over all
    micro-batches and processes) and the gradient's norm before clipping at 1."""
    import torch

    tokens = torch.tensor(float(sum(int(batch.answers.sum()) for batch in micro)), device=accelerator.device)
    tokens = accelerator.reduce(tokens)
    loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(micro, 1):
        with training.micro_step(model, accelerator, last=number == len(micro)):
            with accelerator.autocast():
                nll = -model(batch.to(accelerator.device)).sum() / tokens
            accelerator.backward(nll * accelerator.num_processes)  # gradients are averaged over processes
        loss += nll.detach()
    norm = accelerator.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return accelerator.reduce(loss), norm


@runs.one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    runs.check_out(options.out, "sft")
    import torch

    import evaluate
    from hanorec.model import mllm, packing

    trust, story = options.trust_remote_code, options.summaries
    data = evaluate.Data(options.data, options.model, options.blank_images, options.images, story, trust=trust)
    options.summaries = data.story and data.story.name
    tiny = data.backbone == mllm.TINY
    options.model, options.tune = data.backbone, options.tune or ("full" if tiny else "lora")
    if options.quantize and options.tune == "full":
        raise UserError("--quantize is for --tune lora; rounded weights cannot be trained")
    if options.start and options.tune == "lora":
        raise UserError("--start is for --tune full; LoRA starts from the backbone")
    if options.dropout and options.tune == "lora":
        raise UserError("--dropout is for --tune full; LoRA has --lora-dropout")
    if options.tune == "lora":
        runs.set_defaults(options, warmup_steps=0, dropout=0.0)
    runs.set_defaults(options, **(TINY_RECIPE if tiny else RECIPE), **LORA, no_pack=False, attn="sdpa")
    packing.check_attention(options.attn, not options.no_pack)
    gpu = torch.cuda.is_available() and options.dtype == "auto"
    mixed = options.tune == "full" and (gpu or options.dtype == "bfloat16")
    accelerator = runs.start_accelerator("bf16" if mixed else "no", options.report_to, options.out)
    checkpoints.check(options, accelerator, data=data.hash())
    say = accelerator.print

    # Data
    rows, val_rows = data.rows("train"), data.rows("val", options.eval_limit)
    prompts = data.prompts(options.candidate_images)
    prompts.steps_share = options.steps_share
    warmup, answers = training_samples(prompts, rows, data.sequences(), options)
    say(f"{data.folder}: {len(rows)} training rows x {len(options.tasks)} tasks = {len(answers)} samples")
    steps, steps_per_epoch = training.plan_steps(len(answers), options, accelerator)
    total = options.warmup_steps + steps
    if options.warmup_steps and len(warmup) < options.warmup_batch_size * accelerator.num_processes:
        raise UserError(f"{len(warmup)} warm-up sequences do not fill a step: lower --warmup-batch-size")
    say(f"{options.warmup_steps} warm-up steps of {options.warmup_batch_size} sequences per process come first")
    shape = {"processes": accelerator.num_processes, "rank": accelerator.process_index, "seed": options.seed}
    batches = itertools.chain(
        itertools.islice(
            training.micro_batches(len(warmup), 1, options.warmup_batch_size, 1, **shape), options.warmup_steps
        ),
        itertools.islice(
            training.micro_batches(len(rows), len(options.tasks), options.batch_size, options.grad_accum, **shape),
            steps,
        ),
    )

    # Model
    packed = trainable_model(options, data, accelerator)
    torch.manual_seed(options.seed + accelerator.process_index)  # dropout
    parameters = [p for p in packed.parameters() if p.requires_grad]
    say(f"{data.backbone}: {sum(p.numel() for p in parameters):,} trained weights (--tune {options.tune})")
    optimizer = training.adamw(packed, options.lr, options.weight_decay)
    schedule = training.cosine(optimizer, steps, options.warmup_steps, options.warmup_lr / options.lr)
    model, optimizer = accelerator.prepare(packed, optimizer)
    parameters = [p for p in packed.parameters() if p.requires_grad]  # others, where they are sharded now

    def load(step: int, numbers: list[list[int]]) -> tuple[int, list[list[int]], list]:
        source = warmup if step <= options.warmup_steps else answers
        return step, numbers, [packed.collate([source[n]() for n in batch], data.catalogue) for batch in numbers]

    def names(in_warmup: bool, numbers: list[int]) -> str:
        if in_warmup:
            return f"warm-up sequences {numbers}"
        return "users " + ", ".join(dict.fromkeys(rows[n // len(options.tasks)].user for n in numbers))

    with training.started(options, "sft", accelerator, total, data=data.hash()) as log:
        done = log.resume(packed, optimizer, prompts.shortened, schedule=schedule)
        for step, numbers, micro in training.loaded(load, batches, done, accelerator.device):
            model.train()
            in_warmup, rate = step <= options.warmup_steps, schedule.get_last_lr()[0]
            loss, norm = take_step(model, micro, parameters, optimizer, schedule, accelerator)
            values = {"loss": loss, "grad_norm": norm, "lr": rate, "warmup": in_warmup}
            chosen, due = [n for batch in numbers for n in batch], step % 10 == 0 or step in (1, total)
            option = f"--warmup-lr {options.warmup_lr}" if in_warmup else f"--lr {options.lr}"
            log.step(step, values, len(chosen), option, partial(names, in_warmup, chosen), due)
            answered = step - options.warmup_steps
            validated = answered > 0 and (answered % steps_per_epoch == 0 or step == total)
            if validated:
                log.flush()
                found = evaluate.validate(packed, data, prompts, val_rows, options, accelerator)
                if log.validation(step, answered / steps_per_epoch, found):
                    weights = training.whole_weights(model, accelerator)
                    if accelerator.is_main_process:
                        save_weights(packed.model, weights, data, options)
            log.end_step(step, save=validated)
        log.finish()


if __name__ == "__main__":
    main()
