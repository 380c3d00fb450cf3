"""Recommend items after a user's last interaction, and print the ranking of an example by title."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hanorec.data.folder import MANIFEST, PREPARE, DataFolder, Example
from hanorec.model.check import load_packed
from hanorec.model.finished import check_prompts, check_vision, load_finished, open_encoding
from hanorec.model.load import pick_dtype
from hanorec.model.prompts import Prompts
from hanorec.model.template import load_template
from hanorec.ranking.catalogue import CatalogueRanker
from hanorec.ranking.first_stage import Newcomers, first_stage, shortlist
from hanorec.ranking.settings import Settings
from hanorec.run.files import UserError, printable, read_json, require, value_hash
from hanorec.run.launch import start_accelerator
from hanorec.run.progress import progress
from hanorec.run.records import Record
from hanorec.run.runs import backbone_for_later_data, read_run, weights_hash

USERS_AT_ONCE = 8  # users whose lines are saved together
ANYBODY = "--history"  # the user of a line for --history


def recommend(
    run: str | Path, users: Sequence[str] | None = None, history: Sequence[str] | None = None, **settings
) -> list[dict]:
    """Recommend items to users after their last interaction, or to anybody after a history.

    Args:
        run: a finished run of sft.py or dpo_hano.py.
        users: user ids; None for all users of the data folder, or for `history`.
        history: item ids, oldest first.
        settings: see Settings.

    Returns a dict for each user: `user`, `interactions` (their number), `history` (item and title of the last items,
    which the model reads), `candidates` (their number), `first_stage` (its name, or None), `unit` of the scores, and
    `recommendations`: item, title and score, best first. The score is None if the item left before the last round of
    lists (see catalogue.py).

    Raises:
        UserError: the run, the data folder, a user or an item cannot be used.
    """
    accelerator, settings = start_accelerator(), Settings(**settings)

    def say(text: str) -> None:
        accelerator.print(printable(text), flush=True)

    recommender = Recommender(Path(run), settings, say)
    if history is not None:
        work = [(ANYBODY, recommender.items(history, "--history"), [])]
    else:
        work = [(user, *recommender.user(user)) for user in (recommender.histories if users is None else users)]
    recommender.load_model(accelerator)
    lines = computed(recommender, work, settings, accelerator)
    recommender.ranker.report(say, run)
    return lines


class Recommender:
    """A run and a data folder, opened to recommend.

    Args:
        say: a function that prints a line of text about what is unusual.

    Raises:
        UserError: the run cannot be used with the data folder.
    """

    def __init__(self, run: Path, settings: Settings, say: Callable[[str], None]):
        self.run, self.config, self.settings, self.say = run, read_run(run), settings, say
        options = self.config["options"]
        if options.get("summaries"):
            raise UserError(f"{run} reads texts that are written for examples only; give a run of --prompt plain")
        folder = Path(settings.data or options["data"])
        if not folder.exists():
            raise UserError(f"{folder}, the data folder of {run}, does not exist; give --data DIR")
        self.data = DataFolder(folder)
        self.histories, self.length = self.data.histories(), trained_length(options, self.data)
        among = settings.among
        self.among = list(range(len(self.data.items))) if among is None else self.items(among, "--from")
        if "histories.jsonl" not in self.data.manifest["files"]:
            say(f"{folder} was prepared by an earlier version: it has no users with few interactions; prepare it again")

    def load_model(self, accelerator) -> None:
        """Load the model, and the first stage."""
        run, options, settings = self.run, self.config["options"], self.settings
        encoding = open_encoding(run, self.data, settings.trust)
        later = self.config["data"] != encoding.hash()
        if later:
            backbone_for_later_data(run)  # raises UserError if the run needs its own data folder
        model = load_finished(run, encoding, pick_dtype(settings.dtype, accelerator))
        if later:
            check_vision(run, model, encoding)
            self.say(f"{run} was trained on an earlier data folder; it recommends from {self.data.folder} as it is now")
        packed = load_packed(model, encoding, not options.get("no_pack"), accelerator.device)
        template = load_template(encoding.source, settings.trust)
        prompts = Prompts(template, encoding.items, encoding.tokens, options["candidate_images"])
        check_prompts(run, self.config, prompts)
        tasks, max_length = options["tasks"], options["max_length"]
        self.ranker = CatalogueRanker(packed, prompts, encoding.tokens, tasks, max_length, accelerator)
        histories, vectors = [items for items, _ in self.histories.values()], encoding.tokens.vectors
        self.first = first_stage(self.data, histories, self.length)
        self.newcomers = Newcomers(histories, vectors["text"], vectors["image"])
        read = [self.data.manifest["files"], encoding.manifest, list(prompts.texts), self.first.key]
        choices = [settings.top_k, settings.shortlist, settings.repeat, settings.dtype, self.among]
        self.key = [weights_hash(run), self.config, read, choices, accelerator.device.type]

    def items(self, ids: Sequence[str], option: str) -> list[int]:
        """Return item indices. UserError for an id that is not in the data folder, or if there is none."""
        items = self.data.items
        for item in ids:
            if item in items.index_of:
                continue
            hint = suggestion(item, items.ids)
            if item in items.titles:
                hint = f" ({item} is the title of {items.ids[items.titles.index(item)]})"
            remedy = "give item ids; for a new item prepare the data again, with --keep-untouched if nobody has it"
            raise UserError(f"{option}: {item} is not in {self.data.folder / 'items.jsonl'}{hint}; {remedy}")
        if not ids:
            raise UserError(f"{option} holds no item; give item ids, separated by commas")
        return [items.index_of[item] for item in ids]

    def user(self, user: str) -> tuple[list[int], list[int]]:
        """Return the user's history and the other items that the user touched. UserError for an unknown user."""
        if user not in self.histories:
            hint = suggestion(user, list(self.histories))
            remedy = "prepare the data with this user's interactions, or give --history ID,ID,..."
            raise UserError(f"user {user} has no item of {self.data.folder / 'items.jsonl'}{hint}; {remedy}")
        return self.histories[user]

    def line(self, user: str, history: list[int], others: list[int]) -> dict:
        """Return the recommendations after a history, as `recommend` returns them.

        Args:
            others: further items that the user touched, which are not recommended either.
        """
        items, settings = self.data.items, self.settings
        # Equal titles are one item, because a prompt shows the title alone
        seen = set() if settings.repeat else {items.titles[item] for item in [*history, *others]}
        candidates = []
        for item in self.among:
            if items.titles[item] not in seen:
                seen.add(items.titles[item])
                candidates.append(item)
        count, first_stage_needed = len(candidates), len(candidates) > settings.shortlist
        if first_stage_needed:
            candidates = shortlist(self.first, self.newcomers, history, candidates, settings.shortlist)
        shown = history[-self.length :]
        best = self.ranker.rank(shown, candidates)[: settings.top_k]

        def named(item: int) -> dict:
            return {"item": items.ids[item], "title": items.titles[item]}

        return {
            "user": user,
            "interactions": len(history),
            "history": [named(item) for item in shown],
            "candidates": count,
            "first_stage": self.first.name if first_stage_needed else None,
            "unit": self.ranker.unit,
            "recommendations": [named(item) | {"score": score} for item, score in best],
        }


