"""Bad raw files and options: they end in one line on stderr and exit code 2, or are handled as docs/reliability.md says
and counted in manifest.json; never in a traceback, a hang or wrong output."""

import json
import os
import shutil

import layouts
import pytest
from layouts import ITEMS, TITLES, lines, table
from spoilt import JUNK, LOG, half, refused

import prepare_data


def put(name, content):
    """An edit that writes a file; content: bytes, or what the file's bytes become."""

    def edit(folder):
        path = folder / name
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return edit


def rows_of(change, name="log.csv"):
    """An edit that replaces the csv layout's interactions by change(rows)."""
    return put(name, lambda _: table(LOG, change(layouts.interactions())))


def renamed(old, new, titles=None):
    """An edit: the item `old` has the id `new` in both tables."""

    def edit(folder):
        rows = [(u, new if i == old else i, t, r) for u, i, t, r in layouts.interactions()]
        (folder / "log.csv").write_bytes(table(LOG, rows).replace(b"\r\n", b"\n"))
        names = {new if item == old else item: title for item, title in (titles or TITLES).items()}
        (folder / "items.csv").write_bytes(table(["item", "title"], names.items()))

    return edit


def titled(title):
    return put("items.csv", lambda _: table(["item", "title"], (TITLES | {"i7": title}).items()))


def timed(time):
    return rows_of(lambda rows: [(u, i, time if n == 3 else t, r) for n, (u, i, t, r) in enumerate(rows)])


def edit_pictures(change):
    """An edit that calls change(path) for each picture."""
    return lambda folder: [change(path) for path in sorted((folder / "images").iterdir())]


