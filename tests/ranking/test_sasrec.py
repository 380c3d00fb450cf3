"""SASRec: causality, loss and windows against brute force, what it learns, what it may not see, and its files."""

import json
import math
import shlex
import shutil

import numpy as np
import pytest
import torch
from layouts import lines
from spoilt import refused, sign

import evaluate
from hanorec.data.folder import DataFolder, Example, Items
from hanorec.ranking import sasrec
from hanorec.ranking.baselines import popularity_scores
from hanorec.ranking.metrics import ranking_metrics
from hanorec.ranking.scoring import target_columns
from hanorec.run.files import UserError

QUICK = ["--epochs", "2", "--width", "8", "--length", "6"]


def small_model(items=9, length=6):
    torch.manual_seed(0)
    return sasrec.SASRec(items, width=8, blocks=2, heads=2, length=length, dropout=0.0)


def test_later_items_do_not_change_earlier_states():
    model = small_model()
    sequence = torch.tensor([[1, 2, 3, 4, 5, 6]])
    for mode in (model.train(), model.eval()):
        states = mode(sequence)
        for position in range(1, 6):
            other = sequence.clone()
            other[:, position:] = torch.tensor([8, 7, 0, 0, 0])[: 6 - position]
            changed = mode(other)
            torch.testing.assert_close(changed[:, :position], states[:, :position])
            assert not torch.allclose(changed[:, position], states[:, position])


def test_the_loss_equals_a_brute_force_cross_entropy():
    model = small_model()
    windows = [[1, 2, 3, 4], [5, 6], [7, 8, 0, 1, 2, 3]]
    terms = []
    for window in windows:  # alone, without padding
        for end in range(1, len(window)):
            state = model(torch.tensor([window[:end]]))[0, -1].tolist()
            scores = [sum(a * b for a, b in zip(state, vector, strict=True)) for vector in model.items.weight.tolist()]
            terms.append(math.log(sum(map(math.exp, scores))) - scores[window[end]])
    assert sasrec.next_item_loss(model, windows).item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


@pytest.mark.parametrize("length", [1, 3, 6, 50])
def test_each_item_except_the_first_is_a_target_once(length):
    sequences = [list(range(100 * user, 100 * user + size)) for user, size in enumerate([1, 2, 4, 6, 7, 8, 20])]
    windows = sasrec.training_windows(sequences, length, np.random.default_rng(0))
    assert all(2 <= len(window) <= length + 1 for window in windows)
    assert all(window == list(range(window[0], window[-1] + 1)) for window in windows)
    targets = [item for window in windows for item in window[1:]]
    assert targets == [item for sequence in sequences for item in sequence[1:]]


