"""Runs of several seeds in one row: their interval against loops and simulations, and which runs make a group."""

import json
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from hanorec.ranking import markdown, metrics, pooling
from hanorec.ranking.metrics import Result
from hanorec.run.files import UserError, write_json


def systems(runs, examples=60, candidates=5, seed=0, lift=0.0):
    """Scores of several runs with many ties, and the targets."""
    rng = np.random.default_rng(seed)
    target = np.random.default_rng(99).integers(candidates, size=examples)
    scores = rng.integers(0, 6, (runs, examples, candidates)).astype(float)
    scores[:, np.arange(examples), target] += lift
    return scores, target


def measured(scores, target, resamples=1000):
    return [metrics.measure(own, own, target, resamples=resamples) for own in scores]


def test_the_interval_over_seeds_equals_a_slow_loop():
    """The mean over the runs on drawn examples, plus a normal number of the widened standard error."""
    scores, target = systems(3)
    pooled = metrics.pool(measured(scores, target, 20), 0)
    count = len(target)
    examples = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=20)
    noise = np.random.default_rng([0, 1]).permutation([NormalDist().inv_cdf((n + 0.5) / 20) for n in range(20)])
    whole = {"AUC": [metrics.pooled_auc(own, target)[0] for own in scores]}
    for name in ("HR@3", "NDCG@3", "MRR"):
        whole[name] = [metrics.ranking_metrics(own, target)[name].mean() for own in scores]
    for replicate in range(20):
        drawn = [row for row in range(count) for _ in range(examples[replicate][row])]
        for name, of_runs in whole.items():
            values = []
            for own in scores:
                if name == "AUC":
                    values.append(metrics.pooled_auc(own[drawn], target[drawn])[0])
                else:
                    values.append(metrics.ranking_metrics(own[drawn], target[drawn])[name].mean())
            error = 4.303 / 1.96 * np.std(of_runs, ddof=1) / 3**0.5
            assert pooled.replicates[name][replicate] == pytest.approx(np.mean(values) + error * noise[replicate]), name


def test_mean_and_standard_deviation_over_seeds():
    scores, target = systems(4)
    results = measured(scores, target, 5)
    pooled = metrics.pool(results)
    for name in pooled.values:
        values = [result.values[name] for result in results]
        mean = sum(values) / 4
        assert pooled.values[name] == pytest.approx(mean)
        assert pooled.sd[name] == pytest.approx((sum((value - mean) ** 2 for value in values) / 3) ** 0.5)
    assert metrics.pool(results[:1]) is results[0] and not results[0].sd
    low, high = pooled.interval("MRR")
    assert low < pooled.values["MRR"] < high
    cell = markdown.cell(Result({"MRR": 0.6123}, {"MRR": np.array([0.58, 0.58])}, sd={"MRR": 0.0091}), "MRR")
    assert cell == ".612 ±.009 [.580, .580]"


def coverage(runs, of_runs, of_examples, of_both, trials=300, examples=60):
    """How often the interval of `pool`, and one of the examples alone, holds the true mean 0. The rest: deviations."""
    rng, covered, covered_alone = np.random.default_rng(0), 0, 0
    weights = rng.multinomial(examples, np.full(examples, 1 / examples), size=400) / examples
    for _ in range(trials):
        gains = rng.normal(0, of_examples, examples) + rng.normal(0, of_runs, (runs, 1))
        gains = gains + rng.normal(0, of_both, (runs, examples))
        results = [Result({"MRR": own.mean()}, {"MRR": weights @ own}) for own in gains]
        low, high = metrics.pool(results, 0).interval("MRR")
        covered += low < 0 < high
        low, high = np.percentile(np.mean([result.replicates["MRR"] for result in results], axis=0), [2.5, 97.5])
        covered_alone += low < 0 < high
    return covered / trials, covered_alone / trials


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_the_interval_of_few_seeds_covers_the_mean_over_runs_and_users(runs):
    """Runs that vary much more than users, and users that vary much more than runs. 300 trials: ±.025 is two errors."""
    assert 0.92 <= coverage(runs, of_runs=0.05, of_examples=0.05, of_both=0.05)[0] <= 0.98
    assert 0.91 <= coverage(runs, of_runs=0.003, of_examples=0.5, of_both=0.1)[0] <= 0.99


