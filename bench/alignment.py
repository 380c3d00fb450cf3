"""Print the alignment of titles and images of a study's arms, pooled over seeds.

    python bench/alignment.py demo
    python bench/alignment.py demo --seeds 1 2 3 --arms sft dpo nodo_3

Reads the test predictions of the runs, which bench/study.py left. The numbers are those of `evaluate.py --alignment`.
"""

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import numpy as np  # noqa: E402
from arms import STUDIES  # noqa: E402
from tables import predictions_name  # noqa: E402

from hanorec.data.folder import DataFolder  # noqa: E402
from hanorec.ranking.alignment import METRICS, THIRDS, measure_alignment  # noqa: E402
from hanorec.ranking.ceiling import ceiling_scores  # noqa: E402
from hanorec.ranking.exchange import read_scores  # noqa: E402
from hanorec.ranking.markdown import markdown, short  # noqa: E402
from hanorec.ranking.metrics import STUDENT  # noqa: E402
from hanorec.run.launch import start_accelerator  # noqa: E402
from hanorec.run.runs import read_run  # noqa: E402

ARMS = ["sft", "continued", "softmax", "dpo", "dpo_model", "sdpo9", "sdpo9_turned", "margin", "nodo_3", "absolute_05"]
ARMS += ["embeddings", "dropout", "paper"]


def spread(values: list[float], interval: bool = False) -> str:
    """Return mean and standard deviation over the seeds, and the 95% interval of the mean by Student's t."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return short(mean)
    deviation = float(np.std(values, ddof=1))
    text = f"{short(mean)} ±{short(deviation)}"
    if not interval:
        return text
    half = STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * deviation / len(values) ** 0.5
    return f"{text} [{short(mean - half)}, {short(mean + half)}]"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the study")
    parser.add_argument("--arms", nargs="+", default=ARMS)
    given = parser.parse_args(argv)
    os.chdir(ROOT)
    study, accelerator = STUDIES[given.study], start_accelerator()
    data = DataFolder(ROOT / "data" / study.name)
    examples = data.examples("test")
    ceilings = ceiling_scores(data, "test", examples)
    options = SimpleNamespace(dtype="auto", no_pack=False, images=None, trust_remote_code=False, seed=0)
    found = {arm: {} for arm in given.arms}  # values by seed
    for seed in given.seeds or study.seeds:  # the arms of a seed share their start
        runs = {arm: Path(study.run_folder(arm, seed)) for arm in given.arms}
        runs = {arm: run for arm, run in runs.items() if (run / predictions_name("test")).exists()}
        configs = {run: read_run(run) for run in runs.values()}
        scored = {run: read_scores(run / predictions_name("test"), data.items.ids, examples) for run in configs}
        measured = measure_alignment(configs, scored, ceilings, data, examples, options, accelerator)
        for arm, run in runs.items():
            found[arm][seed] = measured[run]
    header = ["", "seeds", "mean cosine before", "after", "change", "change minus DPO's", "slope of the change"]
    rows = [[*header, *(f"change, {name}" for name in THIRDS), "follows the poster"]]
    paired = {seed: value["change"] for seed, value in found.get("dpo", {}).items()}
    ranked = [
        ["by the third of the target's cosine before", *(f"{metric}, {name}" for metric in METRICS for name in THIRDS)]
    ]
    for arm, by_seed in found.items():
        values, label = [*by_seed.values()], study.arms[arm].label
        if not values:
            continue
        row = [label, str(len(values)), spread([value["mean"] - value["change"] for value in values])]
        row += [spread([value["mean"] for value in values]), spread([value["change"] for value in values], True)]
        minus = [value["change"] - paired[seed] for seed, value in by_seed.items() if seed in paired]
        row.append(spread(minus, True) if minus and arm not in ("sft", "dpo") else "")
        row.append(spread([value["slope"] for value in values], True))
        row += [spread([value["thirds"][name] for value in values]) for name in THIRDS]
        shares = [value["follows_poster"][0] for value in values if "follows_poster" in value]
        rows.append([*row, spread(shares) if shares else "-"])
        cells = [[v[metric][name] for v in values if name in v[metric]] for metric in METRICS for name in THIRDS]
        ranked.append([label, *(spread(cell) if cell else "-" for cell in cells)])
    print(f"{markdown(rows)}\n\n{markdown(ranked)}")


if __name__ == "__main__":
    main()
