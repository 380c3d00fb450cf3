"""Raw files -> data/<name>/: items, histories with candidates, and every item encoded once for a backbone.

    python prepare_data.py                    # the embedded demo -> data/demo, with a tiny untrained backbone
    python prepare_data.py --dataset movielens --source ml-1m/ --model Qwen/Qwen2.5-VL-3B-Instruct --out data/ml-1m
    python prepare_data.py --out data/ml-1m --encode-only --model llava-hf/llava-v1.6-mistral-7b-hf   # another backbone

Writes items.jsonl, train.jsonl, val.jsonl, test.jsonl, sequences.jsonl (each user's whole training sequence),
manifest.json and encoded/<backbone>/. Everything random is drawn here, once, from --seed, and stored.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hanorec.data import demo, readers
from hanorec.run import runs
from hanorec.run.runs import UserError


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
    split: np.ndarray  # [U], train, val or test, where the source has its own split


def build_sequences(
    raw: readers.Raw, min_rating: float | None, min_interactions: int, drop_untitled: bool
) -> Sequences:
    """Filter, sort by user and time (ties by input order), drop repeated items, and number the items that remain."""
    users, items, times, ratings = raw.columns()
    user_ids, item_ids = list(raw.found.user_codes), list(raw.found.item_codes)
    touched = users, items
    if min_rating is not None and not raw.found.rated:
        raise UserError("the source has no ratings: --min-rating does not go with it")
    rated = ratings >= (-np.inf if min_rating is None else min_rating)
    untitled = np.array([not raw.titles.get(item, "" if drop_untitled else "unknown") for item in item_ids])
    keep = rated & ~untitled[items]
    counts = {"interactions_read": len(users), "below_min_rating": int((~rated).sum())}
    counts["of_untitled_items"] = int((rated & ~keep).sum())
    users, items, times = users[keep], items[keep], times[keep]
    order = np.lexsort((times, users))  # stable
    users, items, times = users[order], items[order], times[order]
    first = np.zeros(len(users), dtype=bool)
    first[np.unique(users * len(item_ids) + items, return_index=True)[1]] = True
    counts["repeated_items_dropped"] = int((~first).sum())
    users, items, times = users[first], items[first], times[first]
    long_enough = np.bincount(users, minlength=len(user_ids)) >= min_interactions
    counts["users_too_short"] = int((~long_enough).sum())
    users, items, times = (column[long_enough[users]] for column in (users, items, times))
    if not len(users):
        raise UserError(f"no user has {min_interactions} interactions; lower --min-interactions or --min-rating")
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1]) & raw.found.timed
    counts["interactions_tied_in_time"] = int((np.append(same, False) | np.append(False, same)).sum())

    row_of, ids = number_items(raw, item_ids, np.unique(items))
    kept_users, user_number = np.unique(users, return_inverse=True)
    images = [raw.images.get(item) for item in ids]
    counts |= {"users": len(kept_users), "items": len(ids), "interactions": len(users)}
    counts |= {"items_left_out": len(raw.titles) - len(ids), "items_without_image": images.count(None)}
    counts["images_that_are_links"] = sum(path is not None and path.is_symlink() for path in images)
    number_of = np.full(len(user_ids), -1)
    number_of[kept_users] = np.arange(len(kept_users))
    inside = (number_of[touched[0]] >= 0) & (row_of[touched[1]] >= 0)
    touched = np.stack([number_of[touched[0][inside]], row_of[touched[1][inside]]], axis=1)
    names = [user_ids[user] for user in kept_users]
    start, titles = np.append(0, np.bincount(user_number).cumsum()), [raw.titles[item] for item in ids]
    split = np.array([raw.split.get(name, "") for name in names])
    return Sequences(names, ids, titles, images, row_of[items], start, touched, counts, split)


def number_items(raw: readers.Raw, item_ids: list[str], known: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """([codes] row of each item code, -1 where not known; ids by row): rows are in the order of the source's titles."""
    untitled = [item_ids[code] for code in known if item_ids[code] not in raw.titles]
    if untitled:
        raise UserError(
            f"{len(untitled)} items have interactions but no title, the first is {untitled[0]}; add them, or leave "
            "out their interactions with --drop-untitled"
        )
    place = {item: number for number, item in enumerate(raw.titles)}
    known = np.array(sorted(known.tolist(), key=lambda code: place[item_ids[code]]))
    row_of = np.full(len(item_ids), -1)
    row_of[known] = np.arange(len(known))
    return row_of, [item_ids[code] for code in known]