def suggestion(name: str, names: Sequence[str]) -> str:
    """Return a question about the most similar name, or an empty text."""
    similar = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""


def trained_length(options: dict, data: DataFolder) -> int:
    """Return the maximum number of items in a history that a run was trained with.

    It is in the manifest of the run's own data folder. If that folder is gone, it is taken from `data`.
    """
    own = Path(options["data"]) / "manifest.json"
    manifest = read_json(own, MANIFEST, PREPARE) if own.exists() else data.manifest
    return require(manifest["options"], {"history": int}, "the options in manifest.json", PREPARE)["history"]


def computed(recommender: Recommender, work: list[tuple], settings: Settings, accelerator) -> list[dict]:
    """Return the line of each user. With --out, the processes share the users and write the lines.

    Args:
        work: (user, history, other items) of each user.
    """
    if settings.out is None:
        return [recommender.line(*user) for user in work]
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    record = Record(out, value_hash([recommender.key, [[user, items] for user, items, _ in work]]), accelerator)
    done = {line["user"] for line in record.done}
    chunks = [work[first : first + USERS_AT_ONCE] for first in range(0, len(work), USERS_AT_ONCE)]
    chunks = chunks[accelerator.process_index :: accelerator.num_processes]
    for chunk in progress(chunks, desc="recommend", unit="batch", leave=False):
        record.add([recommender.line(*user) for user in chunk if user[0] not in done])
    place = {user: number for number, (user, _, _) in enumerate(work)}
    return record.finish(lambda line: place[line["user"]])


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py --user: an example by title


def examples_of_user(user: str, among: str | None, data: DataFolder, split: str) -> list[Example]:
    """Return the user's first example of a split, in a list.

    Args:
        among: ids of other candidates, separated by commas. None: the example's own candidates.
    """
    examples = [example for example in data.examples(split) if example.user == user]
    if not examples:
        raise UserError(f'user {user} has no example in {data.folder / split}.jsonl; its "user" fields are the ids')
    ids = [item.strip() for item in (among or "").split(",") if item.strip()]
    for item in ids:
        if item not in data.items.index_of:
            raise UserError(f"--from: {item} is not in {data.folder / 'items.jsonl'}")
    candidates = [data.items.index_of[item] for item in dict.fromkeys(ids)]
    return [replace(examples[0], candidates=candidates)] if candidates else examples[:1]


def print_recommendations(
    name: str, data: DataFolder, example: Example, scores: Sequence[float], top_k: int, unit: str
) -> None:
    """Print a user's history and the best candidates by title.

    Args:
        name: the run's name.
        scores: [C], one for each candidate.
        unit: what the scores are, e.g. log-likelihood.
    """
    titles = data.items.titles
    print(f"\n{name}: user {printable(example.user)}\n  history, oldest first:")
    for item in example.history:
        print(f"    {printable(titles[item])}")
    print(f"  top {min(top_k, len(scores))} of {len(scores)}, with {unit}:")
    best = np.argsort(-np.asarray(scores), kind="stable")[:top_k]
    for rank, column in enumerate(best, 1):
        item = example.candidates[column]
        mark = "  <- came next" if item == example.target else ""
        label = printable(f"{titles[item]} ({data.items.ids[item]})")
        print(f"    {rank:2}. {label}, {scores[column]:.3f}{mark}")
