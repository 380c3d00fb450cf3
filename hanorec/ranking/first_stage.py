"""Choose the items of a large catalogue that a model then ranks: by SASRec, or by co-occurrence with popularity."""

from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from hanorec.data.folder import DataFolder
from hanorec.ranking.baselines import PairCounts, interaction_counts
from hanorec.ranking.sasrec import CONFIG
from hanorec.ranking.sasrec_model import SASRec
from hanorec.run.files import UserError, file_hash, printable, read_json

PLACES_PER_NEWCOMER = 10  # one of so many places of a shortlist is for an item that nobody has


class CoOccurrence:
    """Ranks items by PairCounts with a history. Items of equal scores are in the order of their popularity.

    Args:
        histories: the history of each user, item indices.
        items: the number N of items.
        length: the number of last items of a history that count.
    """

    name, key = "co-occurrence and popularity", "co-occurrence"

    def __init__(self, histories: Sequence[list[int]], items: int, length: int):
        self.counter, self.length = PairCounts(histories, items), length
        self.popularity = interaction_counts(histories, items)  # [N]

    def best_first(self, history: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """Return the candidates, best first."""
        candidates = np.array(candidates, dtype=int)
        scores = self.counter.scores(history[-self.length :], candidates)
        return candidates[np.lexsort((-self.popularity[candidates], -scores))].tolist()


class TrainedSASRec:
    """Scores items by a SASRec that was trained on the data folder.

    Args:
        path: the model.safetensors in its folder.
        options: the options in its config.json.
        items: the number of items.
    """

    def __init__(self, path, options: dict, items: int):
        self.name, self.key = printable(path.parent), file_hash(path)
        try:
            weights = load_file(path)
            self.length = len(weights["positions.weight"])  # shorter than --length if no sequence is so long
            shape = (options["width"], options["blocks"], options["heads"], self.length, options["dropout"])
            self.model = SASRec(items, *shape).eval()
            self.model.load_state_dict(weights)
        except Exception as error:  # a reader of a broken file may raise any exception
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{path} cannot be loaded ({reason}); train it again, or delete that folder") from error

    @torch.inference_mode()
    def best_first(self, history: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """Return the candidates, best first."""
        state = self.model(torch.tensor([history[-self.length :]]))[0, -1]
        scores = (self.model.items.weight @ state).numpy()
        candidates = np.array(candidates, dtype=int)
        return candidates[np.argsort(-scores[candidates], kind="stable")].tolist()


class Newcomers:
    """Chooses among the items that nobody has, which no count of interactions can tell apart.

    The best are most alike to an item of the history: the sum of the cosines of their title vectors and image vectors.

    Args:
        histories: the history of each user, item indices.
        text, image: [N, d], the item vectors of an encoding.
    """

    def __init__(self, histories: Sequence[list[int]], text: torch.Tensor, image: torch.Tensor):
        self.nobody_has = interaction_counts(histories, len(text)) == 0  # [N]
        self.vectors = torch.cat([normalize(text.float()), normalize(image.float())], dim=1)

    def best_first(self, history: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """Return the candidates that nobody has, best first."""
        new = [item for item in candidates if self.nobody_has[item]]
        alike = (self.vectors[new] @ self.vectors[list(history)].T).max(1).values
        return [new[place] for place in alike.argsort(descending=True, stable=True).tolist()] if new else []


def shortlist(stage, newcomers: Newcomers, history: list[int], candidates: list[int], size: int) -> list[int]:
    """Return `size` of the candidates: up to a tenth are newcomers, or more if there are too few other items.

    The stage chooses the others.
    """
    new = newcomers.best_first(history, candidates)
    old = stage.best_first(history, [item for item in candidates if not newcomers.nobody_has[item]])
    places = max(size // PLACES_PER_NEWCOMER, size - len(old))
    new = new[:places]
    return old[: size - len(new)] + new


def first_stage(data: DataFolder, histories: Sequence[list[int]], length: int) -> CoOccurrence | TrainedSASRec:
    """Return the SASRec in <data>/sasrec* that was trained on this data, the first by name, else co-occurrence.

    Args:
        histories, length: for co-occurrence.
    """
    for config_path in sorted(data.folder.glob("sasrec*/config.json")):
        config = read_json(config_path, CONFIG, "delete that folder")
        path = config_path.with_name("model.safetensors")
        if config["files"] == data.manifest["files"] and path.exists():
            return TrainedSASRec(path, config["options"], len(data.items))
    return CoOccurrence(histories, len(data.items), length)
