"""Score candidates with a model: titles by their log-likelihood, and Yes/No by log p(Yes) - log p(No)."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from accelerate.utils import gather_object, tqdm

from hanorec.data.folder import Example
from hanorec.model.encoding import Encoding
from hanorec.model.packing import PackedMLLM
from hanorec.model.prompts import Prompts, fit_to_length
from hanorec.ranking.metrics import measure
from hanorec.run.files import UserError
from hanorec.run.launch import shared_out


def target_columns(examples: Sequence[Example]) -> np.ndarray:
    """[R]: where each example's target stands among its candidates."""
    return np.array([example.candidates.index(example.target) for example in examples])


def score_examples(
    model: PackedMLLM,
    encoding: Encoding,
    prompts: Prompts,
    examples: Sequence[Example],
    options: dict,
    accelerator,
    batch_size: int = 0,
    shortened: set | None = None,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Score every candidate. The processes share the examples out, and each gets all scores.

    Args:
        options: a run's `tasks` and `max_length`.
        batch_size: examples at once; 0: 16 for the tiny backbone, else 2.
        shortened: gets the (user, target) of examples that lost history items.

    Returns (ranking scores, Yes/No scores), each [R, C], or None for a task that the model was not trained on.
    """
    tasks = options["tasks"]
    builds = [partial(prompts.evaluation_tree, task=task) for task in tasks]
    batch_size = batch_size or (16 if encoding.tiny else 2)
    # The batches do not depend on the number of processes, so the scores do not either, to the last bit
    chunks = [range(first, min(first + batch_size, len(examples))) for first in range(0, len(examples), batch_size)]
    found = []
    model.eval()
    for chunk in tqdm(shared_out(chunks, accelerator), desc="evaluate", unit="batch", leave=False):
        trees = []
        for number in chunk:
            trees += [fit_to_length(build, examples[number], options["max_length"], shortened) for build in builds]
        batch = model.collate(trees, encoding.tokens)
        with torch.no_grad(), accelerator.autocast():  # not inference_mode: it breaks gathering sharded weights
            logps = model(batch.to(accelerator.device))
        found += list(zip(chunk, logps.view(len(chunk), -1).tolist(), strict=True))
    found = gather_object(found) if accelerator.num_processes > 1 else found
    logps = np.array([values for _, values in sorted(dict(found).items())])  # [R, answers of all tasks]
    if not np.isfinite(logps).all():
        raise UserError("the model's scores are no numbers: its weights diverged; train with a lower --lr")
    return split_tasks(logps, tasks, len(examples[0].candidates))


def split_tasks(logps: np.ndarray, tasks: Sequence[str], count: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Split log-probabilities [R, answers of all tasks] of `count` candidates as `score_examples` returns them."""
    scores = yes_scores = None
    if "rank" in tasks:
        scores, logps = logps[:, :count], logps[:, count:]
    if "yesno" in tasks:
        answers = logps.reshape(-1, count, 2)  # Yes, No
        yes_scores = answers[:, :, 0] - answers[:, :, 1]
    return scores, yes_scores


def validate(
    model: PackedMLLM,
    encoding: Encoding,
    prompts: Prompts,
    examples: Sequence[Example],
    options,
    accelerator,
    shortened,
) -> dict[str, float]:
    """Metrics without intervals, for training. The best weights are chosen by `select`: NDCG@3, else AUC."""
    settings = (prompts, examples, vars(options), accelerator)
    scores, yes_scores = score_examples(model, encoding, *settings, shortened=shortened)
    ranked = yes_scores if scores is None else scores
    values = measure(ranked, yes_scores, target_columns(examples), resamples=1).values
    return values | {"select": values["AUC" if scores is None else "NDCG@3"]}
