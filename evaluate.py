"""Rank candidates with trained models, and print AUC, GAUC, HR@K, NDCG@K and MRR beside those of simple baselines.

    python evaluate.py                                                    # the demo's runs, side by side
    python evaluate.py --run runs/ml-1m/sft runs/ml-1m/dpo_hano           # writes metrics.json, predictions.jsonl there
    python evaluate.py --run runs/ml-1m/dpo_hano --compare runs/ml-1m/sft # paired bootstrap of the difference
    python evaluate.py --run runs/x/sft-1 runs/x/sft-2 --pool             # one row for runs of several seeds
    python evaluate.py --data data/ml-1m --scores other.jsonl             # another system's scores, same candidates
    python evaluate.py --run runs/demo/sft --user user007 --top-k 5       # recommendations by name

HR, NDCG and MRR rank by the log-likelihood of each candidate's title after one shared prompt. AUC and GAUC use
log p(Yes) - log p(No), which also ranks if a run was not trained on titles. No text is sampled or parsed. Each metric
has a bootstrap interval. Where the data folder holds exact probabilities, their metrics are the row `ceiling`.
"""

import argparse
from pathlib import Path

from hanorec.data.folder import EVALUATED
from hanorec.ranking.pooling import Groups, group_runs, reference_group
from hanorec.run.files import UserError, one_line_errors, printable, read_json, write_json
from hanorec.run.options import DTYPE, TRUST, Option, Parser, non_negative_int, positive_int
from hanorec.run.runs import read_run

