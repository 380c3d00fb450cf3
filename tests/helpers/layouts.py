"""Write a small dataset in every layout that prepare_data.py reads. tests/fuzz.py spoils these files."""

import gzip
import json

from PIL import Image

USERS = [f"u{number}" for number in range(12)]
ITEMS = [f"i{number}" for number in range(24)]
TITLES = {item: f'Film "{item}", the' for item in ITEMS} | {"i3": "Equal", "i4": "Equal", "i5": "Emoji 😀 é"}
LAYOUTS = "movielens-csv movielens-dat microlens-tsv microlens-csv hanorec amazon amazon-gz recbole csv tsv parquet"
LAYOUTS = LAYOUTS.split()
LENGTH = 8  # interactions of a user


def interactions():
    """(user, item, time, rating) of every interaction, user after user, in order of time."""
    return [
        (user, ITEMS[(5 * number + 2 * step) % 24], 1000 + step, step % 5 + 1)
        for number, user in enumerate(USERS)
        for step in range(LENGTH)
    ]


def table(header, rows, delimiter=",", quote=True):
    """The bytes of a table. header: the names of the columns, or None."""

    def field(value):
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if quote and (delimiter in text or '"' in text) else text

    lines = [delimiter.join(map(field, row)) for row in ([header] if header else []) + [list(row) for row in rows]]
    return "".join(line + "\n" for line in lines).encode()


def sequences(rows, users):
    """The bytes of a table with one line for each user: the user and the items in order."""
    return "".join(f"{user}\t{' '.join(row[1] for row in rows if row[0] == user)}\n" for user in users).encode()


def draw(folder, ending=".jpg", items=ITEMS):
    """Write a picture of each item but the first."""
    folder.mkdir(parents=True)
    for number, item in enumerate(items[1:]):
        Image.new("RGB", (30, 30), (8 * number, 99, 0)).save(folder / f"{item}{ending}")


def write(layout, folder, images=False):
    """Write the dataset to `folder` in this layout. Returns the options with which prepare_data.py reads it."""
    rows, name = interactions(), layout.split("-")[0]
    folder.mkdir(parents=True, exist_ok=True)
    titles, by_rating = list(TITLES.items()), [(u, i, r, t) for u, i, t, r in rows]
    files, pictures = {}, "images"
    if layout == "movielens-csv":
        files["ratings.csv"] = table(["userId", "movieId", "rating", "timestamp"], by_rating)
        files["movies.csv"] = table(["movieId", "title", "genres"], [(*row, "Drama") for row in titles])
        pictures = "posters"
    elif layout == "movielens-dat":
        files["ratings.dat"] = table(None, by_rating, "::", quote=False)
        files["movies.dat"] = table(None, [(*row, "Drama") for row in titles], "::", quote=False)
        pictures = "posters"
    elif layout == "hanorec":
        for split, users in (("train", USERS[:8]), ("val", USERS[8:10]), ("test", USERS[10:])):
            files[f"{split}.tsv"] = sequences(rows, users)
        files["Netflix_titles.csv"] = table(None, titles)
    elif name == "microlens":
        files["Small_pairs.tsv"] = sequences(rows, USERS)
        if layout == "microlens-csv":
            files = {"Small_pairs.csv": table(["user", "item", "timestamp"], [row[:3] for row in rows])}
        files["Small_titles.csv"] = table(["item", "title"], titles)
        pictures = "Small_covers"
    elif name == "amazon":
        fields = ("user_id", "parent_asin", "timestamp", "rating")
        meta = [{"parent_asin": item, "title": title} for item, title in titles]
        for stem, lines in (("Beauty", [dict(zip(fields, row, strict=True)) for row in rows]), ("meta_Beauty", meta)):
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
            zipped = layout == "amazon-gz"
            files[f"{stem}.jsonl" + ".gz" * zipped] = gzip.compress(text) if zipped else text
    elif layout == "recbole":
        header = ["user_id:token", "item_id:token", "timestamp:float", "rating:float"]
        files["small.inter"] = table(header, rows, "\t", quote=False)
        files["small.item"] = table(["item_id:token", "title:token_seq"], titles, "\t", quote=False)
    else:
        for stem, header, lines in (
            ("log", ["user", "item", "timestamp", "rating"], rows),
            ("items", ["item", "title"], titles),
        ):
            if layout == "parquet":
                import pyarrow
                from pyarrow import parquet

                columns = {name: [row[at] for row in lines] for at, name in enumerate(header)}
                parquet.write_table(pyarrow.table(columns), folder / f"{stem}.parquet")
            else:
                files[f"{stem}.{layout}"] = table(header, lines, "\t" if layout == "tsv" else ",")
    for file, content in files.items():
        (folder / file).write_bytes(content)
    if images:
        draw(folder / pictures)
    if layout not in ("csv", "tsv", "parquet"):
        return ["--dataset", name, "--source", str(folder)]
    tables = ["--interactions", str(folder / f"log.{layout}"), "--items", str(folder / f"items.{layout}")]
    return ["--dataset", "csv", *tables, *(["--images", str(folder / pictures)] if images else [])]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_rows(out):
    """Check the properties that every data folder must have."""
    titles = {item["item"]: item["title"] for item in lines(out / "items.jsonl")}
    assert all(title and title == " ".join(title.split()) for title in titles.values())
    assert not any("\0" in text for item in titles.items() for text in item)
    examples = lines(out / "train.jsonl") + lines(out / "val.jsonl") + lines(out / "test.jsonl")
    for example in examples:
        history, target, candidates = example["history"], example["target"], example["candidates"]
        names = [titles[item] for item in candidates]
        assert len(set(names)) == len(names) > 1 and target in candidates
        assert history and target not in history and example["rejected"] != target
        assert not set(history) & (set(candidates) - {target})
