"""The best possible ranking: the exact probability of each candidate under the process that made the data.

This module writes it for the demo. A data folder may hold such scores of any origin, in the format of
predictions.jsonl. evaluate.py shows oracle.jsonl as `ceiling` and oracle_titles.jsonl as `ceiling, titles`. The names
for other splits begin with the split, as in val_oracle.jsonl.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from hanorec.data.demo import DRIFT, KINDS, World, item_id, kind_probabilities, labels_of, make_world
from hanorec.data.folder import EVALUATED, DataFolder, Example
from hanorec.data.negatives import sampling_of
from hanorec.ranking.exchange import read_scores, write_predictions

CEILINGS = {
    "ceiling": "oracle",
    "ceiling, titles": "oracle_titles",
}  # the start of a file's name, by row of the results


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
        titles_only: for a reader of titles who sees no posters. The reader does not know the kind of a film; it has the
            frequencies of the kinds among the films whose titles name the same genre.
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


def rows_of(split: str, candidates: np.ndarray, world: World, options: argparse.Namespace) -> list[str]:
    """Return the rows of CEILINGS that a split of the demo gets: those for which its candidate lists tell nothing.

    - Uniform negatives: being a candidate says nothing about a film. Both rows.
    - test_hard: if all candidates of each example have the target's labels, the list says nothing about the target.
      But it tells something about the films: all have one genre. A reader of titles could use this, and
      `ceiling, titles` does not. So there is the row `ceiling` alone.
    - Negatives by popularity, and several positives: the lists tell which candidates are likely. No row.

    Args:
        candidates: [R, C], films.
    """
    if options.positives > 1:
        return []
    sampling = sampling_of(split, options)
    if sampling == "alike":
        labels = np.array(labels_of(world))[candidates]  # [R, C, number of labels]
        return ["ceiling"] if (labels == labels[:, :1]).all() else []
    return [*CEILINGS] if sampling == "uniform" else []


def write_ceilings(options: argparse.Namespace) -> None:
    """Write the scores of the demo's splits: log P(candidate is the next film | all films before it).

    The scores of `ceiling` are exact for test and its further tests. Those of validation do not use that the test film
    is another one than the target. `ceiling, titles` is approximate: it takes the kinds of the films as independent.
    """
    data, world = DataFolder(options.out), make_world(options.seed)
    film_of = {item_id(film): film for film in range(len(world.titles))}
    films = np.array([film_of[item] for item in data.items.ids])  # by item index
    probabilities = {row: film_probabilities(world, titles_only=row != "ceiling") for row in CEILINGS}
    for split in data.evaluated():
        examples = data.examples(split)
        candidates = films[[example.candidates for example in examples]]
        for row in rows_of(split, candidates, world, options):
            scores = []
            for example, own_candidates in zip(examples, candidates, strict=True):
                sequence = world.histories[example.user]
                before = sequence[: sequence.index(films[example.target])]
                belief = forward(probabilities[row], before)
                scores.append(np.log(belief @ probabilities[row][:, own_candidates]))
            write_predictions(options.out / ceiling_file(split, row), data.items.ids, examples, np.array(scores), None)