DEMO_RUNS = (Path("runs/demo/sft"), Path("runs/demo/dpo_hano"))
SPLIT_HELP = "the split to evaluate; test_...: the targets of test among other candidates, if the data folder has them"
COMPARE_HELP = "also print each other row minus this run; with --pool, minus the group that these runs form"
RECBOLE_HELP = "write the examples and the first run's scores of all candidates as RecBole's files"
OPTIONS = {
    "": [
        Option("--run", Path, [], "run folders", nargs="+", shown="those in runs/demo"),
        Option("--data", Path, None, "data folder; needed for --scores without --run"),
        Option("--split", [*EVALUATED], "test", SPLIT_HELP),
        Option("--limit", non_negative_int, 0, "maximum number of examples, the first ones; 0: all"),
        Option("--blank-images", bool, False, "replace every image by a neutral one"),
        Option("--shuffle-images", bool, False, "give every item the image of another item of like popularity"),
        Option("--images", ["stored", "live"], None, "read image tokens, or compute them", shown="as in training"),
        Option("--compare", Path, [], COMPARE_HELP, nargs="+", metavar="RUN"),
        Option("--pool", bool, False, "one row for runs that differ in nothing but --seed"),
        Option("--slices", bool, False, "also print the metrics of parts of the examples"),
        Option("--scores", Path, [], "predictions.jsonl of other systems", nargs="+"),
        Option("--export-recbole", Path, None, RECBOLE_HELP, metavar="DIR"),
        Option("--batch-size", positive_int, 0, "number of examples in a batch", shown="2; tiny: 16"),
        DTYPE,
        Option("--no-pack", bool, False, "compute each answer in a forward of its own", shown="as in training"),
        Option("--seed", non_negative_int, 0, "seed of the bootstrap and of --shuffle-images"),
        TRUST,
    ],
    "recommendations": [
        Option("--user", str, None, "print this user's recommendations instead of metrics"),
        Option("--top-k", positive_int, 10, "number of recommendations"),
        Option("--from", str, None, "items to rank", shown="the candidates", metavar="ID,ID,...", dest="among"),
    ],
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, and check that they go together."""
    parser = Parser(__doc__, OPTIONS)
    options = parser.parse_args(argv)
    if options.among and not options.user:
        parser.error("--from needs --user")
    if options.export_recbole and not options.run:
        parser.error("--export-recbole needs --run; it writes the scores of that run")
    if options.compare and not (options.run or options.scores):
        parser.error("--compare needs --run or --scores; it compares them with its own run")
    if options.export_recbole and options.limit:
        parser.error("--export-recbole writes complete splits; do not give --limit")
    if len(options.compare) > 1 and not options.pool:
        parser.error("--compare takes several runs only with --pool")
    if options.blank_images and options.shuffle_images:
        parser.error("give --blank-images or --shuffle-images, not both")
    for_metrics = ("pool", "slices", "scores", "compare", "export_recbole")
    if options.user and any(getattr(options, name) for name in for_metrics):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in for_metrics)
        parser.error(f"--user prints recommendations; do not give {names}")
    return options


@one_line_errors
def checked_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[Path, dict], Path, Groups]:
    """Parse the options and read the runs.

    Returns (options, config of each run, data folder of all runs, groups of runs that become one row of the results).
    """
    options = parse(argv)
    runs = options.run or [run for run in DEMO_RUNS if run.exists() and not options.scores]
    if not runs and not options.scores:
        raise UserError("no --run given and no runs/demo here; run sft.py first")
    configs = {run: read_run(run) for run in [*runs, *options.compare]}
    # Without --pool each run is a group of its own; the seed 0 stands for any, so that --compare pairs every two
    groups = group_runs(configs) if options.pool else {str(run): {(0,): run} for run in configs}
    if options.compare:
        reference_group(groups, options.compare)
    named = [options.data, *(Path(config["options"]["data"]) for config in configs.values())]
    folders = {folder.resolve(): folder for folder in named if folder}
    if not folders:
        raise UserError("--scores without --run needs --data, the folder whose candidates were scored")
    if len(folders) > 1:
        names = " and ".join(map(str, folders.values()))
        raise UserError(f"one data folder at a time, not {names}; give --run with runs of one, and leave out --data")
    return options, configs, folders.popitem()[1], groups


if __name__ == "__main__":
    checked_options()  # --help and mistakes are answered before the slow imports

import hanorec_loss
from hanorec.data.folder import DataFolder, Example
from hanorec.model.check import load_packed
from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.load import pick_dtype
from hanorec.ranking.baselines import baseline_scores, interaction_counts
from hanorec.ranking.ceiling import ceiling_scores
from hanorec.ranking.exchange import read_scores, write_predictions, write_recbole
from hanorec.ranking.markdown import tables
from hanorec.ranking.metrics import Result, differences, pool, rank_changes
from hanorec.ranking.recommending import examples_of_user, print_recommendations
from hanorec.ranking.sasrec import trained_scores
from hanorec.ranking.scoring import score_examples, target_columns
from hanorec.ranking.shuffling import other_images
from hanorec.ranking.slices import Slicings, make_slicings, measure_slices
from hanorec.run.launch import start_accelerator
from mllm_srec.chain_of_thought import load_prompts, training_hash


def score_run(run: Path, config: dict, data: DataFolder, examples: list[Example], options, accelerator):
    """Score the candidates with the model of a finished run.

    Returns (ranking scores, Yes/No scores), each [examples, candidates], or None for a task that the run was not
    trained on.
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
    prompts = load_prompts(data, encoding, trained["candidate_images"], summaries)
    shortened: set[tuple[str, int]] = set()
    batch_size = options.batch_size
    scores = score_examples(packed, encoding, prompts, examples, trained, accelerator, batch_size, shortened)
    if shortened:
        accelerator.print(f"{run}: {len(shortened)} histories were cut to its --max-length {trained['max_length']}")
    return scores


def file_prefix(options: argparse.Namespace) -> str:
    """Return the prefix of the names of metrics.json and predictions.jsonl, empty for all of test with its images."""
    prefix = "" if options.split == "test" else f"{options.split}_"
    prefix += "blank_" if options.blank_images else "shuffled_" if options.shuffle_images else ""
    return prefix + (f"first{options.limit}_" if options.limit else "")


def protocol(data: DataFolder, examples: list[Example], options: argparse.Namespace) -> str:
    """Describe the data and the protocol of the results in one line. Other candidates have another hash."""
    prepared, file = data.manifest["options"], f"{options.split}.jsonl"
    further = {"test_hard": "hard", "test_popularity": "popularity", "test_99": "uniform"}
    negatives = further.get(options.split, prepared["negative_sampling"])
    text = f"{data.folder}: {options.split} ({prepared['split']}), {len(examples)} examples, "
    text += f"{len(examples[0].candidates)} candidates, {negatives} negatives, seed {prepared['seed']}, "
    images = ", blank images" if options.blank_images else ", shuffled images" if options.shuffle_images else ""
    return text + f"{file} {data.manifest['files'][file][:8]}{images}"


def open_data(folder: Path, split: str) -> DataFolder:
    """Open the data folder. UserError if it lacks the split."""
    data = DataFolder(folder)
    if f"{split}.jsonl" not in data.manifest["files"]:
        remedy = (
            "prepare the data again with the same options, and with --further-tests for test_popularity and test_99"
        )
        raise UserError(f"{folder} has no split {split}; {remedy}")
    return data


def recommend(options: argparse.Namespace, configs: dict[Path, dict], data: DataFolder, accelerator) -> None:
    """Print the recommendations of each run for the user of --user."""
    examples = examples_of_user(options.user, options.among, data, options.split)
    for run, config in configs.items():
        scores, yes_scores = score_run(run, config, data, examples, options, accelerator)
        unit = "log p(Yes) - log p(No)" if scores is None else "log-likelihood"
        ranked = yes_scores if scores is None else scores
        if accelerator.is_main_process:
            print_recommendations(str(run), data, examples[0], ranked[0], options.top_k, unit)


def score_runs(options, configs: dict[Path, dict], data: DataFolder, examples: list[Example], accelerator):
    """Score each run and write its predictions.jsonl; for the first run also --export-recbole.

    Returns (scores that rank, Yes/No scores or None) of each run.
    """
    scored = {}
    for run, config in configs.items():
        scores, yes_scores = score_run(run, config, data, examples, options, accelerator)
        scored[run] = yes_scores if scores is None else scores, yes_scores
        if accelerator.is_main_process:
            prefix = file_prefix(options)
            (run / f"{prefix}metrics.json").unlink(missing_ok=True)  # those of other predictions
            write_predictions(run / f"{prefix}predictions.jsonl", data.items.ids, examples, scores, yes_scores)
            if options.export_recbole and run == next(iter(configs)):
                splits = {split: data.examples(split) for split in ("train", "val", "test")}
                splits["candidates"] = examples
                write_recbole(options.export_recbole, data.items, splits, scored[run][0], data.sequences())
    return scored


def scoring_settings(run: Path, options: argparse.Namespace, accelerator) -> dict:
    """Return what the scores of a run depend on, images aside: the weights, and what changes the last digits."""
    settings = {name: getattr(options, name) for name in ("images", "dtype", "no_pack", "batch_size")}
    weights = read_json(run / "result.json", {"weights": str}, "train the run again")["weights"]
    return settings | {"weights": weights, "device": accelerator.device.type}


def true_scores(run: Path, config: dict, data: DataFolder, examples: list[Example], options, accelerator):
    """Return the scores [R, C] that rank with the items' own images: read from the run folder, or else computed."""
    own = argparse.Namespace(**vars(options) | {"blank_images": False, "shuffle_images": False})
    metrics, predictions = (run / f"{file_prefix(own)}{name}" for name in ("metrics.json", "predictions.jsonl"))
    if metrics.exists() and predictions.exists():
        settings = read_json(metrics, {}, "delete it").get("scored")
        if settings == scoring_settings(run, options, accelerator):
            return read_scores(predictions, data.items.ids, examples)[0]
    scores, yes_scores = score_run(run, config, data, examples, own, accelerator)
    return yes_scores if scores is None else scores


def slicings_of(configs: dict[Path, dict], data: DataFolder, examples: list[Example], sequences, options) -> Slicings:
    """Return the slices of the examples, by the item vectors of the first run's encoding."""
    backbone = next((config["options"]["model"] for config in configs.values()), None)
    vectors = Encoding(data, backbone, blank_images=True, trust=options.trust_remote_code).tokens.vectors
    text, image = vectors["text"].float(), vectors["image"].float()
    fused = hanorec_loss.fuse_item_vectors(text, image).numpy()
    popularity = interaction_counts(sequences, len(data.items))
    return make_slicings(examples, popularity, text.numpy(), image.numpy(), fused)


@one_line_errors
def main(argv: list[str] | None = None) -> dict[str, Result] | None:
    """Run the script. Returns the rows of the table by name, on the main process; None with --user."""
    options, configs, folder, groups = checked_options(argv)
    accelerator = start_accelerator()
    data = open_data(folder, options.split)
    if options.user:
        recommend(options, configs, data, accelerator)
        return None
    examples = data.examples(options.split, options.limit)
    others = {str(path): read_scores(path, data.items.ids, examples) for path in options.scores}
    ceilings = ceiling_scores(data, options.split, examples)
    scored = score_runs(options, configs, data, examples, accelerator)
    targets, changes = target_columns(examples), {}
    if options.blank_images or options.shuffle_images:
        for run, config in configs.items():
            own = true_scores(run, config, data, examples, options, accelerator)
            changes[run] = rank_changes(scored[run][0], own, targets)
    if not accelerator.is_main_process:
        return None

    sequences = [*data.sequences().values()]
    slicings = slicings_of(configs, data, examples, sequences, options) if options.slices else {}

    def measured(scores, yes_scores, slicings):
        # a system with one kind of scores gets its AUC and GAUC from them
        yes_scores = scores if yes_scores is None else yes_scores
        return measure_slices(scores, yes_scores, targets, slicings, options.seed)

    by_run = {run: measure_slices(*scores, targets, slicings, options.seed) for run, scores in scored.items()}
    rows = {name: [by_run[run] for run in runs.values()] for name, runs in groups.items()}
    rows |= {name: [measured(*scores, slicings)] for name, scores in others.items()}
    results = {name: pool(row, options.seed) for name, row in rows.items()}
    results |= {name: measured(*scores, {}) for name, scores in ceilings.items()}
    for name, seeds in trained_scores(data, options.split, examples).items():
        results[name] = pool([measured(scores, None, {}) for scores in seeds], options.seed)
    for name, scores in baseline_scores(sequences, len(data.items), examples).items():
        results[name] = measured(scores, None, {})
    reference = reference_group(groups, options.compare) if options.compare else None
    compared = differences(rows, reference, options.seed) if reference else {}

    line = protocol(data, examples, options)
    print(f"\n{printable(line)}; each value with its 95% bootstrap interval\n\n{tables(results)}")
    if compared:
        print(f"\n{tables(compared, f'minus {reference}')}")
    for run, result in by_run.items():
        metrics = {"protocol": line, "scored": scoring_settings(run, options, accelerator), **result.summary()}
        if run in changes:
            metrics["rank_changes"] = changes[run]
            print(f"\n{run}: {changes[run]:.1%} of the targets have another rank than with the items' own images")
        if str(run) in compared:
            metrics[f"minus {reference}"] = compared[str(run)].summary()
        write_json(run / f"{file_prefix(options)}metrics.json", metrics)
    return results | {f"{name} minus {reference}": difference for name, difference in compared.items()}


if __name__ == "__main__":
    main()
