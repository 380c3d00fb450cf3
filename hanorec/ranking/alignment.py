"""The mechanism that the paper claims: how alike a model holds an item's title and image, before and after training.

The paper's picture is that preference optimisation makes weakly aligned items weaker still ("the weak get weaker"), and
that noise in the weights mends it. Here the alignment of an item is the cosine of the mean last hidden states over its
title's tokens and over its image's tokens, in the prompt of a history that has this item alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hanorec.data.demo import make_world
from hanorec.data.folder import DataFolder, Example
from hanorec.model.check import load_packed
from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.images import ImageTokens
from hanorec.model.load import load_model, pick_dtype
from hanorec.model.packing import PackedMLLM
from hanorec.model.prompts import Prompts, plain_prompts
from hanorec.model.trees import Node
from hanorec.ranking.markdown import markdown, short
from hanorec.ranking.metrics import Result
from hanorec.ranking.scoring import target_columns
from hanorec.ranking.slices import measure_slices
from hanorec.run.progress import progress

THIRDS = ("lowest", "middle", "highest")
METRICS = ("NDCG@3", "HR@3", "AUC")  # of the targets in each third; a run without the yesno task has no AUC
CHUNK = 32  # items in a forward


def item_prompt(prompts: Prompts, item: int) -> tuple[Node, list[int], list[int]]:
    """Return (prompt of a history with one item, offsets of the title's tokens, offsets of the image's tokens).

    The tokens after the first title token are scored, because the model computes only what predicts scored tokens.
    """
    root = Node(None, list(prompts.template.head))
    (title,) = prompts.add_history(root, [item])
    image = [offset for offset, token in enumerate(root.ids) if token == prompts.template.image_token]
    root.ids += prompts.template.tail
    root.scored = range(title[0] + 1, image[-1] + 2)
    return root, list(title), image


def alignments(packed: PackedMLLM, prompts: Prompts, tokens: ImageTokens, device) -> np.ndarray:
    """Return the alignment of each item: [N]. It is NaN for an item without an image."""
    items = [item for item, length in enumerate(tokens.lengths) if length]
    found = np.full(len(tokens.lengths), np.nan)
    states = []
    decoder = packed.core.get_decoder()
    hook = decoder.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state[0].float()))
    packed.eval()
    try:
        for start in progress(range(0, len(items), CHUNK), desc="alignment", unit="batch", leave=False):
            own = [(item, *item_prompt(prompts, item)) for item in items[start : start + CHUNK]]
            batch = packed.collate([[root] for _, root, _, _ in own], tokens).to(device)
            states.clear()
            with torch.no_grad():
                packed(batch)
            predicting = batch.predicting[batch.predicted_by]
            hidden = torch.cat(states)[predicting]  # [S, d], of the tokens before the scored ones
            for number, (item, _, title, image) in enumerate(own):
                of_item = hidden[batch.answer == number]  # of the tokens from the title's first on
                title_mean = of_item[[offset - title[0] for offset in title]].mean(0)
                image_mean = of_item[[offset - title[0] for offset in image]].mean(0)
                found[item] = float(torch.cosine_similarity(title_mean, image_mean, dim=0))
    finally:
        hook.remove()
    return found


def slope(start: np.ndarray, change: np.ndarray, seed: int = 0, resamples: int = 1000) -> tuple[float, list[float]]:
    """Return the least-squares slope of the change on the start, and its 95% bootstrap interval over items.

    A slope above 0 says that items which start low gain less, or lose more, than items which start high.

    Args:
        start, change: [N], without NaN.
    """

    def fitted(rows: np.ndarray) -> float:
        x, y = start[rows] - start[rows].mean(), change[rows]
        return float((x * y).sum() / (x * x).sum())

    rng, everything = np.random.default_rng(seed), np.arange(len(start))
    draws = [fitted(rng.choice(everything, len(start))) for _ in range(resamples)]
    return fitted(everything), np.percentile(draws, [2.5, 97.5]).tolist()


@dataclass
class Change:
    """How a training changed the alignment of the items.

    Args:
        mean: mean alignment after it. change: mean change.
        slope, interval: of the change on the start, see `slope`.
        thirds: mean change of the items that start lowest, in the middle and highest.
    """

    mean: float
    change: float
    slope: float
    interval: list[float]
    thirds: dict[str, float]


def third_of(values: np.ndarray) -> np.ndarray:
    """Return the third of each value, 0 to 2, the lowest first: [N]; -1 for NaN."""
    edges = np.nanquantile(values, [1 / 3, 2 / 3])
    return np.where(np.isnan(values), -1, (values[:, None] > edges).sum(1))


def changes(start: np.ndarray, end: np.ndarray, seed: int = 0) -> Change:
    """Compare the alignments of the items before and after a training: [N] each."""
    known = ~np.isnan(start)
    third, difference = third_of(start), end - start
    thirds = {name: float(difference[third == number].mean()) for number, name in enumerate(THIRDS)}
    fitted, interval = slope(start[known], difference[known], seed)
    return Change(float(end[known].mean()), float(difference[known].mean()), fitted, interval, thirds)


def by_alignment(
    scores: np.ndarray, yes_scores: np.ndarray | None, examples: Sequence[Example], start: np.ndarray, seed: int = 0
) -> dict[str, Result]:
    """Return the metrics of the examples whose targets start lowest, in the middle and highest, of those that exist."""
    third = third_of(start)[[example.target for example in examples]]
    masks = {name: third == number for number, name in enumerate(THIRDS) if (third == number).any()}
    return measure_slices(scores, yes_scores, target_columns(examples), {"start": masks}, seed).slices["start"]


def misleading_items(data: DataFolder) -> set[int]:
    """Return the demo's films whose titles name another genre than their posters show. No other data has any."""
    if data.manifest["options"]["dataset"] != "demo":
        return set()
    world = make_world(data.manifest["seed"])
    numbers = [int(name.removeprefix("film")) for name in data.items.ids]
    return {item for item, film in enumerate(numbers) if world.word[film] not in (-1, world.genre[film])}


