"""The prepared files' invariants against a brute-force look at the raw interactions, and readers of true layouts."""

import json
import os
import shutil
import time
from collections import defaultdict

import numpy as np
import pytest
from conftest import MOVIELENS, draw_posters, movielens
from stages import lines, refused

import prepare_data
from hanorec.data import protocol
from hanorec.ranking.metrics import group_auc, pooled_auc


def prepare(monkeypatch, source, out, options="", ties="input"):
    monkeypatch.setattr(prepare_data, "encode", lambda options: None)  # the files between stages alone
    argv = ["--dataset", "movielens", "--source", str(source), "--out", str(out), "--ties", ties, *options.split()]
    prepare_data.main(argv)


def in_order(rows, titles, min_rating=0.0):
    users = defaultdict(list)
    for row in sorted((r for r in rows if float(r[2]) >= min_rating), key=lambda row: float(row[3])):  # stable
        if titles[row[1]] not in [titles[item] for item in users[row[0]]]:
            users[row[0]].append(row[1])
    return users


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
@pytest.mark.parametrize("history", [1, 5, 50])
def test_leave_one_out_invariants(tmp_path, monkeypatch, sampling, history):
    rows, titles = movielens(tmp_path / "raw")
    out = tmp_path / "data"
    prepare(
        monkeypatch,
        tmp_path / "raw",
        out,
        f"--history {history} --negative-sampling {sampling} --max-windows-per-user 3",
    )
    sequences = {user: items for user, items in in_order(rows, titles).items() if len(items) >= 6}
    train, val, test = (lines(out / f"{name}.jsonl") for name in ("train", "val", "test"))
    assert [row["user"] for row in test] == [row["user"] for row in val]
    assert {row["user"]: row["target"] for row in test} == {user: items[-1] for user, items in sequences.items()}
    assert {row["user"]: row["target"] for row in val} == {user: items[-2] for user, items in sequences.items()}
    targets = defaultdict(list)
    for row in train:
        targets[row["user"]].append(row["target"])
    assert targets == {user: items[1:-2][-3:] for user, items in sequences.items()}
    kept = {item for items in sequences.values() for item in items}
    assert [item["item"] for item in lines(out / "items.jsonl")] == [item for item in titles if item in kept]
    assert {row["user"]: row["items"] for row in lines(out / "sequences.jsonl")} == {
        user: items[:-2] for user, items in sequences.items()
    }
    for row in train + val + test:
        own = sequences[row["user"]]
        place = own.index(row["target"])
        assert row["history"] == own[max(0, place - history) : place]  # nothing of the target or later
        negatives = [item for item in row["candidates"] if item != row["target"]]
        assert len(row["candidates"]) == 10 and len(negatives) == 9
        assert row["rejected"] in negatives
        assert len({titles[item] for item in row["candidates"]}) == 10
        view = own if row in test else own[:-1] if row in val else own[:-2]  # what the split sees of the user
        assert not {titles[item] for item in view} & {titles[item] for item in negatives}
    later = [set(row["candidates"]) & set(sequences[row["user"]][-2:]) for row in train]
    assert any(later)  # a training negative may be a later target
    places = [row["candidates"].index(row["target"]) for row in train + val + test]
    assert len(set(places)) == 10  # shuffled


def test_test_candidates_do_not_depend_on_history_or_windows(tmp_path, monkeypatch):
    movielens(tmp_path / "raw")
    for name, history, windows in (("a", 5, 10), ("b", 50, 0)):
        prepare(monkeypatch, tmp_path / "raw", tmp_path / name, f"--history {history} --max-windows-per-user {windows}")
    for split in ("val", "test"):
        one, other = (lines(tmp_path / name / f"{split}.jsonl") for name in "ab")
        assert [row["candidates"] for row in one] == [row["candidates"] for row in other]


