"""Readers of other projects' layouts, on small files with the warts of the true ones."""

import gzip
import json
import os

import pytest
from PIL import Image

import prepare_data
from hanorec.data import readers, tables
from hanorec.run.files import UserError

USERS = [f"u{number}" for number in range(12)]
ITEMS = [f"i{number}" for number in range(30)]
TITLES = {item: f"Title {item}" for item in ITEMS} | {
    "i3": 'The "Film", a tale',
    "i4": "Emoji 😀 #tag",
    "i5": "Title i6",
}


def sequence(user):
    """Seven items of a user, in order of time."""
    first = USERS.index(user)
    return [ITEMS[(first + 3 * step) % 30] for step in range(7)]


def interactions():
    """(user, item, time, rating), out of order and with a repeated item."""
    rows = [(user, item, 1000 + step, 4) for user in USERS for step, item in enumerate(sequence(user))]
    return sorted([*rows, (USERS[0], sequence(USERS[0])[0], 2000, 5)], key=lambda row: shuffle_key(row))


def shuffle_key(row):
    return (row[2] * 7919) % 31, row


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def draw(folder, items=ITEMS[1:], ending=".jpg"):
    folder.mkdir(parents=True)
    for item in items:
        Image.new("RGB", (30, 30)).save(folder / f"{item}{ending}")


