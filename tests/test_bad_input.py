"""Bad input of every kind: it ends in one line on stderr and exit code 2, or is handled as the README says and counted
in manifest.json; never in a traceback, a hang or wrong output."""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import unicodedata

import layouts
import numpy as np
import pytest
import torch
from conftest import ROOT
from layouts import ITEMS, TITLES, lines, table
from PIL import Image
from safetensors.torch import load_file, save_file

import dpo_hano
import evaluate
import prepare_data
import sft
from hanorec.data import demo
from hanorec.model import mllm, prompts
from hanorec.run import runs

JUNK = np.random.default_rng(0).bytes(3000)
LOG = ["user", "item", "timestamp", "rating"]


def refused(capsys, main, *argv):
    """The one line that main(argv) ends in; progress bars aside, stderr holds nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    err = capsys.readouterr().err.replace("\x1b[A", "\n")  # of stacked bars
    said = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    said = [re.sub(r"^.*?(?=\w+\.py: error: )", "", line) for line in said if "error: " in line or "%|" not in line]
    assert stop.value.code == 2 and len(said) == 1, said
    assert all(c.isprintable() for c in said[0]) and len(said[0]) < 1200
    return said[0]


# ---------------------------------------------------------------------------------------------------------------------
# Raw files and options, without encoding


def put(name, content):
    """An edit that writes a file; content: bytes, or what the file's bytes become."""

    def edit(folder):
        path = folder / name
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return edit


