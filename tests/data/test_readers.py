"""Readers of other projects' layouts, on small files with the warts of the true ones."""

import gzip
import json
import os
import re
import shlex

import layouts
import pytest
from layouts import lines, table
from spoilt import refused

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


def draw(folder, ending=".jpg"):
    layouts.draw(folder, ending, ITEMS)


def prepare(monkeypatch, out, *argv):
    """Prepare without encoding; (rows by split, items, manifest)."""
    monkeypatch.setattr(prepare_data, "encode", lambda options: None)
    prepare_data.main([*map(str, argv), "--out", str(out)])
    splits = {name: lines(out / f"{name}.jsonl") for name in ("train", "val", "test")}
    items = {item["item"]: item for item in lines(out / "items.jsonl")}
    return splits, items, json.loads((out / "manifest.json").read_text())


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
    titles = "\ufeff".encode() + table(["item", "title"], TITLES.items()).replace(b"\n", b"\r\n")
    (folder / "MicroLens-50k_titles.csv").write_bytes(titles)


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
    (raw / "Netflix_titles.csv").write_bytes(table(None, TITLES.items()))
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
    for name, values in (("All_Beauty", rows), ("meta_All_Beauty", meta)):
        text = "".join(json.dumps(value) + "\n" for value in values).encode()
        path = raw / (f"{name}.jsonl" + ".gz" * zipped)
        path.write_bytes(gzip.compress(text) if zipped else text)
    splits, items, manifest = prepare(monkeypatch, tmp_path / "data", "--dataset", "amazon", "--source", raw)
    check(splits, items, manifest)
    assert manifest["counts"]["of_untitled_items"] == 12


