"""Raw files -> data/<name>/: items, histories with candidates, and every item encoded once for a backbone.

    python prepare_data.py                    # the embedded demo -> data/demo, with a tiny untrained backbone
    python prepare_data.py --dataset movielens --source ml-1m/ --model Qwen/Qwen2.5-VL-3B-Instruct --out data/ml-1m
    python prepare_data.py --out data/ml-1m --encode-only --model llava-hf/llava-v1.6-mistral-7b-hf   # another backbone

Writes items.jsonl, train.jsonl, val.jsonl, test.jsonl, sequences.jsonl (each user's whole training sequence),
manifest.json and encoded/<backbone>/. Everything random is drawn here, once, from --seed, and stored.
"""

import argparse
import csv
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import demo
import runs
from runs import UserError


@dataclass
class Raw:
    """A dataset as its reader finds it: interactions in input order, and each item's title and image."""

    users: np.ndarray  # [M] codes into user_ids
    items: np.ndarray  # [M] codes into item_ids
    times: np.ndarray  # [M] float64
    ratings: np.ndarray  # [M] float32
    user_ids: list[str]
    item_ids: list[str]
    titles: dict[str, str]
    images: dict[str, Path]
    files: list[Path]


def table_rows(path: Path, delimiter: str, encoding: str, header: bool) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a delimited text file; `::` is MovieLens's own delimiter and knows no quotes."""
    try:
        with open(path, encoding=encoding, newline="") as file:
            rows = (line.rstrip("\r\n").split("::") for line in file) if delimiter == "::" else csv.reader(file)
            for number, row in enumerate(rows, 1):
                if row and row != [""] and not (header and number == 1):
                    yield number, row
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; --source is the folder that holds it") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_movielens(source: Path, images: Path | None) -> Raw:
    """MovieLens as GroupLens ships it: ratings.dat and movies.dat (`::`, latin-1), or ratings.csv and movies.csv;
    posters in DIR/posters/<movieId>.jpg or --images."""
    if not source.is_dir():
        raise UserError(f"--source {source} is not a folder; give the unpacked MovieLens archive")
    old = (source / "ratings.dat").exists()
    ending, layout = (".dat", ("::", "latin-1", False)) if old else (".csv", (",", "utf-8-sig", True))
    ratings, movies = source / f"ratings{ending}", source / f"movies{ending}"
    user_codes, item_codes = {}, {}  # by order of appearance
    users, items, scores, times = (array(code) for code in "qqfd")
    for number, row in table_rows(ratings, *layout):
        try:
            user, item, score, time = row
            scores.append(float(score))
            times.append(float(time))
        except ValueError as error:
            raise UserError(f"{ratings}, line {number}: expected user, movie, rating and time, got {row}") from error
        users.append(user_codes.setdefault(user, len(user_codes)))
        items.append(item_codes.setdefault(item, len(item_codes)))
    if not users:
        raise UserError(f"{ratings} holds no ratings")
    titles = {}
    for number, row in table_rows(movies, *layout):
        if len(row) < 2:
            raise UserError(f"{movies}, line {number}: expected movie and title, got {row}")
        titles[row[0]] = row[1].strip()
    if images and not images.is_dir():
        raise UserError(f"--images {images} is not a folder")
    folder = images or source / "posters"
    found = {path.stem: path for path in folder.glob("*.jpg")} if folder.is_dir() else {}
    columns, ids = map(np.array, (users, items, times, scores)), map(list, (user_codes, item_codes))
    return Raw(*columns, *ids, titles, found, [ratings, movies])


@dataclass
class Sequences:
    """Users' items in order of time, end to end: user u's are items[start[u]:start[u + 1]]; items are rows."""

    user_ids: list[str]
    item_ids: list[str]
    titles: list[str]
    images: list[Path | None]
    items: np.ndarray  # [M]
    start: np.ndarray  # [U + 1]
    touched: np.ndarray  # [P, 2], every (user, item) of the raw data, those below --min-rating too
    counts: dict[str, int]


