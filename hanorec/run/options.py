"""The options of the scripts, as tables: name, type, defaults and help of each option, and whether it is inherited.

The value of an option comes from the command line. If it is not given there, an inherited option takes the value of
the run before. Otherwise the option has its default, which may differ for the tiny backbone.
"""

import argparse
import difflib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hanorec.run.files import print_main

SAME = object()  # the tiny backbone has the same default


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: with its dashes, such as `--lr`.
        kind: a function that converts text to the value, a list of choices, or bool for a switch.
        default: the value if the option is not given; the paper's value if the paper has one.
        help: one line, with the unit. --help adds the default in brackets.
        tiny: the default for the tiny backbone.
        shown: text to show in the brackets instead of the default.
        inherited: if the option is not given, take its value from the config of the run before.
        nargs, const, metavar, dest: passed to argparse.
    """

    name: str
    kind: Callable | list
    default: object
    help: str
    tiny: object = SAME
    shown: str | None = None
    inherited: bool = False
    nargs: str | None = None
    const: object = None
    metavar: str | None = None
    dest: str | None = None

    @property
    def attribute(self) -> str:
        """The name of the value in the parsed options."""
        return self.dest or self.name.removeprefix("--").replace("-", "_")

    @property
    def late(self) -> bool:
        """Whether the default depends on the backbone or on the run before, so that `complete` must set it."""
        return self.inherited or self.tiny is not SAME

    def settings(self) -> dict:
        """Return the arguments for argparse's add_argument."""
        shown = [self.shown] if self.shown else []
        if not shown and self.kind is not bool and (self.tiny is not SAME or self.default not in (None, [])):
            shown.append("none" if self.default is None else words(self.default))
            if self.tiny is not SAME:
                shown.append(f"tiny: {words(self.tiny)}")
        if self.inherited:
            shown.append("from the run before")
        settings = {"help": self.help + (f" [{'; '.join(shown)}]" if shown else ""), "dest": self.attribute}
        settings["default"] = None if self.late else self.default
        if self.kind is bool:
            return settings | {"action": "store_true"}
        if isinstance(self.kind, list):
            return settings | {"choices": self.kind, "nargs": self.nargs}
        return settings | {"type": self.kind, "nargs": self.nargs, "const": self.const, "metavar": self.metavar}


Table = dict[str, list[Option]]  # by title of a group in --help; "" for options without a group


