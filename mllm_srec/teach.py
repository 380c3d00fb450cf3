"""Teach a backbone to write what summarize.py asks for: one that starts from nothing, or should write otherwise.

    python -m mllm_srec.teach              # the demo: half of its descriptions.jsonl -> runs/demo/teach
    accelerate launch -m mllm_srec.summarize --run runs/demo/teach                  # the taught backbone writes
    python -m mllm_srec.teach --score data/demo/summaries/tiny      # its summaries of the items that it was not taught

descriptions.jsonl in the data folder has a line per item: `item`, `text` (its summary) and, where there are such,
`facts` by name, which --score looks for in a summary. Paragraphs and profiles are taught by a rule (`retell`) on random
windows of the taught items. Writes a run folder as sft.py does.
"""

import argparse
import itertools
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from hanorec.run import checkpoints, runs, training
from hanorec.run.runs import UserError
from mllm_srec import srec

TINY_RECIPE = {"lr": 2e-3, "epochs": 32, "batch_size": 16, "grad_accum": 1, "max_length": 4096}
RECIPE = {"lr": 1e-4, "epochs": 3, "batch_size": 2, "grad_accum": 8, "max_length": 4096}
KINDS = 3  # samples of an item: its summary, a paragraph about a window, a profile


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = runs.Parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="data folder [data/demo]")
    parser.add_argument("--model", help="which of the data's encodings, where there are several")
    parser.add_argument("--out", type=Path, help="run folder to write [runs/<data>/teach]")
    parser.add_argument("--descriptions", type=Path, help="the texts [<data>/descriptions.jsonl]")
    share = "of the items that are taught, drawn by the seed [0.5]"
    parser.add_argument("--share", type=runs.bounded(float, 0, 1.01, open_below=True), default=0.5, help=share)
    parser.add_argument("--prompts", type=Path, default=srec.TEXTS, help="file of all prompts [mllm_srec.txt]")
    parser.add_argument("--window", type=runs.positive_int, default=3, help="items of a window [3]")
    score = "measure the summaries in a folder on the items that --out was not taught, and train nothing"
    parser.add_argument("--score", type=Path, metavar="DIR", help=score)
    parser.add_argument("--tune", choices=["lora", "full"], help="what is trained [full for tiny, else lora]")
    training.add_training_options(parser, batch_size=2, grad_accum=8)
    options = parser.parse_args(argv)
    options.out = options.out or Path("runs") / options.data.resolve().name / "teach"
    options.descriptions = options.descriptions or options.data / "descriptions.jsonl"
    return options


def taught_items(count: int, share: float, seed: int) -> list[int]:
    """The rows of the items that are taught."""
    return sorted(np.random.default_rng([seed, 11]).permutation(count)[: max(1, round(share * count))].tolist())


def read_descriptions(path: Path, catalogue) -> dict[int, dict]:
    """The lines of descriptions.jsonl by row."""
    found = {}
    for line in runs.read_jsonl(
        path, {"item": str, "text": str}, "give a file of lines with item and text by --descriptions"
    ):
        if line["item"] not in catalogue.row_of or not line["text"].strip():
            raise UserError(f"{path}: item {line['item']} has no text, or is not in items.jsonl")
        found[catalogue.row_of[line["item"]]] = line
    return found


def brief(line: dict) -> str:
    """An item in a few words: its first two facts, or its text."""
    return " ".join([*map(str, line.get("facts", {}).values())][:2]) or line["text"].rstrip(".")


def retell(window: list[dict], before: str | None) -> str:
    """The rule by which paragraphs are taught: what the window holds, and what the paragraph before told first."""
    earlier = re.match(r"Lately (.*?)(; before|\.$)", before or "")
    return f"Lately {', '.join(map(brief, window))}" + (f"; before {earlier[1]}." if earlier else ".")


def profile(paragraph: str) -> str:
    """The rule by which profiles are taught: the words that the paragraph has most often."""
    words = re.findall(r"\w{3,}", paragraph.replace("Lately", "").replace("before", ""))
    counts = Counter(words)
    return f"Likes {' and '.join(sorted(counts, key=lambda w: (-counts[w], words.index(w)))[:2])}."