def build_sequences(raw: Raw, min_rating: float, min_interactions: int) -> Sequences:
    """Filter, sort by user and time (ties by input order), drop repeated items, and number the items that remain."""
    users, items, times = raw.users, raw.items, raw.times
    counts = {"interactions_read": len(users)}
    keep = raw.ratings >= min_rating
    counts["below_min_rating"] = int((~keep).sum())
    touched = users, items
    users, items, times = users[keep], items[keep], times[keep]
    order = np.lexsort((times, users))  # stable
    users, items, times = users[order], items[order], times[order]
    first = np.zeros(len(users), dtype=bool)
    first[np.unique(users * len(raw.item_ids) + items, return_index=True)[1]] = True
    counts["repeated_items_dropped"] = int((~first).sum())
    users, items, times = users[first], items[first], times[first]
    long_enough = np.bincount(users, minlength=len(raw.user_ids)) >= min_interactions
    counts["users_too_short"] = int((~long_enough).sum())
    users, items, times = (column[long_enough[users]] for column in (users, items, times))
    if not len(users):
        raise UserError(f"no user has {min_interactions} interactions; lower --min-interactions or --min-rating")
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    counts["interactions_tied_in_time"] = int((np.append(same, False) | np.append(False, same)).sum())

    known = np.unique(items)
    untitled = [raw.item_ids[item] for item in known if not raw.titles.get(raw.item_ids[item])]
    if untitled:
        raise UserError(f"{len(untitled)} items have interactions but no title, the first is {untitled[0]}; add them")
    place = {item: number for number, item in enumerate(raw.titles)}
    known = np.array(sorted(known.tolist(), key=lambda item: place[raw.item_ids[item]]))  # the source's own order
    row_of = np.zeros(len(raw.item_ids), dtype=np.int64)
    row_of[known] = np.arange(len(known))
    ids = [raw.item_ids[item] for item in known]
    kept_users, user_number = np.unique(users, return_inverse=True)
    images = [raw.images.get(item) for item in ids]
    counts |= {"users": len(kept_users), "items": len(ids), "interactions": len(users)}
    counts["items_without_image"] = images.count(None)
    start = np.append(0, np.bincount(user_number).cumsum())
    titles = [raw.titles[item] for item in ids]
    number_of = np.full(len(raw.user_ids), -1)
    number_of[kept_users] = np.arange(len(kept_users))
    in_catalogue = np.zeros(len(raw.item_ids), dtype=bool)
    in_catalogue[known] = True
    inside = (number_of[touched[0]] >= 0) & in_catalogue[touched[1]]
    touched = np.stack([number_of[touched[0][inside]], row_of[touched[1][inside]]], axis=1)
    names = [raw.user_ids[user] for user in kept_users]
    return Sequences(names, ids, titles, images, row_of[items], start, touched, counts)