def test_the_interval_covers_the_truth_and_needs_the_seeds():
    """Runs and examples both vary. An interval of the examples alone covers too rarely."""
    covered, covered_alone = coverage(5, of_runs=0.03, of_examples=0.2, of_both=0.1)
    assert 0.92 <= covered <= 0.99 and covered_alone < 0.9


def test_the_quantiles_of_student_are_right():
    """Against the distribution, integrated numerically: 97.5% of it lies below."""
    for freedom, quantile in enumerate(metrics.STUDENT, 1):
        x = np.linspace(0, quantile, 200_001)
        density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        density *= math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        assert np.trapezoid(density, x) == pytest.approx(0.475, abs=2e-5)


def test_pairing_by_seed_and_example_makes_the_difference_narrower():
    """The second system is the first with a little more for each target: seeds and examples move together."""
    rng = np.random.default_rng(0)
    scores, target = systems(4, examples=200)
    scores += np.arange(4)[:, None, None] * np.eye(5)[target] / 2  # seeds differ
    nearly = scores + 0.01 * rng.random(scores.shape)
    one, other = measured(nearly, target), measured(scores, target)
    paired = metrics.pool([a.minus(b) for a, b in zip(one, other, strict=True)])
    width = np.diff(paired.interval("NDCG@3"))
    swapped = metrics.pool([a.minus(b) for a, b in zip(one, other[::-1], strict=True)])  # pairs of other seeds
    assert width < 0.5 * np.diff(swapped.interval("NDCG@3"))
    assert width < 0.5 * np.diff(metrics.pool(one).interval("NDCG@3"))
    assert paired.values["NDCG@3"] == pytest.approx(metrics.pool(one).minus(metrics.pool(other)).values["NDCG@3"])


def config(seed, **options):
    return {"stage": "sft", "data": "1234", "options": {"seed": seed, "out": f"x{seed}", "lr": 0.1, **options}}


OPTIONS = {"data": "d", "model": "m", "tasks": ["rank"], "max_length": 1, "candidate_images": False, "tune": "full"}
OPTIONS |= {"blank_images": False, "lora_rank": 1, "lora_alpha": 1, "lora_dropout": 0}


def write_run(folder, seed, stage="sft", **options):
    """Write a finished run that others start from. Returns its config.json."""
    written = config(seed, **OPTIONS | options) | {"stage": stage}
    write_json(folder / "config.json", written)
    write_json(folder / "result.json", {})
    return written


def dpo(seed, sft, **options):
    return config(seed, sft=str(sft), **options) | {"stage": "dpo_hano"}


def test_runs_that_differ_in_nothing_but_the_seed_are_a_group(tmp_path):
    configs = {Path(f"runs/sft-{seed}"): config(seed, keep=seed) for seed in (12, 3)}
    configs[Path("runs/high-3")] = config(3, lr=0.2)
    groups = pooling.group_runs(configs)
    expected = {(3,): Path("runs/sft-3"), (12,): Path("runs/sft-12")}
    assert groups == {"runs/sft-* (2 seeds)": expected, "runs/high-3": {(3,): Path("runs/high-3")}}
    assert list(groups["runs/sft-* (2 seeds)"]) == [(3,), (12,)]
    assert pooling.group_name(["a/sft-1", "a/sft-11"]) == "a/sft-1* (2 seeds)"
    assert pooling.group_name(["a/1/sft", "a/2/sft"]) == "a/*/sft (2 seeds)"

    # DPO runs: their SFT runs must be equal but for the seed
    for number, rate in enumerate((0.1, 0.1, 0.2)):
        write_run(tmp_path / f"sft-{number}", number, lr=rate)
    runs = {Path(f"dpo-{n}"): dpo(n, tmp_path / f"sft-{n}") for n in range(3)}
    assert list(pooling.group_runs(runs)) == ["dpo-* (2 seeds)", "dpo-2"]
    with pytest.raises(UserError, match=r"dpo-0 and dpo-2 differ in sft\.lr$"):
        pooling.group_runs({run: runs[run] for run in (Path("dpo-0"), Path("dpo-2"))})

    # DPO runs of one --seed are paired with their SFT runs
    sft = {tmp_path / f"sft-{n}": json.loads((tmp_path / f"sft-{n}" / "config.json").read_text()) for n in (1, 0)}
    groups = pooling.group_runs(sft | {Path(f"dpo-{n}"): dpo(42, tmp_path / f"sft-{n}") for n in (1, 0)})
    assert [path.name for path in groups["dpo-* (2 seeds)"].values()] == ["dpo-0", "dpo-1"]
    name = pooling.reference_group(groups, [tmp_path / "sft-0"])
    assert [path.name for path in groups[name].values()] == ["sft-0", "sft-1"]


