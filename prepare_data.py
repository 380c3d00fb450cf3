"""Raw files -> data/<name>/: items, histories with candidates, and every item encoded once for a backbone.

    python prepare_data.py                    # the embedded demo -> data/demo, with a tiny untrained backbone
    python prepare_data.py --dataset movielens --source ml-1m/ --model Qwen/Qwen2.5-VL-3B-Instruct --out data/ml-1m
    python prepare_data.py --out data/ml-1m --encode-only --model llava-hf/llava-v1.6-mistral-7b-hf   # another backbone

Writes items.jsonl, train.jsonl, val.jsonl, test.jsonl, sequences.jsonl (each user's whole training sequence),
manifest.json and encoded/<backbone>/. Everything random is drawn here, once, from --seed, and stored.
"""

import argparse
from pathlib import Path

from hanorec.data.protocol import items_before
from hanorec.data.readers import READERS
from hanorec.run.files import one_line_errors
from hanorec.run.options import TRUST, Option, Parser, bounded, non_negative_int, positive_int

DATASETS = ["demo", *READERS]
ENCODING_OPTIONS = [
    Option("--model", str, "tiny", "hub name or folder of the backbone; tiny: untrained, made here"),
    Option("--max-pixels", bounded(int, 784, 2**31), None, "most pixels of an image", shown="262144; tiny: 6272"),
    Option("--tokens", ["stored", "live"], "stored", "live: do not keep image tokens, compute them in each step"),
    Option("--encode-only", bool, False, "the data folder stands; only encode it"),
    TRUST,
]
COLUMNS = [  # of the tables of csv and recbole
    Option("--user-column", str, None, "of csv and recbole tables", shown="user; user_id", metavar="NAME"),
    Option("--item-column", str, None, "of csv and recbole tables", shown="item; item_id", metavar="NAME"),
    Option("--time-column", str, None, "of csv and recbole tables", shown="timestamp", metavar="NAME"),
    Option("--rating-column", str, None, "of csv and recbole tables", shown="rating", metavar="NAME"),
    Option("--title-column", str, None, "of csv and recbole tables", shown="title", metavar="NAME"),
]
OFFICIAL_HELP = "official: 3 history items, 3 positives and 7 negatives, the last positive counts"
SHOW_HELP = "print N rendered examples; a folder that stands is only shown"
OPTIONS = {
    "source": [
        Option("--dataset", DATASETS, "demo", "the layout of the raw files"),
        Option("--source", Path, None, "folder of the raw files (demo and csv have none)"),
        Option("--images", Path, None, "folder of <item>.jpg, .png or .webp, if it is not inside SOURCE"),
        Option("--interactions", Path, None, "csv: the table of interactions", metavar="FILE"),
        Option("--items", Path, None, "csv: the table of items", metavar="FILE"),
        *COLUMNS,
        Option("--drop-untitled", bool, False, "leave out items that the titles do not list"),
        Option("--out", Path, None, "data folder to write", shown="data/<dataset>"),
    ],
    "protocol": [
        Option("--history", positive_int, None, "most items before the target", shown="5; official: 3"),
        Option("--negatives", positive_int, None, "negatives beside the target", shown="9; official: 7"),
        Option("--negative-sampling", ["uniform", "popularity"], "uniform", "how negatives are drawn"),
        Option("--split", ["leave-one-out", "user"], None, "user: 8:1:1", shown="leave-one-out; hanorec: published"),
        Option("--protocol", ["standard", "official"], "standard", OFFICIAL_HELP),
        Option("--min-rating", float, None, "drop lower ratings", shown="keep all"),
        Option("--min-interactions", positive_int, 6, "drop users with fewer"),
        Option("--max-windows-per-user", non_negative_int, 10, "training examples of a user, the latest; 0: all"),
        Option("--seed", non_negative_int, 42, "of all that is drawn here"),
    ],
    "encoding": ENCODING_OPTIONS,
    "": [Option("--show", non_negative_int, 0, SHOW_HELP, metavar="N")],
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, OPTIONS)
    options = parser.parse_args(argv)
    options.out = options.out or Path("data") / options.dataset
    name = options.model.strip("/").replace("/", "--")
    options.encoded = options.out / "encoded" / (name if name.strip(".") else Path(options.model).resolve().name)
    if not options.encode_only:
        check_source(options, parser)
    official, published = options.protocol == "official", options.dataset == "hanorec"
    if (official and (options.history or options.negatives)) or (published and options.split):
        parser.error("--protocol official sets --history and --negatives; --dataset hanorec brings its own --split")
    options.split = options.split or ("published" if published else "leave-one-out")
    options.positives = 3 if official else 1
    options.history = options.history or (3 if official else 5)
    options.negatives = options.negatives or (7 if official else 9)
    shortest = items_before(options) + (2 if options.split == "leave-one-out" else 1)
    if options.min_interactions < shortest:
        parser.error(f"--min-interactions must be at least {shortest} here")
    return options