def prepare(monkeypatch, out, *argv):
    """Prepare without encoding; (rows by split, items, manifest)."""
    monkeypatch.setattr(prepare_data, "encode", lambda options: None)
    prepare_data.main([*map(str, argv), "--out", str(out)])

    def lines(name):
        return [json.loads(line) for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    splits = {name: lines(name) for name in ("train", "val", "test")}
    return splits, {item["item"]: item for item in lines("items")}, json.loads((out / "manifest.json").read_text())


def check(splits, items, manifest, images=29):
    """What every reader must give for the data above."""
    assert {row["user"]: row["history"] + [row["target"]] for row in splits["test"]} == {
        user: sequence(user)[-6:] for user in USERS
    }
    assert {item: row["title"] for item, row in items.items()} == TITLES
    assert manifest["counts"]["items_without_image"] == 30 - images
    for row in [row for rows in splits.values() for row in rows]:
        names = [TITLES[item] for item in row["candidates"]]
        assert len(set(names)) == 10  # i5 and i6 share a title


def microlens(folder, layout="tsv"):
    draw(folder / "MicroLens-50k_covers")
    if layout == "tsv":
        text = "".join(f"{user}\t{' '.join(sequence(user))}\r\n" for user in USERS)
        (folder / "MicroLens-50k_pairs.tsv").write_text(text, newline="")
    else:
        text = "user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t, _ in interactions())
        (folder / "MicroLens-50k_pairs.csv").write_text(text)
    text = "\ufeffitem,title\r\n" + "".join(f"{item},{quoted(title)}\r\n" for item, title in TITLES.items())
    (folder / "MicroLens-50k_titles.csv").write_text(text, encoding="utf-8", newline="")


@pytest.mark.parametrize("layout", ["tsv", "csv"])
def test_microlens(tmp_path, monkeypatch, layout):
    microlens(tmp_path / "raw", layout)
    check(*prepare(monkeypatch, tmp_path / "data", "--dataset", "microlens", "--source", tmp_path / "raw"))


def test_hanorec_keeps_the_published_split(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    draw(raw / "images")
    split = {"train": USERS[:8], "val": USERS[8:10], "test": USERS[10:]}
    for name, users in split.items():
        (raw / f"{name}.tsv").write_text("".join(f"{user}\t{' '.join(sequence(user))}\n" for user in users))
    (raw / "Netflix_titles.csv").write_text("".join(f"{item},{quoted(title)}\n" for item, title in TITLES.items()))
    argv = ["--dataset", "hanorec", "--source", raw]
    splits, items, manifest = prepare(monkeypatch, tmp_path / "data", *argv)
    assert {name: {row["user"] for row in rows} for name, rows in splits.items()} == {
        n: set(u) for n, u in split.items()
    }
    assert all(row["target"] == sequence(row["user"])[-1] for name in ("val", "test") for row in splits[name])
    assert len(items) == 30 and manifest["options"]["split"] == "published"
    splits, _, _ = prepare(monkeypatch, tmp_path / "official", *argv, "--protocol", "official")
    for row in splits["test"]:
        own = sequence(row["user"])
        assert row["history"] == own[-6:-3] and set(own[-3:]) < set(row["candidates"]) and row["target"] == own[-1]


@pytest.mark.parametrize("zipped", [True, False])
def test_amazon(tmp_path, monkeypatch, zipped):
    raw = tmp_path / "raw"
    draw(raw / "images")
    rows = [
        {"user_id": u, "parent_asin": i, "timestamp": t, "rating": r, "text": "long"} for u, i, t, r in interactions()
    ]
    rows += [{"user_id": user, "parent_asin": "untitled", "timestamp": 1, "rating": 1.0} for user in USERS]
    meta = [{"parent_asin": item, "title": title.replace('"', "&quot;")} for item, title in TITLES.items()]
    meta += [{"parent_asin": "unknown", "title": "Never bought"}, {"parent_asin": "untitled", "title": None}]
    for name, lines in (("All_Beauty", rows), ("meta_All_Beauty", meta)):
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        path = raw / (f"{name}.jsonl" + ".gz" * zipped)
        path.write_bytes(gzip.compress(text) if zipped else text)
    splits, items, manifest = prepare(monkeypatch, tmp_path / "data", "--dataset", "amazon", "--source", raw)
    check(splits, items, manifest)
    assert manifest["counts"]["of_untitled_items"] == 12


def test_recbole(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    draw(raw / "images", ending=".png")
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (raw / "ml.inter").write_text(header + "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, t, r in interactions()))
    header = "item_id:token\tmovie_title:token_seq\tgenre:token_seq\n"
    (raw / "ml.item").write_text(header + "".join(f"{item}\t{title}\tDrama\n" for item, title in TITLES.items()))
    check(*prepare(monkeypatch, tmp_path / "data", "--dataset", "recbole", "--source", raw))


TABLES = ["--user-column", "who", "--item-column", "asin", "--time-column", "when", "--title-column", "name"]


def test_csv_with_named_columns_and_dates(tmp_path, monkeypatch):
    draw(tmp_path / "pictures", ending=".webp")
    rows = "".join(f"{i},2024-01-{t - 999:02} 12:00:00,{u}\n" for u, i, t, _ in interactions() if t < 2000)
    (tmp_path / "log.csv").write_text("asin,when,who\n" + rows)
    titles = "".join(f"{quoted(title)},{item}\n" for item, title in TITLES.items())
    (tmp_path / "items.csv").write_text("name,asin\n" + titles + "Never bought,i99\n", encoding="utf-8")
    files = ["--interactions", tmp_path / "log.csv", "--items", tmp_path / "items.csv"]
    argv = ["--dataset", "csv", *files, "--images", tmp_path / "pictures"]
    check(*prepare(monkeypatch, tmp_path / "data", *argv, *TABLES))
    with pytest.raises(SystemExit):
        prepare(monkeypatch, tmp_path / "other", *argv)


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    draw(tmp_path / "pictures")
    names = ("who", "asin", "when")
    columns = {name: [row[at] for row in interactions()] for at, name in enumerate(names)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "log.parquet")
    parquet.write_table(
        pyarrow.table({"asin": list(TITLES), "name": list(TITLES.values())}), tmp_path / "items.parquet"
    )
    files = ["--interactions", tmp_path / "log.parquet", "--items", tmp_path / "items.parquet"]
    check(
        *prepare(monkeypatch, tmp_path / "data", "--dataset", "csv", *files, "--images", tmp_path / "pictures", *TABLES)
    )


def test_parquet_columns_that_nobody_uses_are_not_read(tmp_path, monkeypatch):
    """Lists, bytes and maps beside the columns of text, numbers and times. Text may be a category, as in pandas."""
    pyarrow = pytest.importorskip("pyarrow")
    from datetime import datetime

    from pyarrow import parquet

    rows = [row for row in interactions() if row[2] < 2000]
    columns = {"user": pyarrow.array([row[0] for row in rows]).dictionary_encode()}
    columns["genres"] = [["Drama"]] * len(rows)
    columns["item"] = pyarrow.array([row[1] for row in rows], pyarrow.large_string())
    columns["vector"] = [b"\xff\xfe"] * len(rows)
    columns["timestamp"] = [datetime(2024, 1, row[2] - 999) for row in rows]
    columns["counts"] = pyarrow.array([[("a", 1)]] * len(rows), pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    parquet.write_table(pyarrow.table(columns), tmp_path / "log.parquet")
    titles = {"picture": [b"\x89PNG"] * len(TITLES), "item": list(TITLES), "title": list(TITLES.values())}
    parquet.write_table(pyarrow.table(titles), tmp_path / "items.parquet")
    files = ["--interactions", tmp_path / "log.parquet", "--items", tmp_path / "items.parquet"]
    check(*prepare(monkeypatch, tmp_path / "data", "--dataset", "csv", *files), images=0)


def test_parquet_that_pyarrow_cannot_read_is_refused(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"user": ["u1"]}), tmp_path / "log.parquet")
    for error in (pyarrow.ArrowNotImplementedError, pyarrow.ArrowTypeError):

        def fail(*_, error=error, **__):
            raise error("not this type")

        monkeypatch.setattr(parquet.ParquetFile, "iter_batches", fail)
        with pytest.raises(UserError, match=r"log\.parquet cannot be read: not this type"):
            list(tables.table_rows(tmp_path / "log.parquet"))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_movielens_titles_in_either_encoding(tmp_path, encoding, mark):
    """A byte order mark is no part of the first user's id."""
    (tmp_path / "ratings.dat").write_text(f"{mark}1::2::3.5::4\n", encoding="utf-8")
    (tmp_path / "movies.dat").write_text("2::Léon: The Professional (1994)::Crime\n", encoding=encoding)
    options = prepare_data.parse(["--dataset", "movielens", "--source", str(tmp_path)])
    raw = readers.read_movielens(options)
    assert raw.titles == {"2": "Léon: The Professional (1994)"} and list(raw.interactions.user_codes) == ["1"]
    assert [column.tolist() for column in raw.columns] == [[0], [0], [4], [3.5]]


def test_without_times_the_input_order_counts_and_is_said(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "pictures")
    rows = "".join(f"{user},{item}\n" for user in USERS for item in sequence(user))
    (tmp_path / "log.csv").write_text("user,item\n" + rows)
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"{i},{quoted(t)}\n" for i, t in TITLES.items()))
    files = [
        "--interactions",
        tmp_path / "log.csv",
        "--items",
        tmp_path / "items.csv",
        "--images",
        tmp_path / "pictures",
    ]
    found = prepare(monkeypatch, tmp_path / "data", "--dataset", "csv", *files)
    check(*found)
    assert "has no column timestamp" in capsys.readouterr().out
    assert found[2]["counts"]["interactions_tied_in_time"] == 0


def test_negative_ratings_are_kept_unless_asked(tmp_path, monkeypatch):
    rows = "".join(f"{user},{item},-1\n" for user in USERS for item in sequence(user))
    (tmp_path / "log.csv").write_text("user,item,rating\n" + rows)
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"{i},{quoted(t)}\n" for i, t in TITLES.items()))
    files = ["--interactions", tmp_path / "log.csv", "--items", tmp_path / "items.csv"]
    _, _, manifest = prepare(monkeypatch, tmp_path / "data", "--dataset", "csv", *files)
    assert manifest["counts"]["below_min_rating"] == 0
    with pytest.raises(SystemExit):
        prepare(monkeypatch, tmp_path / "data", "--dataset", "csv", *files, "--min-rating", "0")