def test_seed_decides_everything(tmp_path, monkeypatch):
    movielens(tmp_path / "raw")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(monkeypatch, tmp_path / "raw", tmp_path / name, f"--seed {seed}")
    read = {name: (tmp_path / name / "train.jsonl").read_bytes() for name in "abc"}
    assert read["a"] == read["b"] != read["c"]


def test_split_by_user(tmp_path, monkeypatch):
    rows, titles = movielens(tmp_path / "raw")
    out = tmp_path / "data"
    prepare(monkeypatch, tmp_path / "raw", out, "--split user")
    sequences = {user: items for user, items in in_order(rows, titles).items() if len(items) >= 6}
    users = {name: {row["user"] for row in lines(out / f"{name}.jsonl")} for name in ("train", "val", "test")}
    assert not users["train"] & users["val"] and not users["train"] & users["test"] and not users["val"] & users["test"]
    assert users["train"] | users["val"] | users["test"] == set(sequences)
    assert len(users["val"]) == len(users["test"]) == len(sequences) // 10
    for name in ("val", "test"):
        for row in lines(out / f"{name}.jsonl"):
            assert row["target"] == sequences[row["user"]][-1]
    assert {row["user"] for row in lines(out / "sequences.jsonl")} == users["train"]


def test_old_layout_and_min_rating(tmp_path, monkeypatch):
    rows, titles = movielens(tmp_path / "raw", layout="dat")
    out = tmp_path / "data"
    prepare(monkeypatch, tmp_path / "raw", out, "--min-rating 2.5 --min-interactions 4")
    sequences = {user: items for user, items in in_order(rows, titles, 2.5).items() if len(items) >= 4}
    assert {row["user"]: row["target"] for row in lines(out / "test.jsonl")} == {u: i[-1] for u, i in sequences.items()}
    assert lines(out / "items.jsonl")[0]["title"].startswith("Café")  # latin-1
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert counts["interactions_read"] == len(rows)
    rated = {split: defaultdict(set) for split in ("train", "test")}
    for row in rows:
        rated["test"][row[0]].add(row[1])
    for user, items in sequences.items():  # what the user touched up to the last training item
        own = sorted((row for row in rows if row[0] == user), key=lambda row: float(row[3]))
        last = next(n for n, row in enumerate(own) if row[1] == items[-3] and float(row[2]) >= 2.5)
        rated["train"][user] = {row[1] for row in own[: last + 1]}
    for split in ("train", "test"):
        for row in lines(out / f"{split}.jsonl"):  # disliked items are no negatives either
            assert not rated[split][row["user"]] & (set(row["candidates"]) - {row["target"]})
    assert counts["below_min_rating"] == sum(float(row[2]) < 2.5 for row in rows)
    assert counts["users_too_short"] == len({row[0] for row in rows}) - len(sequences)


def test_ties_and_images_are_counted(tmp_path, monkeypatch):
    rows, titles = movielens(tmp_path / "raw")
    (tmp_path / "raw" / "posters").mkdir()
    (tmp_path / "raw" / "posters" / "101.jpg").write_bytes(b"not looked at here")
    out = tmp_path / "data"
    prepare(monkeypatch, tmp_path / "raw", out)
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    kept = {user for user, items in in_order(rows, titles).items() if len(items) >= 6}
    times, sequences = defaultdict(int), in_order(rows, titles)
    for row in rows:
        times[row[0], row[3]] += row[0] in kept and row[1] in sequences[row[0]]
    assert counts["interactions_tied_in_time"] == sum(n for n in times.values() if n > 1)
    items = lines(out / "items.jsonl")
    images = {item["item"]: item["image"] for item in items if item["image"]}
    assert {name: os.path.basename(path) for name, path in images.items()} == {"101": "101.jpg"}
    assert (out / images["101"]).exists()
    assert counts["items_without_image"] == len(items) - 1