def test_recbole(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    draw(raw / "images", ending=".png")
    header = ["user_id:token", "item_id:token", "timestamp:float", "rating:float"]
    (raw / "ml.inter").write_bytes(table(header, interactions(), "\t", quote=False))
    header = ["item_id:token", "movie_title:token_seq", "genre:token_seq"]
    (raw / "ml.item").write_bytes(table(header, [(*title, "Drama") for title in TITLES.items()], "\t", quote=False))
    check(*prepare(monkeypatch, tmp_path / "data", "--dataset", "recbole", "--source", raw))


TABLES = ["--user-column", "who", "--item-column", "asin", "--time-column", "when", "--title-column", "name"]


def test_csv_with_named_columns_and_dates(tmp_path, monkeypatch):
    draw(tmp_path / "pictures", ending=".webp")
    rows = "".join(f"{i},2024-01-{t - 999:02} 12:00:00,{u}\n" for u, i, t, _ in interactions() if t < 2000)
    (tmp_path / "log.csv").write_text("asin,when,who\n" + rows)
    titles = [*((title, item) for item, title in TITLES.items()), ("Never bought", "i99")]
    (tmp_path / "items.csv").write_bytes(table(["name", "asin"], titles))
    files = ["--interactions", tmp_path / "log.csv", "--items", tmp_path / "items.csv"]
    argv = ["--dataset", "csv", *files, "--images", tmp_path / "pictures"]
    check(*prepare(monkeypatch, tmp_path / "data", *argv, *TABLES))
    with pytest.raises(SystemExit):
        prepare(monkeypatch, tmp_path / "other", *argv)


def test_semicolons_and_german_dates(tmp_path, monkeypatch):
    """The header has no comma, so semicolons separate the fields; tabs in a file named .csv, too."""
    rows = [(u, i, f"{t - 999:02}.01.2024 09:05") for u, i, t, _ in interactions() if t < 2000]
    for mark in ";\t":
        argv = write_tables(tmp_path, rows, ("user", "item", "timestamp"), mark)
        for name in ("log.csv", "items.csv"):
            (tmp_path / name).write_bytes(b"\r\n\n" + (tmp_path / name).read_bytes())  # blank lines in front
        check(*prepare(monkeypatch, tmp_path / "data", *argv), images=0)


@pytest.mark.parametrize(
    ("text", "time"),
    [("31.12.2025", "2025-12-31"), ("1.2.2025 14:05:06", "2025-02-01T14:05:06"), (" 01.02.2025", "2025-02-01")],
)
def test_points_say_that_the_day_comes_first(text, time):
    assert tables.timestamp(text) == tables.timestamp(time)


@pytest.mark.parametrize("text", ["12/31/2025", "31.12.25", "31.13.2025", "2025-31-12"])
def test_other_dates_are_refused_with_the_forms_that_are_read(text, tmp_path, capsys):
    argv = write_tables(tmp_path, [("u1", "i1", text)], ("user", "item", "timestamp"))
    error = refused(capsys, prepare_data.main, *argv, "--out", tmp_path / "data")
    assert "log.csv, line 2" in error and f"{text!r} is no time that can be read" in error
    assert "2025-12-31 14:05 or 31.12.2025" in error


def test_a_file_that_is_not_utf_8_says_what_to_do(tmp_path, capsys):
    argv = write_tables(tmp_path, [("Müller", "i1")])
    (tmp_path / "log.csv").write_bytes((tmp_path / "log.csv").read_text().encode("latin-1"))
    error = refused(capsys, prepare_data.main, *argv, "--out", tmp_path / "data")
    assert "log.csv cannot be read: it is not UTF-8" in error and "save it as UTF-8" in error


def test_all_columns_are_named_in_one_message(tmp_path, monkeypatch, capsys):
    """The options of the message are those that a shop's export needs. After them the tables are read."""
    rows = [
        (number, u, i, 2, f"{t - 999:02}.01.2024") for number, (u, i, t, _) in enumerate(interactions()) if t < 2000
    ]
    argv = write_tables(tmp_path, rows, ("order_no", "customer", "product id", "quantity", "ordered_at"))
    (tmp_path / "items.csv").write_bytes(table(["price", "product id", "name"], [(5, *row) for row in TITLES.items()]))
    options = "--user-column customer --item-column 'product id' --time-column ordered_at --title-column name"
    for more in ([], ["--user-column", "customer"], ["--user-column", "wrong"]):
        error = refused(capsys, prepare_data.main, *argv, *more, "--out", tmp_path / "data")
        assert error.strip().endswith(f"; name the columns: {options}"), error
    check(*prepare(monkeypatch, tmp_path / "data", *argv, *shlex.split(options)), images=0)
    (tmp_path / "items.csv").write_bytes(table(["id", "name"], TITLES.items()))
    error = refused(capsys, prepare_data.main, *argv, *shlex.split(options), "--out", tmp_path / "data")
    assert "items.csv has no column product id, only id, name" in error
    assert "the column of items must have one name in both tables" in error


def test_one_name_in_both_tables_is_asked_for(tmp_path, capsys):
    """Both tables have a column id, which is no item in the orders."""
    argv = write_tables(tmp_path, [(1, "u1", "i1", 5)], ("id", "customer", "product", "created_at"))
    (tmp_path / "items.csv").write_bytes(table(["id", "name"], TITLES.items()))
    error = refused(capsys, prepare_data.main, *argv, "--out", tmp_path / "data")
    options = "--user-column customer --item-column product --time-column created_at --title-column name"
    assert f"columns: {options}; the column of items must have one name in both tables" in error
    argv = write_tables(tmp_path, [("u1", "i1", 5)], ("user", "item", "timestamp"))
    (tmp_path / "items.csv").write_bytes(table(["user", "title"], TITLES.items()))
    error = refused(capsys, prepare_data.main, *argv, "--out", tmp_path / "data")
    assert "items.csv has no column item, only user, title; add this column; the column of items must" in error


def test_a_header_of_one_field_has_another_separator(tmp_path, capsys):
    argv = [*write_tables(tmp_path, [("u1", "i1", 5)], ("user", "item", "timestamp"), "|"), "--out", tmp_path / "data"]
    error, marks = refused(capsys, prepare_data.main, *argv), "separate the fields by commas, semicolons or tabs"
    assert error.strip().endswith(f"log.csv has no column user, only user|item|timestamp; {marks}")
    (tmp_path / "log.csv").write_bytes(table(["user", "item", "timestamp"], [("u1", "i1", 5)]))
    error = refused(capsys, prepare_data.main, *argv)
    assert error.strip().endswith(f"items.csv has no column item, only item|title; {marks}")


def test_a_mistyped_rating_column_is_named(tmp_path, capsys):
    for name, guess in (("score", "score"), ("q", "NAME")):
        argv = write_tables(tmp_path, [("u1", "i1", 5, 3)], ("user", "item", "timestamp", name))
        error = refused(capsys, prepare_data.main, *argv, "--rating-column", "stars", "--out", tmp_path / "data")
        expected = f"no column stars, only user, item, timestamp, {name}; name the columns: --rating-column {guess}"
        assert error.strip().endswith(expected)


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("updated_by,customer_name,customer_id,product_group,productId,orderdate", "customer_id productId orderdate"),
        ("client_group,client,article_no,article,created_by,ordered_at", "client article ordered_at"),
        ("user_product,sku,Kaufdatum", "user_product sku Kaufdatum"),  # one column has one meaning
        ("user_product,amount,when", "user_product NAME when"),
    ],
)
def test_the_likeliest_columns_are_guessed(header, options):
    usual = {"user": ("user",), "item": ("item",), "time": ("timestamp",), "rating": ("rating",), "title": ("title",)}
    user, item, time = options.split()
    items = ["product_name", "name", "subtitle", item.replace("NAME", "id")]
    text = tables.column_options(header.split(","), items, usual, dict.fromkeys(usual))
    expected = f"name the columns: --user-column {user} --item-column {item} --time-column {time} --title-column name"
    assert text.partition(";")[0] == expected
    text = tables.column_options(["user", "item_name"], ["item_name"], usual, dict.fromkeys(usual))
    assert text == "name the columns: --item-column item_name --title-column NAME"


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