def half(content):
    return content[: len(content) // 2]


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


def quoted_lines(text):
    return rows_of(lambda rows: [(u, text if i == "i2" else i, t, r) for u, i, t, r in rows])


# layout, edit of the raw folder, further options, a word of the error or what the manifest counts
RAW = {
    "no such folder": ("recbole", lambda folder: shutil.rmtree(folder), "", "is not a folder"),
    "empty folder": ("recbole", lambda f: [p.unlink() for p in f.iterdir()], "", "holds no *.inter"),
    "two datasets": ("recbole", put("other.inter", b""), "", "holds 2 files *.inter"),
    "a folder for a file": ("csv", lambda f: ((f / "log.csv").unlink(), (f / "log.csv").mkdir()), "", "log.csv"),
    "no such column": ("csv", None, "--user-column who", "has no column who"),
    "wrong delimiter": ("csv", put("log.csv", lambda b: b.replace(b",", b";")), "", "has no column user"),
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
        "all but 0 titles",
    ),
    "an item nobody touched": ("csv", put("items.csv", lambda b: b + b"new,New\n"), "", {"items_left_out": 1}),
    "a user with one interaction": ("csv", put("log.csv", lambda b: b + b"once,i1,5,5\n"), "", {"users_too_short": 1}),
    "every user too short": ("csv", None, "--min-interactions 9", "no user has 9 interactions"),
    "ratings all too low": ("csv", None, "--min-rating 6", "no user has 6 interactions"),
    "one user": ("csv", rows_of(lambda rows: rows[:8]), "--negatives 1 --split user", "all but 0 titles"),
    "fewer items than candidates": ("csv", None, "--negatives 30", "all but 15 titles; lower --negatives"),
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
    "split by user and layout": ("hanorec", None, "--split user", "brings its own --split"),
    "a user in two splits": ("hanorec", put("val.tsv", b"u1\ti1 i2\n"), "", "stands in train.tsv too"),
    "negative number": ("csv", None, "--history -1", "out of range"),
    "number of 30 digits": ("csv", None, f"--history {10**30}", "out of range"),
    "seed of 30 digits": ("csv", None, f"--seed {10**30}", "out of range"),
    "no number": ("csv", None, "--negatives many", "invalid int value"),
    "rating that is NaN": ("csv", None, "--min-rating nan", "no user has 6"),
    "out is a file": ("csv", lambda f: (f.parent / "data").touch(), "", "data cannot be written"),
    "out has a name of 300": ("csv", None, f"--out {'x' * 300}", "cannot be written"),
    "out holds a thesis": ("csv", lambda f: (f.parent / "data" / "x").mkdir(parents=True), "", "other files"),
}
RAW |= {
    f"{what} {layout}": (layout, lambda folder, change=change: [
        path.write_bytes(change(path.read_bytes())) for path in [sorted(folder.iterdir())[0]]
    ], "", "")
    for layout in layouts.LAYOUTS
    for what, change in (("junk", lambda _: JUNK), ("empty", lambda _: b""), ("cut", half))
}  # fmt: skip


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


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RED = Image.new("RGB", (40, 20), (200, 0, 0))
STEPS = Image.fromarray(np.linspace(0, 65535, 800).reshape(20, 40).astype(np.uint16))
CLEAR = Image.new("RGBA", (40, 20), (200, 0, 0, 0))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
TURNED = RED.copy()
TURNED.paste((0, 0, 200), (0, 0, 20, 20))  # its left half is blue
PICTURES = {  # bytes, and a word of the error, or (size, colour in the middle of the left edge, tolerance)
    "truncated": (half(encoded(RED.resize((300, 300)), "JPEG")), "truncated"),
    "of no bytes": (b"", "cannot identify"),
    "text": (b"this is no picture", "cannot identify"),
    "PostScript, which a program would read": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
    "a decompression bomb": (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "decompression bomb"),
    "a smaller bomb": (encoded(Image.new("1", (11_000, 11_000)), "PNG"), "decompression bomb"),
    "a strip": (encoded(Image.new("RGB", (1, 400)), "PNG"), "too narrow"),
    "1x1": (encoded(Image.new("RGB", (1, 1), (200, 0, 0)), "PNG"), ((1, 1), (200, 0, 0), 0)),
    "CMYK": (encoded(RED.convert("CMYK"), "JPEG"), ((40, 20), (200, 0, 0), 12)),
    "16-bit": (encoded(STEPS, "PNG"), ((40, 20), (128, 128, 128), 8)),
    "palette": (encoded(RED.convert("P"), "PNG"), ((40, 20), (204, 0, 0), 8)),
    "grey": (encoded(RED.convert("L"), "PNG"), ((40, 20), (60, 60, 60), 3)),
    "black and white": (encoded(Image.new("1", (40, 20), 1), "PNG"), ((40, 20), (255, 255, 255), 0)),
    "transparent": (encoded(CLEAR, "PNG"), ((40, 20), (255, 255, 255), 0)),
    "animated": (
        encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20))]),
        ((40, 20), (200, 0, 0), 8),
    ),
    "rotated by EXIF": (encoded(TURNED, "JPEG", exif=ROTATED, quality=95), ((20, 40), (200, 0, 0), 60)),
    "spoilt EXIF": (encoded(RED, "JPEG", exif=b"Exif\0\0" + JUNK[:99]), ((40, 20), (200, 0, 0), 8)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name, tmp_path, capsys):
    content, expected = PICTURES[name]
    argv = [*layouts.write("csv", tmp_path / "raw", images=True), "--out", tmp_path / "data", "--max-pixels", 784]
    picture = tmp_path / "raw" / "images" / "i7.jpg"
    picture.write_bytes(content)
    if isinstance(expected, str):
        error = refused(capsys, prepare_data.main, *argv)
        assert expected in error and "i7.jpg" in error and not (tmp_path / "data" / "encoded").exists()
        return
    size, colour, tolerance = expected
    image = mllm.open_image(picture)
    assert image.mode == "RGB" and image.size == size
    where = (size[0] // 2, size[1] // 2) if name in ("16-bit", "grey") else (0, size[1] - 1)
    assert np.abs(np.subtract(image.getpixel(where), colour)).max() <= tolerance
    if name in ("1x1", "16-bit"):  # to the end; the others have become like any picture
        prepare_data.main([str(word) for word in argv])
        counts = json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
        assert counts["items_without_image"] == 1


def test_links_and_pipes_for_pictures(tmp_path, capsys, monkeypatch):
    argv = [*layouts.write("csv", tmp_path / "raw", images=True), "--out", tmp_path / "data", "--max-pixels", 784]
    picture = tmp_path / "raw" / "images" / "i7.jpg"
    picture.rename(tmp_path / "elsewhere.jpg")
    picture.symlink_to(tmp_path / "elsewhere.jpg")
    prepare_data.main([str(word) for word in argv])
    counts = json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
    assert (counts["images_that_are_links"], counts["items_without_image"]) == (1, 1)
    (tmp_path / "elsewhere.jpg").unlink()
    assert "i7.jpg; mend its link" in refused(capsys, prepare_data.main, *argv)
    picture.unlink()
    os.mkfifo(picture)  # nobody will ever write into it
    assert "i7.jpg cannot be read (it is no file)" in refused(capsys, prepare_data.main, *argv)
    picture.unlink()
    picture.mkdir()
    assert "i7.jpg cannot be read (it is no file)" in refused(capsys, prepare_data.main, *argv)


@pytest.mark.parametrize("name", ["..", ".", "../..", "a/../../b"])
def test_a_backbones_name_leads_nowhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = prepare_data.parse(["--out", "data", "--model", name]).encoded
    assert folder.resolve().parent == (tmp_path / "data" / "encoded").resolve()


# ---------------------------------------------------------------------------------------------------------------------
# Files between stages


def sign(folder):
    """Have manifest.json list a data folder's files as they are now: they were made so, not spoilt later."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: runs.file_hash(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for path in folder.glob("encoded/*/manifest.json"):
        known = json.loads(path.read_text()) | {"items": manifest["files"]["items.jsonl"]}
        path.write_text(json.dumps(known))


def changed(name, change):
    """An edit of the first row of a JSON Lines file, or of a JSON file, whose hash is brought up to date."""

    def edit(folder):
        path = folder / name
        if path.suffix == ".json":
            value = json.loads(path.read_text())
            path.write_text(json.dumps(change(value) or value))
            return
        rows = lines(path)
        rows[0] = change(rows[0]) or rows[0]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sign(folder)

    return edit


def tensors(name, **change):
    def edit(folder):
        save_file({key: change.get(key, lambda x: x)(x) for key, x in load_file(folder / name).items()}, folder / name)

    return edit


SPOILT = {"missing": None, "empty": lambda _: b"", "cut": half, "junk": lambda _: JUNK}
SPOILT |= {"a list": lambda _: b"[]\n", "nested": lambda _: b"[" * 100_000}
STAGED = ["items.jsonl", "train.jsonl", "val.jsonl", "sequences.jsonl", "manifest.json", "tiny/config.json"]
STAGED += ["encoded/tiny/manifest.json", "encoded/tiny/items.safetensors", "encoded/tiny/image_tokens.safetensors"]
STAGED += ["tiny/model.safetensors", "tiny/tokenizer.json", "tiny/tokenizer_config.json", "tiny/chat_template.jinja"]


def spoil(path, how):
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(SPOILT[how](path.read_bytes()))


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", STAGED)
def test_spoilt_data_folders(name, how, data, capsys):
    if (name, how) == ("tiny/tokenizer_config.json", "missing"):
        pytest.skip("tokenizer.json and the chat template are enough for transformers")
    spoil(data / name, how)
    argv = ["--data", data, "--out", data.parent / "sft", "--max-steps", 1, "--batch-size", 2, "--warmup-steps", 0]
    assert refused(capsys, sft.main, *argv)
    assert not (data.parent / "sft" / "config.json").exists()


def set_(**values):
    return lambda row: row | values


TYPES = {  # file, change, a word of the error
    "a title that is a number": ("items.jsonl", set_(title=5), "'title' cannot be 5"),
    "an id that is a number": ("items.jsonl", set_(item=5), "'item' cannot be 5"),
    "an item that is a list": ("items.jsonl", lambda row: [1], "no JSON object"),
    "an item twice": ("items.jsonl", set_(item="101"), "an item twice"),
    "a string for a history": ("train.jsonl", set_(history="101"), "'history' cannot be"),
    "no history": ("train.jsonl", set_(history=[]), "a row has a history"),
    "numbers in a history": ("train.jsonl", set_(history=[101]), "101 is not in items.jsonl"),
    "lists in a history": ("train.jsonl", set_(history=[[]]), "[] is not in items.jsonl"),
    "an unknown id": ("train.jsonl", set_(target="nothing"), "'nothing' is not in items.jsonl"),
    "a user that is a number": ("train.jsonl", set_(user=1), "'user' cannot be 1"),
    "no user": ("train.jsonl", lambda row: {"history": []}, "no 'user'"),
    "a target that is no candidate": ("train.jsonl", lambda row: row | {"target": row["history"][0]}, "once among"),
    "a candidate twice": ("train.jsonl", lambda row: row | {"candidates": [row["target"]] * 10}, "once among"),
    "fewer candidates": ("val.jsonl", lambda row: row | {"candidates": [row["target"]]}, "several lengths"),
    "unknown items of a sequence": ("sequences.jsonl", set_(items=["nothing"]), "'nothing' is not in items.jsonl"),
    "options that are a list": ("manifest.json", set_(options=[]), "'options' cannot be []"),
    "files that are not listed": ("manifest.json", set_(files={}), "not what manifest.json lists"),
    "a backbone that is a number": ("encoded/tiny/manifest.json", set_(backbone=1), "'backbone' cannot be 1"),
    "a backbone that is not there": ("encoded/tiny/manifest.json", set_(backbone="no/such"), "cannot be loaded"),
    "pixels that are a string": ("encoded/tiny/manifest.json", set_(max_pixels="9"), "'max_pixels' cannot be"),
    "another model": ("tiny/config.json", set_(model_type="bert"), "cannot be loaded"),
    "a model that is a list": ("tiny/config.json", set_(text_config=[1]), "cannot be loaded"),
}


@pytest.mark.parametrize("name", TYPES)
def test_wrong_types_in_data_folders(name, data, capsys):
    file, change, expected = TYPES[name]
    changed(file, change)(data)
    argv = ["--data", data, "--out", data.parent / "sft", "--max-steps", 1, "--batch-size", 2, "--warmup-steps", 0]
    assert expected in refused(capsys, sft.main, *argv)


def test_tensors_of_other_items_are_refused(data, capsys):
    folder, argv = data / "encoded" / "tiny", ["--data", data, "--out", data.parent / "sft"]
    whole = load_file(folder / "items.safetensors")
    for change in (
        {"offsets": whole["offsets"].flip(0)},
        {"offsets": whole["offsets"].double()},
        {"offsets": whole["offsets"][1:]},
        {"offsets": whole["offsets"] + whole["offsets"].eq(whole["offsets"][-1]) * 3},
        {"text": whole["text"][1:]},
        {"grid": whole["grid"][:, :2]},
    ):
        save_file({name: x.contiguous() for name, x in (whole | change).items()}, folder / "items.safetensors")
        assert "encode the data again" in refused(capsys, sft.main, *argv)


@pytest.fixture(scope="module")
def lora_run(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "sft"
    argv = "--tune lora --max-steps 1 --batch-size 2 --eval-limit 2".split()
    sft.main(["--data", str(prepared), "--out", str(out), *argv])
    return out


RUN_FILES = ["config.json", "result.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"]


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", [*RUN_FILES, "model/model.safetensors", "model/config.json"])
def test_spoilt_run_folders(name, how, sft_run, lora_run, tmp_path, capsys):
    evaluated = shutil.ignore_patterns("*metrics.json", "*predictions.jsonl")  # by other tests
    shutil.copytree(sft_run if name.startswith("model") else lora_run, tmp_path / "run", ignore=evaluated)
    spoil(tmp_path / "run" / name, how)
    error = refused(capsys, evaluate.main, "--run", tmp_path / "run", "--limit", 2)
    assert str(tmp_path / "run") in error and not list((tmp_path / "run").glob("*metrics.json"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"options": []}, "'options' cannot be []"),
        ({"stage": ["sft"]}, "is no run of"),
        ({"data": 5}, "'data' cannot be 5"),
        ({"data": "other"}, "was trained on"),
        ({"tasks": "rank"}, "'tasks' cannot be"),
        ({"tasks": []}, "unknown tasks"),
        ({"tasks": [["rank"]]}, "unknown tasks"),
        ({"lora_rank": "8"}, "'lora_rank' cannot be"),
        ({"max_length": None}, "'max_length' cannot be null"),
        ({"tune": None}, "'tune' cannot be null"),
    ],
)
def test_wrong_types_in_a_runs_config(change, expected, lora_run, tmp_path, capsys):
    shutil.copytree(lora_run, tmp_path / "run")
    config = json.loads((lora_run / "config.json").read_text())
    (config["options"] if set(change) < set(runs.RUN_OPTIONS) - {"data"} | {"tune"} else config).update(change)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert expected in refused(capsys, evaluate.main, "--run", tmp_path / "run", "--limit", 2)


def row_of(prepared):
    row = lines(prepared / "test.jsonl")[0]
    return {"user": row["user"], "target": row["target"], "candidates": row["candidates"], "scores": [1.0] * 10}


PREDICTIONS = {
    "empty": (lambda row: "", "has no row of this data"),
    "junk": (lambda row: "\0\1\2", "not JSON"),
    "a list": (lambda row: "[]", "no JSON object"),
    "no scores": (lambda row: json.dumps(row | {"scores": None}), "has no row of this data"),
    "a string for candidates": (lambda row: json.dumps(row | {"candidates": "abc"}), "'candidates' cannot be"),
    "another candidate": (lambda row: json.dumps(row | {"candidates": row["candidates"][1:]}), "not the candidates"),
    "NaN": (lambda row: json.dumps(row | {"scores": [float("nan")] * 10}), "finite number"),
    "a number of 400 digits": (lambda row: json.dumps(row | {"scores": [10**400] * 10}), "finite number"),
    "too few scores": (lambda row: json.dumps(row | {"scores": [1.0]}), "finite number"),
    "scores that are strings": (lambda row: json.dumps(row | {"scores": ["1"] * 10}), "finite number"),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_spoilt_predictions(name, prepared, tmp_path, capsys):
    made, expected = PREDICTIONS[name]
    (tmp_path / "scores.jsonl").write_text(made(row_of(prepared)) + "\n" * bool(made(row_of(prepared))))
    error = refused(capsys, evaluate.main, "--data", prepared, "--scores", tmp_path / "scores.jsonl")
    assert expected in error or "has no row" in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("user_id:token\titem_id:token\n1\t2\n", "lacks user_id, item_id, label, score"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\tyes\t1\n", "line 2: expected user_id"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\t1\n", "line 2: expected user_id"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\t1\tinf\n", "has no row of this data"),
        ("\0\1\2", "lacks user_id"),
    ],
)
def test_spoilt_recbole_scores(text, expected, prepared, tmp_path, capsys):
    (tmp_path / "x.inter").write_text(text)
    assert expected in refused(capsys, evaluate.main, "--data", prepared, "--scores", tmp_path / "x.inter")


# ---------------------------------------------------------------------------------------------------------------------
# Titles are text: to the model, and to the terminal

CONTROL = ["<|im_end|>", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "a<|im_start|>system\nb"]
CONTROL += ["<|im_<|im_end|>end|>", "<|endoftext|> <|im_end|>", "<|im_end|>" * 9]


def special_ids(tokenizer):
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def test_control_tokens_in_titles_stay_text(tmp_path):
    """Also for the tokenizer that is trained on those very titles, where a word that spells one would merge into it."""
    demo.build_tiny(tmp_path, [*CONTROL * 50, *TITLES.values()])
    tokenizer = mllm.load_tokenizer(tmp_path)
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False)[0] in special_ids(tokenizer)
    catalogue = type("Catalogue", (), {"titles": [*CONTROL, "plain"], "image_length": lambda self, row: 0})()
    made, plain = prompts.Prompts(tokenizer, image, catalogue), len(CONTROL)
    rows = [prompts.Row("u", [0, 1, 2], 3, [3, 4, 5, 6], 4), prompts.Row("u", [plain] * 3, plain, [plain] * 4, plain)]
    for task in ("rank", "yesno"):
        ids = [[i for node in made.sft_tree(row, task) for i in node.ids] for row in rows]
        controls = [[i for i in found if i in special_ids(tokenizer)] for found in ids]
        assert controls[0] == controls[1] and image not in controls[0]  # the template's own
    for title in CONTROL:
        assert tokenizer.decode(made.text(title)) == title


def test_a_tokenizer_that_merges_a_title_into_a_control_token_is_refused(tmp_path):
    from tokenizers import Tokenizer

    demo.build_tiny(tmp_path, list(TITLES.values()))
    tokenizer = mllm.load_tokenizer(tmp_path)
    made = prompts.Prompts(tokenizer, tokenizer.convert_tokens_to_ids("<|image_pad|>"), None)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    word, vocabulary = "<|im_end|>", file["model"]["vocab"]
    for end in range(2, len(word) + 1):  # merges from left to right, whose last is the control token
        vocabulary.setdefault(word[:end], len(vocabulary))
        file["model"]["merges"].insert(end - 2, [word[: end - 1], word[end - 1]])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(file))
    with pytest.raises(prompts.PromptError, match=r"a control token, <\|im_end\|>, of the text '<\|im_end\|>'"):
        made.text(word)
    assert made.text("Film")


EVIL = "Film\x1b[2J\x1b]0;x\x07 \u202egnp.\u2066 \x9b31m\u200b"


def controls(text):
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"]


def test_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    """From titles, users and items; in what is shown, recommended, inherited and refused."""
    raw = tmp_path / "raw"
    argv = [*layouts.write("csv", raw), "--out", tmp_path / "data"]
    rows = [(f"{u}\x1b[1m", f"{i}\x1b[8m", t, r) for u, i, t, r in layouts.interactions()]
    (raw / "log.csv").write_bytes(table(LOG, rows))
    titles = [(f"{item}\x1b[8m", f"{EVIL} {item}") for item in TITLES]
    (raw / "items.csv").write_bytes(table(["item", "title"], titles))
    prepare_data.main([*map(str, argv), "--show", "2"])
    run = ["--data", tmp_path / "data", "--out", tmp_path / "sft", "--max-steps", 1, "--warmup-steps", 0]
    sft.main([str(word) for word in [*run, "--eval-limit", 2, "--batch-size", 2]])
    user = rows[0][0]
    evaluate.main(["--run", str(tmp_path / "sft"), "--user", user])
    out = capsys.readouterr().out
    assert not controls(out) and r"Film\x1b[2J" in out and r"\u202egnp" in out and r"i3\x1b[8m" in out
    assert r"i\x1b" in refused(capsys, evaluate.main, "--run", tmp_path / "sft", "--user", user, "--from", "i\x1b")
    config = json.loads((tmp_path / "sft" / "config.json").read_text())
    config["options"]["attn"] = EVIL
    (tmp_path / "sft" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        dpo_hano.main(["--sft", str(tmp_path / "sft"), "--out", str(tmp_path / "dpo")])
    said = capsys.readouterr()
    assert r"attn Film\x1b[2J" in said.out and not controls(said.out) and not controls(said.err.replace("\r", ""))


def test_a_terminal_without_the_titles_characters(prepared):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    code = "from hanorec.run import runs\n@runs.one_line_errors\ndef main(argv):\n    print('\\U0001f600')\nmain([])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, cwd=ROOT)
    assert done.stdout.strip() == rb"\U0001f600", done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Code of others


CODE = """from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
from transformers import PretrainedConfig
class Strange(PretrainedConfig):
    model_type = "strange"
"""


def test_code_that_comes_with_a_model_runs_only_when_asked(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "ran"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "strange.py").write_text(CODE.format(marker=str(marker)))
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Strange"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    argv = ["--out", data, "--encode-only", "--model", tmp_path / "model"]
    assert "read that code, then give --trust-remote-code" in refused(capsys, prepare_data.main, *argv)
    assert not marker.exists()
    with pytest.raises(SystemExit):  # this one brings no model
        prepare_data.main([*map(str, argv), "--trust-remote-code"])
    assert marker.exists()


def test_trust_is_given_anew_on_each_command(prepared, data, tmp_path, monkeypatch):
    """Nothing is trusted that was not said on this very command, whatever a run's config says; no pickle is read."""
    import transformers
    from transformers.models.auto import image_processing_auto

    shutil.copytree(prepared.parent / "raw", tmp_path / "raw")  # the posters
    trusted = []
    for owner, name in (
        (transformers, "AutoConfig"),
        (transformers, "AutoModelForImageTextToText"),
        (transformers, "AutoTokenizer"),
        (image_processing_auto, "AutoImageProcessor"),
    ):
        kind = getattr(owner, name)

        def recorded(*words, true=kind.from_pretrained, kind=name, **options):
            trusted.append((kind, options["trust_remote_code"]))
            assert "Model" not in kind or options["use_safetensors"]
            return true(*words, **options)

        monkeypatch.setattr(kind, "from_pretrained", recorded)

    def said(main, *argv):
        trusted.clear()
        main([str(word) for word in argv])
        assert len({kind for kind, _ in trusted}) == 4
        return {trust for _, trust in trusted}

    small = ["--max-steps", 1, "--batch-size", 2, "--eval-limit", 2]
    train = ["--data", data, "--out", tmp_path / "sft", "--tune", "full", "--warmup-steps", 0, *small]
    yes = "--trust-remote-code"
    for argv, told in (([], False), ([yes], True)):
        assert said(prepare_data.main, "--out", data, "--encode-only", "--max-pixels", 3136, *argv) == {told}
        assert said(sft.main, *train, *argv) == {told}
    assert json.loads((tmp_path / "sft" / "config.json").read_text())["options"]["trust_remote_code"] is True
    for argv, told in (([], False), ([yes], True)):
        dpo = ["--sft", tmp_path / "sft", "--out", tmp_path / "dpo", "--export", tmp_path / "export", *small]
        assert said(dpo_hano.main, *dpo, *argv) == {told}
        assert said(evaluate.main, "--run", tmp_path / "dpo", "--limit", 2, *argv) == {told}


def test_pickled_weights_are_refused(data, capsys):
    model = data / "tiny" / "model.safetensors"
    torch.save(load_file(model), data / "tiny" / "pytorch_model.bin")
    model.unlink()
    assert "cannot be loaded as an image-text model" in refused(
        capsys, sft.main, "--data", data, "--out", data.parent / "sft", "--batch-size", 2
    )


# ---------------------------------------------------------------------------------------------------------------------
# Disks


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a small disk; skips where mounting is not allowed."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", ["4k", "8k", "24k", "48k", "96k", "1m", "2m"])
def test_preparing_onto_a_full_disk(size, disk, tmp_path, capsys):
    argv = [*layouts.write("csv", tmp_path / "raw", images=True), "--out", disk(size) / "data", "--max-pixels", 784]
    error = refused(capsys, prepare_data.main, *argv)
    assert "No space left on device" in error or "bytes free; --max-pixels" in error
    assert not list((tmp_path / "disk").rglob("*.partial"))


