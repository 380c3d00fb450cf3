"""The best possible ranking: the exact probability of each candidate under the process that made the data.

This module writes it for the demo. A data folder may hold such scores of any origin, in the format of
predictions.jsonl. evaluate.py shows oracle.jsonl as `ceiling` and oracle_titles.jsonl as `ceiling, titles`. The names
for other splits begin with the split, as in val_oracle.jsonl.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from hanorec.data.demo import DRIFT, KINDS, World, item_id, kind_probabilities, make_world
from hanorec.data.folder import EVALUATED, DataFolder, Example
from hanorec.ranking.exchange import read_scores, write_predictions

CEILINGS = {"ceiling": "oracle", "ceiling, titles": "oracle_titles"}  # name of the file by row of the results table


def ceiling_file(split: str, row: str) -> str:
    """Return the name of the file with the scores of a row of the results table."""
    return f"{'' if split == 'test' else split + '_'}{CEILINGS[row]}.jsonl"


CEILING_FILES = [ceiling_file(split, row) for split in EVALUATED for row in CEILINGS]


def ceiling_scores(
    data: DataFolder, split: str, examples: Sequence[Example]
) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Read the scores that a data folder holds: (scores, yes_scores or None), [R, C] each, by row of the results table.

    A row without a file is left out.
    """
    paths = {row: data.folder / ceiling_file(split, row) for row in CEILINGS}
    return {row: read_scores(path, data.items.ids, examples) for row, path in paths.items() if path.exists()}


def film_probabilities(world: World, titles_only: bool) -> np.ndarray:
    """Return P(next film | taste): [KINDS, N], a row for each taste.

    Args:
        titles_only: for one who sees no posters. The kind of a film is then uncertain: it has the frequencies of the
            kinds among the films whose titles name the same genre.
    """
    of_kind = np.zeros((KINDS, len(world.titles)))  # P(kind | what is seen of the film)
    of_kind[world.kind, np.arange(len(world.titles))] = 1
    if titles_only:
        for word in np.unique(world.word):
            films = world.word == word
            of_kind[:, films] = of_kind[:, films].mean(axis=1, keepdims=True)
    return kind_probabilities() @ of_kind * world.weight


def forward(probabilities: np.ndarray, history: list[int]) -> np.ndarray:
    """Return P(taste before the next film | history) by the forward algorithm: [KINDS].

    Args:
        probabilities: [KINDS, N], P(film | taste).
    """
    belief = np.full(KINDS, 1 / KINDS)
    for film in history:
        belief = belief * probabilities[:, film]
        belief = (1 - DRIFT) * belief / belief.sum() + DRIFT / KINDS
    return belief


def write_ceilings(options: argparse.Namespace) -> None:
    """Write the scores of the demo's splits: log P(candidate is the next film | all films before it).

    They rank the test candidates exactly for one who sees titles and posters, because negatives are uniform, so that
    being a candidate says nothing about a film. This does not hold for negatives by popularity and for several
    positives: such splits get no scores. Two things are approximate. Validation: that the test film differs from the
    candidates is not used. Titles only: the kinds of the films are taken as independent.
    """
    if options.positives > 1 or options.negative_sampling != "uniform":
        return
    data, world = DataFolder(options.out), make_world(options.seed)
    film_of = {item_id(film): film for film in range(len(world.titles))}
    films = np.array([film_of[item] for item in data.items.ids])  # by item index
    for row in CEILINGS:
        probabilities = film_probabilities(world, titles_only=row != "ceiling")
        for split in data.evaluated():
            if split == "test_popularity":
                continue
            examples, scores = data.examples(split), []
            for example in examples:
                own = world.histories[example.user]
                belief = forward(probabilities, own[: own.index(films[example.target])])
                scores.append(np.log(belief @ probabilities[:, films[example.candidates]]))
            write_predictions(options.out / ceiling_file(split, row), data.items.ids, examples, np.array(scores), None)
