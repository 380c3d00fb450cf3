"""Count operations and memory of steps at full size, on fake tensors: python bench/operations.py [--json FILE]

Counts floating-point operations and the peak of the GPU's memory for this project and for TRL's own loss. Needs neither
weights nor memory nor a GPU, but about an hour on one core. TRL's columns stay empty if TRL is not installed.

Both systems: bf16, LoRA of rank 8 with dropout .05, AdamW, 5 images of 512 x 512 pixels in a history, ten candidates.
"""

import argparse
import json
import tempfile
import textwrap
from pathlib import Path

import fakes
import full_steps
import measure
import trl_side
from torch import nn

from hanorec.run.files import write_json

RATE = 989.4e12  # dense bf16 operations per second of an H100 SXM and of an H200, by their data sheet
SHARE = 0.45  # of this rate
CARDS = {24: 23.5, 48: 47.5, 80: 79.2, 141: 139.8}  # GB in a card's name: GiB that CUDA reports
SPARED = 0.05, 1.0  # of a card's memory: the part lost to fragments, and GiB for CUDA itself


# ---------------------------------------------------------------------------------------------------------------------
# Whole backbones


def at_full_depth(folder: Path, name: str, work: str, **settings) -> dict:
    """Count a step of a backbone: its method `work` of Case. Returns TFLOP, and GiB beyond the weights.

    All layers of a kind cost the same. So the step runs on a backbone with few layers, and again with one more layer
    of each kind, and the difference counts for all missing layers.
    """
    backbone = fakes.BACKBONES[name]
    whole, start = fakes.depths(backbone), [2, 1, 2]
    points = [start, [3, 1, 2]]
    if work.startswith("trl") or settings.get("pack") is False:  # with the vision tower
        points += [[2, 2, 2], [2, 1, 3]] if whole[1] else [[2, 1, 3]]
    counts = []
    for point in points:
        case = full_steps.Case(fakes.shortened(backbone, *point), folder)
        counts.append(getattr(case, work)(**settings))
    result = dict(counts[0])
    for point, count in zip(points[1:], counts[1:], strict=True):
        (kind,) = [number for number in range(3) if point[number] != start[number]]
        missing = (whole[kind] - start[kind]) / (point[kind] - start[kind])
        result = {unit: value + missing * (count[unit] - counts[0][unit]) for unit, value in result.items()}
    return result


def weights_gib(name: str, four_bit: bool = False) -> float:
    """GiB of a backbone's weights in bf16. With four_bit, the language model's linear layers take 4.5 bits a weight."""
    with tempfile.TemporaryDirectory() as folder:
        model = fakes.meta_model(fakes.make_data(Path(folder), fakes.BACKBONES[name], 1)[0])
    size = sum(weight.numel() * 2 for weight in model.parameters())
    if four_bit:
        linear = (module for module in model.get_decoder().modules() if isinstance(module, nn.Linear))
        size -= sum(module.weight.numel() for module in linear) * (2 - 0.5 - 4 / 64)
    return size / 2**30


CHECKPOINTED = {"checkpointing": True}
TRL_PAIR = ("trl_dpo", CHECKPOINTED)
ALL_KINDS = CHECKPOINTED | {"kinds": ["rank", "yes", "no"]}
# By case: the method of Case and its arguments for this project; the same for the other system, or None; how often the
# other system runs it; the goals of the ratios of operations and of memory
WORKS = {
    "DPO, a pair": (("dpo", CHECKPOINTED), TRL_PAIR, 1, (4, 2)),
    "DPO, a pair, no checkpointing": (
        ("dpo", {"checkpointing": False}),
        ("trl_dpo", {"checkpointing": False}),
        1,
        (4, 2),
    ),
    "DPO, an example's three pairs": (("dpo", ALL_KINDS), ("trl_dpo", ALL_KINDS), 1, (4, 2)),
    "DPO, the same with --history-first": (
        ("dpo", ALL_KINDS | {"history_first": True}),
        ("trl_dpo", ALL_KINDS),
        1,
        (4, 2),
    ),
    "S-DPO, nine rejected": (("dpo", CHECKPOINTED | {"rejected": 9}), TRL_PAIR, 9, (15, None)),
    "SFT, an example's three answers": (("sft", CHECKPOINTED), ("trl_sft", CHECKPOINTED), 1, (None, None)),
    "SFT, the same with --history-first": (
        ("sft", CHECKPOINTED | {"history_first": True}),
        ("trl_sft", CHECKPOINTED),
        1,
        (None, None),
    ),
    "evaluation, ten candidates": (("evaluation", {}), ("evaluation", {"pack": False}), 1, (None, None)),
}
BATCHES = {"bf16": [("dpo", CHECKPOINTED), ("dpo", CHECKPOINTED | {"batch": 2})]}
BATCHES["4 bit"] = [(work, settings | {"four_bit": True}) for work, settings in BATCHES["bf16"]]


def key(name: str, call: tuple[str, dict]) -> str:
    return f"{name}, {call[0]} {json.dumps(call[1], sort_keys=True)}"


def pairs_that_fit(weights: float, one: dict, two: dict, card: float) -> int:
    """The largest batch of pairs whose peak fits a card.

    Args:
        weights: GiB of the weights. one, two: the counts of a step of one pair and of two. card: GiB of the card.
    """
    usable, each = card * (1 - SPARED[0]) - SPARED[1] - weights, two["gib"] - one["gib"]
    return int((usable - one["gib"]) / each) + 1 if one["gib"] <= usable else 0


