"""Recommend items after a user's last interaction, or after any history."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from hanorec.data.folder import MANIFEST, PREPARE, DataFolder
from hanorec.model.check import load_packed
from hanorec.model.finished import check_prompts, check_vision, load_finished, open_encoding
from hanorec.model.load import pick_dtype
from hanorec.model.prompts import plain_prompts
from hanorec.ranking.catalogue import CatalogueRanker
from hanorec.ranking.first_stage import Newcomers, first_stage, shortlist
from hanorec.ranking.settings import Settings
from hanorec.run.files import (
    UserError,
    file_hash,
    not_a_folder,
    print_main,
    read_json,
    read_jsonl,
    require,
    value_hash,
    write_json,
)
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
    if settings.out is not None:
        not_a_folder(Path(settings.out))
    recommender = Recommender(Path(run), settings)
    if history is not None:
        work = [(ANYBODY, recommender.items(history, "--history"), [])]
    else:
        work = [recommender.user(user) for user in (recommender.histories if users is None else users)]
        recommender.warn_of_lost_orders([user for user, _, _ in work])
    recommender.load_model(accelerator)
    lines = computed(recommender, work, settings, accelerator)
    recommender.ranker.report(run)
    return lines


class Recommender:
    """A run and a data folder, opened to recommend.

    Raises:
        UserError: the run cannot be used with the data folder.
    """

    def __init__(self, run: Path, settings: Settings):
        self.run, self.config, self.settings = run, read_run(run), settings
        options = self.config["options"]
        if options.get("summaries"):
            remedy = "give a run of --prompt plain, or rank a test example with evaluate.py --user"
            raise UserError(f"{run} reads texts of MLLM-SRec, which are written for examples only; {remedy}")
        folder = Path(settings.data or options["data"])
        if not folder.exists():
            raise UserError(f"{folder}, the data folder of {run}, does not exist; give --data DIR")
        self.data = DataFolder(folder)
        self.histories, self.length = self.data.histories(), trained_length(options, self.data)
        among = settings.among
        self.among = list(range(len(self.data.items))) if among is None else self.items(among, "--from")
        if "histories.jsonl" not in self.data.manifest["files"]:
            lack = "it has no users with few interactions; prepare it again"
            print_main(f"{folder} was prepared by an earlier version: {lack}")

    def warn_of_lost_orders(self, users: Sequence[str]) -> None:
        """Print a warning if users lack items that they have in the data folder of the run (see `lost_orders`)."""
        lost = lost_orders(Path(self.config["options"]["data"]), self.data, {u: self.histories[u] for u in users})
        if lost:
            print_main(lost)

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
            used = f"it recommends from {self.data.folder} as it is now"
            print_main(f"{run} was trained on an earlier data folder; {used}")
        packed = load_packed(model, encoding, not options.get("no_pack"), accelerator.device)
        prompts = plain_prompts(encoding, options["candidate_images"], options["history_first"])
        check_prompts(run, self.config, prompts)
        tasks, max_length = options["tasks"], options["max_length"]
        self.ranker = CatalogueRanker(packed, prompts, encoding.tokens, tasks, max_length, accelerator)
        self.first = None
        if len(self.among) > settings.shortlist:
            histories, vectors = [items for items, _ in self.histories.values()], encoding.tokens.vectors
            self.first = first_stage(self.data, histories, self.length)
            self.newcomers = Newcomers(histories, vectors["text"], vectors["image"])
        first = self.first and self.first.key
        read = [self.data.manifest["files"], encoding.manifest, prompts.hash(), first]
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

    def user(self, user: str) -> tuple[str, list[int], list[int]]:
        """Return the user's name, history, and the other items that the user touched.

        A name that differs from one user's alone in capitals, or spaces at its ends, stands for that user.

        Raises:
            UserError: the data folder has no such user.
        """
        if user not in self.histories:
            alike = [name for name in self.histories if name.strip().casefold() == user.strip().casefold()]
            if len(alike) != 1:
                hint = f" (did you mean {' or '.join(alike)}?)" if alike else suggestion(user, [*self.histories])
                remedy = "prepare the data with this user's interactions, or give --history ID,ID,..."
                raise UserError(f"user {user} has no item of {self.data.folder / 'items.jsonl'}{hint}; {remedy}")
            print_main(f"{user} is read as {alike[0]}")
            user = alike[0]
        return user, *self.histories[user]

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
    """Return a question about the most similar name, or an empty text. Capitals do not count."""
    folded = {other.casefold(): other for other in names}
    similar = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f" (did you mean {folded[similar[0]]}?)" if similar else ""


def trained_length(options: dict, data: DataFolder) -> int:
    """Return the maximum number of items in a history that a run was trained with.

    It is in the manifest of the run's own data folder. If that folder is gone, it is taken from `data`.
    """
    own = Path(options["data"]) / "manifest.json"
    manifest = read_json(own, MANIFEST, PREPARE) if own.exists() else data.manifest
    return require(manifest["options"], {"history": int}, "the options in manifest.json", PREPARE)["history"]


def lost_orders(own: Path, data: DataFolder, histories: dict[str, tuple[list[int], list[int]]]) -> str | None:
    """Return a warning if users lack items in `data` that they have in the data folder of the run, else None.

    Args:
        own: the data folder of the run. If it is `data`, or cannot be read any more, there is nothing to compare.
        histories: those of `data`, of the users that are asked for.
    """
    if own.resolve() == data.folder.resolve():
        return None
    try:
        before = DataFolder(own)
        old_histories = before.histories()
    except UserError:
        return None
    lost = []
    for user in old_histories.keys() & histories.keys():
        had = {before.items.ids[item] for items in old_histories[user] for item in items}
        has = {data.items.ids[item] for items in histories[user] for item in items}
        lost += [(user, item) for item in sorted(had - has) if item in data.items.index_of]
    if not lost:
        return None
    users, (user, item) = len({user for user, _ in lost}), min(lost)
    text = f"WARNING: {data.folder} lacks orders that {own} has, of {users} user{'s' * (users > 1)}"
    return f"{text} (e.g. {user}: {item}): they may be recommended what they have; prepare all orders, old and new"


def computed(recommender: Recommender, work: list[tuple], settings: Settings, accelerator) -> list[dict]:
    """Return the line of each user. With --out, the processes share the users and write the lines.

    Args:
        work: (user, history, other items) of each user.
    """
    if settings.out is None:
        return [recommender.line(*user) for user in work]
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    key = value_hash([recommender.key, work])
    complete = finished_lines(out, key)
    if complete:
        print_main(f"{out} is complete already; delete it to compute it again")
        return complete
    record = Record(out, key, accelerator)
    done = {line["user"] for line in record.done}
    chunks = [work[first : first + USERS_AT_ONCE] for first in range(0, len(work), USERS_AT_ONCE)]
    chunks = chunks[accelerator.process_index :: accelerator.num_processes]
    for chunk in progress(chunks, desc="recommend", unit="batch", leave=False):
        record.add([recommender.line(*user) for user in chunk if user[0] not in done])
    place = {user: number for number, (user, _, _) in enumerate(work)}
    lines = record.finish(lambda line: place[line["user"]])
    if accelerator.is_main_process:
        write_json(key_file(out), {"key": key, "file": file_hash(out)})
    return lines


def key_file(out: Path) -> Path:
    """Return the file beside `out` that says what its lines were computed from."""
    return out.with_name(f".{out.name}.key")


def finished_lines(out: Path, key: str) -> list[dict]:
    """Return the lines of `out` if it was computed with this key and has not been changed since, else []."""
    if not out.is_file() or not key_file(out).is_file():
        return []
    recorded = read_json(key_file(out), {}, f"delete {out} and this file")
    return read_jsonl(out, {}, f"delete {out}") if recorded == {"key": key, "file": file_hash(out)} else []