def ranks(scores: np.ndarray) -> np.ndarray:
    """Return the rank of each candidate, 0 for the best: [R, C]. Equal scores share their mean rank."""
    above = (scores[:, None, :] > scores[:, :, None]).sum(2)
    return above + ((scores[:, None, :] == scores[:, :, None]).sum(2) - 1) / 2


def follows_the_poster(
    scores: np.ndarray, ceiling: np.ndarray, titles: np.ndarray, examples: Sequence[Example], items: set[int]
) -> tuple[float, int]:
    """Return (the share of decided candidates that a model ranks by the poster, their number).

    A candidate among `items` is decided if its rank is nearer to that by the ceiling, which sees the poster, than to
    that by the ceiling of titles, or the other way round.

    Args:
        scores, ceiling, titles: [R, C].
    """
    to_poster, to_title = (np.abs(ranks(scores) - ranks(other)) for other in (ceiling, titles))
    mask = np.array([[candidate in items for candidate in example.candidates] for example in examples])
    mask &= to_poster != to_title
    return float((to_poster < to_title)[mask].mean()), int(mask.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def alignments_of(run: Path | None, encoding: Encoding, options, pack: bool, accelerator) -> np.ndarray:
    """Return the alignments [N] under the model of a finished run; None: under the backbone."""
    dtype = pick_dtype(options.dtype, accelerator)
    model = load_finished(run, encoding, dtype) if run else load_model(encoding.source, dtype, trust=encoding.trust)
    packed = load_packed(model, encoding, pack, accelerator.device)
    return alignments(packed, plain_prompts(encoding), encoding.tokens, accelerator.device)


def measure_alignment(configs, scored, ceilings, data: DataFolder, examples, options, accelerator) -> dict[Path, dict]:
    """Compare each run's alignments with those before its training: the backbone's, or for DPO those of its SFT run.

    Args:
        configs: config.json of each run. scored: (ranking scores, Yes/No scores or None) of each run.
        ceilings: the same of each ceiling, by row.

    Returns JSON values of each run: the fields of `Change`; each of METRICS of the targets by third of the start; and,
    where the data have misleading items, `follows_poster` with the number of decided candidates.
    """
    before: dict[tuple, np.ndarray] = {}  # by run (None: the backbone) and what its encoding depends on
    misleading, found = misleading_items(data), {}
    for run, config in configs.items():
        trained = config["options"]
        images, pack = options.images or trained.get("images"), not (options.no_pack or trained.get("no_pack"))
        encoding = Encoding(data, trained["model"], trained["blank_images"], images, options.trust_remote_code)
        first = Path(trained["sft"]) if config["stage"] == "dpo_hano" else None
        seen = (trained["model"], trained["blank_images"], images)
        for name in (first, run):
            if (name, *seen) not in before:
                before[name, *seen] = alignments_of(name, encoding, options, pack, accelerator)
        start = before[first, *seen]
        found[run] = vars(changes(start, before[run, *seen], options.seed))
        by_third = by_alignment(*scored[run], examples, start, options.seed)
        for metric in METRICS:
            values = {name: result.values.get(metric) for name, result in by_third.items()}
            found[run][metric] = {name: value for name, value in values.items() if value is not None}
        if misleading and len(ceilings) == 2:
            best = [scores for scores, _ in ceilings.values()]
            found[run]["follows_poster"] = follows_the_poster(scored[run][0], *best, examples, misleading)
    return found


def alignment_table(found: dict[Path, dict]) -> str:
    """Return what `measure_alignment` found as two Markdown tables: the alignment, and the metrics by its thirds."""
    header = ["", "mean cosine before", "after", "change", "slope of the change"]
    rows = [[*header, *(f"change, {name}" for name in THIRDS), "follows the poster"]]
    ranked = [
        ["by the third of the target's cosine before", *(f"{metric}, {name}" for metric in METRICS for name in THIRDS)]
    ]
    for run, values in found.items():
        low, high = values["interval"]
        before = values["mean"] - values["change"]
        row = [str(run), short(before), short(values["mean"]), short(values["change"])]
        row.append(f"{short(values['slope'])} [{short(low)}, {short(high)}]")
        row += [short(values["thirds"][name]) for name in THIRDS]
        share, count = values.get("follows_poster", (None, 0))
        rows.append([*row, f"{short(share)} of {count}" if count else "-"])
        cells = [values[metric].get(name) for metric in METRICS for name in THIRDS]  # None: not measured
        ranked.append([str(run), *("-" if value is None else short(value) for value in cells)])
    return f"{markdown(rows)}\n\n{markdown(ranked)}"
