"""Rank candidates with trained models, and print AUC, GAUC, HR@K, NDCG@K and MRR beside those of simple baselines.

    python evaluate.py                                                    # the demo's runs, side by side
    python evaluate.py --run runs/ml-1m/sft runs/ml-1m/dpo_hano           # writes metrics.json, predictions.jsonl there
    python evaluate.py --run runs/ml-1m/dpo_hano --compare runs/ml-1m/sft # paired bootstrap of the difference
    python evaluate.py --data data/ml-1m --scores other.jsonl             # another system's scores, same candidates
    python evaluate.py --run runs/demo/sft --user user007 --top-k 5       # recommendations by name

HR, NDCG and MRR rank by the log-likelihood of each candidate's title after one shared prompt. AUC and GAUC use
log p(Yes) - log p(No), which also ranks if a run was not trained on titles. No text is sampled or parsed. Each metric
has a bootstrap interval.
"""

import argparse
from pathlib import Path

from hanorec.run.files import UserError, one_line_errors, printable, write_json
from hanorec.run.options import DTYPE, TRUST, Option, Parser, non_negative_int, positive_int
from hanorec.run.runs import read_run

DEMO_RUNS = (Path("runs/demo/sft"), Path("runs/demo/dpo_hano"))
RECBOLE_HELP = "write the examples and the first run's scores of all candidates as RecBole's files"
OPTIONS = {
    "": [
        Option("--run", Path, [], "run folders", nargs="+", shown="those in runs/demo"),
        Option("--data", Path, None, "data folder; needed for --scores without --run"),
        Option("--split", ["val", "test"], "test", "the split to evaluate"),
        Option("--limit", non_negative_int, 0, "maximum number of examples, the first ones; 0: all"),
        Option("--blank-images", bool, False, "replace every image by a neutral one"),
        Option("--images", ["stored", "live"], None, "read image tokens, or compute them", shown="as in training"),
        Option(
            "--compare",
            Path,
            None,
            "also print the difference of every other run and system to this run",
            metavar="RUN",
        ),
        Option("--scores", Path, [], "predictions.jsonl of other systems", nargs="+"),
        Option("--export-recbole", Path, None, RECBOLE_HELP, metavar="DIR"),
        Option("--batch-size", positive_int, 0, "number of examples in a batch", shown="2; tiny: 16"),
        DTYPE,
        Option("--no-pack", bool, False, "compute each answer in a forward of its own", shown="as in training"),
        Option("--seed", non_negative_int, 0, "seed of the bootstrap"),
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
    if options.user and (options.scores or options.compare or options.export_recbole):
        parser.error("--user prints recommendations; do not give --scores, --compare or --export-recbole")
    return options


@one_line_errors
def checked_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[Path, dict], Path]:
    """Parse the options and read the runs. Returns (options, config of each run, data folder of all runs)."""
    options = parse(argv)
    runs = options.run or [run for run in DEMO_RUNS if run.exists() and not options.scores]
    if not runs and not options.scores:
        raise UserError("no --run given and no runs/demo here; run sft.py first")
    if options.compare:
        runs = [*runs, options.compare]
    configs = {run: read_run(run) for run in runs}
    named = [options.data, *(Path(config["options"]["data"]) for config in configs.values())]
    folders = {folder.resolve(): folder for folder in named if folder}
    if not folders:
        raise UserError("--scores without --run needs --data, the folder whose candidates were scored")
    if len(folders) > 1:
        names = " and ".join(map(str, folders.values()))
        raise UserError(f"one data folder at a time, not {names}; give --run with runs of one, and leave out --data")
    return options, configs, folders.popitem()[1]


if __name__ == "__main__":
    checked_options()  # --help and mistakes are answered before the slow imports

from hanorec.data.folder import DataFolder, Example
from hanorec.model.check import load_packed
from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.load import pick_dtype
from hanorec.ranking.baselines import baseline_scores
from hanorec.ranking.exchange import read_scores, write_predictions, write_recbole
from hanorec.ranking.metrics import Result, measure, tables
from hanorec.ranking.recommending import examples_of_user, print_recommendations
from hanorec.ranking.sasrec import trained_scores
from hanorec.ranking.scoring import score_examples, target_columns
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
    """Return the prefix for the names of metrics.json and predictions.jsonl, empty for the complete test split
    with its images.
    """
    prefix = "" if options.split == "test" else f"{options.split}_"
    prefix += "blank_" if options.blank_images else ""
    return prefix + (f"first{options.limit}_" if options.limit else "")


def protocol(data: DataFolder, examples: list[Example], options: argparse.Namespace) -> str:
    """Describe the data and the protocol of the results in one line."""
    prepared = data.manifest["options"]
    text = f"{data.folder}: {options.split} ({prepared['split']}), {len(examples)} examples, "
    text += f"{len(examples[0].candidates)} candidates, {prepared['negative_sampling']} negatives, "
    return text + f"seed {prepared['seed']}" + (", blank images" if options.blank_images else "")


def recommend(options: argparse.Namespace, configs: dict[Path, dict], data: DataFolder, accelerator) -> None:
    """Print the recommendations of each run for the user of --user."""
    examples = examples_of_user(options.user, options.among, data, options.split)
    for run, config in configs.items():
        scores, yes_scores = score_run(run, config, data, examples, options, accelerator)
        unit = "log p(Yes) - log p(No)" if scores is None else "log-likelihood"
        ranked = yes_scores if scores is None else scores
        if accelerator.is_main_process:
            print_recommendations(str(run), data, examples[0], ranked[0], options.top_k, unit)


def measure_runs(options, configs: dict[Path, dict], data: DataFolder, examples: list[Example], accelerator):
    """Score each run and write its predictions.jsonl; for the first run also --export-recbole. Returns the results."""
    results = {}
    targets = target_columns(examples)
    for run, config in configs.items():
        scores, yes_scores = score_run(run, config, data, examples, options, accelerator)
        ranked = yes_scores if scores is None else scores
        results[str(run)] = measure(ranked, yes_scores, targets, options.seed)
        if accelerator.is_main_process:
            path = run / f"{file_prefix(options)}predictions.jsonl"
            write_predictions(path, data.items.ids, examples, scores, yes_scores)
            if options.export_recbole and run == next(iter(configs)):
                splits = {split: data.examples(split) for split in ("train", "val", "test")}
                splits["candidates"] = examples
                write_recbole(options.export_recbole, data.items, splits, ranked, data.sequences())
    return results


@one_line_errors
def main(argv: list[str] | None = None) -> dict[str, Result] | None:
    options, configs, folder = checked_options(argv)
    accelerator = start_accelerator()
    data = DataFolder(folder)
    if options.user:
        recommend(options, configs, data, accelerator)
        return None
    examples = data.examples(options.split, options.limit)
    results = measure_runs(options, configs, data, examples, accelerator)
    if not accelerator.is_main_process:
        return None

    targets = target_columns(examples)
    for path in options.scores:
        scores, yes_scores = read_scores(path, data.items.ids, examples)
        # without Yes/No scores, another system's AUC and GAUC are of its only scores
        results[str(path)] = measure(scores, scores if yes_scores is None else yes_scores, targets, options.seed)
    if options.compare:
        compared = results[str(options.compare)]
        differences = {name: result.minus(compared) for name, result in results.items() if result is not compared}
        results |= {f"{name} minus {options.compare}": difference for name, difference in differences.items()}
    baselines = trained_scores(data, options.split, examples) | baseline_scores(data, examples)
    for name, scores in baselines.items():
        results[name] = measure(scores, scores, targets, options.seed)

    line = protocol(data, examples, options)
    print(f"\n{printable(line)}; each value with its 95% bootstrap interval\n\n{tables(results)}")
    for run in configs:
        result = results[str(run)]
        intervals = {name: result.interval(name) for name in result.values}
        metrics = {"protocol": line, "values": result.values, "intervals": intervals}
        write_json(run / f"{file_prefix(options)}metrics.json", metrics)
    return results


if __name__ == "__main__":
    main()
