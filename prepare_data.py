"""Prepare raw files as data/<name>/: items, histories with candidates, and each item encoded once for a backbone.

    python prepare_data.py                    # the embedded demo -> data/demo, with a tiny untrained backbone
    python prepare_data.py --dataset movielens --source ml-1m/ --model Qwen/Qwen2.5-VL-3B-Instruct --out data/ml-1m
    python prepare_data.py --out data/ml-1m --encode-only --model llava-hf/llava-v1.6-mistral-7b-hf   # another backbone
    python prepare_data.py --dataset csv --interactions log.csv --items items.csv --model runs/shop/sft --out data/shop

The last command prepares new orders, users and items for a run that exists, so that it recommends without training.
Writes items.jsonl, train.jsonl, val.jsonl, test.jsonl, sequences.jsonl (each user's whole training sequence),
histories.jsonl (each user's whole history), manifest.json and encoded/<backbone>/. All random choices are made here
from --seed, once, and stored.
"""

if __name__ == "__main__":
    from hanorec.run import interrupts

    interrupts.stop_at_once()  # before the other imports

import argparse
import os.path
import sys
from pathlib import Path

from hanorec.data.protocol import Sequences, items_before
from hanorec.data.readers import READERS
from hanorec.run.files import UserError, one_line_errors, printable
from hanorec.run.options import TRUST, Option, Parser, bounded, non_negative_int, positive_int
from hanorec.run.runs import TINY, backbone_for_later_data, is_run, json_options, next_command

