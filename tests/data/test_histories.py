"""Histories, repeats and untouched items against the raw rows; the question about times, the summary, the warning."""

import csv
import json
import shlex

import numpy as np
import pytest
from conftest import movielens
from stages import lines, refused

import prepare_data
from hanorec.data.folder import DataFolder


def shop(folder, seed=0, header=("user", "item", "timestamp", "rating")):
    """A log with repeated purchases, users with few interactions, and items that nobody or few bought. Returns rows."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(20):
        for step in range(int(rng.integers(8, 16)) if user < 16 else 3):
            item = int(rng.integers(0, 25)) if user < 16 else 25 + step
            rows.append([f"u{user}", f"p{item}", str(100 * step + user), str(int(rng.integers(1, 6)))])
    titles = [[f"p{item}", f"Thing {item if item != 4 else 3}"] for item in range(31)]  # p3 and p4 are alike
    folder.mkdir(exist_ok=True)
    for name, first, table in (("log", header, rows), ("items", ("item", "title"), titles)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([first, *table])
    return rows, dict(titles)


def prepare(monkeypatch, source, out, *options):
    monkeypatch.setattr(prepare_data, "encode", lambda options: "for nothing")
    log = ["--interactions", str(source / "log.csv"), "--items", str(source / "items.csv")]
    prepare_data.main(["--dataset", "csv", *log, "--out", str(out), *map(str, options)])
    return {name: (out / f"{name}.jsonl").read_bytes() for name in ("items", "train", "val", "test", "sequences")}


def brute(rows, titles, repeats, least=0):
    """{user: item ids in order of time}, with the repeated titles that count."""
    users = {}
    for user, item, time, rating in sorted(rows, key=lambda row: float(row[2])):
        if float(rating) >= least:
            users.setdefault(user, []).append((item, time))
    kept = {}
    for user, items in users.items():
        names = [titles[item] for item, _ in items]
        if repeats == "first":
            chosen = [n for n, name in enumerate(names) if name not in names[:n]]
        elif repeats == "last":
            chosen = [n for n, name in enumerate(names) if name not in names[n + 1 :]]
        else:
            chosen = range(len(names))
        kept[user] = [items[n][0] for n in chosen]
    return kept


@pytest.mark.parametrize("repeats", ["first", "last", "all"])
@pytest.mark.parametrize("least", [0, 3])
def test_whole_histories_and_repeats(tmp_path, monkeypatch, repeats, least):
    """Against a brute-force look at the rows: who has few interactions, or low ratings, is there too."""
    rows, titles = shop(tmp_path / "raw")
    rating = ["--min-rating", least] if least else []
    prepare(monkeypatch, tmp_path / "raw", tmp_path / "data", "--repeats", repeats, "--keep-untouched", *rating)
    expected = {user: items for user, items in brute(rows, titles, repeats, least).items() if items}
    found = {line["user"]: line for line in lines(tmp_path / "data" / "histories.jsonl")}
    assert {user: line["items"] for user, line in found.items()} == expected
    for user, line in found.items():
        touched = {row[1] for row in rows if row[0] == user}
        assert sorted(line["others"]) == sorted(touched - set(line["items"]))
    long = {user: items for user, items in expected.items() if len(items) >= 6}
    sequences = {line["user"]: line["items"] for line in lines(tmp_path / "data" / "sequences.jsonl")}
    assert sequences == {user: items[:-2] for user, items in long.items()}
    for line in lines(tmp_path / "data" / "test.jsonl"):
        assert line["target"] == long[line["user"]][-1]
        others = set(line["candidates"]) - {line["target"]}
        assert not others & {row[1] for row in rows if row[0] == line["user"]}
    counts = json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
    accepted = sum(float(row[3]) >= least for row in rows)
    assert counts["repeated_items_dropped"] == accepted - sum(map(len, expected.values()))
    histories = DataFolder(tmp_path / "data").histories()
    assert set(histories) == set(expected)


def test_untouched_items_join_the_catalogue_and_no_example(tmp_path, monkeypatch):
    """items.jsonl has every title; the examples are the same to the last byte."""
    _, titles = shop(tmp_path / "raw")
    without = prepare(monkeypatch, tmp_path / "raw", tmp_path / "a")
    kept = prepare(monkeypatch, tmp_path / "raw", tmp_path / "b", "--keep-untouched")
    assert {name: kept[name] for name in without if name != "items"} == {
        name: without[name] for name in without if name != "items"
    }
    assert [line["item"] for line in lines(tmp_path / "b" / "items.jsonl")] == list(titles)
    few = {line["user"] for line in lines(tmp_path / "b" / "histories.jsonl")}
    assert few - {line["user"] for line in lines(tmp_path / "a" / "histories.jsonl")} == {"u16", "u17", "u18", "u19"}
    for options in (["--negative-sampling", "popularity"], ["--split", "user"]):
        one = prepare(monkeypatch, tmp_path / "raw", tmp_path / "a", *options)
        two = prepare(monkeypatch, tmp_path / "raw", tmp_path / "b", *options, "--keep-untouched")
        assert one["train"] == two["train"] and one["test"] == two["test"]


@pytest.mark.parametrize(
    ("name", "first"),
    [("ordered_at", "5"), ("OrderDate", "1.2.2025"), ("moment", "2025-02-01"), ("when", "5"), ("order time", "5")],
)
def test_a_column_that_looks_like_time_is_a_question(tmp_path, monkeypatch, capsys, name, first):
    rows, _ = shop(tmp_path / "raw", header=("user", "item", name, "rating"))
    text = (tmp_path / "raw" / "log.csv").read_text().splitlines()
    text[1] = ",".join([*rows[0][:2], first, rows[0][3]])
    (tmp_path / "raw" / "log.csv").write_text("\n".join(text))
    log = ["--interactions", tmp_path / "raw" / "log.csv", "--items", tmp_path / "raw" / "items.csv"]
    command = ["--dataset", "csv", *log, "--out", tmp_path / "data"]
    error = refused(capsys, prepare_data.main, *command)
    assert f"{name!r}, with {first!r}" in error
    assert f"--time-column {shlex.quote(name)};" in error and "otherwise --time-column none" in error
    assert not (tmp_path / "data" / "manifest.json").exists()
    prepare(monkeypatch, tmp_path / "raw", tmp_path / "data", "--time-column", "none")
    assert "that of the lines" in capsys.readouterr().out


def test_other_columns_are_no_question(tmp_path, monkeypatch, capsys):
    rows, _ = shop(tmp_path / "raw", header=("user", "item", "quantity", "rating"))
    prepare(monkeypatch, tmp_path / "raw", tmp_path / "data")
    assert "has no column timestamp: the order of its lines is used" in capsys.readouterr().out
    titles = shop(tmp_path / "raw")[1]
    order = brute([[*row[:2], number, 5] for number, row in enumerate(rows)], titles, "first")
    found = {line["user"]: line["items"] for line in lines(tmp_path / "data" / "histories.jsonl")}
    assert found["u0"] == order["u0"] and len(found["u0"]) > 5


def test_the_summary_has_ten_lines_and_the_warning_is_seen(tmp_path, monkeypatch, capsys):
    shop(tmp_path / "raw")
    prepare(monkeypatch, tmp_path / "raw", tmp_path / "data")
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 11 and lines[-1].startswith("next: python sft.py --data ")
    counts = json.loads((tmp_path / "data" / "manifest.json").read_text())["counts"]
    assert f"{counts['interactions']} of {counts['interactions_read']}" in printed.out
    assert f"{counts['repeated_items_dropped']} repeated (--repeats first)" in printed.out
    assert (
        "left out with fewer than 6 (--min-interactions): 4" in printed.out
        and "12 of users with too few" in printed.out
    )
    assert "--keep-untouched" in printed.out and "0 of" in printed.out
    warning = printed.err.splitlines()
    assert "WARNING: none of the" in printed.err and "--images DIR" in printed.err and warning[-1] == "=" * 100
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "p1.jpg").write_bytes(b"")
    prepare(monkeypatch, tmp_path / "raw", tmp_path / "data", "--images", pictures)
    printed = capsys.readouterr()
    assert "WARNING" not in printed.err and "1 of" in printed.out


def test_pictures_of_a_source_that_belong_to_no_item(tmp_path, monkeypatch, capsys):
    """In the source's own folder of pictures: MovieLens' posters with other names."""
    movielens(tmp_path / "raw")
    (tmp_path / "raw" / "posters").mkdir()
    (tmp_path / "raw" / "posters" / "wrong-101.jpg").write_bytes(b"")
    monkeypatch.setattr(prepare_data, "encode", lambda options: "for nothing")
    prepare_data.main(["--dataset", "movielens", "--source", str(tmp_path / "raw"), "--out", str(tmp_path / "data")])
    warning = capsys.readouterr().err
    assert "No picture has the id of an item. The first of 1 is wrong-101.jpg, the first item is 100" in warning