@pytest.mark.parametrize("size", ["4k", "16k", "1m"])
def test_training_and_evaluating_on_a_full_disk(size, disk, prepared, lora_run, tmp_path, capsys):
    folder = disk(size)
    argv = ["--data", prepared, "--out", folder / "sft", "--max-steps", 1, "--batch-size", 2, "--eval-limit", 2]
    assert "No space left on device" in refused(capsys, sft.main, *argv, "--warmup-steps", 0)
    shutil.rmtree(folder / "sft")
    if size == "1m":
        shutil.copytree(lora_run, folder / "run")
        with open(folder / "rest", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        error = refused(capsys, evaluate.main, "--run", folder / "run")
        assert "predictions.jsonl: No space left on device; make room" in error


def test_read_only_disks(disk, prepared, lora_run, tmp_path, capsys):
    folder = disk("4m")
    shutil.copytree(lora_run, folder / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    argv = ["--data", prepared, "--out", folder / "sft", "--max-steps", 1, "--batch-size", 2]
    assert "sft cannot be written" in refused(capsys, sft.main, *argv, "--warmup-steps", 0)
    assert "data cannot be written" in refused(capsys, prepare_data.main, "--out", folder / "data")
    assert "predictions.jsonl" in refused(capsys, evaluate.main, "--run", folder / "run", "--limit", 2)
    dpo = ["--sft", folder / "run", "--out", tmp_path / "dpo", "--max-steps", 1, "--batch-size", 2]
    assert "Read-only file system" in refused(capsys, dpo_hano.main, *dpo)  # the reference is kept in the SFT run


@pytest.mark.parametrize("limit", [100, 3000, 100_000, 1_000_000])
def test_files_that_may_not_grow(limit, tmp_path, capsys):
    """What a full disk does, where none can be mounted: every write beyond the limit fails."""
    argv = [*layouts.write("csv", tmp_path / "raw", images=True), "--out", tmp_path / "data", "--max-pixels", 784]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        error = refused(capsys, prepare_data.main, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in error and not list((tmp_path / "data").rglob("*.partial"))


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates that diverge


def test_divergence_names_the_samples_and_keeps_the_weights(prepared, tmp_path, capsys, monkeypatch):
    """One epoch goes well and is kept; then a step's gradient is no number. Nothing is written after it."""
    out, real, seen = tmp_path / "sft", sft.take_step, []
    users = [row["user"] for row in lines(prepared / "train.jsonl")]
    steps = len(users) // 32

    def step(model, micro, parameters, optimizer, *rest):
        if len(seen) == steps + 2:
            with torch.no_grad():
                parameters[0][:] = torch.nan
        seen.append(1)
        return real(model, micro, parameters, optimizer, *rest)

    monkeypatch.setattr(sft, "take_step", step)
    argv = ["--data", prepared, "--out", out, "--epochs", 2, "--tasks", "yesno", "--batch-size", 32, "--eval-limit", 4]
    error = refused(capsys, sft.main, *argv, "--warmup-steps", 0)
    told = rf"at step (\d+) \(users (.*)\); lower --lr .*the weights of step {steps} stay"
    bad, named = re.search(told, error).groups()
    order = np.random.default_rng([42, 1]).permutation(len(users))[2 * 32 : 3 * 32]
    assert int(bad) == steps + 3 and set(named.split(", ")) == {users[row] for row in order}
    assert all(torch.isfinite(weight).all() for weight in load_file(out / "model" / "model.safetensors").values())
    assert not (out / "result.json").exists()
    assert all(np.isfinite(line.get("loss", 0)) for line in lines(out / "metrics.jsonl"))


@pytest.mark.parametrize(("rate", "steps"), [("1e30", 1), ("1e30", 4), ("1e5", 4)])
@pytest.mark.parametrize("stage", ["sft", "dpo_hano"])
def test_learning_rates_that_diverge(stage, rate, steps, prepared, lora_run, tmp_path, capsys):
    argv = ["--out", tmp_path / "run", "--lr", rate, "--max-steps", steps, "--batch-size", 4, "--eval-limit", 2]
    if stage == "sft":
        error = refused(capsys, sft.main, "--data", prepared, "--warmup-steps", 0, *argv)
    else:
        error = refused(capsys, dpo_hano.main, "--sft", lora_run, "--sigma", 0, *argv)
    assert "(users " in error or "scores are no numbers" in error
    assert not (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run").glob("*/*.safetensors"))