def split_windows(data: Sequences, split: str, max_windows: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Positions of the targets in data.items by split, and [U], how many of a user's items belong to training.

    leave-one-out: a user's last item is tested, the second last validates, each one before it trains (the first has no
    history). user: users 8:1:1; the last item is the target, and a training user's earlier ones are too.
    """
    length = np.diff(data.start)
    end = data.start[1:]
    if split == "leave-one-out":
        training = length - 2
        targets = {"val": end - 2, "test": end - 1}
    else:
        shuffled = np.random.default_rng([seed, 3]).permutation(len(length))
        tenth = max(1, len(length) // 10)
        targets = {"val": np.sort(end[shuffled[:tenth]]) - 1, "test": np.sort(end[shuffled[tenth : 2 * tenth]]) - 1}
        training = length.copy()
        training[shuffled[: 2 * tenth]] = 0
    windows = np.maximum(training - 1, 0)
    if max_windows:
        windows = np.minimum(windows, max_windows)  # the latest ones
    last = data.start[:-1] + training
    offsets = np.arange(windows.sum()) - np.repeat(windows.cumsum() - windows, windows)
    targets["train"] = np.repeat(last - windows, windows) + offsets
    for name in targets:
        if not len(targets[name]):
            raise UserError(f"no {name} rows come of {len(length)} users with --split {split}; more users are needed")
    return targets, training


def draw_negatives(data: Sequences, users: np.ndarray, count: int, sampling: str, rng) -> np.ndarray:
    """[R, count] item rows for R rows of these users: none with the title of one of the user's items, no two in a row
    with the same title; uniform over items, or in proportion to their interactions."""
    _, title = np.unique(data.titles, return_inverse=True)  # [N], items with equal titles are one
    weight = np.bincount(data.items, minlength=len(title)) if sampling == "popularity" else np.ones(len(title))
    cumulative = weight.cumsum()
    own = np.unique(data.touched[:, 0] * len(title) + title[data.touched[:, 1]])  # sorted keys (user, title)
    available = len(np.unique(title)) - np.bincount(own // len(title), minlength=len(data.start) - 1)[users].max()
    if available < count:
        raise UserError(f"--negatives {count}: a user has touched all but {available} titles; lower --negatives")
    drawn = np.full((len(users), count), -1)
    bad = np.ones(drawn.shape, dtype=bool)
    for _ in range(1000):
        rows, columns = np.nonzero(bad)
        if not len(rows):
            return drawn
        fresh = np.searchsorted(cumulative, rng.random(len(rows)) * cumulative[-1], side="right")
        drawn[rows, columns] = fresh
        touched = np.unique(rows)  # only rows that changed can have become wrong
        titles = title[drawn[touched]]
        keys = users[touched, None] * len(title) + titles
        found = own[np.minimum(np.searchsorted(own, keys), len(own) - 1)] == keys
        order = np.argsort(titles, axis=1, kind="stable")
        ranked = np.take_along_axis(titles, order, axis=1)
        repeated = np.zeros_like(found)
        np.put_along_axis(repeated, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
        bad[touched] = found | repeated
    raise UserError(f"no {count} negatives found for {bad.any(1).sum()} rows; lower --negatives")


def split_lines(data: Sequences, targets: np.ndarray, options: argparse.Namespace, rng) -> list[str]:
    """The JSON lines of a split, whose targets stand at these positions of data.items."""
    users = np.searchsorted(data.start, targets, side="right") - 1
    negatives = draw_negatives(data, users, options.negatives, options.negative_sampling, rng)
    candidates = np.concatenate([data.items[targets, None], negatives], axis=1)
    candidates = rng.permuted(candidates, axis=1)
    rejected = negatives[np.arange(len(targets)), rng.integers(options.negatives, size=len(targets))]
    begin = np.maximum(data.start[users], targets - options.history)
    quoted = np.array([json.dumps(item, ensure_ascii=False) for item in data.item_ids], dtype=object)
    names = [json.dumps(user, ensure_ascii=False) for user in data.user_ids]
    return [
        f'{{"user": {names[user]}, "history": [{", ".join(quoted[data.items[first:at]])}], '
        f'"target": {quoted[data.items[at]]}, "candidates": [{", ".join(quoted[row])}], '
        f'"rejected": {quoted[negative]}}}'
        for user, first, at, row, negative in zip(users, begin, targets, candidates, rejected, strict=True)
    ]


def write_data(data: Sequences, options: argparse.Namespace, inputs: list[Path]) -> None:
    """Write a data folder's files; manifest.json comes last, so a folder without it is not whole."""
    targets, training = split_windows(data, options.split, options.max_windows_per_user, options.seed)
    lines = {}
    for number, name in enumerate(("train", "val", "test")):  # a stream for each split
        lines[name] = split_lines(data, targets[name], options, np.random.default_rng([options.seed, number]))
    (options.out / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(options.out / "encoded", ignore_errors=True)  # of the data that stood here
    images = [os.path.relpath(path, options.out) if path else None for path in data.images]
    items = zip(data.item_ids, data.titles, images, strict=True)
    runs.write_jsonl(options.out / "items.jsonl", ({"item": i, "title": t, "image": p} for i, t, p in items))
    for name, rows in lines.items():
        runs.write_jsonl(options.out / f"{name}.jsonl", rows)
    spans = zip(data.user_ids, data.start[:-1], training, strict=True)
    sequences = ((user, data.items[first : first + n]) for user, first, n in spans if n)
    rows = ({"user": user, "items": [data.item_ids[item] for item in sequence]} for user, sequence in sequences)
    runs.write_jsonl(options.out / "sequences.jsonl", rows)
    kept = {name: value for name, value in runs.plain(options).items() if name not in NOT_DATA}
    manifest = {"source": options.dataset, "options": kept, "seed": options.seed}
    manifest["counts"] = data.counts | {f"{name}_rows": len(rows) for name, rows in lines.items()}
    manifest["ties"] = "interactions of a user with equal times keep their input order"
    manifest["inputs"] = {path.name: runs.file_hash(path) for path in inputs}
    manifest["files"] = {f"{name}.jsonl": runs.file_hash(options.out / f"{name}.jsonl") for name in FILES}
    runs.write_json(options.out / "manifest.json", manifest)
    counted = (f"{value} {name.replace('_', ' ')}" for name, value in manifest["counts"].items())
    print(f"{options.out}: {', '.join(counted)}")


def encode(options: argparse.Namespace) -> None:
    """Fill encoded/<backbone>/ of the data folder; the tiny backbone is built first."""
    import torch
    from accelerate.utils import tqdm

    import mllm

    items = runs.read_jsonl(options.out / "items.jsonl", ("item", "title", "image"), "run prepare_data.py")
    titles = [item["title"] for item in items]
    name = options.model
    if name == mllm.TINY:
        seed = runs.read_json(options.out / "manifest.json", "prepare the data first")["seed"]
        with runs.replacing(options.out / "tiny") as beside:
            demo.build_tiny(beside, titles, seed)
        name = options.out / "tiny"
    pixels = options.max_pixels or (mllm.TINY_MAX_PIXELS if options.model == mllm.TINY else mllm.MAX_PIXELS)
    gpu = torch.cuda.is_available()
    model = mllm.load_model(name, torch.bfloat16 if gpu else torch.float32).to("cuda" if gpu else "cpu")
    tokenizer, processor = mllm.load_tokenizer(name), mllm.load_image_processor(name, pixels)
    paths = [options.out / item["image"] if item["image"] else None for item in items]
    gone = [path for path in paths if path and not path.exists()]
    if gone:
        raise UserError(f"{len(gone)} images of items.jsonl are gone, the first is {gone[0]}; prepare the data again")
    folder = options.encoded
    if any(paths):
        check_disk(model, processor, [path for path in paths if path], pixels, options.out)
    with runs.replacing(folder) as beside:
        beside.mkdir(parents=True)
        mllm.encode_items(model, tokenizer, processor, titles, paths, beside, partial(tqdm, desc="encode"))
        manifest = {"backbone": options.model, "max_pixels": pixels, "dtype": str(model.dtype).removeprefix("torch.")}
        manifest["items"] = runs.file_hash(options.out / "items.jsonl")
        manifest["tokens"] = runs.file_hash(beside / "image_tokens.safetensors")
        runs.write_json(beside / "manifest.json", manifest)
    print(f"{folder}: {len(items)} items, {sum(path is not None for path in paths)} images")


def check_disk(model, processor, paths: list[Path], pixels: int, folder: Path) -> None:
    """Print the bytes that encoding will write, judged by 32 images; UserError where the disk cannot hold them."""
    import mllm

    sample = [mllm.open_image(path) for path in paths[:: max(1, len(paths) // 32)][:32]]
    tokens = sum(len(t) for t in mllm.encode_images(model, processor, sample)[0]) / len(sample)
    width = model.get_input_embeddings().weight.shape[1]
    needed = int(len(paths) * tokens * width * model.dtype.itemsize)
    each = f"{tokens:.1f} tokens x {width} x {model.dtype.itemsize} bytes"
    print(f"encoding {len(paths)} images x {each} = about {needed:,} bytes")
    if needed > 0.95 * (free := shutil.disk_usage(folder).free):
        fitting = int(pixels * 0.95 * free / needed)
        raise UserError(f"{folder} has {free:,} bytes free; --max-pixels {fitting} would fit")


FILES = ("items", "train", "val", "test", "sequences")
OWN = {".lock", "images", "tiny", "encoded", *(f"{name}.jsonl" for name in FILES)}
NOT_DATA = ("model", "encoded", "max_pixels", "show", "encode_only", "out")  # options that do not shape the data files


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = runs.Parser(__doc__)
    source = parser.add_argument_group("source")
    source.add_argument("--dataset", choices=["demo", "movielens"], default="demo", help="what --source holds [demo]")
    source.add_argument("--source", type=Path, help="folder of the raw files (the demo has none)")
    source.add_argument("--images", type=Path, help="folder of <item>.jpg, where they are not in SOURCE/posters")
    source.add_argument("--out", type=Path, help="data folder to write [data/<dataset>]")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--history", type=runs.positive_int, default=5, help="items before the target, at most [5]")
    protocol.add_argument(
        "--negatives", type=runs.positive_int, default=9, help="in the candidates, beside the target [9]"
    )
    protocol.add_argument("--negative-sampling", choices=["uniform", "popularity"], default="uniform", help="[uniform]")
    protocol.add_argument("--split", choices=["leave-one-out", "user"], default="leave-one-out", help="user: 8:1:1")
    protocol.add_argument("--min-rating", type=float, default=0.0, help="drop lower ratings [0: keep all]")
    protocol.add_argument("--min-interactions", type=runs.positive_int, default=6, help="drop users with fewer [6]")
    windows = "training rows of a user, the latest; 0: all [10]"
    protocol.add_argument("--max-windows-per-user", type=runs.non_negative_int, default=10, help=windows)
    protocol.add_argument("--seed", type=runs.non_negative_int, default=42, help="of all that is drawn here [42]")
    encoding = parser.add_argument_group("encoding")
    encoding.add_argument("--model", default="tiny", help="hub name or folder; tiny: untrained, made here [tiny]")
    encoding.add_argument("--max-pixels", type=runs.positive_int, help="pixels of an image [262144; tiny: 6272]")
    encoding.add_argument("--encode-only", action="store_true", help="the data folder stands; only encode it")
    shown = "print N rendered rows; a folder that stands is only shown"
    parser.add_argument("--show", type=runs.non_negative_int, default=0, metavar="N", help=shown)
    options = parser.parse_args(argv)
    options.out = options.out or Path("data") / options.dataset
    options.encoded = options.out / "encoded" / options.model.strip("/").replace("/", "--")
    if options.dataset != "demo" and not options.source and not options.encode_only:
        parser.error(f"--dataset {options.dataset} needs --source DIR")
    if options.dataset == "demo" and options.source:
        parser.error("--source needs --dataset: what does it hold?")
    shortest = 3 if options.split == "leave-one-out" else 2
    if options.min_interactions < shortest:
        parser.error(f"--min-interactions must be at least {shortest} for --split {options.split}")
    return options


def show(options: argparse.Namespace) -> None:
    """Print the prompts of the first training rows with their answers, as the model sees them."""
    import mllm
    import prompts

    items = runs.read_jsonl(options.out / "items.jsonl", ("item", "title", "image"), "run prepare_data.py")
    catalogue = mllm.Catalogue(items, options.encoded)
    name = options.out / "tiny" if options.model == mllm.TINY else options.model
    rendered = prompts.Prompts(mllm.load_tokenizer(name), mllm.load_config(name).image_token_id, catalogue)
    for line in runs.read_jsonl(options.out / "train.jsonl", ("user",), "run prepare_data.py")[: options.show]:
        for task in ("rank", "yesno"):
            tree = rendered.sft_tree(prompts.Row.of(line, catalogue.row_of), task)
            print(f"\n--- user {line['user']}, {task}\n{rendered.show(tree)}")


def check_out(out: Path, dataset: str) -> None:
    """UserError where `out` holds another dataset, or something that is no data folder."""
    manifest = out / "manifest.json"
    stands = runs.read_json(manifest, "choose another --out").get("source") if manifest.exists() else dataset
    foreign = not manifest.exists() and {path.name for path in out.iterdir()} - OWN
    if stands != dataset or foreign:
        raise UserError(f"{out} holds {'other files' if foreign else f'the data of {stands}'}; choose another --out")


@runs.one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.show and (options.out / "manifest.json").exists() and (options.out / "encoded").exists():
        print(f"{options.out} stands; showing it, and preparing nothing")
        show(options)
        return
    with runs.locked(options.out):
        if not options.encode_only:
            check_out(options.out, options.dataset)
            readers = {"movielens": lambda: read_movielens(options.source, options.images)}
            readers["demo"] = lambda: Raw(*demo.make_demo(options.out, options.seed))
            raw = readers[options.dataset]()
            data = build_sequences(raw, options.min_rating, options.min_interactions)
            write_data(data, options, raw.files)
        encode(options)
    if options.show:
        show(options)


if __name__ == "__main__":
    main()
