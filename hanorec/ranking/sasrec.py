"""Train SASRec on a data folder and score the candidates. evaluate.py then shows it in every results table.

    python -m hanorec.ranking.sasrec --data data/ml-1m      # -> data/ml-1m/sasrec/
    python -m hanorec.ranking.sasrec --data data/ml-1m --seed 2 --out data/ml-1m/sasrec-2   # a second seed

SASRec (Kang and McAuley 2018, arXiv 1808.09781) predicts the next item from item ids alone, with causal self-attention
over the user's whole sequence. Here the loss is the cross-entropy over all items at every position. The epoch with the
best NDCG@3 on validation is kept. Writes config.json, predictions.jsonl (test), those of the other splits, such as
val_predictions.jsonl, and the weights, with which hanorec.recommend chooses items for the model.
"""

if __name__ == "__main__":
    from hanorec.run import interrupts

    interrupts.stop_at_once()  # before the other imports

import argparse
import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from hanorec.run.files import UserError, one_line_errors, printable, read_json, replacing, require, write_json
from hanorec.run.options import DATA, Option, Parser, non_negative_int, positive_float, positive_int, probability
from hanorec.run.runs import COMMANDS, check_out, json_options, versions

OPTIONS = {
    "": [
        DATA,
        Option("--out", Path, None, "folder to write; evaluate.py reads <data>/sasrec*", shown="<data>/sasrec"),
    ],
    "model": [
        Option("--width", positive_int, 50, "size of an item's vector"),
        Option("--blocks", positive_int, 2, "number of transformer blocks"),
        Option("--heads", positive_int, 1, "attention heads of a block; they divide --width"),
        Option("--length", positive_int, 50, "maximum number of items that the model sees, the last ones"),
        Option("--dropout", probability, 0.3, "dropout of embeddings and blocks"),
    ],
    "training": [
        Option("--lr", positive_float, 4e-3, "learning rate of Adam"),
        Option("--batch-size", positive_int, 64, "sequences in a batch"),
        Option("--epochs", positive_int, 200, "maximum number of passes over the training users"),
        Option("--patience", positive_int, 10, "stop after so many epochs without a better validation"),
        Option("--seed", non_negative_int, 42, "seed of the weights, the order of sequences and dropout"),
    ],
}


@one_line_errors
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the options, and set --out."""
    parser = Parser(__doc__, OPTIONS)
    options = parser.parse_args(argv)
    if options.width % options.heads:
        parser.error(f"--heads {options.heads} does not divide --width {options.width}")
    options.out = options.out or options.data / "sasrec"
    return options


if __name__ == "__main__":
    parse()  # prints --help and errors before the slow imports

import numpy as np
import torch
from safetensors.torch import save_file

from hanorec.data.folder import DataFolder, Example
from hanorec.ranking.exchange import read_scores, write_predictions
from hanorec.ranking.metrics import ranking_metrics
from hanorec.ranking.sasrec_model import SASRec, next_item_loss, padded
from hanorec.ranking.scoring import target_columns

STAGE = "sasrec"
CONFIG = {"stage": str, "options": dict, "files": dict}  # the fields of config.json that are read, and their types
SCORED_AT_ONCE = 256  # number of examples


def training_windows(sequences: Sequence[Sequence[int]], length: int, rng: np.random.Generator) -> list[Sequence[int]]:
    """Cut the sequences into windows of at most length + 1 items. Each item except a user's first is a target once.

    A window begins with the last item of the window before it. The cuts of long sequences are drawn at random.
    """
    windows = []
    for sequence in sequences:
        last = len(sequence) - 1
        first = length if last <= length else int(rng.integers(1, length + 1))
        cuts = [0, *range(first, last, length), last]
        windows += [sequence[begin : end + 1] for begin, end in itertools.pairwise(cuts) if begin < end]
    return windows


def training_batches(
    sequences: Sequence[Sequence[int]], length: int, batch_size: int, rng: np.random.Generator
) -> Iterator[list[Sequence[int]]]:
    """Yield the windows of an epoch in random order, batch_size at a time."""
    windows = training_windows(sequences, length, rng)
    order = rng.permutation(len(windows))
    for first in range(0, len(order), batch_size):
        yield [windows[number] for number in order[first : first + batch_size]]


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def known_items(example: Example, sequences: dict[str, list[int]]) -> list[int]:
    """Return the items of the example's user before its target: those of the training sequence, then the history.

    If the history begins within the training sequence, the sequence counts up to there.
    """
    sequence, history = sequences.get(example.user, []), example.history
    for begin in range(len(sequence)):
        shared = sequence[begin : begin + len(history)]
        if shared == history[: len(shared)]:
            return sequence[:begin] + history
    return sequence + history


@torch.inference_mode()
def score_candidates(model: SASRec, sequences: dict[str, list[int]], examples: Sequence[Example]) -> np.ndarray:
    """Return the log-probability of each candidate as the next item, after all known items: [R, C]."""
    model.eval()
    device, length = model.items.weight.device, model.positions.num_embeddings
    scores = []
    for first in range(0, len(examples), SCORED_AT_ONCE):
        batch = examples[first : first + SCORED_AT_ONCE]
        known = [known_items(example, sequences)[-length:] for example in batch]
        last = [len(items) - 1 for items in known]
        states = model(padded(known, 0).to(device))[range(len(batch)), last]  # [B, d]
        logps = (states @ model.items.weight.T).log_softmax(-1)  # [B, N]
        candidates = torch.tensor([example.candidates for example in batch], device=device)
        scores.append(logps.gather(1, candidates).cpu())
    return torch.cat(scores).double().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_epoch(model: SASRec, optimizer, batches: Iterator[list[Sequence[int]]]) -> float:
    """Train on the batches. Return the mean of their losses."""
    model.train()
    losses = []
    for windows in batches:
        loss = next_item_loss(model, windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def train(options: argparse.Namespace, data: DataFolder) -> tuple[SASRec, dict]:
    """Train until validation no longer improves.

    The model sees at most one item less than the longest training sequence has, also if --length is larger: the
    vectors of later positions would never be trained, and validation and test would use them.

    Returns (the model of the best epoch, a dict with this `epoch` and its `val_ndcg3`).
    """
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    sequences, validation = data.sequences(), data.examples("val")
    longest = max(map(len, sequences.values()))
    if longest < 2:
        raise UserError(f"{data.folder / 'sequences.jsonl'} has no sequence of two items; prepare more data")
    columns, length = target_columns(validation), min(options.length, longest - 1)
    model = SASRec(len(data.items), options.width, options.blocks, options.heads, length, options.dropout)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, betas=(0.9, 0.98))
    best, weights = {"epoch": 0, "val_ndcg3": -1.0}, {}
    for epoch in range(1, options.epochs + 1):
        batches = training_batches([*sequences.values()], length, options.batch_size, rng)
        loss = train_epoch(model, optimizer, batches)
        scores = score_candidates(model, sequences, validation)
        if not np.isfinite(scores).all():
            raise UserError("SASRec's scores are not finite; lower --lr")
        metric = float(ranking_metrics(scores, columns)["NDCG@3"].mean())
        if metric > best["val_ndcg3"]:
            best = {"epoch": epoch, "val_ndcg3": metric}
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        print(f"epoch {epoch}: loss {loss:.3f}, validation NDCG@3 {metric:.4f}", flush=True)
        if epoch - best["epoch"] >= options.patience:
            break
    model.load_state_dict(weights)
    return model, best


# ---------------------------------------------------------------------------------------------------------------------
# Files


def predictions_name(split: str) -> str:
    """Return the name of a split's predictions, as evaluate.py names those of a run."""
    return "predictions.jsonl" if split == "test" else f"{split}_predictions.jsonl"


