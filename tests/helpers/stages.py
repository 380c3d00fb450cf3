"""Small runs of the stages, and their logs."""

from layouts import lines
from spoilt import refused  # noqa: F401  (tests of the stages import it from here)

import dpo_hano
import sft

SMALL = "--max-steps 1 --batch-size 3 --grad-accum 1 --eval-limit 2".split()


def training(path):
    """The lines of training steps in a metrics.jsonl, without validations."""
    return [line for line in lines(path) if "loss" in line]


def small_sft(data, out, options):
    """Run sft.py with these options, a string. Returns the new run's folder."""
    sft.main(["--data", str(data), "--out", str(out), *options.split()])
    return out


def dpo(sft_run, out, *more):
    """Run dpo_hano.py for three steps on an SFT run. Returns the new run's folder."""
    argv = ["--sft", sft_run, "--out", out, "--max-steps", 3, "--batch-size", 6, "--eval-limit", 8, "--lr", 1e-3, *more]
    dpo_hano.main([str(word) for word in argv])
    return out