def test_ties_are_shuffled_by_the_seed_and_nothing_else_moves(tmp_path, monkeypatch):
    rows, _ = movielens(tmp_path / "raw")
    time_of = {(row[0], row[1]): float(row[3]) for row in rows}
    read = {}
    for name, ties in (("1", "shuffle"), ("1 again", "shuffle"), ("2", "shuffle"), ("file", "input")):
        prepare(monkeypatch, tmp_path / "raw", tmp_path / name, f"--seed {name[0] if ties == 'shuffle' else 1}", ties)
        read[name] = {row["user"]: row["items"] for row in lines(tmp_path / name / "sequences.jsonl")}
        for user, items in read[name].items():
            times = [time_of[user, item] for item in items]
            assert times == sorted(times)
    assert read["1"] == read["1 again"] != read["2"] and read["file"] not in (read["1"], read["2"])


def test_the_order_of_the_file_tells_nothing_of_tied_targets(tmp_path, monkeypatch):
    """In a file sorted by item within a user, the next higher item would be the next one of equal time."""
    rng = np.random.default_rng(0)
    rows = [(user, item, 4.0, 9 * (place // 6)) for user in range(600) for place, item in enumerate(sorted_items(rng))]
    folder = tmp_path / "raw"
    folder.mkdir()
    text = "".join(f"{','.join(map(str, row))}\n" for row in rows)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + text)
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "".join(f"{i},Film {i},x\n" for i in range(400)))
    found = {}
    for ties in ("shuffle", "input"):
        prepare(monkeypatch, folder, tmp_path / ties, ties=ties)
        hits = []
        for row in lines(tmp_path / ties / "test.jsonl"):
            last = int(row["history"][-1])
            hits.append(min(row["candidates"], key=lambda item: (int(item) - last) % 400) == row["target"])
        found[ties] = np.mean(hits)
    assert found["input"] > 0.35 and found["shuffle"] < 0.15, found  # one of ten by chance


def sorted_items(rng):
    """12 of 400 items: two halves, each sorted."""
    items = rng.choice(400, 12, replace=False)
    return [*sorted(items[:6].tolist()), *sorted(items[6:].tolist())]


@pytest.mark.parametrize(
    ("sampling", "split", "seed"),
    [("uniform", "leave-one-out", 0), ("popularity", "leave-one-out", 1), ("uniform", "user", 1)],
)
def test_negatives_do_not_betray_the_future(tmp_path, monkeypatch, sampling, split, seed):
    """How often a candidate was a negative in the user's training examples must not tell whether it is the target."""
    rng = np.random.default_rng(seed)
    items, users, low = 150 + 150 * seed, 2000, 8
    weight = np.arange(1, items + 1) ** -0.7
    rows = []
    for user in range(users):
        own = rng.choice(items, rng.integers(low, 15), replace=False, p=weight / weight.sum())
        rows += [(user, item, rng.integers(1, 6), time) for time, item in enumerate(own)]
    folder = tmp_path / "raw"
    folder.mkdir()
    text = "".join(f"{','.join(map(str, row))}\n" for row in rows)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + text)
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "".join(f"{i},Film {i},x\n" for i in range(items)))
    rating = "--min-rating 2" if seed else ""
    options = f"--split {split} --negative-sampling {sampling} --max-windows-per-user 4 --seed {seed} {rating}"
    prepare(monkeypatch, folder, tmp_path / "data", options)
    counts = defaultdict(int)
    for row in lines(tmp_path / "data" / "train.jsonl"):
        for item in row["candidates"]:
            counts[row["user"], item] += item != row["target"]
    for name in ("val", "test"):
        examples = lines(tmp_path / "data" / f"{name}.jsonl")
        scores = np.array([[-counts[row["user"], item] for item in row["candidates"]] for row in examples])
        target = np.array([row["candidates"].index(row["target"]) for row in examples])
        assert 0.48 < pooled_auc(scores.astype(float), target)[0] < 0.52
        assert 0.48 < group_auc(scores, target).mean() < 0.52