class Lessons:
    """The samples: prompts of summarize.py with the replies that are taught."""

    def __init__(self, options, data, prompts, texts: dict[str, str], truth: dict[int, dict]):
        self.options, self.prompts, self.texts, self.truth = options, prompts, texts, truth
        self.rows = sorted(truth)
        summaries = [truth[row]["text"] if row in truth else None for row in range(len(data.catalogue.ids))]
        self.story = srec.Story(texts, data.catalogue, {}, summaries, {})

    def sample(self, number: int, step: int) -> tuple[int, list, str]:
        """(which prompt, its parts, the reply) of a sample; the windows are drawn anew in each step."""
        row, kind = self.rows[number // KINDS], number % KINDS
        if kind == 0:
            catalogue = self.prompts.catalogue
            return 0, srec.item_prompt(self.texts, "both", catalogue, row), f"Summary: {self.truth[row]['text']}"
        rng = np.random.default_rng([self.options.seed, step, number])
        *earlier, window = rng.choice(self.rows, size=(3, self.options.window)).tolist()
        before, told = None, rng.choice([0, 1, 2, 2])  # windows before this one: none, one, more
        for items in earlier[:told]:
            before = retell([self.truth[item] for item in items], before)
        paragraph = retell([self.truth[item] for item in window], before)
        if kind == 2:
            return 1, srec.fill(self.texts["profile"], preference=paragraph), profile(paragraph)
        return 2 + (before is None), self.story.preference_prompt(window, before), paragraph

    def trees(self, numbers: list[int], step: int) -> list[list]:
        """Prompt trees of a batch; what the prompts of one kind begin with is shared."""
        from hanorec.model.prompts import Node, common_length

        trees, samples = [], sorted((self.sample(number, step) for number in numbers), key=lambda sample: sample[0])
        for _, alike in itertools.groupby(samples, key=lambda sample: sample[0]):
            alike = [(self.prompts.whole(parts), reply) for _, parts, reply in alike]
            shared = common_length([node.ids for node, _ in alike], self.prompts.image_token)
            for node, reply in alike:
                root, rest = Node(None, node.ids[:shared]), Node(0, node.ids[shared:], node.images)
                trees.append([root, rest, self.prompts.answer(reply, 1)])
        return trees


def measure(folder: Path, truth: dict[int, dict], taught: list[int], catalogue) -> dict[str, float]:
    """The share of the summaries in a folder that name a fact's value and no other value of that fact, printed for the
    items that were not taught and those that were, beside the share of the most frequent value."""
    summaries = {}
    for line in runs.read_jsonl(folder / "items.jsonl", srec.ITEM, "give a folder that summarize.py wrote"):
        summaries[catalogue.row_of[line["item"]]] = (line["summary"] or "").casefold()
    names = list(dict.fromkeys(name for line in truth.values() for name in line.get("facts", {})))
    if not names:
        raise UserError("no description has facts; --score needs them")
    found = {}
    for name in names:
        rows = [row for row in truth if name in truth[row].get("facts", {})]
        of = {row: str(truth[row]["facts"][name]).casefold() for row in rows}
        words = {value: re.compile(rf"(?<!\w){re.escape(value)}(?!\w)") for value in of.values()}
        named = {row: {v for v, word in words.items() if word.search(summaries.get(row, ""))} for row in rows}
        right = {row: named[row] == {of[row]} for row in rows}
        parts = {"not taught": [r for r in rows if r not in taught], "taught": [r for r in rows if r in taught]}
        shares = {part: float(np.mean([right[r] for r in own])) for part, own in parts.items() if own}
        rest = parts["not taught"]
        guess = max(Counter(of[row] for row in rest).values(), default=0) / max(len(rest), 1)
        told = ", ".join(f"{share:.3f} of {len(parts[part])} {part}" for part, share in shares.items())
        print(f"{name}: {told}; the most frequent value {guess:.3f}")
        found[name] = shares.get("not taught", float("nan"))
    return found


@runs.one_line_errors
def main(argv: list[str] | None = None) -> dict[str, float] | None:
    options = parse(argv)
    texts = srec.read_texts(options.prompts)
    import torch

    import evaluate
    import sft
    from hanorec.model import mllm, packing

    data = evaluate.Data(options.data, options.model, images=options.images, trust=options.trust_remote_code)
    truth = read_descriptions(options.descriptions, data.catalogue)
    if options.score:
        made = runs.read_run(options.out, ["teach"])["options"]
        taught = set(taught_items(len(data.catalogue.ids), made["share"], made["seed"]))
        told = runs.read_json(options.score / "manifest.json", srec.MANIFEST, "give a folder that summarize.py wrote")
        if told.get("made_by", {}).get("weights") != runs.weights_hash(options.out):
            print(f"note: {options.score} was written by another model than {options.out}")
        return measure(options.score, truth, taught, data.catalogue)
    runs.check_out(options.out, "teach")
    tiny = data.backbone == mllm.TINY
    options.model, options.tune = data.backbone, options.tune or ("full" if tiny else "lora")
    runs.set_defaults(
        options, **(TINY_RECIPE if tiny else RECIPE), **sft.LORA, no_pack=False, attn="sdpa", eval_limit=0
    )
    options.dropout, options.blank_images, options.start = 0.0, False, None
    mixed = options.tune == "full" and options.dtype != "float32" and torch.cuda.is_available()
    accelerator = runs.start_accelerator("bf16" if mixed else "no", options.report_to, options.out)

    taught = [row for row in taught_items(len(data.catalogue.ids), options.share, options.seed) if row in truth]
    prompts = packing.load_prompts(data.source, data.catalogue, trust=data.trust)
    lessons = Lessons(options, data, prompts, texts, {row: truth[row] for row in taught})
    accelerator.print(f"{options.descriptions}: {len(taught)} of {len(data.catalogue.ids)} items are taught")
    steps, _ = training.plan_steps(len(taught) * KINDS, options, accelerator)
    shape = {"processes": accelerator.num_processes, "rank": accelerator.process_index, "seed": options.seed}
    batches = training.micro_batches(len(taught), KINDS, options.batch_size, options.grad_accum, **shape)
    batches = itertools.islice(batches, steps)
    packed = sft.trainable_model(options, data, accelerator)
    torch.manual_seed(options.seed + accelerator.process_index)  # LoRA's dropout
    optimizer = training.adamw(packed, options.lr)
    schedule = training.cosine(optimizer, steps)
    model, optimizer = accelerator.prepare(packed, optimizer)
    parameters = [p for p in packed.parameters() if p.requires_grad]  # others, where they are sharded now

    def load(step: int, numbers: list[list[int]]) -> tuple[int, list[list[int]], list]:
        return step, numbers, [packed.collate(lessons.trees(batch, step), data.catalogue) for batch in numbers]

    hashes = {"data": data.hash(), "lessons": runs.value_hash([texts, sorted(truth.items())])}
    checkpoints.check(options, accelerator, **hashes)
    with training.started(options, "teach", accelerator, steps, **hashes) as log:
        done = log.resume(packed, optimizer, prompts.shortened, schedule=schedule)
        for step, numbers, micro in training.loaded(load, batches, done, accelerator.device):
            model.train()
            rate = schedule.get_last_lr()[0]
            loss, norm = sft.take_step(model, micro, parameters, optimizer, schedule, accelerator)
            values, due = {"loss": loss, "grad_norm": norm, "lr": rate}, step % 10 == 0 or step in (1, steps)
            names = partial("samples {}".format, numbers)
            log.step(step, values, sum(map(len, numbers)), f"--lr {options.lr}", names, due)
            log.end_step(step, save=step == steps)
        log.best = {"step": steps}
        weights = training.whole_weights(model, accelerator)
        if accelerator.is_main_process:
            sft.save_weights(packed.model, weights, data, options)
        log.finish()
    return None


if __name__ == "__main__":
    main()
