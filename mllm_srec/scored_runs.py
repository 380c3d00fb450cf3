"""Score the candidates of examples with the model of a finished run.

It is in mllm_srec because a run may have been trained on MLLM-SRec's prompts.
"""

import argparse
from pathlib import Path

import numpy as np

from hanorec.data.folder import DataFolder, Example
from hanorec.model.check import load_packed
from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.load import pick_dtype
from hanorec.ranking.baselines import interaction_counts
from hanorec.ranking.exchange import read_scores
from hanorec.ranking.results import Scores, file_prefix
from hanorec.ranking.scoring import score_examples
from hanorec.ranking.shuffling import other_images
from hanorec.run.files import UserError, read_json
from mllm_srec.chain_of_thought import load_run_prompts, training_hash


def score_run(run: Path, config: dict, data: DataFolder, examples: list[Example], options, accelerator) -> Scores:
    """Score the candidates with the model of a finished run.

    Returns (scores that rank, Yes/No scores), each [examples, candidates]. A run without the ranking task is ranked by
    its Yes/No scores. A run without the Yes/No task has None for them.
    """
    trained = config["options"]
    blank, images = options.blank_images or trained["blank_images"], options.images or trained.get("images")
    encoding = Encoding(data, trained["model"], blank, images, options.trust_remote_code)
    summaries = trained.get("summaries")
    if config["data"] != training_hash(data, encoding, summaries):
        raise UserError(f"{run} was trained on an earlier {data.folder}; train it again, or prepare that data again")
    if options.shuffle_images:
        popularity = interaction_counts([*data.sequences().values()], len(data.items))
        encoding.tokens.give_images(other_images(data.items.images, popularity, options.seed))
    model = load_finished(run, encoding, pick_dtype(options.dtype, accelerator))
    pack = not (options.no_pack or trained.get("no_pack"))
    packed = load_packed(model, encoding, pack, accelerator.device)
    prompts = load_run_prompts(run, config, data, encoding)
    shortened: set[tuple[str, int]] = set()
    scores, yes_scores = score_examples(
        packed, encoding, prompts, examples, trained, accelerator, options.batch_size, shortened
    )
    if shortened:
        accelerator.print(f"{run}: {len(shortened)} histories were cut to its --max-length {trained['max_length']}")
    return yes_scores if scores is None else scores, yes_scores


def scoring_settings(run: Path, options: argparse.Namespace, accelerator) -> dict:
    """Return what a run's scores depend on besides --blank-images and --shuffle-images: weights, and last digits."""
    settings = {name: getattr(options, name) for name in ("images", "dtype", "no_pack", "batch_size")}
    weights = read_json(run / "result.json", {"weights": str}, "train the run again")["weights"]
    return settings | {"weights": weights, "device": accelerator.device.type}


def true_scores(run: Path, config: dict, data: DataFolder, examples: list[Example], options, accelerator) -> np.ndarray:
    """Return the scores [R, C] that rank with the items' own images: read from the run folder, or else computed."""
    own = argparse.Namespace(**vars(options) | {"blank_images": False, "shuffle_images": False})
    metrics, predictions = (run / f"{file_prefix(own)}{name}" for name in ("metrics.json", "predictions.jsonl"))
    if metrics.exists() and predictions.exists():
        settings = read_json(metrics, {}, "delete it").get("scored")
        if settings == scoring_settings(run, options, accelerator):
            return read_scores(predictions, data.items.ids, examples)[0]
    return score_run(run, config, data, examples, own, accelerator)[0]
