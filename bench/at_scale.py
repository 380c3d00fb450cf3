"""Work out what a catalogue of a million items needs, from counts and from measured rates: python bench/at_scale.py

Prints the table of docs/scale.md. The operations are those of results.json and one count on fake tensors, which takes
some seconds. Nothing is measured here.
"""

import argparse
import json
import tempfile
from pathlib import Path

import fakes
import full_steps
import operations
import torch

from hanorec.model import families

BACKBONE = "Qwen2.5-VL-3B"
ITEMS, INTERACTIONS, GPUS = 1_000_000, 100_000_000, 64
IMAGES = 5  # in a history
PER_EXAMPLE = 5  # interactions for each training example: the share that tests/scale.py prints
NEIGHBOURS = (41_081, 61.0)  # items of the row "Scaling: neighbours" in RESULTS.md, and seconds on two cores
STEP_SECONDS = 0.43  # of a DPO step of one pair on an H100, docs/performance.md
GIB = 2**30


def tower_tflop(folder: Path) -> float:
    """Count the vision tower's operations for an image of 512 x 512 pixels, in TFLOP."""
    case = full_steps.Case(fakes.BACKBONES[BACKBONE], folder)
    core = case.ours(checkpointing=False).core
    inputs = case.model_inputs([[0]])  # IMAGES images
    pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        return case.count(core, lambda: families.image_tokens(core, pictures))["tflop"] / IMAGES


def hours(tflop: float) -> float:
    """Return the hours of one GPU for these operations, at SHARE of RATE."""
    return tflop * 1e12 / (operations.SHARE * operations.RATE) / 3600


def table(counts: dict, tower: float) -> list[list[str]]:
    """Return the rows (what, amount, how it was worked out).

    Args:
        counts: of results.json: {"tflop", "gib"} by step.
        tower: TFLOP of the vision tower for an image.
    """
    backbone, examples = fakes.BACKBONES[BACKBONE], INTERACTIONS // PER_EXAMPLE
    width = backbone.text["hidden_size"]

    def counted(step: str) -> float:
        return counts[operations.key(BACKBONE, operations.WORKS[step][0])]["tflop"]

    sft, sft_first = counted("SFT, an example's three answers"), counted("SFT, the same with --history-first")
    dpo, dpo_first = counted("DPO, an example's three pairs"), counted("DPO, the same with --history-first")
    tokens, vectors = backbone.image_tokens * width * 2, ITEMS * width * 4
    items, seconds = NEIGHBOURS
    rows = [
        ["training examples", f"{examples:,}", f"one for {PER_EXAMPLE} interactions"],
        ["stored image tokens", f"{ITEMS * tokens / 1e12:.2f} TB", f"{backbone.image_tokens} tokens x {width}, bf16"],
        ["encoding the images once", f"{hours(ITEMS * tower):.1f} GPU h", f"{tower:.2f} TFLOP an image"],
        ["a file of item vectors", f"{2 * vectors / GIB:.1f} GiB", f"text and image, {width} float32 each"],
        [
            "neighbours for lambda",
            f"{(ITEMS / items) ** 2 * seconds / 3600:.1f} h",
            f"{items:,} items take {seconds} s on two cores; grows with the square",
        ],
    ]
    works = {
        "an epoch of SFT": (sft, "three answers behind two prompts"),
        "the same SFT with --history-first": (sft_first, "one history"),
        "the same SFT, live images": (sft + IMAGES * tower, f"{IMAGES} distinct images"),
        "the reference, once": (counted("evaluation, ten candidates"), "at most an evaluation of ten candidates"),
        "an epoch of DPO, all kinds of pairs": (dpo, "three pairs behind two prompts"),
        "the same DPO with --history-first": (dpo_first, "one history"),
        "the same DPO, live images": (dpo + IMAGES * tower, f"{IMAGES} distinct images"),
    }
    for name, (tflop, reason) in works.items():
        total = hours(examples * tflop)
        rows.append(
            [name, f"{total:,.0f} GPU h", f"{tflop:.1f} TFLOP an example ({reason}); {total / GPUS:.1f} h on {GPUS}"]
        )
    slow = examples * 3 * STEP_SECONDS / 3600
    rows.append(
        ["an epoch of DPO at the measured step", f"{slow:,.0f} GPU h", f"{STEP_SECONDS} s a pair, one pair a step"]
    )
    return [["what", "amount", "worked out from"], *rows]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    counts = json.loads((Path(__file__).parent / "results.json").read_text())["operations"]["counts"]
    with tempfile.TemporaryDirectory() as folder:
        print(operations.markdown(table(counts, tower_tflop(Path(folder)))))


if __name__ == "__main__":
    main()