TIME_HELP = "csv, recbole: column of times; none: the lines are in order of time"
COLUMNS = [
    Option("--user-column", str, None, "csv, recbole: column of users", shown="user; user_id", metavar="NAME"),
    Option("--item-column", str, None, "csv, recbole: column of items", shown="item; item_id", metavar="NAME"),
    Option("--time-column", str, None, TIME_HELP, shown="timestamp", metavar="NAME"),
    Option("--rating-column", str, None, "csv, recbole: column of ratings", shown="rating", metavar="NAME"),
    Option("--title-column", str, None, "csv, recbole: column of titles", shown="title", metavar="NAME"),
]
OFFICIAL_HELP = "official: 3 history items, 3 positives and 7 negatives; the target is the last positive"
FURTHER_HELP = "also write the test targets among popularity-weighted negatives, or among 99 uniform ones"
TIES_HELP = "order of a user's interactions with equal times: shuffled by --seed, or that of the file"
SPLIT_HELP = "leave-one-out: the last items of each user; user: users 8:1:1"
REPEATS_HELP = "which interaction of a user with the same item counts"
UNTOUCHED_HELP = "keep items without an interaction that counts: they can be recommended, and are in no example"
MODEL_HELP = "hub name or folder of the backbone; a run: its own; tiny: untrained, built here"
SHOW_HELP = "print N rendered examples; if the folder is prepared, do nothing else"
OPTIONS = {
    "source": [
        Option("--dataset", ["demo", *READERS], "demo", "layout of the raw files"),
        Option("--source", Path, None, "folder of the raw files (not for demo and csv)"),
        Option("--images", Path, None, "folder of <item>.jpg, .png or .webp, if it is not in SOURCE (not for demo)"),
        Option("--interactions", Path, None, "csv: table of interactions", metavar="FILE"),
        Option("--items", Path, None, "csv: table of items", metavar="FILE"),
        *COLUMNS,
        Option("--drop-untitled", bool, False, "drop items that the titles do not list"),
        Option("--out", Path, None, "data folder to write", shown="data/<dataset>"),
    ],
    "protocol": [
        Option("--history", positive_int, None, "maximum number of items before the target", shown="5; official: 3"),
        Option("--negatives", positive_int, None, "negatives for each target", shown="9; official: 7"),
        Option("--negative-sampling", ["uniform", "popularity"], "uniform", "how negatives are drawn"),
        Option("--further-tests", ["popularity", "99"], [], FURTHER_HELP, nargs="+"),
        Option("--split", ["leave-one-out", "user"], None, SPLIT_HELP, shown="leave-one-out; hanorec: published"),
        Option("--protocol", ["standard", "official"], "standard", OFFICIAL_HELP),
        Option("--ties", ["shuffle", "input"], "shuffle", TIES_HELP),
        Option("--min-rating", float, None, "drop interactions with lower ratings", shown="keep all"),
        Option("--min-interactions", positive_int, 6, "drop users with fewer interactions"),
        Option("--repeats", ["first", "last", "all"], "first", REPEATS_HELP),
        Option("--keep-untouched", bool, False, UNTOUCHED_HELP),
        Option("--max-windows-per-user", non_negative_int, 10, "training examples of a user, the last ones; 0: all"),
        Option("--seed", non_negative_int, 42, "seed of all random choices"),
    ],
    "encoding": [
        Option("--model", str, None, MODEL_HELP, shown="tiny"),
        Option("--max-pixels", bounded(int, 784, 2**31), None, "pixel limit per image", shown="262144; tiny: 6272"),
        Option("--tokens", ["stored", "live"], "stored", "live: do not store image tokens, compute them in each step"),
        Option("--encode-only", bool, False, "only encode a data folder that exists"),
        TRUST,
    ],
    "": [Option("--show", non_negative_int, 0, SHOW_HELP, metavar="N")],
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the options, and set those that depend on others. `model` stays None if it is not given."""
    parser = Parser(__doc__, OPTIONS)
    options = parser.parse_args(argv)
    options.out, options.run = options.out or Path("data") / options.dataset, None
    if options.model:
        options.model = options.model.rstrip("/") or "/"
        options.run = Path(options.model) if is_run(Path(options.model)) else None
        if options.run:
            options.model = backbone_for_later_data(options.run)
    name = os.path.normpath(options.model or "tiny").strip("/").replace("/", "--")
    if name.startswith("."):  # ../ckpt; readers skip names that begin with a dot
        name = Path(options.model).resolve().name
    options.encoded = options.out / "encoded" / name
    if not options.encode_only:
        check_source(options, parser)
    official, published = options.protocol == "official", options.dataset == "hanorec"
    if (official and (options.history or options.negatives)) or (published and options.split):
        parser.error("do not give --history or --negatives with --protocol official, or --split with --dataset hanorec")
    options.split = options.split or ("published" if published else "leave-one-out")
    options.positives = 3 if official else 1
    options.history = options.history or (3 if official else 5)
    options.negatives = options.negatives or (7 if official else 9)
    shortest = items_before(options) + (2 if options.split == "leave-one-out" else 1)
    if options.min_interactions < shortest:
        parser.error(f"--min-interactions must be at least {shortest} with this --protocol and --split")
    return options


def check_source(options: argparse.Namespace, parser: Parser) -> None:
    """End with a parser error if --dataset needs an option that is missing, or does not use an option that is given."""
    if options.dataset == "csv" and not (options.interactions and options.items):
        parser.error("--dataset csv needs --interactions FILE and --items FILE")
    if options.dataset not in ("demo", "csv") and not options.source:
        parser.error(f"--dataset {options.dataset} needs --source DIR")
    used_by = {"source": {*READERS} - {"csv"}, "images": {*READERS}, "interactions": {"csv"}, "items": {"csv"}}
    used_by |= {option.attribute: {"csv", "recbole"} for option in COLUMNS}
    for name, datasets in used_by.items():
        if getattr(options, name) and options.dataset not in datasets:
            parser.error(f"--{name.replace('_', '-')} does not go with --dataset {options.dataset}; leave it out")


if __name__ == "__main__":
    one_line_errors(parse)()  # --help and mistakes are answered before the slow imports

from functools import partial

import numpy as np
import torch

from hanorec.data.demo import read_demo, read_descriptions
from hanorec.data.folder import FILES, FURTHER_TESTS, DataFolder
from hanorec.data.negatives import negatives_of_splits
from hanorec.data.protocol import build_sequences, example_lines, split_targets
from hanorec.data.summary import picture_warning, summary
from hanorec.model.encoding import Encoding
from hanorec.model.images import check_disk, encode_items
from hanorec.model.load import load_config, load_image_processor, load_model, load_tokenizer, usual_pixels
from hanorec.model.prompts import plain_prompts
from hanorec.model.tiny import build_tiny
from hanorec.ranking.ceiling import CEILING_FILES, write_ceilings
from hanorec.run.files import delete, file_hash, locked, read_json, replacing, value_hash, write_json, write_jsonl
from hanorec.run.progress import progress
from mllm_srec.texts import read_texts, without_words

# Each split has its own stream of random numbers
STREAMS = {"train": 0, "val": 1, "test": 2, "test_hard": 5, "test_popularity": 6, "test_99": 9}
# What was made of the old data, and is deleted when the data are prepared again
OF_OLD_DATA = ["encoded", "sasrec*", *CEILING_FILES, *(f"{name}.jsonl" for name in FURTHER_TESTS)]
# The files of a data folder without manifest.json: an earlier command was interrupted
DATA_FILES = {"images", "tiny", "summaries", "descriptions.jsonl", *OF_OLD_DATA, *(f"{name}.jsonl" for name in FILES)}
# Options that do not change the data files
NOT_DATA = ("model", "run", "encoded", "max_pixels", "tokens", "trust_remote_code", "show", "encode_only", "out")


def check_out(out: Path, dataset: str) -> None:
    """Raise UserError if `out` is the data folder of another dataset, or holds files that are not in DATA_FILES."""
    manifest = out / "manifest.json"
    if manifest.exists():
        source = read_json(manifest, {}, "choose another --out").get("source")
        if source != dataset:
            raise UserError(f"{out} holds the data of {source}; choose another --out")
    elif any(not any(path.match(known) for known in [*DATA_FILES, ".*"]) for path in out.iterdir()):
        raise UserError(f"{out} holds other files; choose another --out")


def write_data(data: Sequences, options: argparse.Namespace, inputs: list[Path]) -> dict:
    """Write the files of a data folder. manifest.json is written last, so a folder without it is unfinished.

    Args:
        inputs: the raw files. The manifest lists their hashes.

    Returns the manifest.
    """
    out = options.out
    targets, training = split_targets(data, options)
    negatives = negatives_of_splits(data, training, options)
    for name, positions in targets.items():
        if not len(positions):
            users = len(data.user_ids)
            raise UserError(f"no {name} examples from {users} users with the split {options.split}; add users")
    (out / "manifest.json").unlink(missing_ok=True)
    for old in [path for pattern in OF_OLD_DATA for path in out.glob(pattern)]:
        delete(old)
    images = [os.path.relpath(path, out) if path else None for path in data.images]
    items = zip(data.item_ids, data.titles, images, strict=True)
    write_jsonl(out / "items.jsonl", ({"item": i, "title": t, "image": p} for i, t, p in items))
    for name in negatives:
        rng, positions = np.random.default_rng([options.seed, STREAMS[name]]), targets[name.split("_")[0]]
        write_jsonl(out / f"{name}.jsonl", example_lines(data, name, positions, negatives[name], options, rng))
    write_jsonl(out / "sequences.jsonl", sequence_lines(data, training))
    write_jsonl(out / "histories.jsonl", data.histories)
    files = ("items", "sequences", "histories", *negatives)
    counts = data.counts | {f"{name}_rows": len(positions) for name, positions in targets.items()}
    manifest = {
        "source": options.dataset,
        "options": {name: value for name, value in json_options(options).items() if name not in NOT_DATA},
        "seed": options.seed,
        "counts": counts,
        "inputs": {str(path): file_hash(path) for path in inputs},
        "files": {f"{name}.jsonl": file_hash(out / f"{name}.jsonl") for name in files},
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def sequence_lines(data: Sequences, training: np.ndarray):
    """Yield the lines of sequences.jsonl. training: [U], number of each user's items that belong to training."""
    for user, first, count in zip(data.user_ids, data.start[:-1], training, strict=True):
        if count:
            yield {"user": user, "items": [data.item_ids[item] for item in data.items[first : first + count]]}


def encode(options: argparse.Namespace) -> str:
    """Write encoded/<backbone>/ of the data folder. If the backbone is `tiny`, build it first. Returns a summary."""
    out, trust, tiny = options.out, options.trust_remote_code, options.model == TINY
    data = DataFolder(out)
    titles = data.items.titles
    source = out / "tiny" if tiny else options.model
    if tiny:
        with replacing(source) as new:
            texts = [*titles, *read_descriptions(out)]
            build_tiny(new, texts, data.manifest["seed"], without_words(read_texts()))
    pixels = options.max_pixels or usual_pixels(options.model, trust)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = load_model(source, dtype, trust=trust).to(device)
    tokenizer, processor = load_tokenizer(source, trust), load_image_processor(source, pixels, trust)
    paths = [out / image if image else None for image in data.items.images]
    pictures = [path for path in paths if path]
    missing = [path for path in pictures if not path.exists()]
    if missing:
        raise UserError(f"{len(missing)} images are missing, the first is {missing[0]}; restore them")
    keep = options.tokens == "stored"
    if pictures and keep:
        check_disk(model, processor, pictures, pixels, out)
    with replacing(options.encoded) as new:
        new.mkdir(parents=True)
        encode_items(
            model, tokenizer, processor, titles, paths, new, partial(progress, desc="encode", unit="batch"), keep
        )
        manifest = {
            "backbone": options.model,
            "max_pixels": pixels,
            "dtype": str(model.dtype).removeprefix("torch."),
            "items": data.manifest["files"]["items.jsonl"],
            "vocabulary": value_hash(tokenizer.get_vocab()),
            "tokens": file_hash(new / "image_tokens.safetensors") if keep else None,
        }
        write_json(new / "manifest.json", manifest)
    return f"for {options.model}, pictures of at most {pixels} pixels, in {options.encoded}"


def show(options: argparse.Namespace) -> None:
    """Print the prompts and answers of the first training examples, as the model sees them."""
    data = DataFolder(options.out)
    encoding = Encoding(data, options.model, trust=options.trust_remote_code)
    prompts = plain_prompts(encoding)
    for example in data.examples("train", options.show):
        for task in ("rank", "yesno"):
            lines = prompts.show(prompts.sft_tree(example, task)).split("\n")
            print(f"\n--- user {printable(example.user)}, {task}", *map(printable, lines), sep="\n")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    encodings = options.out.glob("encoded/[!.]*/manifest.json")
    if options.show and (options.out / "manifest.json").exists() and any(encodings):
        print(f"{options.out} is prepared already; only showing it")
        show(options)
        return
    options.model = options.model or TINY
    if options.model != TINY:
        load_config(options.model, options.trust_remote_code)  # a wrong name is noticed before the raw files are read
    with locked(options.out):
        if not options.encode_only:
            check_out(options.out, options.dataset)
            raw = (READERS | {"demo": read_demo})[options.dataset](options)
            data = build_sequences(raw, options)
            manifest = write_data(data, options, raw.files)
            if options.dataset == "demo":
                write_ceilings(options)
        encoded = encode(options)
    lines = [f"  encoded {encoded}"] if options.encode_only else summary(manifest, data, raw, encoded)
    print(printable(options.out), *map(printable, lines), sep="\n", flush=True)
    warning = None if options.encode_only else picture_warning(data, raw)
    if warning:
        print(warning, file=sys.stderr, flush=True)
    if options.show:
        show(options)
    stage = "later_data" if options.run else "prepare_data"
    print("next:", printable(next_command(stage, options)))


if __name__ == "__main__":
    main()