def check_source(options: argparse.Namespace, parser: Parser) -> None:
    """The parser's error if --dataset lacks an option that it needs, or has one that it does not take."""
    if options.dataset == "csv" and not (options.interactions and options.items):
        parser.error("--dataset csv needs --interactions FILE and --items FILE")
    if options.dataset not in ("demo", "csv") and not options.source:
        parser.error(f"--dataset {options.dataset} needs --source DIR")
    foreign = ["source"] if options.dataset in ("demo", "csv") else []
    if options.dataset != "csv":
        foreign += ["interactions", "items"]
    if options.dataset not in ("csv", "recbole"):
        foreign += [option.attribute for option in COLUMNS]
    for name in foreign:
        if getattr(options, name):
            parser.error(f"--{name.replace('_', '-')} does not go with --dataset {options.dataset}")


if __name__ == "__main__":
    one_line_errors(parse)()  # --help and mistakes are answered before the slow imports

import os
import shutil
from functools import partial

import numpy as np
import torch
from accelerate.utils import tqdm

from hanorec.data import folder as data_folder
from hanorec.data.demo import read_demo, read_descriptions
from hanorec.data.folder import FILES, DataFolder
from hanorec.data.protocol import (
    Negatives,
    Sequences,
    build_sequences,
    drop_equal_titles,
    example_lines,
    split_targets,
)
from hanorec.model.encoding import Encoding
from hanorec.model.images import check_disk, encode_items
from hanorec.model.load import MAX_PIXELS, TINY, TINY_MAX_PIXELS, load_image_processor, load_model, load_tokenizer
from hanorec.model.prompts import Prompts
from hanorec.model.template import load_template
from hanorec.model.tiny import build_tiny
from hanorec.run.files import (
    UserError,
    file_hash,
    locked,
    printable,
    read_json,
    read_jsonl,
    replacing,
    value_hash,
    write_json,
    write_jsonl,
)
from hanorec.run.runs import json_options
from mllm_srec.texts import read_texts, without_words

OWN = {"images", "tiny", "encoded", "summaries", "descriptions.jsonl", *(f"{name}.jsonl" for name in FILES)}
NOT_DATA = ("model", "encoded", "max_pixels", "tokens", "trust_remote_code", "show", "encode_only", "out")  # options


def check_out(out: Path, dataset: str) -> None:
    """UserError if `out` holds another dataset, or something that is no data folder."""
    manifest = out / "manifest.json"
    held = read_json(manifest, {}, "choose another --out").get("source") if manifest.exists() else dataset
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    foreign = not manifest.exists() and names - OWN  # a run that was cut off leaves own files without a manifest
    if held != dataset or foreign:
        raise UserError(f"{out} holds {'other files' if foreign else f'the data of {held}'}; choose another --out")


