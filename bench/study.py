"""Train each arm of a study with several seeds, evaluate them, and write the tables into docs/results.md.

    python bench/study.py demo                                    # every arm and seed, then the tables
    python bench/study.py movielens-small --seeds 1 2 3 --cores 0 # three seeds, on core 0 alone

Each run has a core of its own. A finished run is not trained again, and an interrupted one continues. The output of a
run is in runs/<study>/<arm>-<seed>.log. Validation chooses the weights; the test split is evaluated once, at the end.
"""

import argparse
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
from hanorec.ranking.markdown import cell, markdown  # noqa: E402
from hanorec.ranking.metrics import Result  # noqa: E402
from hanorec.ranking.pooling import group_name  # noqa: E402
from hanorec.run.files import replacing  # noqa: E402

# The arms: label, script, options, the arm whose run it starts from
ARMS = {
    "sft": ("SFT", "sft.py", "", None),
    "titles": ("SFT without posters", "sft.py", "--blank-images", None),
    "plain": ("SFT, then plain DPO", "dpo_hano.py", "--hardness none --responsiveness none --sigma 0", "sft"),
    "hanorec": ("SFT, then HaNoRec", "dpo_hano.py", "", "sft"),
}
SHUFFLED = "SFT, posters shuffled at evaluation"
# The studies: how the data are prepared, further options of each script and of the arm hanorec, splits to evaluate
STUDIES = {
    "demo": {
        "prepare": "",
        "sft.py": "",
        "dpo_hano.py": "",
        "hanorec": "--sigma 0.05",
        "splits": ["test", "test_hard"],
    },
    "movielens-small": {
        "prepare": "--dataset movielens --source movielens-small/ --out data/movielens-small --history 20 "
        "--max-windows-per-user 0 --max-pixels 784 --further-tests popularity 99",
        "sft.py": "--warmup-steps 4000 --dropout 0 --lr 3e-4 --max-steps 1500 --eval-limit 0",
        "dpo_hano.py": "--max-steps 200 --eval-limit 0",
        "hanorec": "--sigma 0.1",
        "splits": ["test", "test_popularity"],
    },
}
COLUMNS = ("AUC", "HR@1", "HR@3", "NDCG@3", "MRR")


def run_folder(study: str, arm: str, seed: int) -> str:
    """Return the run folder of an arm and a seed."""
    return f"runs/{study}/{arm}-{seed}"


def training_command(study: str, arm: str, seed: int) -> list[str]:
    """Return the command that trains an arm, without `python`."""
    _, script, options, start = ARMS[arm]
    given = ["--sft", run_folder(study, start, seed)] if start else ["--data", f"data/{study}"]
    further = STUDIES[study].get(arm, "")
    words = f"{STUDIES[study][script]} {options} {further} --seed {seed}".split()
    return [script, *given, "--out", run_folder(study, arm, seed), *words]


def prepare_command(study: str) -> list[str]:
    """Return the command that prepares the data, without `python`."""
    return ["prepare_data.py", *STUDIES[study]["prepare"].split()]


def sasrec_command(study: str, seed: int) -> list[str]:
    """Return the command that trains SASRec, without `python`."""
    folder = f"data/{study}"
    return ["-m", "hanorec.ranking.sasrec", "--data", folder, "--out", f"{folder}/sasrec-{seed}", "--seed", str(seed)]


def run(command: list[str], core: int, log: Path) -> None:
    """Run a command on one core. Its output goes to `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pinned = ["taskset", "-c", str(core)] if hasattr(os, "sched_setaffinity") else []
    began = time.monotonic()
    with open(log, "a") as file:
        done = subprocess.run([*pinned, sys.executable, *command], env=environment, stdout=file, stderr=file, cwd=ROOT)
    print(f"{time.monotonic() - began:5.0f} s  python {' '.join(command)}", flush=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(command)} failed; see {log}")


def train(study: str, seeds: list[int], cores: list[int]) -> None:
    """Prepare the data and train what is not finished. Arms that start from another arm's run come after it."""
    logs = ROOT / "runs" / study
    logs.mkdir(parents=True, exist_ok=True)
    data = ROOT / "data" / study
    if not (data / "manifest.json").exists():
        run(prepare_command(study), cores[0], logs / "data.log")
    for seed in seeds:
        if not (data / f"sasrec-{seed}" / "config.json").exists():
            run(sasrec_command(study, seed), cores[0], logs / "sasrec.log")
    free = queue.SimpleQueue()
    for core in cores:
        free.put(core)

    def train_arms(arms: list[str], seed: int) -> None:
        core = free.get()
        try:
            for arm in arms:
                folder = ROOT / run_folder(study, arm, seed)
                if not (folder / "result.json").exists():
                    run(training_command(study, arm, seed), core, logs / f"{arm}-{seed}.log")
        finally:
            free.put(core)

    first = [[arm, *(later for later in ARMS if ARMS[later][3] == arm)] for arm in ARMS if not ARMS[arm][3]]
    with ThreadPoolExecutor(len(cores)) as pool:
        jobs = [pool.submit(train_arms, arms, seed) for seed in seeds for arms in first]
        for job in jobs:
            job.result()


