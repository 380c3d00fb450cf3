"""Rank candidates with trained models, and print AUC, GAUC, HR@K, NDCG@K and MRR beside those of simple baselines.

    python evaluate.py                                                    # the demo's runs; --run runs/x: all inside
    python evaluate.py --run runs/ml-1m/sft runs/ml-1m/dpo_hano           # writes metrics.json, predictions.jsonl there
    python evaluate.py --run runs/ml-1m/dpo_hano --compare runs/ml-1m/sft # paired bootstrap of the difference
    python evaluate.py --run runs/x/sft-1 runs/x/sft-2 --pool             # one row for runs of several seeds
    python evaluate.py --data data/ml-1m --scores other.jsonl             # another system's scores, same candidates
    python evaluate.py --run runs/demo/dpo_hano --compare runs/demo/sft --report   # writes report.html there
    python evaluate.py --run runs/demo/sft --user user007 --top-k 5       # recommendations by name

HR, NDCG and MRR rank by the log-likelihood of each candidate's title after one shared prompt. AUC and GAUC use
log p(Yes) - log p(No), which also ranks if a run was not trained on titles. No text is sampled or parsed. Each metric
has a bootstrap interval. Where the data folder holds exact probabilities, their metrics are the row `ceiling`.
"""

if __name__ == "__main__":
    from hanorec.run import interrupts

    interrupts.stop_at_once()  # before the other imports

import argparse
from pathlib import Path

from hanorec.data.folder import EVALUATED
from hanorec.ranking.pooling import Groups, group_runs, reference_group
from hanorec.run.files import UserError, one_line_errors, printable
from hanorec.run.options import DTYPE, TRUST, Option, Parser, non_negative_int, positive_int
from hanorec.run.runs import expand_runs, next_command, read_run

DEMO_RUNS = (Path("runs/demo/sft"), Path("runs/demo/dpo_hano"))
SPLIT_HELP = "the split to evaluate; test_...: the targets of test among other candidates, if the data folder has them"
COMPARE_HELP = "also print other runs and systems minus this run; with --pool, minus the group that these runs form"
ALIGNMENT_HELP = "also print how alike the model holds each item's title and image, before and after the training"
REPORT_HELP = "write report.html into the run, a page to look at; of several runs: into FILE"
RECBOLE_HELP = "write the examples and the first run's scores of all candidates as RecBole's files"
OPTIONS = {
    "": [
        Option("--run", Path, [], "run folders, or folders of runs", nargs="+", shown="the demo's two"),
        Option("--data", Path, None, "data folder: its runs are evaluated, or only --scores"),
        Option("--split", [*EVALUATED], "test", SPLIT_HELP),
        Option("--limit", non_negative_int, 0, "maximum number of examples, the first ones; 0: all"),
        Option("--blank-images", bool, False, "replace every image by a neutral one"),
        Option("--shuffle-images", bool, False, "give every item the image of another item of like popularity"),
        Option("--images", ["stored", "live"], None, "read image tokens, or compute them", shown="as in training"),
        Option("--compare", Path, [], COMPARE_HELP, nargs="+", metavar="RUN"),
        Option("--pool", bool, False, "one row for runs that differ in nothing but --seed"),
        Option("--slices", bool, False, "also print the metrics of parts of the examples"),
        Option("--alignment", bool, False, ALIGNMENT_HELP),
        Option("--report", Path, None, REPORT_HELP, nargs="?", const=True, metavar="FILE"),
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
    if isinstance(options.report, Path) and options.report.is_dir():
        parser.error(
            f"--report: {options.report} is a folder; give the file to write, such as {options.report}/report.html"
        )
    for_metrics = ("pool", "slices", "alignment", "report", "scores", "compare", "export_recbole")
    if options.user and any(getattr(options, name) for name in for_metrics):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in for_metrics)
        parser.error(f"--user prints recommendations; do not give {names}")
    return options


@one_line_errors
def checked_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict, Path, Groups, str | None]:
    """Parse the options and read the runs.

    Returns (options, config of each run, data folder of all runs, groups of runs that become one row of the results,
    the name of the row to compare with or None). Without --compare and --pool, a report compares with its first run.
    """
    options = parse(argv)
    runs = [] if options.scores and not options.run else expand_runs(options.run, options.data, DEMO_RUNS)
    configs = {run: read_run(run) for run in [*runs, *options.compare]}
    # Without --pool each run is a group of its own, under the same seed 0, so that any two can be paired
    groups = group_runs(configs) if options.pool else {str(run): {(0,): run} for run in configs}
    if options.compare:
        reference = reference_group(groups, options.compare)
    else:
        reference = next(iter(groups), None) if options.report and not options.pool else None
    if options.report is True and len(runs) != 1:
        raise UserError("--report of several runs, or of none, needs a file: --report FILE")
    named = [options.data, *(Path(config["options"]["data"]) for config in configs.values())]
    folders = {folder.resolve(): folder for folder in named if folder}
    if not folders:
        raise UserError("--scores without --run needs --data, the folder whose candidates were scored")
    if len(folders) > 1:
        names = " and ".join(map(str, folders.values()))
        raise UserError(f"one data folder at a time, not {names}; give --run with runs of one, and leave out --data")
    return options, configs, folders.popitem()[1], groups, reference