def write_data(data: Sequences, options: argparse.Namespace, inputs: list[Path]) -> None:
    """Write the files of a data folder. manifest.json comes last, so a folder without it is unfinished.

    Args:
        inputs: the raw files, whose hashes the manifest lists.
    """
    out = options.out
    targets, training = split_targets(data, options)
    negatives = Negatives(data, options.negatives, options.negative_sampling)
    if options.positives > 1:
        drop_equal_titles(data, targets, negatives, options.positives)
    for name, at in targets.items():
        if not len(at):
            raise UserError(f"no {name} examples come of {len(data.user_ids)} users, split {options.split}; add users")
    (out / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(out / "encoded", ignore_errors=True)  # of the data that stood here
    images = [os.path.relpath(path, out) if path else None for path in data.images]
    items = zip(data.item_ids, data.titles, images, strict=True)
    write_jsonl(out / "items.jsonl", ({"item": i, "title": t, "image": p} for i, t, p in items))
    for number, name in enumerate(("train", "val", "test")):  # a stream of random numbers for each split
        rng = np.random.default_rng([options.seed, number])
        write_jsonl(out / f"{name}.jsonl", example_lines(data, targets[name], negatives, options, rng))
    write_jsonl(out / "sequences.jsonl", sequence_lines(data, training))
    counts = data.counts | {f"{name}_rows": len(at) for name, at in targets.items()}
    manifest = {
        "source": options.dataset,
        "options": {name: value for name, value in json_options(options).items() if name not in NOT_DATA},
        "seed": options.seed,
        "counts": counts,
        "ties": "interactions of a user with equal times keep their input order",
        "inputs": {str(path): file_hash(path) for path in inputs},
        "files": {f"{name}.jsonl": file_hash(out / f"{name}.jsonl") for name in FILES},
    }
    write_json(out / "manifest.json", manifest)
    counted = [f"{value} {name.replace('_', ' ')}" for name, value in counts.items()]
    print(f"{out}: {', '.join(counted)}")


def sequence_lines(data: Sequences, training: np.ndarray):
    """The lines of sequences.jsonl. training: [U], how many of a user's items belong to training."""
    for user, first, count in zip(data.user_ids, data.start[:-1], training, strict=True):
        if count:
            yield {"user": user, "items": [data.item_ids[item] for item in data.items[first : first + count]]}


def encode(options: argparse.Namespace) -> None:
    """Fill encoded/<backbone>/ of the data folder. The tiny backbone is built first."""
    out, trust, tiny = options.out, options.trust_remote_code, options.model == TINY
    items = read_jsonl(out / "items.jsonl", data_folder.ITEM, "run prepare_data.py")
    titles = [item["title"] for item in items]
    source = out / "tiny" if tiny else options.model
    if tiny:
        seed = read_json(out / "manifest.json", {"seed": int}, "prepare the data first")["seed"]
        with replacing(source) as new:
            build_tiny(new, [*titles, *read_descriptions(out)], seed, without_words(read_texts()))
    pixels = options.max_pixels or (TINY_MAX_PIXELS if tiny else MAX_PIXELS)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = load_model(source, dtype, trust=trust).to(device)
    tokenizer, processor = load_tokenizer(source, trust), load_image_processor(source, pixels, trust)
    paths = [out / item["image"] if item["image"] else None for item in items]
    pictures = [path for path in paths if path]
    gone = [path for path in pictures if not path.exists()]
    if gone:
        raise UserError(f"{len(gone)} images are not there, the first is {gone[0]}; mend its link, or prepare again")
    keep = options.tokens == "stored"
    if pictures and keep:
        check_disk(model, processor, pictures, pixels, out)
    with replacing(options.encoded) as new:
        new.mkdir(parents=True)
        encode_items(model, tokenizer, processor, titles, paths, new, partial(tqdm, desc="encode"), keep)
        manifest = {
            "backbone": options.model,
            "max_pixels": pixels,
            "dtype": str(model.dtype).removeprefix("torch."),
            "items": file_hash(out / "items.jsonl"),
            "vocabulary": value_hash(tokenizer.get_vocab()),
            "tokens": file_hash(new / "image_tokens.safetensors") if keep else None,
        }
        write_json(new / "manifest.json", manifest)
    print(f"{options.encoded}: {len(items)} items, {len(pictures) or 'no'} images")


def show(options: argparse.Namespace) -> None:
    """Print the prompts of the first training examples with their answers, as the model sees them."""
    data = DataFolder(options.out)
    encodings = data.encodings()
    model = options.model if options.model in encodings else next(iter(encodings))
    encoding = Encoding(data, model, trust=options.trust_remote_code)
    prompts = Prompts(load_template(encoding.source, encoding.trust), encoding.items, encoding.tokens)
    for example in data.examples("train", options.show):
        for task in ("rank", "yesno"):
            lines = prompts.show(prompts.sft_tree(example, task)).split("\n")
            print(f"\n--- user {printable(example.user)}, {task}", *map(printable, lines), sep="\n")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.show and (options.out / "manifest.json").exists() and any(options.out.glob("encoded/*/manifest.json")):
        print(f"{options.out} stands; showing it, and preparing nothing")
        show(options)
        return
    with locked(options.out):
        if not options.encode_only:
            check_out(options.out, options.dataset)
            raw = (READERS | {"demo": read_demo})[options.dataset](options)
            data = build_sequences(raw, options.min_rating, options.min_interactions, options.drop_untitled)
            write_data(data, options, raw.files)
        encode(options)
    if options.show:
        show(options)


if __name__ == "__main__":
    main()
