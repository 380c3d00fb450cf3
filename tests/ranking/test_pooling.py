"""Runs of several seeds in one row: the hierarchical bootstrap against loops, and which runs make a group."""

import json
from pathlib import Path

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


def test_the_hierarchical_bootstrap_equals_a_slow_loop():
    scores, target = systems(3)
    pooled = metrics.pool(measured(scores, target, 20), 0)
    count = len(target)
    examples = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=20)
    runs = np.random.default_rng([0, 1]).multinomial(3, np.full(3, 1 / 3), size=20)
    for replicate in range(20):
        drawn_examples = [row for row in range(count) for _ in range(examples[replicate][row])]
        drawn_runs = [run for run in range(3) for _ in range(runs[replicate][run])]
        for name in ("AUC", "HR@3", "NDCG@3", "MRR"):
            values = []
            for run in drawn_runs:
                own, own_target = scores[run][drawn_examples], target[drawn_examples]
                if name == "AUC":
                    values.append(metrics.pooled_auc(own, own_target)[0])
                else:
                    values.append(metrics.ranking_metrics(own, own_target)[name].mean())
            assert pooled.replicates[name][replicate] == pytest.approx(np.mean(values)), name


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


def test_the_interval_covers_the_truth_and_needs_the_seeds():
    """Runs and examples both vary. An interval of the examples alone covers too rarely."""
    rng = np.random.default_rng(0)
    runs, examples, covered, covered_alone, trials = 5, 80, 0, 0, 300
    weights = rng.multinomial(examples, np.full(examples, 1 / examples), size=200) / examples
    for _ in range(trials):
        gains = rng.normal(0, 0.2, examples) + rng.normal(0, 0.03, (runs, 1)) + rng.normal(0, 0.1, (runs, examples))
        results = [Result({"MRR": own.mean()}, {"MRR": weights @ own}) for own in gains]
        low, high = metrics.pool(results, 0).interval("MRR")
        covered += low < 0 < high
        alone = np.mean([result.replicates["MRR"] for result in results], axis=0)
        low, high = np.percentile(alone, [2.5, 97.5])
        covered_alone += low < 0 < high
    assert 0.89 <= covered / trials <= 0.99
    assert covered_alone < covered


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


def test_runs_that_differ_in_nothing_but_the_seed_are_a_group(tmp_path):
    configs = {Path(f"runs/sft-{seed}"): config(seed, keep=seed) for seed in (12, 3)}
    configs[Path("runs/high-3")] = config(3, lr=0.2)
    groups = pooling.group_runs(configs)
    expected = {(3,): Path("runs/sft-3"), (12,): Path("runs/sft-12")}
    assert groups == {"runs/sft-* (2 seeds)": expected, "runs/high-3": {(3,): Path("runs/high-3")}}
    assert list(groups["runs/sft-* (2 seeds)"]) == [(3,), (12,)]
    for name in (["a/sft-1", "a/sft-11"], ["a/1/sft", "a/2/sft"]):
        assert pooling.group_name(name) in ("a/sft-1* (2 seeds)", "a/*/sft (2 seeds)")

    # DPO runs: their SFT runs must be equal but for the seed
    for number, rate in enumerate((0.1, 0.1, 0.2)):
        options = {"data": "d", "model": "m", "tasks": ["rank"], "max_length": 1, "candidate_images": False}
        options |= {"blank_images": False, "lora_rank": 1, "lora_alpha": 1, "lora_dropout": 0, "tune": "full"}
        write_json(tmp_path / f"sft-{number}" / "config.json", config(number, **options | {"lr": rate}))
        write_json(tmp_path / f"sft-{number}" / "result.json", {})
    dpo = {Path(f"dpo-{n}"): config(n, sft=str(tmp_path / f"sft-{n}")) | {"stage": "dpo_hano"} for n in range(3)}
    assert list(pooling.group_runs(dpo)) == ["dpo-* (2 seeds)", "dpo-2"]

    # Their seeds are those of the SFT runs too: DPO runs of one --seed are paired with their SFT runs
    sft = {tmp_path / f"sft-{n}": json.loads((tmp_path / f"sft-{n}" / "config.json").read_text()) for n in (1, 0)}
    dpo = {Path(f"dpo-{n}"): config(42, sft=str(tmp_path / f"sft-{n}")) | {"stage": "dpo_hano"} for n in (1, 0)}
    groups = pooling.group_runs(sft | dpo)
    assert list(groups["dpo-* (2 seeds)"].items()) == [((42, 0), Path("dpo-0")), ((42, 1), Path("dpo-1"))]
    name = pooling.reference_group(groups, [tmp_path / "sft-0"])
    assert [path.name for path in groups[name].values()] == ["sft-0", "sft-1"]
    same = {Path(f"dpo-{n}"): config(n, sft=str(tmp_path / "sft-0")) | {"stage": "dpo_hano"} for n in (1, 0)}
    with pytest.raises(UserError, match="by the --seed of their SFT runs"):
        pooling.reference_group(pooling.group_runs(sft | same), [tmp_path / "sft-0"])


def test_two_groups_of_one_common_name_are_told_apart():
    configs = {Path(f"a{seed}"): config(seed, lr=seed // 2) for seed in range(4)}
    assert list(pooling.group_runs(configs)) == ["a* (2 seeds)", "a2, a3"]


def test_what_cannot_be_pooled_is_refused():
    with pytest.raises(UserError, match="needs two or more runs"):
        pooling.group_runs({Path("a"): config(1)})
    with pytest.raises(UserError, match="a and b differ in nothing, their --seed is 1"):
        pooling.group_runs({Path("a"): config(1), Path("b"): config(1)})
    with pytest.raises(UserError, match="no two runs differ in nothing but --seed; a and b differ in lr, tasks"):
        pooling.group_runs({Path("a"): config(1), Path("b"): config(2, lr=0.2, tasks=["rank"])})
    groups = {"a*": {(1,): Path("a1"), (2,): Path("a2")}, "b*": {(2,): Path("b2"), (3,): Path("b3")}}
    with pytest.raises(UserError, match=r"a\* has 1, 2, but b\* has 2, 3"):
        pooling.reference_group(groups, [Path("b3")])
    with pytest.raises(UserError, match=r"several groups: a\* and b\*"):
        pooling.reference_group(groups, [Path("a1"), Path("b3")])
    assert pooling.reference_group({"a*": groups["a*"]}, [Path("a2")]) == "a*"