@pytest.mark.parametrize(
    ("sequence", "history", "known"),
    [
        ([1, 2, 3, 4], [3, 4], [1, 2, 3, 4]),  # validation of leave-one-out
        ([1, 2, 3, 4], [4, 5], [1, 2, 3, 4, 5]),  # test: the validation target is new
        ([1, 2, 3, 4], [5], [1, 2, 3, 4, 5]),  # test with a history of one item
        ([1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ([], [7, 8], [7, 8]),  # a user of --split user without a training sequence
        ([1, 2, 3, 4], [2], [1, 2]),  # a training example: nothing after its history
    ],
)
def test_known_items_end_before_the_target(sequence, history, known):
    example = Example("u", history, 0, [0, 9], 9)
    assert sasrec.known_items(example, {"u": sequence} if sequence else {}) == known


@pytest.mark.parametrize("split", ["leave-one-out", "user"])
def test_known_items_are_those_of_the_raw_order(split, tmp_path):
    """Against the whole order of each user, which validation and test targets of leave-one-out complete."""
    from conftest import movielens, words

    import prepare_data

    movielens(tmp_path / "raw", users=30)
    argv = ["--dataset", "movielens", "--source", tmp_path / "raw", "--out", tmp_path / "data", "--split", split]
    prepare_data.main(words(*argv, "--max-pixels", 784, "--history", 3))
    data = DataFolder(tmp_path / "data")
    sequences = data.sequences()
    val = {example.user: example.target for example in data.examples("val")}
    for name in ("val", "test"):
        for example in data.examples(name):
            known = sasrec.known_items(example, sequences)
            expected = example.history
            if split == "leave-one-out":
                expected = sequences[example.user] + ([val[example.user]] if name == "test" else [])
            assert known == expected and example.target not in known


class Cycle:
    """Data of users who walk round a circle of 20 items. Every item is equally popular but item 0."""

    folder = "cycle"
    items = Items([{"item": str(n), "title": str(n)} for n in range(20)])

    @staticmethod
    def sequences():
        return {str(user): [(user + step) % 20 for step in range(8)] + [0] * (user % 20 > 1) for user in range(60)}

    @staticmethod
    def examples(split):
        found = []
        for user in range(20):
            history = [(user + step) % 20 for step in range(4)]
            target, others = (user + 4) % 20, [(user + step) % 20 for step in range(5, 14)]
            found.append(Example(f"{split}{user}", history, target, [*others[:4], target, *others[4:]], others[0]))
        return found


def test_a_cycle_is_learned():
    options = sasrec.parse(["--epochs", "40", "--width", "16", "--batch-size", "16", "--lr", "0.01"])
    model, best = sasrec.train(options, Cycle)
    examples = Cycle.examples("test")
    columns = target_columns(examples)
    learned = ranking_metrics(sasrec.score_candidates(model, {}, examples), columns)["HR@1"].mean()
    popular = ranking_metrics(popularity_scores([*Cycle.sequences().values()], len(Cycle.items), examples), columns)[
        "HR@1"
    ].mean()
    assert learned > 0.9 > 0.3 > popular and best["val_ndcg3"] > 0.9


def test_no_position_is_used_that_was_never_trained():
    """A training sequence of L items trains positions 0 to L - 2; validation and test know more items than that."""
    options = sasrec.parse(["--epochs", "1", "--width", "8", "--length", "50"])
    model, _ = sasrec.train(options, Cycle)
    longest = max(map(len, Cycle.sequences().values()))
    assert model.positions.num_embeddings == longest - 1 == 8
    torch.manual_seed(options.seed)
    before = sasrec.SASRec(len(Cycle.items), 8, options.blocks, options.heads, longest - 1, options.dropout)
    assert (model.positions.weight != before.positions.weight).any(1).all()
    long, cut = ([Example("u", items, 0, [0, 19], 19)] for items in ([*range(1, 13)], [*range(5, 13)]))
    assert (sasrec.score_candidates(model, {}, long) == sasrec.score_candidates(model, {}, cut)).all()


def train_on(folder, *argv):
    sasrec.main(["--data", str(folder), *QUICK, *argv])
    return folder / "sasrec"


def scores_of(path):
    return {line["user"]: dict(zip(line["candidates"], line["scores"], strict=True)) for line in lines(path)}


def test_the_same_seed_gives_the_same_bytes(data, tmp_path):
    first, second, third = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for out, seed in ((first, "1"), (second, "1"), (third, "2")):
        sasrec.main(["--data", str(data), "--out", str(out), "--seed", seed, *QUICK])
    for name in ("predictions.jsonl", "val_predictions.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes() != (third / name).read_bytes()
    config = json.loads((first / "config.json").read_text())
    assert config["options"]["seed"] == 1 and config["epoch"] in (1, 2) and 0 < config["val_ndcg3"] < 1
    assert config["files"] == json.loads((data / "manifest.json").read_text())["files"]


def test_the_test_split_and_the_targets_are_not_seen(data):
    """With other test targets, candidates in another order and one training example, all scores are the same."""
    before = train_on(data)
    old = {name: scores_of(before / name) for name in ("predictions.jsonl", "val_predictions.jsonl")}
    rows = lines(data / "test.jsonl")
    for row in rows:
        row["target"], row["rejected"] = row["rejected"], row["target"]
        row["candidates"] = sorted(row["candidates"])
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = lines(data / "train.jsonl")
    (data / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    sign(data)
    after = train_on(data)
    assert {name: scores_of(after / name) for name in old} == old


def test_evaluate_reads_the_scores_only_of_this_data(data, capsys):
    folder = DataFolder(data)
    examples = {split: folder.examples(split) for split in ("val", "test")}
    assert sasrec.trained_scores(folder, "test", examples["test"]) == {}  # not trained yet
    train_on(data)
    for split, name in (("val", "val_predictions.jsonl"), ("test", "predictions.jsonl")):
        (scores,) = sasrec.trained_scores(folder, split, examples[split])["SASRec"]
        assert scores.tolist() == [line["scores"] for line in lines(data / "sasrec" / name)]
    (first,) = sasrec.trained_scores(folder, "test", examples["test"][:1])["SASRec"]
    assert first.shape == (1, len(examples["test"][0].candidates))

    table = evaluate.main(
        [
            "--data",
            str(data),
            "--scores",
            str(data / "sasrec" / "predictions.jsonl"),
            "--report",
            str(data / "report.html"),
        ]
    )
    assert '<span class="key other">SASRec</span>' in (data / "report.html").read_text(encoding="utf-8")
    assert "SASRec" in table and table["SASRec"].values == table[str(data / "sasrec" / "predictions.jsonl")].values
    sasrec.main(["--data", str(data), "--out", str(data / "sasrec-2"), "--seed", "2", *QUICK])
    pooled = evaluate.main(["--data", str(data), "--scores", str(data / "sasrec-2" / "predictions.jsonl")])
    both = [table["SASRec"].values["MRR"], pooled[str(data / "sasrec-2" / "predictions.jsonl")].values["MRR"]]
    assert pooled["SASRec (2 seeds)"].values["MRR"] == pytest.approx(sum(both) / 2)
    sasrec.main(["--data", str(data), "--out", str(data / "sasrec-wide"), *QUICK, "--width", "20"])
    assert set(sasrec.trained_scores(folder, "test", examples["test"])) == {"SASRec 1 (2 seeds)", "SASRec 2"}
    shutil.rmtree(data / "sasrec-2")
    shutil.rmtree(data / "sasrec-wide")

    capsys.readouterr()
    rows = lines(data / "val.jsonl")
    (data / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    sign(data)
    assert sasrec.trained_scores(DataFolder(data), "test", examples["test"]) == {}
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{data / 'sasrec'} was trained on other data and is left out" in said


def test_the_command_that_trains_again_gives_the_same_folder(data, capsys):
    """It names every option, also --seed. A folder without a split's predictions is not told to be of other data."""
    out = data / "sasrec of mine"
    sasrec.main(["--data", str(data), "--out", str(out), *QUICK, "--seed", "7", "--lr", "0.01"])
    config, scores = ((out / name).read_bytes() for name in ("config.json", "predictions.jsonl"))
    (out / "predictions.jsonl").unlink()
    capsys.readouterr()
    folder = DataFolder(data)
    assert sasrec.trained_scores(folder, "test", folder.examples("test")) == {}
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out} has no predictions.jsonl and is left out; train it again with python -m ")
    command = shlex.split(printed.partition("train it again with ")[2].rpartition(", or delete it")[0])
    assert command[:3] == ["python", "-m", "hanorec.ranking.sasrec"]
    sasrec.main(command[3:])
    assert (out / "config.json").read_bytes() == config and (out / "predictions.jsonl").read_bytes() == scores


def test_folders_that_cannot_be_a_seed_are_refused(data):
    train_on(data)
    folder = DataFolder(data)
    config = json.loads((data / "sasrec" / "config.json").read_text())

    def refusal(**changes):
        (data / "sasrec-2" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError) as error:
            sasrec.trained_scores(folder, "test", folder.examples("test"))
        return str(error.value)

    shutil.copytree(data / "sasrec", data / "sasrec-2")
    same = f"{data / 'sasrec'} and {data / 'sasrec-2'} have the same options and the seed 42; delete one"
    assert refusal() == same
    options = config["options"]
    assert refusal(options=dict(reversed(options.items()))) == same  # their order does not matter
    assert "config.json is of sft, not of python -m hanorec.ranking.sasrec; move or" in refusal(stage="sft")
    options = {name: value for name, value in options.items() if name != "seed"}
    assert "sasrec-2/config.json: no 'seed'; move or delete" in refusal(options=options)


def test_hard_candidates_are_scored_if_there_are_any(data):
    out = train_on(data)
    assert not (out / "test_hard_predictions.jsonl").exists()
    shutil.copy(data / "test.jsonl", data / "test_hard.jsonl")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["files"]["test_hard.jsonl"] = ""
    (data / "manifest.json").write_text(json.dumps(manifest))
    sign(data)
    train_on(data)
    assert (out / "test_hard_predictions.jsonl").read_bytes() == (out / "predictions.jsonl").read_bytes()


def test_preparing_again_removes_the_scores(tmp_path):
    from conftest import movielens, words

    import prepare_data

    movielens(tmp_path / "raw", users=30)
    argv = words("--dataset", "movielens", "--source", tmp_path / "raw", "--out", tmp_path / "data")
    prepare_data.main(argv)
    out = train_on(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()  # interrupted
    prepare_data.main(argv)
    assert not out.exists()


def test_mistakes_give_one_line(data, tmp_path, capsys):
    assert "--heads 3 does not divide --width 50" in refused(capsys, sasrec.main, "--heads", 3)
    assert "manifest.json does not exist" in refused(capsys, sasrec.main, "--data", tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    error = refused(capsys, sasrec.main, "--data", data, "--out", tmp_path / "mine")
    assert "choose another --out" in error and (tmp_path / "mine" / "thesis.tex").exists()
    assert "lower --lr" in refused(capsys, sasrec.main, "--data", data, "--lr", "1e30", *QUICK)
    assert not (data / "sasrec").exists()
