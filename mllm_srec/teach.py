"""Teach a backbone to write the texts of mllm_srec.summarize. The tiny backbone cannot write without this.

    python -m mllm_srec.teach              # the demo: half of its descriptions.jsonl -> runs/demo/teach
    accelerate launch -m mllm_srec.summarize --run runs/demo/teach            # write with the taught backbone
    python -m mllm_srec.teach --score data/demo/summaries/tiny                # measure the summaries that it wrote

descriptions.jsonl in the data folder has one line per item: `item`, `text` (the summary to learn) and optional `facts`
(name: value), which --score looks for in a summary. The texts of preference paragraphs and profiles are made by a rule
(lessons.py) from random windows of the taught items. Writes a run folder like sft.py.
"""

if __name__ == "__main__":
    from hanorec.run import interrupts

    interrupts.stop_at_once()  # before the other imports

import argparse
import itertools
from pathlib import Path

from hanorec.run.files import one_line_errors, read_json, value_hash
from hanorec.run.options import DATA, ENCODING, TUNE, Option, Parser, bounded, complete, positive_int, training_options
from hanorec.run.runs import check_out, read_run, weights_hash
from mllm_srec.texts import PROMPTS_FILE, read_texts

SCORE_HELP = "train nothing; measure the summaries in DIR, of the items that the run --out was not taught"
OPTIONS = {
    "": [
        DATA,
        ENCODING,
        Option("--out", Path, None, "run folder to write", shown="runs/<data>/teach"),
        Option("--descriptions", Path, None, "texts to learn", shown="<data>/descriptions.jsonl"),
        Option("--share", bounded(float, 0, 1, "(]"), 0.5, "share of the items to teach, drawn by the seed"),
        Option("--prompts", Path, PROMPTS_FILE, "file of all prompts", shown="mllm_srec/prompts.txt"),
        Option("--window", positive_int, 3, "items in a window"),
        Option("--score", Path, None, SCORE_HELP, metavar="DIR"),
        TUNE,
    ],
    **training_options(lr=(1e-4, 2e-3), epochs=(3, 32), batch_size=(2, 16), grad_accum=(8, 1)),
}


@one_line_errors
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, without the defaults that depend on the backbone."""
    options = Parser(__doc__, OPTIONS).parse_args(argv)
    options.out = options.out or Path("runs") / options.data.resolve().name / "teach"
    options.descriptions = options.descriptions or options.data / "descriptions.jsonl"
    options.dropout, options.blank_images, options.start = 0.0, False, None  # options of sft.py
    read_texts(options.prompts)  # UserError if the file cannot be used
    return options


if __name__ == "__main__":
    parse()  # prints --help and errors before the slow imports

import torch

from hanorec.data.folder import DataFolder
from hanorec.model.encoding import Encoding
from hanorec.model.finished import save_trained
from hanorec.model.supervised import check_tuning, mixed_precision, supervised_step, trainable_model
from hanorec.run import checkpoints, training
from hanorec.run.launch import start_accelerator
from hanorec.run.log import started
from mllm_srec.chain_of_thought import load_prompts
from mllm_srec.lessons import KINDS, Lessons, read_descriptions, score_summaries, taught_items
from mllm_srec.preferences import MANIFEST


def score(options: argparse.Namespace, data: DataFolder) -> dict[str, float]:
    """Measure the summaries of the folder --score against the descriptions. Return the shares by fact."""
    descriptions = read_descriptions(options.descriptions, data.items)
    run_options = read_run(options.out, ["teach"])["options"]
    taught = set(taught_items(len(data.items), run_options["share"], run_options["seed"]))
    manifest = read_json(options.score / "manifest.json", MANIFEST, "give a folder that mllm_srec.summarize wrote")
    if manifest.get("made_by", {}).get("weights") != weights_hash(options.out):
        print(f"note: the model of {options.out} did not write {options.score}")
    return score_summaries(options.score, descriptions, taught, data)


@one_line_errors
def main(argv: list[str] | None = None) -> dict[str, float] | None:
    options = parse(argv)
    data = DataFolder(options.data)
    if options.score:
        return score(options, data)
    check_out(options.out, "teach", options.overwrite)
    encoding = Encoding(data, options.model, images=options.images, trust=options.trust_remote_code)
    check_tuning(options, encoding)
    complete(options, OPTIONS, encoding.tiny)
    accelerator = start_accelerator(mixed_precision(options), options.report_to, options.out)

    # Data
    texts = read_texts(options.prompts)
    descriptions = read_descriptions(options.descriptions, data.items)
    taught = [item for item in taught_items(len(data.items), options.share, options.seed) if item in descriptions]
    taught_descriptions = {item: descriptions[item] for item in taught}
    lessons = Lessons(encoding, load_prompts(data, encoding), texts, taught_descriptions, options.window, options.seed)
    accelerator.print(f"{options.descriptions}: {len(taught)} of {len(data.items)} items are taught")
    hashes = {"data": encoding.hash(), "lessons": value_hash([texts, sorted(descriptions.items())])}
    checkpoints.check(options, accelerator, **hashes)
    batches, steps, _ = training.plan_steps(len(taught), KINDS, options, accelerator)

    # Model
    packed = trainable_model(options, encoding, accelerator)
    torch.manual_seed(options.seed + accelerator.process_index)  # for the dropout of LoRA
    optimizer = torch.optim.AdamW(training.trained_weights(packed).values(), lr=options.lr, fused=True)
    schedule = training.cosine(optimizer, steps)
    model, optimizer = accelerator.prepare(packed, optimizer)
    weights = list(training.trained_weights(packed).values())  # again: `prepare` may shard them

    def load_batches(step: int, numbers: list[list[int]]) -> list:
        return [packed.collate(lessons.trees(batch, step), encoding.tokens) for batch in numbers]

    # Train
    with started(options, "teach", accelerator, steps, hashes, every=10, named="items") as log:
        steps_done = log.resume(packed, optimizer, set(), schedule=schedule)
        for step, numbers, micro_batches in training.loaded(load_batches, batches, steps_done, accelerator.device):
            model.train()
            rate = schedule.get_last_lr()[0]
            loss, norm = supervised_step(model, micro_batches, weights, optimizer, schedule, accelerator)
            items = [data.items.ids[taught[number // KINDS]] for number in itertools.chain(*numbers)]
            log.step(step, {"loss": loss, "grad_norm": norm, "lr": rate}, items)
            log.end_step(step, step == steps)
        log.best = {"step": steps}  # the weights of the last step are kept
        save_trained(model, packed, encoding, options.out, accelerator)
        log.finish()
    return None


if __name__ == "__main__":
    main()