@pytest.mark.skipif(not MOVIELENS.exists(), reason=f"real data is absent: {MOVIELENS}")
def test_real_movielens(tmp_path, monkeypatch):

    prepare(monkeypatch, MOVIELENS, tmp_path)
    counts = json.loads((tmp_path / "manifest.json").read_text())["counts"]
    assert (counts["users"], counts["items"], counts["interactions"]) == (665, 1000, 54436)
    assert counts["interactions_tied_in_time"] == pytest.approx(0.38 * 54436, rel=0.02)
    train = [row["target"] for row in lines(tmp_path / "train.jsonl")]
    assert len(train) == counts["train_rows"] <= 6650


def test_a_million_interactions_take_seconds(tmp_path, monkeypatch):
    rng, count = np.random.default_rng(0), 1_000_000
    users, items = rng.integers(20_000, size=count), (rng.random(count) ** 2 * 10_000).astype(int)
    pairs = zip(users.tolist(), items.tolist(), strict=True)
    rows = (f"{user},{item},{time}" for time, (user, item) in enumerate(pairs))
    (tmp_path / "Big_pairs.csv").write_text("user,item,timestamp\n" + "\n".join(rows))
    (tmp_path / "Big_titles.csv").write_text("item,title\n" + "\n".join(f"{i},Title {i}" for i in range(10_000)))
    started = time.perf_counter()
    prepare(monkeypatch, tmp_path, tmp_path / "data", "--dataset microlens")
    assert time.perf_counter() - started < 60
    assert len(lines(tmp_path / "data" / "train.jsonl")) == 200_000


def test_rows_drawn_in_parts_keep_the_invariants(tmp_path, monkeypatch):
    movielens(tmp_path / "raw")
    monkeypatch.setattr(protocol, "AT_ONCE", 7)
    prepare(monkeypatch, tmp_path / "raw", tmp_path / "data")
    rows, counts = (
        lines(tmp_path / "data" / "train.jsonl"),
        json.loads((tmp_path / "data" / "manifest.json").read_text()),
    )
    assert len(rows) == counts["counts"]["train_rows"] > 70
    assert all(len(set(row["candidates"])) == 10 and row["rejected"] != row["target"] for row in rows)
    assert all({row["rejected"], row["target"]} < set(row["candidates"]) for row in rows)


def test_official_protocol(tmp_path, monkeypatch):
    """3 history items, 3 positives and 7 negatives; the last positive is the target."""
    rows, titles = movielens(tmp_path / "raw")
    out = tmp_path / "data"
    prepare(monkeypatch, tmp_path / "raw", out, "--protocol official --split user")
    sequences = {user: items for user, items in in_order(rows, titles).items() if len(items) >= 6}
    for row in lines(out / "test.jsonl") + lines(out / "val.jsonl"):
        own = sequences[row["user"]]
        assert row["history"] == own[-6:-3] and row["target"] == own[-1]
        assert set(row["candidates"]) & set(own) == set(own[-3:]) and len(row["candidates"]) == 10
        assert row["rejected"] not in own
    for row in lines(out / "train.jsonl"):
        at = sequences[row["user"]].index(row["target"])
        assert row["history"] == sequences[row["user"]][at - 5 : at - 2]


def raw(folder, **files):
    movielens(folder)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ratings_csv": "userId,movieId,rating,timestamp\n"}, "holds no interactions"),
        ({"ratings_csv": ""}, "ratings.csv is empty"),
        ({"ratings_csv": "userId,movieId,rating,timestamp\n1,2,five,9\n"}, "line 2: expected user, item, time, rating"),
        ({"ratings_csv": "userId,movieId,rating,timestamp\n1,2,5\n"}, "line 2: expected user, item, time, rating"),
        (
            {"ratings_csv": "userId,movieId,rating,timestamp\n1,100,5,9\n1,101,5,9\n"},
            "(2 interactions read, 1 repeated items dropped, 1 users too short); lower --min-interactions\n",
        ),
        (
            {"movies_csv": "movieId,title,genres\n100,Alone,Drama\n"},
            "items have interactions but no title, the first is",
        ),
        ({"movies_csv": "movieId\n100\n"}, "line 1: expected movieId,title,genres, got movieId"),
    ],
)
def test_bad_raw_files(tmp_path, capsys, files, message):
    folder = raw(tmp_path / "raw", **files)
    error = refused(capsys, prepare_data.main, "--dataset", "movielens", "--source", folder, "--out", tmp_path / "data")
    assert message in f"{error}\n" and error.startswith("prepare_data.py: error: ")
    assert [p for p in (tmp_path / "data").glob("*") if p.name != ".lock"] == []


