"""Teach a backbone to write what mllm_srec.summarize asks for: an untrained one, or one that should write otherwise.

    python -m mllm_srec.teach              # the demo: half of its descriptions.jsonl -> runs/demo/teach
    accelerate launch -m mllm_srec.summarize --run runs/demo/teach                  # the taught backbone writes
    python -m mllm_srec.teach --score data/demo/summaries/tiny      # its summaries of the items that it was not taught

descriptions.jsonl in the data folder has a line for each item: `item`, `text` (its summary) and, if there are any,
`facts` by name, which --score looks for in a summary. Paragraphs and profiles are taught by a rule (lessons.py) on
random windows of the taught items. Writes a run folder as sft.py does.
"""

import argparse
from pathlib import Path

from hanorec.run.files import one_line_errors, read_json, value_hash
from hanorec.run.options import Option, Parser, bounded, complete, positive_int, training_options
from hanorec.run.runs import check_out, read_run, weights_hash
from mllm_srec.texts import PROMPTS_FILE, read_texts

OPTIONS = {
    "": [
        Option("--data", Path, Path("data/demo"), "data folder"),
        Option("--model", str, None, "which of the data's encodings, if there are several"),
        Option("--out", Path, None, "run folder to write", shown="runs/<data>/teach"),
        Option("--descriptions", Path, None, "the texts", shown="<data>/descriptions.jsonl"),
        Option(
            "--share", bounded(float, 0, 1.01, open_below=True), 0.5, "of the items that are taught, drawn by the seed"
        ),
        Option("--prompts", Path, PROMPTS_FILE, "file of all prompts", shown="mllm_srec/prompts.txt"),
        Option("--window", positive_int, 3, "items in a window"),
        Option(
            "--score",
            Path,
            None,
            "measure the summaries in a folder on the items that --out was not taught, and train nothing",
            metavar="DIR",
        ),
        Option("--tune", ["lora", "full"], None, "what is trained", shown="lora; tiny: full"),
    ],
    **training_options(lr=(1e-4, 2e-3), epochs=(3, 32), batch_size=(2, 16), grad_accum=(8, 1)),
}


@one_line_errors
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    options = Parser(__doc__, OPTIONS).parse_args(argv)
    options.out = options.out or Path("runs") / options.data.resolve().name / "teach"
    options.descriptions = options.descriptions or options.data / "descriptions.jsonl"
    options.dropout, options.blank_images, options.start = 0.0, False, None  # as sft.py's runs have them
    read_texts(options.prompts)
    return options


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the slow imports

import torch

from hanorec.data.folder import DataFolder
from hanorec.model.encoding import Encoding
from hanorec.model.supervised import (
    check_tuning,
    mixed_precision,
    save_trained,
    supervised_step,
    trainable_model,
)
from hanorec.run import checkpoints
from hanorec.run.launch import start_accelerator
from hanorec.run.log import started
from hanorec.run.training import (
    adamw,
    cosine,
    loaded,
    own_micro_batches,
    plan_steps,
    trainable,
    whole_weights,
)
from mllm_srec.chain_of_thought import load_prompts
from mllm_srec.lessons import KINDS, Lessons, read_descriptions, score_summaries, taught_items
from mllm_srec.preferences import MANIFEST


def score(options: argparse.Namespace, data: DataFolder) -> dict[str, float]:
    """--score: measure the summaries of a folder against the descriptions."""
    descriptions = read_descriptions(options.descriptions, data.items)
    before = read_run(options.out, ["teach"])["options"]
    taught = set(taught_items(len(data.items), before["share"], before["seed"]))
    manifest = read_json(options.score / "manifest.json", MANIFEST, "give a folder that mllm_srec.summarize wrote")
    if manifest.get("made_by", {}).get("weights") != weights_hash(options.out):
        print(f"note: {options.score} was written by another model than {options.out}")
    return score_summaries(options.score, descriptions, taught, data)


@one_line_errors
def main(argv: list[str] | None = None) -> dict[str, float] | None:
    options = parse(argv)
    data = DataFolder(options.data)
    if options.score:
        return score(options, data)
    check_out(options.out, "teach")
    encoding = Encoding(data, options.model, images=options.images, trust=options.trust_remote_code)
    check_tuning(options, encoding)
    complete(options, OPTIONS, encoding.tiny)
    accelerator = start_accelerator(mixed_precision(options), options.report_to, options.out)

    # Data
    texts, everything = read_texts(options.prompts), read_descriptions(options.descriptions, data.items)
    taught = [item for item in taught_items(len(data.items), options.share, options.seed) if item in everything]
    descriptions = {item: everything[item] for item in taught}
    lessons = Lessons(encoding, load_prompts(data, encoding), texts, descriptions, options.window, options.seed)
    accelerator.print(f"{options.descriptions}: {len(taught)} of {len(data.items)} items are taught")
    hashes = {"data": encoding.hash(), "lessons": value_hash([texts, sorted(everything.items())])}
    checkpoints.check(options, accelerator, **hashes)
    steps, _ = plan_steps(len(taught) * KINDS, options, accelerator)
    batches = own_micro_batches(len(taught), KINDS, options.batch_size, options.grad_accum, steps, options, accelerator)

    # Model
    packed = trainable_model(options, encoding, accelerator)
    torch.manual_seed(options.seed + accelerator.process_index)  # LoRA's dropout
    optimizer = adamw(packed, options.lr)
    schedule = cosine(optimizer, steps)
    model, optimizer = accelerator.prepare(packed, optimizer)
    parameters = trainable(packed)

    def load(step: int, numbers: list[list[int]]) -> list:
        return [packed.collate(lessons.trees(batch, step), encoding.tokens) for batch in numbers]

    with started(options, "teach", accelerator, steps, hashes, every=10, named="items") as log:
        done = log.resume(packed, optimizer, set(), schedule=schedule)
        for step, numbers, micro in loaded(load, batches, done, accelerator.device):
            model.train()
            rate = schedule.get_last_lr()[0]
            loss, norm = supervised_step(model, micro, parameters, optimizer, schedule, accelerator)
            items = [data.items.ids[taught[number // KINDS]] for batch in numbers for number in batch]
            log.step(step, {"loss": loss, "grad_norm": norm, "lr": rate}, items)
            log.end_step(step, validated=step == steps)
        log.best = {"step": steps}
        weights = whole_weights(model, accelerator)
        if accelerator.is_main_process:
            save_trained(packed.model, weights, encoding, options)
        log.finish()
    return None


if __name__ == "__main__":
    main()