def markdown(lines: list[list[str]]) -> str:
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def steps_table(results: dict) -> str:
    """Markdown: operations and memory of each step that was counted."""
    head = ["backbone, step", "this project [TFLOP]", "other [TFLOP]", "ratio", "goal"]
    lines = [[*head, "this project [GiB]", "other [GiB]", "ratio", "goal"]]
    for name, weights in results["weights"].items():
        for work, (call, other_call, times, goals) in WORKS.items():
            ours, other = (results["counts"].get(key(name, which)) for which in (call, other_call))
            if not ours:
                continue
            cells = [
                f"{name}, {work}",
                f"{ours['tflop']:.1f}",
                "",
                "",
                "",
                f"{weights['bf16'] + ours['gib']:.1f}",
                "",
                "",
                "",
            ]
            if other:
                cells[2:5] = (
                    f"{other['tflop'] * times:.1f}",
                    f"**{other['tflop'] * times / ours['tflop']:.1f}**",
                    f"{goals[0] or ''}",
                )
                gib = [weights["bf16"] + count["gib"] for count in (ours, other)]
                cells[6:9] = f"{gib[1]:.1f}", f"**{gib[1] / gib[0]:.1f}**", f"{goals[1] or ''}"
            lines.append(cells)
    return markdown(lines)


def cards_table(results: dict) -> str:
    """Markdown: the pairs of a step that fit each card, and the time of a pair at SHARE of RATE."""
    cards = [f"pairs in {card} GB" for card in CARDS]
    lines = [
        ["backbone", "weights [GiB]", "first pair [GiB]", "further pair [GiB]", *cards, "ms a pair", "TRL, ms a pair"]
    ]
    for name, weights in results["weights"].items():
        trl = results["counts"].get(key(name, TRL_PAIR))
        for kind, calls in BATCHES.items():
            one, two = (results["counts"].get(key(name, call)) for call in calls)
            if not (one and two):
                continue
            fitting = [str(pairs_that_fit(weights[kind], one, two, card)) for card in CARDS.values()]
            sizes = [f"{value:.1f}" for value in (weights[kind], one["gib"], two["gib"] - one["gib"])]
            seconds = [f"{count['tflop'] * 1e15 / SHARE / RATE:.0f}" if count else "" for count in (one, trl)]
            lines.append([f"{name}, {kind}", *sizes, *fitting, *seconds])
    return markdown(lines)


ABOUT = """Counted on fake tensors of the published sizes in bf16; nothing ran on a GPU (commit {commit}, torch
{torch}, transformers {transformers}, PEFT {peft}, TRL {trl}). Both systems train LoRA of rank 8 with dropout .05 by
AdamW, with activation checkpointing unless a row says otherwise. Below the LoRA of this project's DPO lies SFT's
frozen one. A prompt has 5 images of 262,144 pixels and ten titles. This project's step is `take_step` of
`dpo_hano.py` with noise, the step of `sft.py`, or the packed forward on stored image tokens. TRL's steps are
`DPOTrainer._compute_loss` (policy and reference, with the vision tower) and the loss of its `SFTTrainer`, with the
head for the answers alone as on a GPU. For S-DPO the other system is nine pairs of TRL, one after the other; an
example's three pairs are one batch, which TRL pads to the longest; for the evaluation it is one forward with the
vision tower for each of the 30 answers. Attention counts as the full square in both systems, and what checkpointing
computes again counts. A step was counted with few layers, and again with one more layer of each kind; the
difference counts for each missing layer. GiB are the weights (also of the vision tower, which this project's step
does not run) and the peak of all tensors. Workspaces of kernels and fragments are not in it."""
CARDS_ABOUT = """With checkpointing. A card's memory is used up to 95%, less 1 GiB. In 4 bits the language
model's linear layers are counted as bitsandbytes keeps them (NF4, one float32 scale for 64 weights), computed in
bf16. The milliseconds are the operations at 45% of an H100's and H200's 989 TFLOP/s: a calculation, not a
measurement."""


def report(results: dict) -> str:
    """The section of RESULTS.md."""
    facts = {"commit": results["commit"], **results["versions"]}
    texts = ABOUT.format(**facts), CARDS_ABOUT
    about, cards = (textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False) for text in texts)
    return f"{about}\n\n{steps_table(results)}\n\n{cards}\n\n{cards_table(results)}"


def counts(path: Path) -> dict:
    """The counts in results.json with their commit and versions, none if it has none."""
    found = json.loads(path.read_text()).get("operations") if path.exists() else None
    return found if found and "commit" in found else {}


def save(path: Path, results: dict) -> None:
    """Write the counts into a JSON file, which keeps what else it has."""
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | {"operations": results})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=fakes.BACKBONES, default=list(fakes.BACKBONES))
    parser.add_argument("--json", type=Path, help="write into it; counts of this commit are not made again")
    options = parser.parse_args(argv)
    results = counts(options.json) if options.json else {}
    machine = measure.machine()
    facts = {"commit": machine["commit"], "versions": machine["versions"]}
    if facts != {name: results.get(name) for name in facts}:
        results = {"counts": {}, "weights": {}} | facts  # what other code counted may differ
    calls = [call for work in WORKS.values() for call in work[:2]] + [
        call for pair in BATCHES.values() for call in pair
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in options.backbones:
            results["weights"][name] = {"bf16": weights_gib(name), "4 bit": weights_gib(name, four_bit=True)}
            for call in calls:
                if key(name, call) in results["counts"] or (call[0].startswith("trl") and not trl_side.installed()):
                    continue
                results["counts"][key(name, call)] = at_full_depth(Path(folder), name, call[0], **call[1])
                if options.json:
                    save(options.json, results)
    print(report(results))


if __name__ == "__main__":
    main()