# layout, edit of the raw folder, further options, a word of the error or what the manifest counts
RAW = {
    "no such folder": ("recbole", lambda folder: shutil.rmtree(folder), "", "is not a folder"),
    "empty folder": ("recbole", lambda f: [p.unlink() for p in f.iterdir()], "", "holds no *.inter"),
    "two datasets": ("recbole", put("other.inter", b""), "", "holds 2 files named *.inter"),
    "a folder for a file": ("csv", lambda f: ((f / "log.csv").unlink(), (f / "log.csv").mkdir()), "", "log.csv"),
    "no such column": ("csv", None, "--user-column who", "has no column who"),
    "wrong delimiter": ("csv", put("log.csv", lambda b: b.replace(b",", b"|")), "", "has no column user"),
    "wrong delimiter in titles": ("microlens-tsv", put("Small_titles.csv", b"item;title\ni1;One\n"), "", "2 fields"),
    "spaces for tabs": ("microlens-tsv", put("Small_pairs.tsv", lambda b: b.replace(b"\t", b" ")), "", "a tab"),
    "wrong header": ("movielens-csv", put("ratings.csv", lambda b: b.replace(b"userId", b"uid")), "", "line 1"),
    "UTF-16": ("csv", put("log.csv", lambda b: b.decode().encode("utf-16")), "", "log.csv cannot be read"),
    "UTF-16 without its mark": ("csv", put("items.csv", lambda b: b.decode().encode("utf-16-le")), "", "items.csv"),
    "UTF-16 sequences": (
        "microlens-tsv",
        lambda f: [p.write_bytes(p.read_bytes().decode().encode("utf-16-le")) for p in f.iterdir()],
        "",
        "Small_",
    ),
    "latin-1": ("csv", put("items.csv", lambda b: b.replace("é".encode(), b"\xe9")), "", "items.csv cannot be read"),
    "NUL in an id": ("csv", renamed("i2", "i\0"), "", "is no text"),
    "half a character": ("amazon", put("meta_Beauty.jsonl", lambda b: b.replace(b"Equal", b"\\ud800")), "", "no text"),
    "quotes never closed": ("csv", put("items.csv", b'item,title\ni1,"One\ni2,Two\n'), "", "items.csv cannot be read"),
    "field of 200,000": ("csv", titled("x" * 200_000), "", "field larger than field limit"),
    "not gzip": ("amazon-gz", put("Beauty.jsonl.gz", b"{}\n"), "", "Beauty.jsonl.gz"),
    "spoilt gzip": ("amazon-gz", put("Beauty.jsonl.gz", lambda b: b[:20] + JUNK), "", "Beauty.jsonl.gz"),
    "JSON that is no object": ("amazon", put("Beauty.jsonl", b"[1]\n"), "", "near line 1"),
    "JSON nested deeply": ("amazon", put("Beauty.jsonl", b"[" * 100_000 + b"\n"), "", "near line 1"),
    "a list for an id": ("amazon", put("Beauty.jsonl", lambda b: b.replace(b'"i4"', b'["i4"]')), "", "expected a text"),
    "null for an id": ("amazon", put("Beauty.jsonl", lambda b: b.replace(b'"u4"', b"null")), "", "without an id"),
    "an endless time": ("amazon", put("Beauty.jsonl", lambda b: b.replace(b"1003", b"1" * 400)), "", "line 4"),
    "a list for a title": ("amazon", put("meta_Beauty.jsonl", lambda b: b.replace(b'"Equal"', b"[]")), "", "line 4"),
    "pictures of other items": (
        "csv",
        edit_pictures(lambda path: path.rename(path.with_stem(f"{path.stem}x"))),
        "--images raw/images",
        "raw/images has no picture of an item; name them like i0.jpg",
    ),
    "two pictures of one item": (
        "csv",
        edit_pictures(lambda path: shutil.copy(path, path.with_suffix(".png"))),
        "--images raw/images",
        "raw/images/i1.jpg and raw/images/i1.png are pictures of one item; keep one",
    ),
    "a folder named like a picture": (
        "csv",
        lambda folder: (folder / "images" / "i0.jpg").mkdir(),
        "--images raw/images",
        {"items_without_image": 1},
    ),
    "no picture folder": ("csv", None, "--images /nowhere", "/nowhere is not a folder"),
    "NaN for a time": ("csv", timed("nan"), "", "log.csv, line 5"),
    "an infinite time": ("csv", timed("-inf"), "", "log.csv, line 5"),
    "a time beyond floats": ("csv", timed("1e999"), "", "log.csv, line 5"),
    "no date": ("csv", timed("2024-13-45"), "", "log.csv, line 5"),
    "negative times": ("csv", timed(-(10**9)), "", {"users": 12, "interactions_tied_in_time": 0}),
    "dates before 1970": ("csv", timed("1890-01-01"), "", {"users": 12, "interactions_tied_in_time": 0}),
    "no title at all": ("csv", put("items.csv", b"item,title\n"), "", "no title"),
    "empty title": ("csv", titled(""), "", {"of_untitled_items": 4, "items_left_out": 1}),
    "blank title": ("csv", titled(" \t\u3000 "), "", {"of_untitled_items": 4, "items_left_out": 1}),
    "title of 10,000": ("csv", titled("long " * 2000), "", {"items": 24}),
    "equal titles": ("csv", None, "", {"items": 24}),
    "all titles equal": (
        "csv",
        put("items.csv", table(["item", "title"], [(i, "One") for i in ITEMS])),
        "",
        "no user has 6 interactions",  # a title that a user has twice counts once
    ),
    "an item nobody touched": ("csv", put("items.csv", lambda b: b + b"new,New\n"), "", {"items_left_out": 1}),
    "a user with one interaction": ("csv", put("log.csv", lambda b: b + b"once,i1,5,5\n"), "", {"users_too_short": 1}),
    "every user too short": ("csv", None, "--min-interactions 9", "no user has 9 interactions"),
    "ratings all too low": ("csv", None, "--min-rating 6", "no user has 6 interactions"),
    "one user": ("csv", rows_of(lambda rows: rows[:8]), "--negatives 1 --split user", "all except 0 titles; add items"),
    "fewer items than candidates": ("csv", None, "--negatives 30", "15 titles; give --negatives 15 or fewer"),
    "a repeated item": ("csv", put("log.csv", lambda b: b + b"u1,i5,5,5\n"), "", {"repeated_items_dropped": 1}),
    "a picture for nobody": ("csv", None, "--images raw/images", {"items_without_image": 1}),
    "id with a slash": ("csv", renamed("i2", "a/b"), "--images raw/images", {"items_without_image": 2}),
    "id out of the folder": ("csv", renamed("i2", "../secret"), "--images raw/images", {"items_without_image": 2}),
    "id from the root": ("csv", renamed("i2", "/etc/passwd"), "--images raw/images", {"items_without_image": 2}),
    "id of dots": ("csv", renamed("i2", ".."), "--images raw/images", {"items_without_image": 2}),
    "id with spaces": ("csv", renamed("i2", "a b  c"), "--images raw/images", {"items_without_image": 2}),
    "id with a line end": ("csv", renamed("i2", "a,\nb"), "", {"items": 24}),
    "id of emoji": ("csv", renamed("i2", "😀🏳️‍🌈"), "--images raw/images", {"items_without_image": 2}),
    "id of 300": ("csv", renamed("i2", "x" * 300), "--images raw/images", {"items_without_image": 2}),
    "id that is blank": ("csv", renamed("i2", "  "), "", "without an id"),
    "split by user and layout": ("hanorec", None, "--split user", "or --split with --dataset hanorec"),
    "a user in two splits": ("hanorec", put("val.tsv", b"u1\ti1 i2\n"), "", "is also in train.tsv"),
    "negative number": ("csv", None, "--history -1", "out of range"),
    "number of 30 digits": ("csv", None, f"--history {10**30}", "out of range"),
    "seed of 30 digits": ("csv", None, f"--seed {10**30}", "out of range"),
    "no number": ("csv", None, "--negatives many", "invalid int value"),
    "rating that is NaN": ("csv", None, "--min-rating nan", "no user has 6"),
    "out is a file": ("csv", lambda f: (f.parent / "data").touch(), "", "data cannot be written"),
    "out has a name of 300": ("csv", None, f"--out {'x' * 300}", "cannot be written"),
    "out holds a thesis": ("csv", lambda f: (f.parent / "data" / "x").mkdir(parents=True), "", "other files"),
}