def test_prepare_data_refuses_bad_options_and_images(tmp_path, capsys):
    run = prepare_data.main
    assert "needs --source" in refused(capsys, run, "--dataset", "movielens", "--out", tmp_path / "data")
    error = refused(capsys, run, "--dataset", "movielens", "--source", tmp_path / "no", "--out", tmp_path / "data")
    assert "is not a folder" in error
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    assert "holds other files" in refused(capsys, run, "--out", tmp_path / "thesis")
    assert "--source does not go with --dataset demo" in refused(capsys, run, "--source", tmp_path)
    assert "--images does not go with --dataset demo" in refused(capsys, run, "--images", tmp_path)
    (tmp_path / "empty").mkdir()
    error = refused(capsys, run, "--dataset", "movielens", "--source", tmp_path / "empty", "--out", tmp_path / "data")
    assert "holds no ratings.dat or ratings.csv" in error
    folder = raw(tmp_path / "raw")
    common = ["--dataset", "movielens", "--source", folder, "--out", tmp_path / "data"]
    assert "has touched all except" in refused(capsys, run, *common, "--negatives", 58)
    error = refused(capsys, run, *common, "--model", "nobody/no-such-model")
    assert "check the name, or you are offline" in error
    (folder / "posters").mkdir()
    (folder / "posters" / "100.jpg").write_text("this is no picture")
    error = refused(capsys, run, *common)
    assert "100.jpg cannot be read" in error and not (tmp_path / "data" / "encoded").exists()


def test_a_full_disk_is_foreseen(tmp_path, capsys, monkeypatch):
    folder = raw(tmp_path / "raw")
    draw_posters(folder / "posters")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    error = refused(
        capsys, prepare_data.main, "--dataset", "movielens", "--source", folder, "--out", tmp_path / "data",
        "--max-pixels", 3136,
    )  # fmt: skip
    assert "50,000 bytes free; give --tokens live" in error and not (tmp_path / "data" / "encoded").exists()


@pytest.mark.parametrize("name", ["..", ".", "../..", "a/../../b"])
def test_a_backbones_name_leads_nowhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = prepare_data.parse(["--out", "data", "--model", name]).encoded
    assert folder.resolve().parent == (tmp_path / "data" / "encoded").resolve()


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen--Qwen2.5-VL-3B-Instruct"),
        ("tiny", "tiny"),
        ("./bb", "bb"),
        ("../bb", "bb"),
        ("bb/", "bb"),
        (".hidden/bb", "bb"),
        ("/models/bb", "models--bb"),
    ],
)
def test_the_folder_of_an_encoding_is_never_hidden(model, folder):
    options = prepare_data.parse(["--out", "data", "--model", model])
    assert options.encoded.name == folder and options.model == model.rstrip("/")


def test_show_refuses_a_backbone_that_is_not_encoded(prepared, capsys):
    error = refused(capsys, prepare_data.main, "--out", prepared, "--show", 1, "--model", "other/backbone")
    assert "is encoded for tiny, not for other/backbone" in error
    prepare_data.main(["--out", str(prepared), "--show", "1"])
    assert "--- user" in capsys.readouterr().out


def test_encoding_refuses_items_that_were_changed(data, capsys):
    (data / "items.jsonl").write_text((data / "items.jsonl").read_text().replace("Film", "Movie"))
    assert "not what manifest.json lists" in refused(capsys, prepare_data.main, "--out", data, "--encode-only")
