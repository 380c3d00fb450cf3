"""Compare ways to rank a whole catalogue: python bench/recommending.py --run runs/demo/sft [--users 200]

For test users of a leave-one-out data folder, find the last item among all items that the user did not have before.
The first stage (co-occurrence) counts the training sequences alone.

- first stage: its order.
- one list: the 100 best of the first stage in one ranking prompt.
- rounds: the same in lists of about ten, of which the better half stays.
- Yes/No: the same by questions.

Prints HR@10, NDCG@10 and seconds for each user, and how often the first stage keeps the last item.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from hanorec.data.folder import DataFolder
from hanorec.model.check import load_packed
from hanorec.model.finished import load_finished, open_encoding
from hanorec.ranking.catalogue import CatalogueRanker
from hanorec.ranking.first_stage import CoOccurrence
from hanorec.run.launch import start_accelerator
from hanorec.run.runs import read_run
from mllm_srec.chain_of_thought import load_run_prompts

SHORTLIST, ROUND = 100, 10


def rankers(run: Path, data: DataFolder) -> dict[str, CatalogueRanker]:
    """Return a ranker for each way."""
    accelerator, encoding = start_accelerator(), open_encoding(run, data)
    packed = load_packed(load_finished(run, encoding), encoding, True, accelerator.device)
    prompts = load_run_prompts(run, read_run(run), data, encoding)
    common = (packed, prompts, encoding.tokens)
    long = 10**6  # tokens
    ways = {name: CatalogueRanker(*common, ["rank"], long, accelerator) for name in ("one list", "rounds")}
    return ways | {"Yes/No": CatalogueRanker(*common, ["yesno"], long, accelerator)}


def narrow(ranker: CatalogueRanker, history: list[int], candidates: list[int]) -> None:
    """Set max_length so that a list of about ROUND of these candidates fits."""
    lines = ranker.prompt_length(history, candidates) - ranker.prompt_length(history, [])
    answer = max(len(ranker.prompts.answer(ranker.prompts.items.titles[item], 0).ids) for item in candidates)
    ranker.max_length = ranker.prompt_length(history, []) + answer + lines * ROUND // len(candidates) + ROUND


def main(argv: list[str] | None = None) -> dict[str, list]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo/sft"))
    parser.add_argument("--users", type=int, default=200)
    options = parser.parse_args(argv)
    data = DataFolder(Path(read_run(options.run)["options"]["data"]))
    ways, sequences = rankers(options.run, data), data.sequences()
    val = {example.user: example.target for example in data.examples("val")}
    places: dict[str, list] = {name: [] for name in ("first stage", *ways)}
    seconds = dict.fromkeys(places, 0.0)
    for example in data.examples("test", options.users):
        owned = {*sequences[example.user], val[example.user]}
        candidates = [item for item in range(len(data.items)) if item not in owned]
        stage = CoOccurrence([*sequences.values()], len(data.items), len(example.history))
        order = stage.best_first(example.history, candidates)
        places["first stage"].append(order.index(example.target))
        narrow(ways["rounds"], example.history, order[:SHORTLIST])
        for name, ranker in ways.items():
            started = time.perf_counter()
            best = [item for item, _ in ranker.rank(example.history, order[:SHORTLIST])]
            seconds[name] += time.perf_counter() - started
            places[name].append(best.index(example.target) if example.target in best else SHORTLIST)
    print(f"{options.run}: {len(places['first stage'])} users, {len(data.items)} items")
    for name, found in places.items():
        place = np.array(found)
        gain = np.where(place < 10, 1 / np.log2(place + 2), 0)
        each = seconds[name] / len(place)
        print(f"{name}: HR@10 {np.mean(place < 10):.3f}, NDCG@10 {gain.mean():.3f}, {each:.3f} s for each user")
    print(f"kept by the first stage: {np.mean(np.array(places['first stage']) < SHORTLIST):.3f}")
    return places


if __name__ == "__main__":
    main()
