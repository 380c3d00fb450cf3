"""Train each arm of a study with several seeds, evaluate them, and write the tables into docs/results.md.

    python bench/study.py demo                                    # every arm and seed, then the tables
    python bench/study.py movielens-small --seeds 1 2 3 --cores 0 # three seeds, on core 0 alone
    python bench/study.py demo --grid                             # learning rates and betas of each family, one seed
    python bench/study.py demo --tables                           # the tables alone, of what is finished

The arms are in arms.py. Each run has a core of its own. A finished run is not trained again, and an interrupted one
continues. The output of a run is in runs/<study>/<arm>-<seed>.log. Validation alone chooses the weights and the
recipes; each run is evaluated on the test splits once it is trained.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import tables  # noqa: E402
from arms import STUDIES, Study  # noqa: E402

import dpo_hano  # noqa: E402
import evaluate  # noqa: E402
import sft  # noqa: E402
from hanorec.run.files import read_json  # noqa: E402
from hanorec.run.runs import json_options  # noqa: E402

SCRIPTS = {"sft.py": sft, "dpo_hano.py": dpo_hano}


def training_command(study: Study, arm: str, seed: int) -> list[str]:
    """Return the command that trains an arm, without `python`."""
    found, out = study.arms[arm], study.run_folder(arm, seed)
    start = ["--data", f"data/{study.name}"]
    if found.script == "dpo_hano.py":
        start = ["--sft", study.run_folder("sft", seed)]
    words = f"{study.options[found.script]} {study.recipes.get(found.family, '')} {found.options} --seed {seed}"
    return [found.script, *start, "--out", out, *words.split()]


def grid_command(study: Study, family: str, recipe: str) -> list[str]:
    """Return the command that trains a family's first arm with another recipe, with seed 1, validated on all users."""
    arm = next(arm for arm in study.arms.values() if arm.family == family)
    words = f"{study.options[arm.script]} --eval-limit 0 {recipe} {arm.options} --seed 1".split()
    return [arm.script, "--sft", study.run_folder("sft", 1), "--out", study.grid_folder(family, recipe), *words]


def prepare_command(study: Study) -> list[str]:
    """Return the command that prepares the data, without `python`."""
    return ["prepare_data.py", *study.prepare.split()]


def sasrec_command(study: Study, seed: int) -> list[str]:
    """Return the command that trains SASRec, without `python`."""
    folder = f"data/{study.name}"
    return ["-m", "hanorec.ranking.sasrec", "--data", folder, "--out", f"{folder}/sasrec-{seed}", "--seed", str(seed)]


def finished(command: list[str]) -> bool:
    """Return whether the run of a training command is finished. ValueError if it was trained with other options."""
    script, *words = command
    options = json_options(SCRIPTS[script].parse(words))
    out = ROOT / options["out"]
    if not (out / "result.json").exists():
        return False
    before = read_json(out / "config.json", {"options": dict}, f"delete {out}")["options"]
    given = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    given -= {"data", "sft", "out"}  # folders, which may have been moved
    changed = sorted(name for name in given if options[name] != before.get(name))
    if changed:
        raise ValueError(f"{out} was trained with another {', '.join(changed)}; delete it")
    return True


def train_and_evaluate(command: list[str], splits: list[str]) -> None:
    """Run a training command in this process if its run is not finished. Then evaluate the run on these splits."""
    script, *words = command
    if not finished(command):
        SCRIPTS[script].main(words)
    run = Path(words[words.index("--out") + 1])
    for split in splits:
        if not (run / tables.predictions_name(split)).exists():
            evaluate.main(["--run", str(run), "--split", split])


