"""The options of the scripts, as tables: each option's name, type, default, help and origin stand in one place.

An option gets its value in this order: from the command line; from the run before, if it is inherited; from its
default, which may be another one for the tiny backbone.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hanorec.run.files import printable

SAME = object()  # the tiny backbone has the same default


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: as it is typed, `--lr`.
        kind: a function from text to the value; a list of choices; or bool for a switch.
        default: the value without the option; where the paper gives one, the paper's.
        help: one line, with the unit. The default is added to it in brackets.
        tiny: the default for the tiny backbone.
        shown: text for the brackets, where the default alone says too little.
        inherited: taken from the config of the run before.
        nargs, metavar, dest: as argparse has them.
    """

    name: str
    kind: Callable | list
    default: object
    help: str
    tiny: object = SAME
    shown: str | None = None
    inherited: bool = False
    nargs: str | None = None
    metavar: str | None = None
    dest: str | None = None

    @property
    def attribute(self) -> str:
        return self.dest or self.name.removeprefix("--").replace("-", "_")

    @property
    def late(self) -> bool:
        """Whether the value depends on the backbone or on the run before."""
        return self.inherited or self.tiny is not SAME

    def settings(self) -> dict:
        """The arguments of argparse's add_argument."""
        shown = self.shown
        if shown is None and self.default is not None and self.kind is not bool:
            shown = words(self.default) + (f"; tiny: {words(self.tiny)}" if self.tiny is not SAME else "")
        settings = {"help": self.help + (f" [{shown}]" if shown else ""), "dest": self.attribute}
        settings["default"] = None if self.late else self.default
        if self.kind is bool:
            return settings | {"action": "store_true"}
        if isinstance(self.kind, list):
            return settings | {"choices": self.kind, "nargs": self.nargs}
        return settings | {"type": self.kind, "nargs": self.nargs, "metavar": self.metavar}


Table = dict[str, list[Option]]  # by the title of their group in --help; "" for none


def words(value) -> str:
    """An option's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and answers a mistake in one line.

    Args:
        doc: the script's docstring, shown by --help as it stands.
        tables: the options, by group.
    """

    def __init__(self, doc: str, tables: Table):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        for title, options in tables.items():
            group = self.add_argument_group(title) if title else self
            for option in options:
                group.add_argument(option.name, **option.settings())

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def complete(
    options: argparse.Namespace,
    tables: Table,
    tiny: bool,
    before: dict | None = None,
    source: Path | None = None,
    further: Sequence[str] = (),
) -> None:
    """Give every option that is still None its value: of the run before if it is inherited, else its default.

    Args:
        tiny: whether the backbone is the tiny one.
        before: the options of the run before, as its config.json has them.
        source: the folder of that run, for the line that prints what was inherited.
        further: names in `before` to inherit that are no options of this script.
    """
    late = [option for group in tables.values() for option in group if option.late]
    shown = []
    for name in [*further, *(option.attribute for option in late if option.inherited)]:
        value = (before or {}).get(name)
        if getattr(options, name, None) is None:
            setattr(options, name, value)
            shown += [f"{name.replace('_', '-')} {words(value)}"] if value is not None else []
    if shown and int(os.environ.get("RANK", 0)) == 0:
        print(printable(f"from {source}: {', '.join(shown)}"))
    for option in late:
        if getattr(options, option.attribute) is None:
            setattr(options, option.attribute, option.tiny if tiny and option.tiny is not SAME else option.default)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def bounded(kind: type, low: float, high: float = math.inf, open_below: bool = False) -> Callable:
    """An option's type: a number with low <= number < high (low < number if open_below)."""

    def parse(text: str):
        value = kind(text)
        above = low < value if open_below else low <= value
        if not (above and value < high):
            limits = f"from {low} {'excluded ' * open_below}to below {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse names it if the text is no number
    return parse


positive_int, non_negative_int = bounded(int, 1, 2**31), bounded(int, 0, 2**31)
positive_float, non_negative_float = bounded(float, 0, 1e36, open_below=True), bounded(float, 0, 1e36)
probability = bounded(float, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Options of several scripts

# Never inherited: a run folder may come from somebody else
TRUST = Option("--trust-remote-code", bool, False, "run the backbone's own Python code; each command needs it anew")
DTYPE = Option("--dtype", ["auto", "float32", "bfloat16"], "auto", "auto: bfloat16 on a GPU, else float32")


IMAGES_HELP = "image tokens read from the data folder, or computed by the vision tower in each step"
RESUME_HELP = (
    "auto: an unfinished run in --out continues, a finished one is trained anew; never: refuse an unfinished run"
)
ATTENTIONS = ["sdpa", "flash_attention_2", "flex_attention"]
STOPPING = [
    Option("--resume", ["auto", "never"], "auto", RESUME_HELP),
    Option("--save-every", positive_int, 500, "optimizer steps between checkpoints; each validation makes one too"),
    Option("--keep", positive_int, 2, "checkpoints kept, the last ones"),
]


def training_options(inherits: Sequence[str] = (), **defaults: tuple) -> Table:
    """The options of every training stage.

    Args:
        inherits: names of the options that the stage takes from the run before, as attributes.
        defaults: of the options that differ between stages: (default, the tiny backbone's default).
    """

    def option(name: str, kind, default, help: str, **more) -> Option:
        attribute = name.removeprefix("--").replace("-", "_")
        if attribute in defaults:
            default, more["tiny"] = defaults[attribute]
        return Option(name, kind, default, help, inherited=attribute in inherits, **more)

    lora = [
        option("--lora-rank", positive_int, 8, "rank of the LoRA matrices"),
        option("--lora-alpha", positive_int, 32, "LoRA's scale times its rank"),
        option("--lora-dropout", probability, 0.05, "dropout before LoRA"),
        option("--quantize", ["4bit"], None, "keep the frozen base in 4 bits (needs bitsandbytes)"),
    ]
    training = [
        option("--lr", positive_float, 1e-4, "peak learning rate of AdamW, cosine to 0"),
        option("--epochs", positive_int, 5, "passes over the training examples"),
        option("--max-steps", positive_int, None, "at most so many optimizer steps, warm-up not counted"),
        option("--batch-size", positive_int, 2, "samples in a micro-batch"),
        option("--grad-accum", positive_int, 8, "micro-batches in an optimizer step"),
        option("--max-length", positive_int, 4096, "most tokens of a prompt with its answer"),
        option("--gradient-checkpointing", bool, False, "less memory, a third more time"),
        option("--attn", ATTENTIONS, "sdpa", "attention; all but sdpa need --no-pack"),
        option("--no-pack", bool, False, "one plain forward for each answer, slower"),
        option("--images", ["stored", "live"], None, IMAGES_HELP, shown="stored, if they are"),
        DTYPE,
        option("--eval-limit", non_negative_int, 0, "validation examples in an epoch; 0: all"),
        TRUST,
        option("--report-to", str, None, "a tracker that accelerate knows: tensorboard, wandb, ...", metavar="NAME"),
        option("--seed", non_negative_int, 42, "of order, new weights, dropout and noise"),
    ]
    titles = ("LoRA (the paper: rank 8, alpha 32, dropout 0.05)", "training", "stopping and going on")
    return dict(zip(titles, (lora, training, STOPPING), strict=True))