if __name__ == "__main__":
    checked_options()  # --help and mistakes are answered before the slow imports

import hanorec_loss
from hanorec.data.folder import DataFolder, Example
from hanorec.model.encoding import Encoding
from hanorec.ranking.alignment import alignment_table, measure_alignment
from hanorec.ranking.baselines import interaction_counts
from hanorec.ranking.by_title import examples_of_user, print_recommendations
from hanorec.ranking.ceiling import ceiling_scores
from hanorec.ranking.exchange import read_scores, write_predictions, write_recbole
from hanorec.ranking.gallery import System
from hanorec.ranking.metrics import Result, rank_changes
from hanorec.ranking.report import write_report
from hanorec.ranking.results import file_prefix, measure_all, write_results
from hanorec.ranking.scoring import target_columns
from hanorec.ranking.slices import Slicings, make_slicings
from hanorec.run.launch import start_accelerator
from mllm_srec.chain_of_thought import load_texts
from mllm_srec.scored_runs import score_run, scoring_settings, true_scores


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
        scores, _ = score_run(run, config, data, examples, options, accelerator)
        unit = "log-likelihood" if "rank" in config["options"]["tasks"] else "log p(Yes) - log p(No)"
        if accelerator.is_main_process:
            print_recommendations(str(run), data, examples[0], scores[0], options.top_k, unit)


def score_runs(options, configs: dict[Path, dict], data: DataFolder, examples: list[Example], accelerator):
    """Score each run and write its predictions.jsonl; for the first run also --export-recbole.

    Returns (scores that rank, Yes/No scores or None) of each run.
    """
    scored = {}
    for run, config in configs.items():
        scored[run] = score_run(run, config, data, examples, options, accelerator)
        if accelerator.is_main_process:
            prefix = file_prefix(options)
            (run / f"{prefix}metrics.json").unlink(missing_ok=True)  # those of other predictions
            write_predictions(run / f"{prefix}predictions.jsonl", data.items.ids, examples, *scored[run])
            if options.export_recbole and run == next(iter(configs)):
                splits = {split: data.examples(split) for split in ("train", "val", "test")}
                splits["candidates"] = examples
                write_recbole(options.export_recbole, data.items, splits, scored[run][0], data.sequences())
    return scored


def slicings_of(configs: dict[Path, dict], data: DataFolder, examples: list[Example], options) -> Slicings:
    """Return the slices of the examples, by the item vectors of the first run's encoding."""
    backbone = next((config["options"]["model"] for config in configs.values()), None)
    vectors = Encoding(data, backbone, blank_images=True, trust=options.trust_remote_code).tokens.vectors
    text, image = vectors["text"].float(), vectors["image"].float()
    fused = hanorec_loss.fuse_item_vectors(text, image).numpy()
    popularity = interaction_counts([*data.sequences().values()], len(data.items))
    return make_slicings(examples, popularity, text.numpy(), image.numpy(), fused)


def report(results, groups: Groups, configs, scored, others, data: DataFolder, examples, slicings, options) -> None:
    """Write the report. Its gallery shows the run of the first seed of each group, and the systems of --scores."""
    order = sorted(groups, key=lambda name: name != results.reference)  # the reference first
    systems = []
    for name in order:
        run = next(iter(groups[name].values()))
        trained = configs[run]["options"]
        texts = load_texts(data, trained["model"], trained.get("summaries"), options.trust_remote_code)
        systems.append(System(name, scored[run][0], texts, str(run) if name != str(run) else ""))
    systems += [System(name, scores) for name, (scores, _) in others.items()]
    path = next(iter(configs)) / f"{file_prefix(options)}report.html" if options.report is True else options.report
    configs = {run: configs[run] for name in order for run in groups[name].values()}
    write_report(path, results, systems, configs, data, examples, slicings, options)
    print(f"\n{path}: open it in a browser")


@one_line_errors
def main(argv: list[str] | None = None) -> dict[str, Result] | None:
    """Run the script. Returns the rows of the table by name, on the main process; None with --user."""
    options, configs, folder, groups, reference = checked_options(argv)
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
    aligned = {}
    if options.alignment:
        aligned = measure_alignment(configs, scored, ceilings, data, examples, options, accelerator)

    slicings = slicings_of(configs, data, examples, options) if options.slices or options.report else {}
    results = measure_all(scored, others, ceilings, groups, reference, data, examples, slicings, options)
    print(f"\n{results.text(options.slices)}")
    if aligned:
        print(f"\n{alignment_table(aligned)}")
    for run in configs:
        fields = {"scored": scoring_settings(run, options, accelerator)}
        if run in changes:
            fields["rank_changes"] = changes[run]
            print(f"\n{run}: {changes[run]:.1%} of the targets have another rank than with the items' own images")
        if aligned:
            fields["alignment"] = aligned[run]
        write_results(run, results, fields, file_prefix(options))
    if options.report:
        report(results, groups, configs, scored, others, data, examples, slicings, options)
    for run in [run for run in scored if run not in options.compare][-1:]:
        print("\nnext:", printable(next_command("evaluate", argparse.Namespace(run=run, user=examples[0].user))))
    return results.table | {f"{name} minus {reference}": difference for name, difference in results.differences.items()}


if __name__ == "__main__":
    main()
