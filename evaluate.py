"""Rank candidates by log-likelihood; AUC, GAUC, HR@K, NDCG@K, MRR with intervals, beside simple baselines.

    python evaluate.py                                                    # the demo's runs, side by side
    python evaluate.py --run runs/ml-1m/sft runs/ml-1m/dpo_hano           # writes metrics.json, predictions.jsonl there
    python evaluate.py --run runs/ml-1m/dpo_hano --compare runs/ml-1m/sft # paired bootstrap of the difference
    python evaluate.py --data data/ml-1m --scores other.jsonl             # another system's scores, same candidates
    python evaluate.py --run runs/demo/sft --user user007 --top-k 5       # recommendations by name

Every candidate's title is scored behind one prompt; Yes/No by log p(Yes) - log p(No). Nothing is sampled or parsed.
"""

import argparse
from pathlib import Path

from hanorec.run.files import UserError, one_line_errors, printable, write_json
from hanorec.run.options import DTYPE, TRUST, Option, Parser, non_negative_int, positive_int
from hanorec.run.runs import read_run

DEMO_RUNS = (Path("runs/demo/sft"), Path("runs/demo/dpo_hano"))
RECBOLE_HELP = "RecBole's files of the same examples, and the first run's scores of all candidates"
OPTIONS = {
    "": [
        Option("--run", Path, [], "run folders", nargs="+", shown="those of runs/demo"),
        Option("--data", Path, None, "data folder, if no run names it (--scores)"),
        Option("--split", ["val", "test"], "test", "which examples"),
        Option("--limit", non_negative_int, 0, "only the first examples; 0: all"),
        Option("--blank-images", bool, False, "replace every image by a neutral one"),
        Option("--images", ["stored", "live"], None, "image tokens read, or computed", shown="as in training"),
        Option("--compare", Path, None, "also the difference of each --run to this one", metavar="RUN"),
        Option("--scores", Path, [], "other systems' predictions.jsonl", nargs="+"),
        Option("--export-recbole", Path, None, RECBOLE_HELP, metavar="DIR"),
        Option("--batch-size", positive_int, 0, "examples at once", shown="2; tiny: 16"),
        DTYPE,
        Option("--no-pack", bool, False, "one plain forward for each answer", shown="as the run was trained"),
        Option("--seed", non_negative_int, 0, "of the bootstrap"),
        TRUST,
    ],
    "recommendations": [
        Option("--user", str, None, "print this user's recommendations instead of metrics"),
        Option("--top-k", positive_int, 10, "how many of them"),
        Option("--from", str, None, "among these items", shown="the candidates", metavar="ID,ID,...", dest="among"),
    ],
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, OPTIONS)
    options = parser.parse_args(argv)
    if options.among and not options.user:
        parser.error("--from needs --user")
    if options.export_recbole and options.scores and not options.run:
        parser.error("--export-recbole needs --run, whose scores it writes")
    if options.export_recbole and options.limit:
        parser.error("--export-recbole writes whole splits and goes without --limit")
    if options.user and (options.scores or options.compare or options.export_recbole):
        parser.error("--user goes without --scores, --compare and --export-recbole")
    return options


@one_line_errors
def checked_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[Path, dict], Path]:
    """Parse the options. Returns (options, config of each run, the data folder that the runs share)."""
    options = parse(argv)
    runs = options.run or [run for run in DEMO_RUNS if run.exists() and not options.scores]
    if not runs and not options.scores:
        raise UserError("no --run given and no runs/demo here; run sft.py first")
    configs = {run: read_run(run) for run in [*runs, *([options.compare] if options.compare else [])]}
    folders = {config["options"]["data"] for config in configs.values()}
    folders |= {str(options.data)} if options.data else set()
    if not folders:
        raise UserError("--scores without --run needs --data, the folder whose candidates were scored")
    if len(folders) > 1:
        raise UserError(f"one data folder at a time, not {' and '.join(sorted(folders))}; give runs of the same data")
    return options, configs, Path(folders.pop())


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
from hanorec.ranking.scoring import score_examples, target_columns
from hanorec.run.launch import start_accelerator
from mllm_srec.chain_of_thought import load_prompts, training_hash


def score_run(run: Path, config: dict, data: DataFolder, examples: list[Example], options, accelerator):
    """Score the candidates with the model of a finished run.

    Returns (ranking scores, Yes/No scores), each [R, C], or None for a task that the run was not trained on.
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
    return score_examples(packed, encoding, prompts, examples, trained, accelerator, options.batch_size)


def file_prefix(options: argparse.Namespace) -> str:
    """What the names of metrics.json and predictions.jsonl begin with, if they are not of the whole test split."""
    prefix = "" if options.split == "test" else f"{options.split}_"
    prefix += "blank_" if options.blank_images else ""
    return prefix + (f"first{options.limit}_" if options.limit else "")


def protocol(data: DataFolder, examples: list[Example], options: argparse.Namespace) -> str:
    """How the numbers were made, in a line."""
    prepared = data.manifest["options"]
    text = f"{data.folder}: {options.split} ({prepared['split']}), {len(examples)} examples, "
    text += f"{len(examples[0].candidates)} candidates, {prepared['negative_sampling']} negatives, "
    text += f"seed {prepared['seed']}"
    return text + (", blank images" if options.blank_images else "")


def recommend(options: argparse.Namespace, configs: dict[Path, dict], data: DataFolder, accelerator) -> None:
    """--user: print the recommendations of each run."""
    examples = examples_of_user(options.user, options.among, data, options.split)
    for run, config in configs.items():
        scores, yes_scores = score_run(run, config, data, examples, options, accelerator)
        unit = "log p(Yes) - log p(No)" if scores is None else "log-likelihood"
        ranked = yes_scores if scores is None else scores
        if accelerator.is_main_process:
            print_recommendations(str(run), data, examples[0], ranked[0], options.top_k, unit)


def measure_runs(options, configs: dict[Path, dict], data: DataFolder, examples: list[Example], accelerator):
    """Score each run, and write its predictions.jsonl. Returns the results by run."""
    results, prefix, targets = {}, file_prefix(options), target_columns(examples)
    for run, config in configs.items():
        scores, yes_scores = score_run(run, config, data, examples, options, accelerator)
        ranked = yes_scores if scores is None else scores
        results[str(run)] = measure(ranked, yes_scores, targets, options.seed)
        if accelerator.is_main_process:
            write_predictions(run / f"{prefix}predictions.jsonl", data.items.ids, examples, scores, yes_scores)
            if options.export_recbole and run == next(iter(configs)):
                splits = {split: data.examples(split) for split in ("train", "val", "test")}
                write_recbole(options.export_recbole, data.items, splits | {"candidates": examples}, ranked)
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
        results[str(path)] = measure(scores, scores if yes_scores is None else yes_scores, targets, options.seed)
    compared = results.get(str(options.compare))
    for name in list(results) if compared else ():
        if results[name] is not compared:
            results[f"{name} minus {options.compare}"] = results[name].minus(compared)
    for name, scores in baseline_scores(data, examples).items():
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