def measured(study: str, seeds: list[int], split: str) -> tuple[dict[str, Result], dict[str, Result]]:
    """Evaluate the arms. Returns (results by label, differences to SFT by label)."""
    folders = {arm: [run_folder(study, arm, seed) for seed in seeds] for arm in ARMS}
    everything = [folder for runs in folders.values() for folder in runs]
    found = evaluate.main(["--run", *everything, "--split", split, "--pool", "--compare", *folders["sft"]])
    images = {}
    if split == "test":
        images = evaluate.main(["--run", *folders["sft"], "--pool", "--shuffle-images"])
    group = {arm: group_name(runs) for arm, runs in folders.items()}
    sasrec = next(name for name in found if name.startswith("SASRec"))
    beside = ("ceiling", "ceiling, titles", sasrec, "co-occurrence", "popularity", "chance")
    results = {name: found[name] for name in beside if name in found}
    results |= {ARMS[arm][0]: found[group[arm]] for arm in ARMS}
    results |= {SHUFFLED: images[group["sft"]]} if images else {}
    minus = {ARMS[arm][0]: found[f"{group[arm]} minus {group['sft']}"] for arm in ARMS if arm != "sft"}
    return results, minus


def table(results: dict[str, Result], corner: str) -> str:
    """Return a Markdown table: value, standard deviation over seeds, 95% interval."""
    rows = [[name, *(cell(result, metric) for metric in COLUMNS)] for name, result in results.items()]
    return markdown([[corner, *COLUMNS], *rows])


def section(study: str, seeds: list[int]) -> str:
    """Evaluate the arms on every split, and return the study's section of docs/results.md."""
    commands = [prepare_command(study), sasrec_command(study, seeds[0])]
    commands += [training_command(study, arm, seeds[0]) for arm in ARMS]
    folders = [run_folder(study, arm, seeds[0]) for arm in ARMS]
    commands.append(["evaluate.py", "--run", *folders, "--compare", folders[0]])
    texts = ["```", *(f"python {' '.join(command)}" for command in commands), "```", ""]
    texts += [f"Seeds {', '.join(map(str, seeds))}: the same commands with other numbers, in one: `--pool`.", ""]
    for split in STUDIES[study]["splits"]:
        results, minus = measured(study, seeds, split)
        examples = results["chance"].examples
        texts += [table(results, f"{split}, {examples} users"), "", table(minus, f"{split}, minus SFT"), ""]
    return "\n".join(texts)


def write_section(path: Path, study: str, text: str) -> None:
    """Replace what stands between the two marks of the study in a document."""
    start, end = f"<!-- study {study} -->\n", f"<!-- end of study {study} -->\n"
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    if not after and not rest.endswith(end):
        raise ValueError(f"{path} lacks the marks of the study {study}")
    with replacing(path) as new:
        new.write_text(f"{before}{start}{text}{end}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    parser.add_argument("--cores", type=int, nargs="+", default=cores, help="cores to use (default: all)")
    parser.add_argument("--train-only", action="store_true", help="write no tables")
    options = parser.parse_args(argv)
    if len(options.seeds) < 2:
        parser.error("--seeds: give two or more")
    os.chdir(ROOT)
    train(options.study, options.seeds, options.cores)
    if not options.train_only:
        write_section(ROOT / "docs" / "results.md", options.study, section(options.study, options.seeds))


if __name__ == "__main__":
    main()
