"""The demo's world has the properties that docs/data.md lists, and its ceilings are the exact probabilities."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from layouts import lines
from PIL import Image

import prepare_data
from hanorec.data import demo, protocol
from hanorec.ranking import ceiling
from hanorec.ranking.metrics import group_auc, ranking_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "encode", lambda options: None)
        prepare_data.main(["--out", str(out)])
    return out


def scores_of(path):
    """The scores [R, C] of a predictions file, and the target's column [R]."""
    read = lines(path)
    columns = [line["candidates"].index(line["target"]) for line in read]
    return np.array([line["scores"] for line in read]), np.array(columns)


def test_a_seed_makes_the_same_world_again():
    one, other = demo.make_world(1), demo.make_world(2)
    again = demo.make_world.__wrapped__(1)
    assert one.titles == again.titles and one.histories == again.histories
    assert one.titles != other.titles and one.histories != other.histories


def test_films_are_as_described():
    world = demo.make_world(42)
    assert len(set(world.titles)) == len(world.titles) == demo.KINDS * demo.FILMS_OF_A_KIND
    for title, word in zip(world.titles, world.word, strict=True):
        assert title.startswith(f"{demo.GENRES[word]} in " if word >= 0 else "Untitled ")
    for kind in range(demo.KINDS):
        films = world.kind == kind
        assert world.weight[films].sum() == pytest.approx(1)
        assert (world.word[films] < 0).sum() == demo.UNTITLED
        misleading = (world.word[films] >= 0) & (world.word[films] != world.genre[films])
        assert misleading.sum() == demo.MISLEADING
    assert all(len(set(own)) == len(own) for own in world.histories.values())
    assert np.allclose(demo.kind_probabilities().sum(1), 1)


def test_posters_show_the_genre_and_the_band(folder):
    world = demo.make_world(42)
    for film in range(0, len(world.titles), 37):
        image = np.asarray(Image.open(folder / "images" / f"{demo.item_id(film)}.png").convert("RGB")).astype(float)
        colour, band = image[2, 2], image[-3, -3]
        nearest = [np.abs(np.array(rgb) - colour).max() for rgb in demo.COLOURS.values()]
        assert np.argmin(nearest) == world.genre[film]
        assert (band.mean() > 128) == (list(demo.BANDS)[world.band[film]] == "white")


@pytest.mark.parametrize("titles_only", [False, True])
def test_forward_algorithm_equals_the_sum_over_all_tastes(titles_only):
    world = demo.make_world(3)
    probabilities = ceiling.film_probabilities(world, titles_only)
    assert np.allclose(probabilities.sum(1), 1, atol=0.05 * titles_only)  # over all films
    history = [5, 41, 200]
    transition = (1 - demo.DRIFT) * np.eye(demo.KINDS) + demo.DRIFT / demo.KINDS
    total = np.zeros(demo.KINDS)
    for first, second, third in itertools.product(range(demo.KINDS), repeat=3):
        path = probabilities[first, 5] * transition[first, second] * probabilities[second, 41]
        path *= transition[second, third] * probabilities[third, 200]
        total += path * transition[third]
    assert np.allclose(ceiling.forward(probabilities, history), total / total.sum())


@pytest.mark.parametrize("name", ["oracle", "test_hard_oracle"])
def test_the_ceiling_is_calibrated(folder, name):
    """The softmax of the scores over the candidates is how often each of them is the target."""
    scores, target = scores_of(folder / f"{name}.jsonl")
    chance = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    hit = np.arange(scores.shape[1]) == target[:, None]
    for low, high in itertools.pairwise([0, 0.05, 0.2, 0.5, 1]):
        inside = (chance > low) & (chance <= high)
        error = np.sqrt(chance[inside].mean() / inside.sum())
        assert abs(hit[inside].mean() - chance[inside].mean()) < 3 * error


def test_posters_tell_more_than_titles_and_titles_more_than_nothing(folder):
    (whole, target), (titles, _) = (scores_of(folder / f"{name}.jsonl") for name in ("oracle", "oracle_titles"))
    seen, read = (ranking_metrics(scores, target)["NDCG@3"].mean() for scores in (whole, titles))
    assert seen > read + 0.1 and read > 0.25  # chance has 0.21
    assert group_auc(whole, target).mean() > 0.8