def split_windows(data: Sequences, options: argparse.Namespace) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Positions of the targets in data.items by split, and [U], how many of a user's items belong to training.

    leave-one-out: a user's last item is tested, the second last validates, each one before it trains (the first has no
    history). user: users 8:1:1; the last item is the target, and a training user's earlier ones are too. published: the
    same with the source's own users.
    """
    length, end = np.diff(data.start), data.start[1:]
    training = length.copy()
    if options.split == "leave-one-out":
        training -= 2
        targets = {"val": end - 2, "test": end - 1}
    else:
        split = data.split
        if options.split == "user":
            shuffled, tenth = np.random.default_rng([options.seed, 3]).permutation(len(length)), len(length) // 10
            split = np.full(len(length), "train")
            split[shuffled[: max(1, tenth)]], split[shuffled[max(1, tenth) : 2 * max(1, tenth)]] = "val", "test"
        targets = {name: end[split == name] - 1 for name in ("val", "test")}
        training[split != "train"] = 0
    windows = np.maximum(training - items_before(options), 0)
    if options.max_windows_per_user:
        windows = np.minimum(windows, options.max_windows_per_user)  # the latest ones
    last = data.start[:-1] + training
    offsets = np.arange(windows.sum()) - np.repeat(windows.cumsum() - windows, windows)
    targets["train"] = np.repeat(last - windows, windows) + offsets
    return targets, training


class Negatives:
    """Draws negatives: none with the title of one of the user's items, no two in a row with the same title; uniform
    over items, or in proportion to their interactions."""

    def __init__(self, data: Sequences, count: int, sampling: str):
        codes: dict[str, int] = {}
        self.title = np.array([codes.setdefault(title, len(codes)) for title in data.titles])  # equal titles are one
        weight = np.bincount(data.items, minlength=len(self.title)) if sampling == "popularity" else 1
        self.cumulative = np.cumsum(np.broadcast_to(weight, self.title.shape))
        self.count = count
        self.own = np.unique(data.touched[:, 0] * len(self.title) + self.title[data.touched[:, 1]])  # (user, title)
        available = len(codes) - int(np.bincount(self.own // len(self.title)).max())
        if available < count:
            raise UserError(f"--negatives {count}: a user has touched all but {available} titles; lower --negatives")

    def draw(self, users: np.ndarray, rng) -> np.ndarray:
        """[R, count] item rows for R rows of these users."""
        drawn = np.full((len(users), self.count), -1)
        bad = np.ones(drawn.shape, dtype=bool)
        for _ in range(1000):
            rows, columns = np.nonzero(bad)
            if not len(rows):
                return drawn
            fresh = np.searchsorted(self.cumulative, rng.random(len(rows)) * self.cumulative[-1], side="right")
            drawn[rows, columns] = fresh
            touched = np.unique(rows)  # only rows that changed can have become wrong
            titles = self.title[drawn[touched]]
            keys = users[touched, None] * len(self.title) + titles
            found = self.own[np.minimum(np.searchsorted(self.own, keys), len(self.own) - 1)] == keys
            order = np.argsort(titles, axis=1, kind="stable")
            ranked = np.take_along_axis(titles, order, axis=1)
            repeated = np.zeros_like(found)
            np.put_along_axis(repeated, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
            bad[touched] = found | repeated
        raise UserError(f"no {self.count} negatives found for {bad.any(1).sum()} rows; lower --negatives")


ROWS_AT_ONCE = 1 << 18  # rows of a split that are drawn and rendered together, which bounds the memory


def split_lines(data: Sequences, targets: np.ndarray, negatives: Negatives, options, rng) -> Iterator[str]:
    """The JSON lines of a split, whose targets stand at these positions of data.items. With several positives, the
    items just before the target are candidates too, and the history ends before them."""
    quoted = np.array([json.dumps(item, ensure_ascii=False) for item in data.item_ids], dtype=object)
    names = [json.dumps(user, ensure_ascii=False) for user in data.user_ids]
    for chunk in range(0, len(targets), ROWS_AT_ONCE):
        at = targets[chunk : chunk + ROWS_AT_ONCE]
        users = np.searchsorted(data.start, at, side="right") - 1
        drawn = negatives.draw(users, rng)
        positives = data.items[at[:, None] - np.arange(options.positives)]
        candidates = rng.permuted(np.concatenate([positives, drawn], axis=1), axis=1)
        rejected = drawn[np.arange(len(at)), rng.integers(negatives.count, size=len(at))]
        end = at - options.positives + 1
        begin = np.maximum(data.start[users], end - options.history)
        for user, first, last, target, row, negative in zip(users, begin, end, at, candidates, rejected, strict=True):
            yield (
                f'{{"user": {names[user]}, "history": [{", ".join(quoted[data.items[first:last]])}], '
                f'"target": {quoted[data.items[target]]}, "candidates": [{", ".join(quoted[row])}], '
                f'"rejected": {quoted[negative]}}}'
            )


def write_data(data: Sequences, options: argparse.Namespace, inputs: list[Path]) -> None:
    """Write a data folder's files; manifest.json comes last, so a folder without it is not whole."""
    targets, training = split_windows(data, options)
    negatives = Negatives(data, options.negatives, options.negative_sampling)
    for name, at in targets.items() if options.positives > 1 else ():
        titles = np.sort(negatives.title[data.items[at[:, None] - np.arange(options.positives)]], axis=1)
        distinct = (titles[:, 1:] != titles[:, :-1]).all(axis=1)  # no two candidates share a title
        targets[name] = at[distinct]
        data.counts[f"{name}_rows_of_equal_titles"] = int((~distinct).sum())
    for name, at in targets.items():
        if not len(at):
            raise UserError(f"no {name} rows come of {len(data.user_ids)} users, split {options.split}; add users")
    (options.out / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(options.out / "encoded", ignore_errors=True)  # of the data that stood here
    images = [os.path.relpath(path, options.out) if path else None for path in data.images]
    items = zip(data.item_ids, data.titles, images, strict=True)
    runs.write_jsonl(options.out / "items.jsonl", ({"item": i, "title": t, "image": p} for i, t, p in items))
    for number, name in enumerate(("train", "val", "test")):  # a stream of random numbers for each split
        rng = np.random.default_rng([options.seed, number])
        runs.write_jsonl(options.out / f"{name}.jsonl", split_lines(data, targets[name], negatives, options, rng))
    spans = zip(data.user_ids, data.start[:-1], training, strict=True)
    sequences = ((user, data.items[first : first + n]) for user, first, n in spans if n)
    rows = ({"user": user, "items": [data.item_ids[item] for item in sequence]} for user, sequence in sequences)
    runs.write_jsonl(options.out / "sequences.jsonl", rows)
    kept = {name: value for name, value in runs.plain(options).items() if name not in NOT_DATA}
    manifest = {"source": options.dataset, "options": kept, "seed": options.seed}
    manifest["counts"] = data.counts | {f"{name}_rows": len(rows) for name, rows in targets.items()}
    manifest["ties"] = "interactions of a user with equal times keep their input order"
    manifest["inputs"] = {str(path): runs.file_hash(path) for path in inputs}
    manifest["files"] = {f"{name}.jsonl": runs.file_hash(options.out / f"{name}.jsonl") for name in FILES}
    runs.write_json(options.out / "manifest.json", manifest)
    counted = (f"{value} {name.replace('_', ' ')}" for name, value in manifest["counts"].items())
    print(f"{options.out}: {', '.join(counted)}")


def encode(options: argparse.Namespace) -> None:
    """Fill encoded/<backbone>/ of the data folder; the tiny backbone is built first."""
    import torch
    from accelerate.utils import tqdm

    from hanorec.model import mllm

    items = runs.read_jsonl(options.out / "items.jsonl", runs.ITEM, "run prepare_data.py")
    titles = [item["title"] for item in items]
    name, trust = options.model, options.trust_remote_code
    if name == mllm.TINY:
        seed = runs.read_json(options.out / "manifest.json", {"seed": int}, "prepare the data first")["seed"]
        with runs.replacing(options.out / "tiny") as beside:
            demo.build_tiny(beside, [*titles, *demo.descriptions(options.out)], seed)
        name = options.out / "tiny"
    pixels = options.max_pixels or (mllm.TINY_MAX_PIXELS if options.model == mllm.TINY else mllm.MAX_PIXELS)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = mllm.load_model(name, dtype, trust=trust).to(device)
    tokenizer, processor = mllm.load_tokenizer(name, trust), mllm.load_image_processor(name, pixels, trust)
    paths = [options.out / item["image"] if item["image"] else None for item in items]
    gone = [path for path in paths if path and not path.exists()]
    if gone:
        raise UserError(f"{len(gone)} images are not there, the first is {gone[0]}; mend its link, or prepare again")
    keep = options.tokens == "stored"
    if any(paths) and keep:
        mllm.check_disk(model, processor, [path for path in paths if path], pixels, options.out)
    with runs.replacing(options.encoded) as beside:
        beside.mkdir(parents=True)
        mllm.encode_items(model, tokenizer, processor, titles, paths, beside, partial(tqdm, desc="encode"), keep)
        manifest = {"backbone": options.model, "max_pixels": pixels, "dtype": str(model.dtype).removeprefix("torch.")}
        manifest["items"] = runs.file_hash(options.out / "items.jsonl")
        manifest["vocabulary"] = runs.value_hash(tokenizer.get_vocab())
        manifest["tokens"] = runs.file_hash(beside / "image_tokens.safetensors") if keep else None
        runs.write_json(beside / "manifest.json", manifest)
    print(f"{options.encoded}: {len(items)} items, {sum(map(bool, paths)) or 'no'} images")


FILES = ("items", "train", "val", "test", "sequences")
OWN = {"images", "tiny", "encoded", "summaries", "descriptions.jsonl", *(f"{name}.jsonl" for name in FILES)}
# Options that do not shape the data files
NOT_DATA = ("model", "encoded", "max_pixels", "tokens", "trust_remote_code", "show", "encode_only", "out")
COLUMNS = {  # of --dataset csv and recbole, with their usual names
    "--user-column": "user; recbole: user_id",
    "--item-column": "item; recbole: item_id",
    "--time-column": "timestamp",
    "--rating-column": "rating",
    "--title-column": "title",
}


def items_before(options: argparse.Namespace) -> int:
    """How many of a user's items must stand before a target."""
    return 1 if options.positives == 1 else options.history + options.positives - 1


def check_source(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """A parser's error where what --dataset needs is not given, or something is that it does not take."""
    if options.dataset == "csv" and not (options.interactions and options.items):
        parser.error("--dataset csv needs --interactions FILE and --items FILE")
    if options.dataset not in ("demo", "csv") and not options.source:
        parser.error(f"--dataset {options.dataset} needs --source DIR")
    names = ["--source"] if options.dataset in ("demo", "csv") else []
    names += [] if options.dataset == "csv" else ["--interactions", "--items"]
    names += [] if options.dataset in ("csv", "recbole") else list(COLUMNS)
    for name in names:
        if getattr(options, name[2:].replace("-", "_")):
            parser.error(f"{name} does not go with --dataset {options.dataset}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = runs.Parser(__doc__)
    source = parser.add_argument_group("source")
    source.add_argument("--dataset", choices=["demo", *readers.READERS], default="demo", help="the layout [demo]")
    source.add_argument("--source", type=Path, help="folder of the raw files (demo and csv have none)")
    source.add_argument("--images", type=Path, help="folder of <item>.jpg, .png or .webp, where not inside SOURCE")
    source.add_argument("--interactions", type=Path, metavar="FILE", help="csv: the table of interactions")
    source.add_argument("--items", type=Path, metavar="FILE", help="csv: the table of items")
    for option, usual in COLUMNS.items():
        source.add_argument(option, metavar="NAME", help=f"of csv and recbole tables [{usual}]")
    source.add_argument("--drop-untitled", action="store_true", help="leave out items that the titles do not list")
    source.add_argument("--out", type=Path, help="data folder to write [data/<dataset>]")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--history", type=runs.positive_int, help="items before the target, at most [5]")
    protocol.add_argument("--negatives", type=runs.positive_int, help="in the candidates, beside the target [9]")
    protocol.add_argument("--negative-sampling", choices=["uniform", "popularity"], default="uniform", help="[uniform]")
    split = "user: 8:1:1 [leave-one-out; hanorec: the published one]"
    protocol.add_argument("--split", choices=["leave-one-out", "user"], help=split)
    official = "official: 3 history items, 3 positives and 7 negatives, the last positive counts [standard]"
    protocol.add_argument("--protocol", choices=["standard", "official"], default="standard", help=official)
    protocol.add_argument("--min-rating", type=float, help="drop lower ratings [keep all]")
    protocol.add_argument("--min-interactions", type=runs.positive_int, default=6, help="drop users with fewer [6]")
    windows = "training rows of a user, the latest; 0: all [10]"
    protocol.add_argument("--max-windows-per-user", type=runs.non_negative_int, default=10, help=windows)
    protocol.add_argument("--seed", type=runs.non_negative_int, default=42, help="of all that is drawn here [42]")
    encoding = parser.add_argument_group("encoding")
    encoding.add_argument("--model", default="tiny", help="hub name or folder; tiny: untrained, made here [tiny]")
    encoding.add_argument("--max-pixels", type=runs.bounded(int, 784, 2**31), help="of an image [262144; tiny: 6272]")
    kept = "live: image tokens are not kept, but made in each step of training, where they outgrow the disk [stored]"
    encoding.add_argument("--tokens", choices=["stored", "live"], default="stored", help=kept)
    encoding.add_argument("--encode-only", action="store_true", help="the data folder stands; only encode it")
    runs.add_trust_option(encoding)
    shown = "print N rendered rows; a folder that stands is only shown"
    parser.add_argument("--show", type=runs.non_negative_int, default=0, metavar="N", help=shown)
    options = parser.parse_args(argv)
    options.out = options.out or Path("data") / options.dataset
    inside = options.model.strip("/").replace("/", "--")
    options.encoded = options.out / "encoded" / (inside if inside.strip(".") else Path(options.model).resolve().name)
    if not options.encode_only:
        check_source(options, parser)
    official, published = options.protocol == "official", options.dataset == "hanorec"
    if (official and (options.history or options.negatives)) or (published and options.split):
        parser.error("--protocol official sets --history and --negatives; --dataset hanorec brings its own --split")
    options.split = options.split or ("published" if published else "leave-one-out")
    options.positives = 3 if official else 1
    runs.set_defaults(options, **({"history": 3, "negatives": 7} if official else {"history": 5, "negatives": 9}))
    shortest = items_before(options) + (2 if options.split == "leave-one-out" else 1)
    if options.min_interactions < shortest:
        parser.error(f"--min-interactions must be at least {shortest} here")
    return options


def show(options: argparse.Namespace) -> None:
    """Print the prompts of the first training rows with their answers, as the model sees them."""
    from hanorec.model import mllm, packing, prompts

    items = runs.read_jsonl(options.out / "items.jsonl", runs.ITEM, "run prepare_data.py")
    folders = [options.encoded, *sorted((options.out / "encoded").glob("[!.]*"))]  # of --model, else of any
    folder = next(path for path in folders if (path / "manifest.json").exists())
    catalogue = mllm.Catalogue(items, folder)
    model = runs.read_json(folder / "manifest.json", {"backbone": str}, "encode the data again")["backbone"]
    name = options.out / "tiny" if model == mllm.TINY else model
    rendered = packing.load_prompts(name, catalogue, trust=options.trust_remote_code)
    for line in runs.read_jsonl(options.out / "train.jsonl", runs.ROW, "run prepare_data.py")[: options.show]:
        for task in ("rank", "yesno"):
            text = rendered.show(rendered.sft_tree(prompts.Row.of(line, catalogue.row_of), task))
            print(
                f"\n--- user {runs.printable(line['user'])}, {task}", *map(runs.printable, text.split("\n")), sep="\n"
            )


def check_out(out: Path, dataset: str) -> None:
    """UserError where `out` holds another dataset, or something that is no data folder."""
    manifest = out / "manifest.json"
    stands = runs.read_json(manifest, {}, "choose another --out").get("source") if manifest.exists() else dataset
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}  # of what was cut off, at most
    foreign = not manifest.exists() and names - OWN
    if stands != dataset or foreign:
        raise UserError(f"{out} holds {'other files' if foreign else f'the data of {stands}'}; choose another --out")


@runs.one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.show and (options.out / "manifest.json").exists() and any(options.out.glob("encoded/*/manifest.json")):
        print(f"{options.out} stands; showing it, and preparing nothing")
        show(options)
        return
    with runs.locked(options.out):
        if not options.encode_only:
            check_out(options.out, options.dataset)
            raw = (readers.READERS | {"demo": demo.read_demo})[options.dataset](options)
            data = build_sequences(raw, options.min_rating, options.min_interactions, options.drop_untitled)
            write_data(data, options, raw.files)
        encode(options)
    if options.show:
        show(options)


if __name__ == "__main__":
    main()