def write_tables(folder, rows, header=("user", "item"), mark=","):
    """Write log.csv with these rows, and items.csv. Returns the options that name them."""
    (folder / "log.csv").write_bytes(table(header, rows, mark))
    (folder / "items.csv").write_bytes(table(["item", "title"], TITLES.items(), mark))
    return ["--dataset", "csv", "--interactions", folder / "log.csv", "--items", folder / "items.csv"]


def test_without_times_the_input_order_counts_and_is_said(tmp_path, monkeypatch, capsys):
    argv = write_tables(tmp_path, [(user, item) for user in USERS for item in sequence(user)])
    splits, items, manifest = prepare(monkeypatch, tmp_path / "data", *argv)
    check(splits, items, manifest, images=0)
    assert "has no column timestamp" in capsys.readouterr().out
    assert manifest["counts"]["interactions_tied_in_time"] == 0


def test_negative_ratings_are_kept_unless_asked(tmp_path, monkeypatch, capsys):
    rows = [(user, item, -1) for user in USERS for item in sequence(user)]
    argv = write_tables(tmp_path, rows, ("user", "item", "rating"))
    _, _, manifest = prepare(monkeypatch, tmp_path / "data", *argv)
    assert manifest["counts"]["below_min_rating"] == 0
    error = refused(capsys, prepare_data.main, *argv, "--out", tmp_path / "data", "--min-rating", "0")
    assert "84 below min rating, 12 users too short); lower --min-interactions or --min-rating" in error


def test_an_id_is_not_taken_for_a_title(tmp_path, capsys):
    """An item that the titles do not list is refused, also if its id is the title of an item before it."""
    rows = [(user, item) for user in USERS for item in sequence(user)]
    argv = write_tables(tmp_path, [*rows, (USERS[0], "Title i9")])
    error = refused(capsys, prepare_data.main, *argv, "--out", tmp_path / "data")
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


MISTAKES = {  # what Small_titles.csv holds, and the error
    "too few fields": ("item,title\ni1\n", "line 2: expected an item and its title, 2 fields, got ['i1']"),
    "a comma": ("item,title\ni1,Good, bad and ugly\n", "2 fields, got ['i1', 'Good', ' bad and ugly']"),
    "an open quote": ('item,title\ni1,"One\ni2,Two\n', "cannot be read: unexpected end of data"),
    "two titles": ("item,title\ni1,One\ni1,\ni1,Another\n", "line 4: item i1 is 'One' above and 'Another' here"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_titles_are_named(name, tmp_path, capsys):
    text, expected = MISTAKES[name]
    argv = layouts.write("microlens-tsv", tmp_path / "raw")
    (tmp_path / "raw" / "Small_titles.csv").write_text(text)
    assert expected in refused(capsys, prepare_data.main, *argv, "--out", tmp_path / "data")


def test_mistakes_in_the_source_are_named(tmp_path, monkeypatch, capsys):
    raw, out = tmp_path / "raw", tmp_path / "data"
    argv = layouts.write("microlens-tsv", raw)[:-1]

    def error_of(*more):
        return refused(capsys, prepare_data.main, *more, "--out", out)

    assert "holds no *_pairs.tsv or *_pairs.csv" in error_of(*argv, tmp_path)
    assert "is not a folder; give the unpacked dataset" in error_of(*argv, tmp_path / "nowhere")
    assert "or --split with --dataset hanorec" in error_of("--dataset", "hanorec", "--source", raw, "--split", "user")
    with open(raw / "Small_pairs.tsv", "a") as file:
        file.write(f"new\t{' '.join(['ghost', *layouts.ITEMS[:8]])}\n")
    error = error_of(*argv, raw)
    assert "1 items have interactions but no title, the first is ghost" in error and "--drop-untitled" in error
    assert not os.listdir(out) or os.listdir(out) == [".lock"]
    _, items, manifest = prepare(monkeypatch, out, *argv, raw, "--drop-untitled")
    assert "ghost" not in items and manifest["counts"]["of_untitled_items"] == 1
    (raw / "second_pairs.tsv").write_text("u1\ti1\n")
    assert "holds 2 files named *_pairs.tsv" in error_of(*argv, raw)
    (raw / "second_pairs.tsv").unlink()
    (raw / "Small_pairs.tsv").rename(raw / "Small_pairs.csv")
    assert re.search("Small_pairs.csv has no column user, .*; add a header line", error_of(*argv, raw))


@pytest.mark.parametrize("time", ["yesterday", "nan", "inf", ""])
def test_mistakes_in_tables_are_named(time, tmp_path, capsys):
    argv = write_tables(tmp_path, [("u1", "i1", time)], ("user", "item", "timestamp"))

    def error_of(*more):
        return refused(capsys, prepare_data.main, *more, "--out", tmp_path / "data")

    assert f"log.csv, line 2: expected user, item, time, got ['u1', 'i1', '{time}']" in error_of(*argv)
    assert "needs --interactions FILE and --items FILE" in error_of("--dataset", "csv")
    assert "--source does not go with --dataset csv" in error_of(*argv, "--source", tmp_path)
    error = error_of(*argv, "--user-column", "who")
    assert "log.csv has no column who, only user, item, timestamp; name the columns: --user-column user" in error