def training_command(data: DataFolder, out: Path, options: dict) -> str:
    """Return the command that trains a SASRec of these options again. options: those of its config.json."""
    words = ["--data", data.folder, "--out", out]
    for option in itertools.chain(OPTIONS["model"], OPTIONS["training"]):
        if option.attribute in options:
            words += [option.name, options[option.attribute]]
    return f"{COMMANDS[STAGE]} {shlex.join(map(str, words))}"


def trained_folders(data: DataFolder, split: str) -> list[dict[int, Path]]:
    """Return the folders <data>/sasrec* that were trained on this data: by seed, for each set of options.

    If the data folder was prepared again since training, or a folder lacks the split's predictions, print so.

    Raises:
        UserError: a folder is not of this script, or two folders have equal options and seeds.
    """
    folders: dict[str, dict[int, Path]] = {}
    for path in sorted(data.folder.glob("sasrec*/config.json")):
        folder, remedy = path.parent, f"move or delete {path.parent}"
        config = read_json(path, CONFIG, remedy)
        options = require(config["options"], {"seed": int}, str(path), remedy)
        if config["stage"] != STAGE:
            raise UserError(f"{path} is of {config['stage']}, not of {COMMANDS[STAGE]}; {remedy}")
        fault = None
        if config["files"] != data.manifest["files"]:
            fault = "was trained on other data"
        elif not (folder / predictions_name(split)).exists():
            fault = f"has no {predictions_name(split)}"
        if fault:
            command = training_command(data, folder, options)
            print(printable(f"{folder} {fault} and is left out; train it again with {command}, or delete it"))
            continue
        compared = {name: value for name, value in options.items() if name not in ("seed", "out", "data")}
        by_seed = folders.setdefault(json.dumps(compared, sort_keys=True), {})
        other = by_seed.setdefault(options["seed"], folder)
        if other != folder:
            raise UserError(f"{other} and {folder} have the same options and the seed {options['seed']}; delete one")
    return [*folders.values()]


def trained_scores(data: DataFolder, split: str, examples: Sequence[Example]) -> dict[str, list[np.ndarray]]:
    """Return the scores [R, C] of each SASRec of `trained_folders`, by row of the results.

    A row has the seeds of one set of options.
    """
    groups = trained_folders(data, split)
    rows = {}
    for number, by_seed in enumerate(groups, 1):
        name = "SASRec" if len(groups) == 1 else f"SASRec {number}"
        paths = [folder / predictions_name(split) for folder in by_seed.values()]
        scores = [read_scores(path, data.items.ids, examples)[0] for path in paths]
        rows[name if len(scores) == 1 else f"{name} ({len(scores)} seeds)"] = scores
    return rows


@one_line_errors
def main(argv: list[str] | None = None) -> dict:
    options = parse(argv)
    data = DataFolder(options.data)
    check_out(options.out, STAGE)
    splits = {split: data.examples(split) for split in data.evaluated()}
    model, best = train(options, data)
    sequences = data.sequences()
    with replacing(options.out) as new:
        new.mkdir()
        for split, examples in splits.items():
            scores = score_candidates(model, sequences, examples)
            write_predictions(new / predictions_name(split), data.items.ids, examples, scores, None)
        files = data.manifest["files"]
        config = {"stage": STAGE, "options": json_options(options), "files": files, **best, "versions": versions()}
        save_file(model.state_dict(), new / "model.safetensors")
        write_json(new / "config.json", config)
    print(printable(f"{options.out}: epoch {best['epoch']}, validation NDCG@3 {best['val_ndcg3']:.4f}"))
    return best


if __name__ == "__main__":
    main()
