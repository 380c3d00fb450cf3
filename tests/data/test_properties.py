"""prepare_data.py on generated interaction tables, against a brute-force rewrite of what it must do."""

import contextlib
import io
import json
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from layouts import table

import prepare_data

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

ITEMS = [f"i{number}" for number in range(24)]


@st.composite
def tables(draw):
    """(rows of (user, item, time, rating) in any order, titles): ties in time, repeated items, equal, empty and missing
    titles."""
    interaction = st.tuples(st.sampled_from(ITEMS), st.integers(-3, 6), st.sampled_from([1.0, 2.5, 4.1, 5.0]))
    rows = []
    for user in range(draw(st.integers(1, 12))):
        own = draw(st.lists(interaction, min_size=draw(st.sampled_from([1, 6, 9])), max_size=14))
        rows += [(f"u{user}", *values) for values in own]
    rows = draw(st.permutations(rows))
    wording = draw(st.sampled_from(["apart", "pairs", "holes"]))
    titles = {item: f"T{number // 2 if wording == 'pairs' else number}" for number, item in enumerate(ITEMS)}
    if wording == "holes":
        titles |= {"i3": "", "i7": " "}
    if draw(st.integers(0, 4)) == 4:
        del titles[draw(st.sampled_from(ITEMS))]
    names = draw(st.permutations(list(titles)))
    return rows, {item: titles[item] for item in names}


@st.composite
def protocols(draw):
    """Options of prepare_data.py, as a dict."""
    split = draw(st.sampled_from(["leave-one-out", "user"]))
    options = {"split": split, "negative-sampling": draw(st.sampled_from(["uniform", "popularity"]))}
    options["ties"] = draw(st.sampled_from(["input", "shuffle"]))
    if draw(st.booleans()):
        options["min-rating"] = draw(st.sampled_from([1, 2.5, 4.1]))
    options["max-windows-per-user"] = draw(st.integers(0, 3))
    options["seed"] = draw(st.integers(0, 5))
    if draw(st.integers(0, 3)) == 0:
        return options | {"protocol": "official", "min-interactions": draw(st.integers(7, 8))}
    options |= {"history": draw(st.integers(1, 5)), "negatives": draw(st.integers(1, 5))}
    return options | {"min-interactions": draw(st.integers(3, 6))}


def run(rows, titles, options, dropping):
    """What prepare_data.py writes: (rows by file, manifest), or its error."""
    with tempfile.TemporaryDirectory() as name, mock.patch.object(prepare_data, "encode", lambda options: None):
        folder = Path(name)
        (folder / "log.csv").write_bytes(table(["user", "item", "timestamp", "rating"], rows))
        (folder / "items.csv").write_bytes(table(["item", "title"], titles.items()))
        argv = ["--dataset", "csv", "--interactions", folder / "log.csv", "--items", folder / "items.csv"]
        argv += [word for option, value in options.items() for word in (f"--{option}", value)]
        argv += ["--out", folder / "data"] + ["--drop-untitled"] * dropping
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                prepare_data.main([str(word) for word in argv])
        except SystemExit as stop:
            assert stop.code == 2 and len(said.getvalue().splitlines()) == 1
            return said.getvalue()
        files = {
            path.stem: [json.loads(line) for line in path.read_text().splitlines()]
            for path in (folder / "data").glob("*.jsonl")
        }
        return files, json.loads((folder / "data" / "manifest.json").read_text())


def in_order_of_ties(rows, options):
    """The rows in an order in which a stable sort by time gives the order of equal times."""
    if options["ties"] == "input":
        return rows
    keys = np.random.default_rng([options["seed"], 4]).permutation(len(rows))
    return [rows[number] for number in np.argsort(keys)]


def title_of(item, titles):
    return titles.get(item, "").strip() or item


def expected_sequences(rows, titles, options, dropping):
    """(items of each user who is kept, in order of time; counts), or what is wrong, by the plainest loops."""
    counts, kept = Counter(), defaultdict(list)
    users = list(dict.fromkeys(row[0] for row in rows))
    for user, item, time, rating in in_order_of_ties(rows, options):
        if rating < options.get("min-rating", 0):
            counts["below_min_rating"] += 1
        elif not titles.get(item, "" if dropping else "?").strip():
            counts["of_untitled_items"] += 1
        else:
            kept[user].append((time, item))
    sequences = {}
    for user in users:
        own = []
        for time in sorted({time for time, _ in kept[user]}):
            for when, item in kept[user]:
                if when == time:
                    repeated = title_of(item, titles) in [title_of(i, titles) for _, i in own]
                    counts["repeated_items_dropped"] += repeated
                    own += [] if repeated else [(time, item)]
        if len(own) < options["min-interactions"]:
            counts["users_too_short"] += 1
            continue
        sequences[user] = [item for _, item in own]
        counts["interactions_tied_in_time"] += sum([t for t, _ in own].count(time) > 1 for time, _ in own)
    items = {item for own in sequences.values() for item in own}
    if not sequences:
        return "no user has"
    if items - set(titles):
        return "no title"
    counts |= {"interactions_read": len(rows), "users": len(sequences), "items": len(items)}
    counts |= {"items_left_out": len(set(titles) - items), "interactions": sum(map(len, sequences.values()))}
    return sequences, counts