def test_an_id_is_not_taken_for_a_title(tmp_path, monkeypatch, capsys):
    """An item that the titles do not list is refused, also if its id is the title of an item before it."""
    rows = "".join(f"{user},{item}\n" for user in USERS for item in sequence(user))
    (tmp_path / "log.csv").write_text(f"user,item\n{rows}{USERS[0]},Title i9\n")
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"{i},{quoted(t)}\n" for i, t in TITLES.items()))
    files = ["--interactions", tmp_path / "log.csv", "--items", tmp_path / "items.csv"]
    error = refused(capsys, monkeypatch, tmp_path / "data", "--dataset", "csv", *files)
    assert "1 items have interactions but no title, the first is Title i9" in error and "i9" in sequence(USERS[0])


def test_official_examples_never_hold_a_title_twice(tmp_path, monkeypatch):
    microlens(tmp_path / "raw")
    text = "".join(f"u{n}\t{' '.join(ITEMS[7 + n : 13 + n])} i5 i6\n" for n in range(11))  # i5 and i6 share a title
    (tmp_path / "raw" / "MicroLens-50k_pairs.tsv").write_text(text + f"other\t{' '.join(ITEMS[10:18])}\n")
    argv = ["--dataset", "microlens", "--source", tmp_path / "raw", "--protocol", "official"]
    splits, _, manifest = prepare(monkeypatch, tmp_path / "data", *argv, "--min-interactions", 7)
    assert manifest["counts"]["repeated_items_dropped"] == 11 and len(splits["test"]) == 12
    for row in splits["train"] + splits["val"] + splits["test"]:
        assert len({TITLES[item] for item in row["candidates"]}) == len(row["candidates"]) == 10