def first_file(change):
    """An edit that changes the bytes of the folder's first file."""

    def edit(folder):
        path = min(folder.iterdir())
        path.write_bytes(change(path.read_bytes()))

    return edit


for layout in layouts.LAYOUTS:
    for what, change in (("junk", lambda _: JUNK), ("empty", lambda _: b""), ("cut", half)):
        RAW[f"{what} {layout}"] = (layout, first_file(change), "", "")


@pytest.mark.parametrize("name", RAW)
def test_raw_files(name, tmp_path, monkeypatch, capsys):
    layout, edit, options, expected = RAW[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "encode", lambda options: None)
    (tmp_path / "secret.jpg").write_bytes(b"not to be read")
    argv = layouts.write(layout, tmp_path / "raw", images="--images raw" in options)
    if edit:
        edit(tmp_path / "raw")
    argv = [*argv, "--out", "data", *options.split()]
    if name.startswith("cut "):  # what is left may be a whole dataset of fewer rows, but for its last line
        try:
            prepare_data.main([str(word) for word in argv])
        except SystemExit as stop:
            assert stop.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
            return
    elif isinstance(expected, str):
        assert expected in refused(capsys, prepare_data.main, *argv)
        assert not (tmp_path / "data" / "manifest.json").exists()
        return
    else:
        prepare_data.main([str(word) for word in argv])
        counts = json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
        assert counts.items() >= expected.items()
    layouts.check_rows(tmp_path / "data")
    images = [item["image"] for item in lines(tmp_path / "data" / "items.jsonl") if item["image"]]
    assert all(os.path.dirname(image) == "../raw/images" for image in images)