def expected_targets(sequences, split_of, options):
    """{split: [(user, place of the target)]} in the order of the files."""
    positives, history = (3, 3) if "protocol" in options else (1, options["history"])
    first, most = (history + positives - 1 if positives > 1 else 1), options["max-windows-per-user"]
    targets = {"train": [], "val": [], "test": []}
    for user, own in sequences.items():
        end = len(own) - 2 if options["split"] == "leave-one-out" else len(own)
        places = list(range(first, end))
        if options["split"] == "leave-one-out":
            targets["val"].append((user, len(own) - 2))
            targets["test"].append((user, len(own) - 1))
        elif split_of[user] != "train":
            targets[split_of[user]].append((user, len(own) - 1))
            continue
        targets["train"] += [(user, place) for place in (places[-most:] if most else places)]
    return targets, positives, history


def touched_titles(rows, titles, sequences, options):
    """{(user, split): titles of kept items that the user has touched as the split sees it}, with any rating."""
    items = {item for own in sequences.values() for item in own}
    touched = defaultdict(set)
    for user, own in sequences.items():
        in_time = sorted((row for row in in_order_of_ties(rows, options) if row[0] == user), key=lambda row: row[2])
        shown = [
            (titles[row[1]] if row[1] in items else None, row[3] >= options.get("min-rating", 0)) for row in in_time
        ]
        for split, last in (("train", -3), ("val", -2), ("test", -1)):
            end = len(in_time)
            if options["split"] == "leave-one-out" and split != "test":
                end = shown.index((titles[own[last]], True)) + 1
            for title in {title for title, _ in shown if title}:
                kept = (title, True)  # a low rating before does not count if the title is kept later
                place = shown.index(kept) if kept in shown else shown.index((title, False))
                touched[user, split] |= {title} if place < end else set()
    return touched


SEEN = Counter()


@settings(max_examples=150, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(tables(), protocols(), st.booleans())
def compare_with_the_rewrite(drawn, options, dropping):
    rows, titles = drawn
    found, expected = run(rows, titles, options, dropping), expected_sequences(rows, titles, options, dropping)
    if isinstance(expected, str):
        assert expected in found
        return
    sequences, counts = expected
    users = list(sequences)
    tenth = max(1, len(users) // 10)
    too_few = options["split"] == "user" and len(users) < 3
    titles = {item: title.strip() for item, title in titles.items()}
    items = {item for own in sequences.values() for item in own}
    touched = touched_titles(rows, titles, sequences, options)
    available = len({titles[item] for item in items}) - max(len(touched[user, "test"]) for user in users)
    negatives, before = options.get("negatives", 7), 5 if "protocol" in options else 1
    barren = options["split"] == "leave-one-out" and all(len(own) - 2 <= before for own in sequences.values())
    if isinstance(found, str):
        if "has touched all except" in found:
            assert available < negatives
        else:
            assert re.search("no (train|val|test) examples from", found) and (too_few or barren)
        SEEN["refused"] += 1
        return
    files, manifest = found
    assert available >= negatives and not too_few and not barren
    assert all(files[split] for split in ("train", "val", "test"))
    assert [item["item"] for item in files["items"]] == [item for item in titles if item in items]
    assert all(item["title"] == titles[item["item"]] for item in files["items"])
    split_of = {row["user"]: "train" for row in files["sequences"]}
    split_of |= {row["user"]: split for split in ("val", "test") for row in files[split]}
    assert set(split_of) == set(sequences)
    if options["split"] == "user":
        assert Counter(split_of.values()) == {"val": tenth, "test": tenth, "train": len(users) - 2 * tenth}
    targets, positives, history = expected_targets(sequences, split_of, options)
    for split, wanted in targets.items():
        assert [(row["user"], row["target"]) for row in files[split]] == [
            (user, sequences[user][at]) for user, at in wanted
        ]
        assert manifest["counts"][f"{split}_rows"] == len(wanted)
        for row, (user, at) in zip(files[split], wanted, strict=True):
            own = sequences[user]
            assert row["history"] == own[max(0, at - positives + 1 - history) : at - positives + 1] != []
            right = own[at - positives + 1 : at + 1]
            drawn_items = [item for item in row["candidates"] if item not in right]
            assert sorted(row["candidates"]) == sorted(right + drawn_items) and len(drawn_items) == negatives
            assert not {titles[item] for item in drawn_items} & touched[user, split] and set(drawn_items) <= items
            assert len({titles[item] for item in row["candidates"]}) == positives + negatives
            assert row["rejected"] in drawn_items
    for row in files["sequences"]:
        own = sequences[row["user"]]
        assert row["items"] == (own[:-2] if options["split"] == "leave-one-out" else own)
    trained = [user for user in users if options["split"] == "leave-one-out" or split_of[user] == "train"]
    assert [row["user"] for row in files["sequences"]] == trained
    assert {name: manifest["counts"][name] for name in counts} == counts
    SEEN["prepared"] += 1


def test_prepared_data_against_a_rewrite():
    SEEN.clear()
    compare_with_the_rewrite()
    assert SEEN["prepared"] > 40 and SEEN["refused"] > 3, SEEN  # the tables are neither all good nor all bad