def words(value) -> str:
    """Return the value of an option as the user would type it."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class Parser(argparse.ArgumentParser):
    """A parser that accepts no abbreviations and prints an error in one line.

    Args:
        doc: the script's docstring, which --help prints without changes.
        tables: the options, by group.
    """

    def __init__(self, doc: str, tables: Table):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        for title, options in tables.items():
            group = self.add_argument_group(title) if title else self
            for option in options:
                group.add_argument(option.name, **option.settings())

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        if near:
            message += f"; did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def complete(
    options: argparse.Namespace, tables: Table, tiny: bool, before: dict | None = None, source=None, further=()
) -> None:
    """Set every late option that is None: to the value of the run before if it is inherited, else to its default.

    Print the inherited values.

    Args:
        tiny: whether the backbone is the tiny one.
        before: the options in config.json of the run before.
        source: path of the run before.
        further: a list of more names to inherit from `before`. They are not options of this script.
    """
    late = [option for option in itertools.chain(*tables.values()) if option.late]
    inherited = []
    for name in [*further, *(option.attribute for option in late if option.inherited)]:
        value = (before or {}).get(name)
        if getattr(options, name, None) is None:
            setattr(options, name, value)
            if value is not None:
                inherited.append(f"{name.replace('_', '-')} {words(value)}")
    if inherited:
        print_main(f"from {source}: {', '.join(inherited)}")
    for option in late:
        if getattr(options, option.attribute) is None:
            setattr(options, option.attribute, option.tiny if tiny and option.tiny is not SAME else option.default)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def bounded(kind: type, low: float, high: float, bounds: str = "[)") -> Callable:
    """Return a type for an option: a number between low and high. bounds: "[" includes low, "]" includes high."""
    includes_low, includes_high = bounds[0] == "[", bounds[1] == "]"

    def parse(text: str):
        value = kind(text)
        if not (low < value < high or (includes_low and value == low) or (includes_high and value == high)):
            above, below = "<=" if includes_low else "<", "<=" if includes_high else "<"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {low} {above} number {below} {high}")
        return value

    parse.__name__ = kind.__name__  # argparse prints this name if the text is no number
    return parse


positive_int, non_negative_int = bounded(int, 1, 2**31), bounded(int, 0, 2**31)
positive_float, non_negative_float = bounded(float, 0, 1e36, "()"), bounded(float, 0, 1e36)
probability = bounded(float, 0, 1)


def sign(text: str) -> int:
    """A type for an option: 1 or -1."""
    if text not in ("1", "-1"):
        raise argparse.ArgumentTypeError(f"{text} is no sign; give 1 or -1")
    return int(text)


# ---------------------------------------------------------------------------------------------------------------------
# Options of several scripts

DATA = Option("--data", Path, Path("data/demo"), "data folder")
ENCODING = Option("--model", str, None, "backbone, if the data folder is encoded for several")
TUNE = Option("--tune", ["lora", "full"], None, "what is trained", shown="lora; tiny: full")
# Never inherited: a run folder may come from somebody else
TRUST = Option("--trust-remote-code", bool, False, "run the backbone's own Python code; never inherited")
DTYPE = Option("--dtype", ["auto", "float32", "bfloat16"], "auto", "precision; auto: bfloat16 on a GPU, else float32")

IMAGES_HELP = "stored: read image tokens from the data folder; live: compute them in each step"
RESUME_HELP = "auto: continue an unfinished run in --out; never: refuse it"
OVERWRITE_HELP = "train again and replace a finished run in --out; runs that started from it can then not be used"
ATTENTIONS = ["sdpa", "flash_attention_2", "flex_attention"]
TRAINING = {
    "LoRA (the paper: rank 8, alpha 32, dropout 0.05)": [
        Option("--lora-rank", positive_int, 8, "rank of the LoRA matrices"),
        Option("--lora-alpha", positive_int, 32, "scale of LoRA, before the division by its rank"),
        Option("--lora-dropout", probability, 0.05, "dropout before LoRA"),
        Option("--quantize", ["4bit"], None, "keep the frozen base in 4 bits (needs bitsandbytes)"),
    ],
    "training": [
        Option("--lr", positive_float, 1e-4, "peak learning rate of AdamW; it falls to 0 by a cosine"),
        Option("--epochs", positive_int, 5, "passes over the training examples"),
        Option("--max-steps", positive_int, None, "maximum number of optimizer steps; the warm-up does not count"),
        Option("--batch-size", positive_int, 2, "samples in a micro-batch"),
        Option("--grad-accum", positive_int, 8, "micro-batches in an optimizer step"),
        Option("--max-length", positive_int, 4096, "maximum number of tokens of a prompt with its answer"),
        Option("--gradient-checkpointing", bool, False, "use less memory, but a third more time"),
        Option("--attn", ATTENTIONS, "sdpa", "attention implementation; all except sdpa need --no-pack"),
        Option("--no-pack", bool, False, "compute each answer in a forward of its own, which is slower"),
        Option("--images", ["stored", "live"], None, IMAGES_HELP, shown="stored, if they are"),
        DTYPE,
        Option("--eval-limit", non_negative_int, 0, "validation examples in each epoch; 0: all"),
        TRUST,
        Option("--report-to", str, None, "tracker: tensorboard, trackio, wandb, ...", metavar="NAME"),
        Option("--seed", non_negative_int, 42, "seed of the order of samples, new weights, dropout and noise"),
    ],
    "stopping and continuing": [
        Option("--resume", ["auto", "never"], "auto", RESUME_HELP),
        Option("--overwrite", bool, False, OVERWRITE_HELP),
        Option("--save-every", positive_int, 500, "optimizer steps between checkpoints; each validation saves one too"),
        Option("--keep", positive_int, 2, "number of checkpoints to keep, the last ones"),
    ],
}


def training_options(inherits: Sequence[str] = (), **defaults: tuple) -> Table:
    """Return the options of a training stage.

    Args:
        inherits: attribute names of the options that the stage inherits from the run before.
        defaults: (default, default for the tiny backbone) of options that differ between stages, by attribute name.
    """
    unknown = {*inherits, *defaults} - {option.attribute for option in itertools.chain(*TRAINING.values())}
    if unknown:
        raise ValueError(f"no training option has the name {', '.join(sorted(unknown))}; see TRAINING")
    tables: Table = {}
    for title, options in TRAINING.items():
        tables[title] = []
        for option in options:
            default, tiny = defaults.get(option.attribute, (option.default, option.tiny))
            inherited = option.attribute in inherits
            tables[title].append(replace(option, default=default, tiny=tiny, inherited=inherited))
    return tables