def test_runs_of_one_sft_run_are_no_independent_seeds(tmp_path):
    write_run(tmp_path / "sft", 5)
    with pytest.raises(UserError, match="a and b start from SFT runs of one --seed, 5, so they are not independent"):
        pooling.group_runs({Path("a"): dpo(1, tmp_path / "sft"), Path("b"): dpo(2, tmp_path / "sft")})


def test_sft_runs_that_start_from_one_taught_run_are_paired_by_their_own_seed(tmp_path):
    write_run(tmp_path / "teach", 9, "teach", share=0.5)
    start = str(tmp_path / "teach")
    runs = {}
    for seed in (2, 1):
        for name, images in (("cot", True), ("direct", False)):
            runs[tmp_path / f"{name}-{seed}"] = write_run(
                tmp_path / f"{name}-{seed}", seed, start=start, candidate_images=images
            )
        runs[Path(f"dpo-{seed}")] = dpo(3, tmp_path / f"cot-{seed}")
    groups = pooling.group_runs(runs)
    assert {name.rpartition("/")[2] for name in groups} == {f"{name}-* (2 seeds)" for name in ("cot", "direct", "dpo")}
    assert pooling.reference_group(groups, [tmp_path / "cot-1"]).endswith("cot-* (2 seeds)")
    for group in groups.values():
        assert [path.name[-1] for path in group.values()] == ["1", "2"]


def test_each_run_before_is_read_once(tmp_path, monkeypatch):
    reads = []
    read_run = pooling.read_run
    monkeypatch.setattr(pooling, "read_run", lambda run, stages: reads.append(run.name) or read_run(run, stages))
    for seed in (1, 2):
        write_run(tmp_path / f"sft-{seed}", seed)
    pooling.group_runs({Path(f"dpo-{seed}"): dpo(seed, tmp_path / f"sft-{seed}") for seed in (1, 2)})
    assert reads == ["sft-1", "sft-2"]


def test_two_groups_of_one_common_name_are_told_apart():
    configs = {Path(f"a{seed}"): config(seed, lr=seed // 2) for seed in range(4)}
    assert list(pooling.group_runs(configs)) == ["a* (2 seeds)", "a2, a3"]


def test_what_cannot_be_pooled_is_refused():
    with pytest.raises(UserError, match="needs two or more runs"):
        pooling.group_runs({Path("a"): config(1)})
    with pytest.raises(UserError, match="a and b differ in nothing, also not in --seed; give one"):
        pooling.group_runs({Path("a"): config(1), Path("b"): config(1)})
    with pytest.raises(UserError, match="no two runs differ in nothing but --seed; a and b differ in lr, tasks"):
        pooling.group_runs({Path("a"): config(1), Path("b"): config(2, lr=0.2, tasks=["rank"])})
    with pytest.raises(UserError, match=r"a and b differ in later$"):  # an option that an old run does not have
        pooling.group_runs({Path("a"): config(1), Path("b"): config(2, later=None)})
    groups = {"a*": {(1,): Path("a1"), (2,): Path("a2")}, "b*": {(2,): Path("b2"), (3,): Path("b3")}}
    with pytest.raises(UserError, match=r"a\* has 1, 2, but b\* has 2, 3; give runs of the same seeds"):
        pooling.reference_group(groups, [Path("b3")])
    with pytest.raises(UserError, match=r"several groups: a\* and b\*"):
        pooling.reference_group(groups, [Path("a1"), Path("b3")])
    assert pooling.reference_group({"a*": groups["a*"]}, [Path("a2")]) == "a*"
