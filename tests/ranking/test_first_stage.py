"""The first stage: co-occurrence against brute force, and SASRec as it scores candidates."""

import numpy as np
import pytest
import torch
from spoilt import sign

from hanorec.data.folder import DataFolder, Example
from hanorec.ranking import sasrec
from hanorec.ranking.baselines import cooccurrence_scores
from hanorec.ranking.first_stage import CoOccurrence, Newcomers, TrainedSASRec, first_stage, shortlist


def test_co_occurrence_then_popularity_against_brute_force():
    rng = np.random.default_rng(0)
    histories = [rng.permutation(30)[: rng.integers(1, 9)].tolist() for _ in range(40)]
    popularity = [sum(item in history for history in histories) for item in range(40)]  # 10 that nobody has
    stage = CoOccurrence(histories, 40, 3)
    for history in ([5, 7, 9, 11], [2], [39]):
        pairs = [
            sum(past in other for other in histories if item in other for past in history[-3:]) for item in range(40)
        ]
        candidates = rng.permutation(40)[:25].tolist()
        best = stage.best_first(history, candidates)
        assert sorted(best) == sorted(candidates)
        keys = [(pairs[item], popularity[item]) for item in best]
        assert keys == sorted(keys, reverse=True)
        example = Example("u", history[-3:], 0, candidates, 0)
        assert cooccurrence_scores(histories, 40, [example])[0].tolist() == [pairs[item] for item in candidates]


def test_a_tenth_of_a_shortlist_is_for_items_that_nobody_has():
    """Those most alike to the history; the stage chooses the others, and each side fills up for the other one."""
    rng = np.random.default_rng(1)
    histories = [rng.permutation(40)[:12].tolist() for _ in range(60)]  # nobody has 40 to 59
    text, image = torch.randn(60, 4), torch.randn(60, 4)
    image[::3] = 0  # without a picture
    stage, newcomers = CoOccurrence(histories, 60, 5), Newcomers(histories, text, image)
    history, candidates = [3, 7, 45], [item for item in rng.permutation(60).tolist() if item not in (3, 7, 45)]

    def cosine(one, other):
        norms = float(one.norm() * other.norm())
        return float(one @ other) / norms if norms else 0.0

    alike = {
        item: max(cosine(text[item], text[past]) + cosine(image[item], image[past]) for past in history)
        for item in candidates
        if item >= 40
    }
    nearest = sorted(alike, key=lambda item: -alike[item])
    chosen = shortlist(stage, newcomers, history, candidates, 20)
    old = [item for item in candidates if item < 40]
    assert chosen == stage.best_first(history, old)[:18] + nearest[:2]
    assert shortlist(stage, newcomers, history, old, 20) == stage.best_first(history, old)[:20]
    assert shortlist(stage, newcomers, history, list(alike), 5) == nearest[:5]
    few = [*old[:5], *nearest]
    assert shortlist(stage, newcomers, history, few, 10) == stage.best_first(history, old[:5]) + nearest[:5]


def test_sasrec_where_it_was_trained_on_this_data(data):
    """It ranks as its own scores of the candidates do. After a change of the data, co-occurrence takes its place."""
    sasrec.main(["--data", str(data), "--epochs", "2", "--width", "8", "--length", "6"])
    folder = DataFolder(data)
    histories = [items for items, _ in folder.histories().values()]
    stage = first_stage(folder, histories, 5)
    assert isinstance(stage, TrainedSASRec)
    examples, sequences = folder.examples("test"), folder.sequences()
    scores = sasrec.score_candidates(stage.model, sequences, examples)
    for example, row in list(zip(examples, scores, strict=True))[:8]:
        known = sasrec.known_items(example, sequences)
        expected = [example.candidates[column] for column in np.argsort(-row, kind="stable")]
        assert stage.best_first(known, example.candidates) == expected
    weights = data / "sasrec" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:200])
    with pytest.raises(ValueError, match="cannot be loaded"):
        first_stage(folder, histories, 5)
    weights.unlink()  # of an earlier version
    assert isinstance(first_stage(folder, histories, 5), CoOccurrence)
    weights.write_bytes(content)
    first_line, rest = (data / "val.jsonl").read_text().split("\n", 1)
    (data / "val.jsonl").write_text(rest + first_line + "\n")
    sign(data)
    assert isinstance(first_stage(DataFolder(data), histories, 5), CoOccurrence)