def ceilings_of(out):
    return {path.name.removesuffix(".jsonl") for path in out.glob("*oracle*")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {"val_oracle", "val_oracle_titles", "oracle", "oracle_titles", "test_hard_oracle"}),
        # 20 alike films are not left for every target
        ("--negatives 20", {"val_oracle", "val_oracle_titles", "oracle", "oracle_titles"}),
        (
            "--negative-sampling popularity --further-tests 99 popularity",
            {"test_hard_oracle", "test_99_oracle", "test_99_oracle_titles"},
        ),
        ("--protocol official --min-interactions 7 --further-tests 99", set()),
    ],
)
def test_only_lists_that_tell_nothing_get_a_ceiling(options, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "encode", lambda options: None)
    prepare_data.main(["--out", str(tmp_path / "demo"), *options.split()])
    assert ceilings_of(tmp_path / "demo") == expected
    for name in ("test_hard_oracle", "test_99_oracle"):
        if name in expected:
            best, target = scores_of(tmp_path / "demo" / f"{name}.jsonl")
            films = [line["candidates"] for line in lines(tmp_path / "demo" / f"{name}.jsonl")]
            weight = demo.make_world(42).weight
            popular = np.array([[weight[int(film.removeprefix("film"))] for film in row] for row in films])
            found, without = (ranking_metrics(scores, target)["NDCG@3"].mean() for scores in (best, popular))
            assert found > without + 0.05  # a ceiling is above a ranking that needs no history


def test_long_histories_tell_more_than_short_ones():
    world = demo.make_world(42)
    probabilities = ceiling.film_probabilities(world, titles_only=False)
    means = []  # of the log-probability of the last film
    for length in (1, 3, 12):
        logs = []
        for own in world.histories.values():
            belief = ceiling.forward(probabilities, own[:-1][-length:])
            logs.append(np.log(belief @ probabilities[:, own[-1]]))
        means.append(np.mean(logs))
    assert means[0] < means[1] < means[2]


def test_every_item_needs_its_labels():
    labels = {"film1": ("0", "True"), "film2": ("0", "True")}
    assert protocol.item_labels(SimpleNamespace(labels=labels), ["film2", "film1"]).shape == (2, 2)
    assert protocol.item_labels(SimpleNamespace(labels={}), ["film2", "film1"]).size == 0
    with pytest.raises(ValueError, match="every item needs the same number of labels"):
        protocol.item_labels(SimpleNamespace(labels=labels), ["film1", "film3"])


def test_hard_candidates_are_alike(folder):
    world = demo.make_world(42)
    number = {demo.item_id(film): film for film in range(len(world.titles))}
    easy, hard = lines(folder / "test.jsonl"), lines(folder / "test_hard.jsonl")
    for one, other in zip(easy, hard, strict=True):
        assert {name: one[name] for name in ("user", "target", "history")} == {
            name: other[name] for name in ("user", "target", "history")
        }
        films = np.array([number[item] for item in other["candidates"]])
        target = number[other["target"]]
        assert (world.genre[films] == world.genre[target]).all() and len(set(films.tolist())) == 10
        own = set(world.histories[other["user"]]) - {target}
        assert not own & set(films.tolist())
        honest = world.word == world.genre
        assert (honest[films] == honest[target]).all()  # so titles alone do not tell the target


def test_preparing_again_replaces_the_hard_candidates_and_ceilings(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "encode", lambda options: None)
    out = tmp_path / "demo"
    for seed in (1, 2):
        prepare_data.main(["--out", str(out), "--seed", str(seed), "--history", "3", "--further-tests", "99"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert "test_hard.jsonl" in manifest["files"]
    assert len(lines(out / "test_99_oracle.jsonl")[0]["candidates"]) == 100
    official = ["--protocol", "official", "--min-interactions", "7"]
    prepare_data.main(["--out", str(out), "--seed", "2", *official])  # no ceiling is known
    assert not ceilings_of(out) and not (out / "test_99.jsonl").exists()
    prepare_data.main(["--out", str(out), "--seed", "2"])
    test = {(line["user"], tuple(line["candidates"])) for line in lines(out / "test.jsonl")}
    assert {(line["user"], tuple(line["candidates"])) for line in lines(out / "oracle.jsonl")} == test