def refused(capsys, monkeypatch, *argv):
    with pytest.raises(SystemExit) as stop:
        prepare(monkeypatch, *argv)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    return error


def test_mistakes_are_named(tmp_path, monkeypatch, capsys):
    raw, out = tmp_path / "raw", tmp_path / "data"
    microlens(raw)
    argv = [out, "--dataset", "microlens", "--source"]
    assert "holds no *_pairs.tsv or *_pairs.csv" in refused(capsys, monkeypatch, *argv, tmp_path)
    assert "is not a folder; give the unpacked dataset" in refused(capsys, monkeypatch, *argv, tmp_path / "nowhere")
    with open(raw / "MicroLens-50k_pairs.tsv", "a") as file:
        file.write(f"new\t{' '.join(['ghost', *ITEMS[:8]])}\n")
    error = refused(capsys, monkeypatch, *argv, raw)
    assert "1 items have interactions but no title, the first is ghost" in error and "--drop-untitled" in error
    assert not os.listdir(out) or os.listdir(out) == [".lock"]
    _, items, manifest = prepare(monkeypatch, *argv, raw, "--drop-untitled")
    assert "ghost" not in items and manifest["counts"]["of_untitled_items"] == 1
    (raw / "MicroLens-50k_titles.csv").write_text("item,title\ni1\n")
    assert "line 2: expected an item and its title, 2 fields, got ['i1']" in refused(capsys, monkeypatch, *argv, raw)
    (raw / "MicroLens-50k_titles.csv").write_text("item,title\ni1,Good, bad and ugly\n")
    assert "2 fields, got ['i1', 'Good', ' bad and ugly']" in refused(capsys, monkeypatch, *argv, raw)
    (raw / "MicroLens-50k_titles.csv").write_text('item,title\ni1,"One\ni2,Two\n')
    assert "cannot be read: unexpected end of data" in refused(capsys, monkeypatch, *argv, raw)
    (raw / "MicroLens-50k_titles.csv").write_text("item,title\ni1,One\ni1,\ni1,Another\n")
    assert "line 4: item i1 is 'One' above and 'Another' here" in refused(capsys, monkeypatch, *argv, raw)
    (raw / "second_pairs.tsv").write_text("u1\ti1\n")
    assert "holds 2 files named *_pairs.tsv" in refused(capsys, monkeypatch, *argv, raw)
    assert "needs --interactions FILE and --items FILE" in refused(capsys, monkeypatch, out, "--dataset", "csv")
    error = refused(capsys, monkeypatch, out, "--dataset", "hanorec", "--source", raw, "--split", "user")
    assert "or --split with --dataset hanorec" in error
    (tmp_path / "log.csv").write_text("user,item,timestamp\nu1,i1,yesterday\n")
    (tmp_path / "items.csv").write_text("item,title\ni1,One\n")
    tables = ["--interactions", tmp_path / "log.csv", "--items", tmp_path / "items.csv"]
    argv = [tmp_path / "tables", "--dataset", "csv", *tables]
    error = refused(capsys, monkeypatch, *argv)
    assert "log.csv, line 2: expected user, item, time, got ['u1', 'i1', 'yesterday']" in error
    for time in ("nan", "inf", ""):
        (tmp_path / "log.csv").write_text(f"user,item,timestamp\nu1,i1,{time}\n")
        assert "log.csv, line 2: expected user, item, time" in refused(capsys, monkeypatch, *argv)
    assert "--source does not go with --dataset csv" in refused(capsys, monkeypatch, *argv, "--source", raw)
    error = refused(capsys, monkeypatch, *argv, "--user-column", "who")
    assert "log.csv has no column who, only user, item, timestamp; name it with --user-column" in error
