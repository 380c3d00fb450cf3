"""The first stage: co-occurrence against brute force, and SASRec as it scores candidates."""

import numpy as np
import pytest
from spoilt import sign

from hanorec.data.folder import DataFolder, Example
from hanorec.ranking import sasrec
from hanorec.ranking.baselines import cooccurrence_scores
from hanorec.ranking.first_stage import CoOccurrence, TrainedSASRec, first_stage


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
