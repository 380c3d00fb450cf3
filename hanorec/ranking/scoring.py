"""Score candidates with a model: by the log-likelihood of their titles, and by log p(Yes) - log p(No)."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from accelerate.utils import gather_object

from hanorec.data.folder import Example
from hanorec.model.prompts import fit_to_length
from hanorec.ranking.metrics import measure
from hanorec.run.files import UserError
from hanorec.run.launch import shared_out
from hanorec.run.progress import progress
from hanorec.run.training import reshard


def target_columns(examples: Sequence[Example]) -> np.ndarray:
    """Return the index of each example's target among its candidates: [R]."""
    return np.array([example.candidates.index(example.target) for example in examples])


def score_examples(
    model, encoding, prompts, examples: Sequence[Example], options: dict, accelerator, batch_size=0, shortened=None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Score every candidate. Each process scores a part of the examples, and every process gets all scores.

    Args:
        model: a PackedMLLM.
        encoding: the Encoding of the examples' data.
        prompts: the Prompts that the model was trained on.
        options: the run's options, of which `tasks` and `max_length` are used.
        batch_size: the number of examples in a batch; 0: 16 for the tiny backbone, else 2.
        shortened: gets the (user, target) of each example of this process whose history was cut to `max_length`.

    Returns (ranking scores, Yes/No scores), each [R, C], or None for a task that the model was not trained on.
    """
    tasks = options["tasks"]
    builds = [partial(prompts.evaluation_tree, task=task) for task in tasks]
    batch_size = batch_size or (16 if encoding.tiny else 2)
    # The same batches for any number of processes, so that the scores are equal to the last bit
    chunks = [range(first, min(first + batch_size, len(examples))) for first in range(0, len(examples), batch_size)]
    numbers, scores = [], []
    model.eval()
    for chunk in progress(shared_out(chunks, accelerator), desc="evaluate", unit="batch", leave=False):
        trees = []
        for number in chunk:
            trees += [fit_to_length(build, examples[number], options["max_length"], shortened) for build in builds]
        batch = model.collate(trees, encoding.tokens)
        with torch.no_grad(), accelerator.autocast():  # not inference_mode: it breaks gathering sharded weights
            scores.append(model(batch.to(accelerator.device)).view(len(chunk), -1))
        numbers += chunk
    reshard(model)
    scored = list(zip(numbers, torch.cat(scores).tolist(), strict=True))  # one read: no wait between the batches
    if accelerator.num_processes > 1:
        scored = gather_object(scored)
        if shortened is not None:
            shortened.update(gather_object(list(shortened)))
    logps = np.array([values for _, values in sorted(dict(scored).items())])  # [R, answers of all tasks]
    if not np.isfinite(logps).all():
        raise UserError("some of the model's scores are NaN or infinite: its weights diverged; train with a lower --lr")
    return split_tasks(logps, tasks, len(examples[0].candidates))


def split_tasks(logps: np.ndarray, tasks: Sequence[str], count: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Turn log-probabilities into the scores that `score_examples` returns.

    Args:
        logps: [R, answers of all tasks], of `count` candidates.
    """
    scores = yes_scores = None
    if "rank" in tasks:
        scores, logps = logps[:, :count], logps[:, count:]
    if "yesno" in tasks:
        answers = logps.reshape(-1, count, 2)  # Yes, No
        yes_scores = answers[:, :, 0] - answers[:, :, 1]
    return scores, yes_scores


def validate(model, encoding, prompts, examples, options, accelerator, shortened: set) -> dict[str, float]:
    """Compute the metrics of validation examples, without intervals.

    For the arguments see `score_examples`; `options` is a namespace here.

    Returns values by name. `select`, by which the best weights are chosen, is NDCG@3 or, without ranking scores, AUC.
    """
    scores, yes_scores = score_examples(model, encoding, prompts, examples, vars(options), accelerator, 0, shortened)
    ranked = yes_scores if scores is None else scores
    values = measure(ranked, yes_scores, target_columns(examples), resamples=1).values
    return values | {"select": values["AUC" if scores is None else "NDCG@3"]}