def run(command: list[str], core: int, log: Path) -> None:
    """Run a command on one core. Its output goes to `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pinned = ["taskset", "-c", str(core)] if shutil.which("taskset") else []
    began = time.monotonic()
    with open(log, "a") as file:
        done = subprocess.run([*pinned, sys.executable, *command], env=environment, stdout=file, stderr=file, cwd=ROOT)
    print(f"{time.monotonic() - began:5.0f} s  python {' '.join(command)}", flush=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(command)} failed; see {log}")


def jobs_of(study: Study, seeds: list[int], grid: bool) -> list[list[tuple[str, list[str], list[str]]]]:
    """Return the phases of a study. The jobs of a phase, (name, training command, splits), may run side by side."""
    arms = {
        arm: [(f"{arm}-{seed}", training_command(study, arm, seed), study.splits) for seed in seeds]
        for arm in study.arms
    }
    first = [job for arm, jobs in arms.items() if study.arms[arm].script == "sft.py" for job in jobs]
    if grid:
        recipes = [(family, recipe) for family in study.grid for recipe in study.grid[family]]
        names = [study.grid_folder(family, recipe).rpartition("/")[2] for family, recipe in recipes]
        commands = [grid_command(study, family, recipe) for family, recipe in recipes]
        return [
            [("sft-1", training_command(study, "sft", 1), [])],
            [(name, command, []) for name, command in zip(names, commands, strict=True)],
        ]
    later = [jobs for arm, jobs in arms.items() if study.arms[arm].script != "sft.py"]
    return [first, [job for jobs in zip(*later, strict=True) for job in jobs]]  # all arms of a seed, then the next seed


def train(study: Study, seeds: list[int], cores: list[int], grid: bool = False) -> None:
    """Prepare the data, and train and evaluate what is not finished."""
    logs, data = ROOT / "runs" / study.name, ROOT / "data" / study.name
    logs.mkdir(parents=True, exist_ok=True)
    if not (data / "manifest.json").exists():
        run(prepare_command(study), cores[0], logs / "data.log")
    for seed in seeds:
        if not (data / f"sasrec-{seed}" / "config.json").exists():
            run(sasrec_command(study, seed), cores[0], logs / "sasrec.log")
    free = queue.SimpleQueue()
    for core in cores:
        free.put(core)

    def run_job(name: str, command: list[str], splits: list[str]) -> None:
        wanted = [
            split
            for split in splits
            if not (ROOT / command[command.index("--out") + 1] / tables.predictions_name(split)).exists()
        ]
        if finished(command) and not wanted:
            return
        core = free.get()
        try:
            run(
                ["bench/study.py", study.name, "--job", " ".join(command), "--splits", *splits],
                core,
                logs / f"{name}.log",
            )
        finally:
            free.put(core)

    for phase in jobs_of(study, seeds, grid):
        with ThreadPoolExecutor(len(cores)) as pool:
            for job in [pool.submit(run_job, *job) for job in phase]:
                job.result()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the study")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    parser.add_argument("--cores", type=int, nargs="+", default=cores, help="cores to use (default: all)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="train these arms only, in this order (default: all)")
    parser.add_argument("--grid", action="store_true", help="train the recipes of each family instead")
    parser.add_argument("--train-only", action="store_true", help="write no tables")
    parser.add_argument("--tables", action="store_true", help="train nothing, write the tables")
    parser.add_argument("--job", help="train and evaluate one run in this process; the study starts such processes")
    parser.add_argument("--splits", nargs="*", default=[], help="splits of --job")
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    study = STUDIES[options.study]
    seeds = options.seeds or study.seeds
    if options.job:
        train_and_evaluate(options.job.split(), options.splits)
        return
    if len(set(seeds)) < max(2, len(seeds)):
        parser.error("--seeds: give two or more, each once")
    if options.grid and (options.arms or options.seeds):
        parser.error("--grid trains every family with seed 1; do not give --arms or --seeds")
    if unknown := set(options.arms or []) - set(study.arms):
        parser.error(f"--arms: {', '.join(sorted(unknown))} is no arm of {study.name}; it has {', '.join(study.arms)}")
    tables.check_marks(study.name)
    if not options.tables:
        chosen = {arm: study.arms[arm] for arm in options.arms or study.arms}
        train(replace(study, arms=chosen), seeds, options.cores, options.grid)
    if not options.train_only:
        before = [prepare_command(study), sasrec_command(study, seeds[0])]
        tables.write(study, seeds, before, {arm: training_command(study, arm, seeds[0]) for arm in study.arms})


if __name__ == "__main__":
    main()
