"""The arithmetic of the measurements, and each measurement on a tiny backbone."""

import importlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, Opened
from stages import dpo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "bench"))
import dpo_step
import evaluation
import gpu
import hardness
import measure
import noise
import run
import scaling
import sft_step
import study
import summaries
import tables
import trl_side
import workload

import dpo_hano
import prepare_data
import sft
from hanorec.model.finished import load_finished
from hanorec.model.packing import PackedMLLM
from hanorec.model.trees import Node
from hanorec.ranking import sasrec
from hanorec.ranking.exchange import write_predictions
from hanorec.ranking.markdown import short as three_decimals
from hanorec.ranking.metrics import ranking_metrics
from hanorec_loss import noisy_lora
from mllm_srec import writers

RESULTS = ROOT / "bench" / "results.json"
against_trl = pytest.mark.skipif(not trl_side.installed(), reason="trl is not installed (bench/requirements.txt)")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "bench").glob("*.py")))
def test_every_script_can_be_imported(name):
    importlib.import_module(name)


def test_the_spread_of_lambda_by_form(sft_run, capsys):
    """The table's numbers are those of the returned lambdas; a standardised distance has a mean lambda of about 1."""
    found = hardness.main(["--sft", str(sft_run), "--pairs", "12", "--top-k", "4"])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[-len(found) :]}
    assert rows.keys() == found.keys() == {"topk", "clusters", "cosine", "margin", "union"}
    for name, values in found.items():
        assert rows[name][:3] == [f"{np.quantile(values, at):.3f}" for at in (0.01, 0.5, 0.99)] and len(values) == 12
    standardised = (found["union"] / 2).logit()
    assert float(standardised.mean()) == pytest.approx(0, abs=1e-5) and float(standardised.std()) == pytest.approx(1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Keep measurements from changing torch's number of threads, which later tests use too."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    """Measure the machine's matrix rate with a small product, which takes almost no time."""

    def init(product, device="cpu", dtype=None):
        product.device, product.size = device, 64
        product.a, product.b = torch.randn(2, 64, 64, device=device, dtype=dtype or torch.float32)

    monkeypatch.setattr(measure.Product, "__init__", init)


@pytest.fixture
def short(monkeypatch):
    """One turn for each measurement."""
    monkeypatch.setattr(measure, "BLOCKS", 1)


def test_the_first_turn_does_not_count(monkeypatch):
    assert measure.summary([3.0, 1.0, 8.0]) == {"median": 3.0, "min": 1.0, "max": 8.0, "runs": 3}
    clock = iter(range(1000))
    monkeypatch.setattr(measure, "now", lambda device: next(clock))
    steps = []
    turns = measure.Turns(lambda: steps.append(next(clock)), size=2)
    turns.run()
    assert len(steps) == 12 and [summary["runs"] for summary in turns.summaries()] == [5, 5, 5]


def test_the_floor_is_what_pytorch_counts(tmp_path):
    """Compare the floor with PyTorch's count for the model's own forward over a prompt and an answer.

    PyTorch counts two things more (`beyond`): attention over pairs of tokens that do not see each other, and the last
    layer's queries, output and MLP for tokens that predict nothing. A second answer adds only its own tokens to the
    floor.
    """
    workload.build_backbone(tmp_path, "demo", ["a title"])
    core, ids = workload.load(tmp_path), list(range(30))
    tree = [Node(None, ids[:25]), Node(0, ids[25:], scored=range(5))]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        core(torch.tensor([ids]), logits_to_keep=5, use_cache=False)
    floor, layers = measure.floor(core, [tree], training=False), core.get_decoder().layers
    attention = layers[-1].self_attn
    mlp = layers[-1].mlp
    parts = [attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    unneeded = sum(part.weight.numel() for part in parts)
    per_pair = 4 * core.config.get_text_config().hidden_size  # operations for a pair of tokens
    last = sum(range(25, 30))  # the pairs of tokens of the last layer
    beyond = per_pair * (len(layers) * 30 * 30 - (len(layers) - 1) * 30 * 31 / 2 - last) + 2 * unneeded * 25
    assert counter.get_total_flops() == pytest.approx(floor + beyond, rel=1e-6)
    count = measure.weights(core)
    answer = 5 * 2 * (count["language model"] + count["head"]) + per_pair * ((len(layers) - 1) * (5 * 25 + 15) + last)
    assert measure.floor(core, [[*tree, tree[1]]], training=False) == floor + answer


def test_full_size_is_qwen2_5_vl_3b(tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    workload.build_backbone(tmp_path, "full", ["a title"])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == 3_754_622_976  # its model card: 3.75 billion


@against_trl
@pytest.mark.parametrize("case", dpo_step.KINDS)
def test_dpo_loss_is_trls(tmp_path, short, case):
    row = dpo_step.compare(tmp_path, "demo", 56, case, size=1)
    if dpo_step.KINDS[case].rejected > 1:
        assert row["losses"] is None and row["goal"] == 15
        return
    assert row["losses"]["ours"] == pytest.approx(row["losses"]["TRL"], abs=1e-5) and row["ratios"]["TRL"] > 0
    assert abs(row["losses"]["ours"] - math.log(2)) > 1e-4  # off the start, where every loss is log 2
    assert "not supported" in dpo_step.refusal(tmp_path)


@against_trl
@pytest.mark.parametrize("case", sft_step.CASES)
def test_sft_loss_is_trls(tmp_path, short, case):
    row = sft_step.compare(tmp_path, "demo", 56, case, size=1)
    assert row["losses"]["ours"] == pytest.approx(row["losses"]["TRL"], abs=1e-4) and row["ratios"]["TRL"] > 0


def test_packed_scores_equal_plain_scores_and_generate_answers(tmp_path, short):
    row = evaluation.compare(tmp_path, "demo", 56, examples=2)
    assert row["difference"] < 1e-4 and set(row["others"]) == {"plain forwards", "generate"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_scaling_at_small_sizes(tmp_path, short, monkeypatch):
    monkeypatch.setattr(scaling, "SHAPE", "demo")
    monkeypatch.setattr(scaling, "SIDE", 56)
    seconds, tokens, floor = scaling.dpo_seconds(tmp_path, history=2, batch=2)
    assert seconds["median"] > 0 and tokens > 2 * 4
    assert 2 * floor["flops"] == pytest.approx(scaling.dpo_seconds(tmp_path, history=2, batch=4)[2]["flops"])
    monkeypatch.setattr(scaling, "LIVE_SIDES", (56,))
    monkeypatch.setattr(measure, "cpu_only", lambda: None)
    scaling.main(["--part", "live", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert ["live" in row["case"] for row in rows] == [False, True]
    assert scaling.neighbours(2_000, 16)["more_mib"] > 0
    assert [row["ours"]["median"] > 0 for row in scaling.adapters(tmp_path)] == [True] * 3


def test_seconds_per_text_in_batches_and_one_by_one(monkeypatch):
    """With a writer that takes a second for a call, a text costs 1/16 s in a batch of 16, and 1 s one by one."""
    clock = [0.0]
    monkeypatch.setattr(measure, "now", lambda device: clock[0])
    monkeypatch.setattr(measure.Product, "rate", lambda self: 1.0)

    class Writer:
        length = staticmethod(len)

        def __call__(self, prompts):
            clock[0] += 1
            return [writers.Reply("A text.", None if len(prompt) > 1 else "limit") for prompt in prompts]

    row = summaries.rates(Writer(), "items", [["a"] * (1 + n % 2) for n in range(16)])
    assert row["ours"]["median"] == 1 / 16 and row["others"]["one by one"]["median"] == 1
    assert row["ratios"] == {"one by one": 16} and row["usable"] == 8 and row["ours"]["runs"] == 5


def test_gpu_parts_at_tiny_size_without_trl(monkeypatch, short, capsys):
    monkeypatch.setattr(trl_side, "installed", lambda: False)
    monkeypatch.setattr(gpu, "EXAMPLES", 12)
    rows = {name: gpu.part(name, "demo", 56, "cpu", torch.float32, False) for name in gpu.PARTS}
    rows["dpo ranking pairs"]["others"] = {"TRL": {"median": 9.0}}
    rows["dpo ranking pairs"] |= {"ratios": {"TRL": 9.0}, "losses": {"ours": 0.7, "TRL": 0.7}}
    rows["dpo ranking pairs"]["floor"]["TRL"] = 1.0
    rows["dpo ranking pairs"]["memory"] = {"weights": 7.0, "ours": {"median": 3.0}, "TRL": {"median": 33.0}}
    lines = gpu.table(rows | {"a part": "out of memory"}).splitlines()
    assert {line.count("|") for line in lines} == {len(gpu.HEAD) + 1} and len(lines) == 2 + 7
    assert "| 10.0 | 40.0 | 4.00 |" in lines[3] and "failed: out of memory" in lines[-1]
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2 and "no CUDA device" in capsys.readouterr().err


@pytest.fixture
def own_state():
    """Reset accelerate's state before and after the test, because TRL's trainer sets it for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@against_trl
@pytest.mark.usefixtures("own_state")
@pytest.mark.parametrize("name", [name for name in gpu.PARTS if name != "evaluation"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gpu_parts_in_half_precision_against_trl(short, monkeypatch, name, autocast):
    monkeypatch.setattr(gpu, "EXAMPLES", 12)
    row = gpu.part(name, "demo", 56, "cpu", torch.bfloat16, autocast, batch=2)
    assert row["losses"]["ours"] == pytest.approx(row["losses"]["TRL"], rel=0.02) and row["ratios"]["TRL"] > 0


def test_gpu_parts_that_fail_are_tried_with_fewer_pairs_and_then_without_trl(monkeypatch):
    calls = []

    def attempt(name, *options):
        calls.append(options)
        if "--no-trl" in options:
            return {"alone": True}
        return "torch.OutOfMemoryError: CUDA" if options[1] != "1" else "RuntimeError: no compiler"

    monkeypatch.setattr(gpu, "attempt", attempt)
    monkeypatch.setattr(trl_side, "installed", lambda: True)
    assert gpu.run_part("dpo ranking pairs", True) == {"alone": True, "trl_failed": "RuntimeError: no compiler"}
    assert calls == [*(("--batch", batch, "--autocast") for batch in "421"), ("--no-trl",)]
    row = {"others": {"TRL": {"median": 4.0}}, "per_step": 4}
    half = {"others": {"TRL": {"median": 3.0}}, "per_step": 2}  # fewer seconds for a step, more for a sample
    assert gpu.better_autocast({True: row, False: half}) and not gpu.better_autocast({True: half, False: row})
    assert gpu.better_autocast({True: row, False: "failed"}) and not gpu.better_autocast({True: "a", False: "b"})


def test_trl_gets_batches_of_one_kind():
    assert trl_side.in_batches(examples=3, kinds=2, batch=2) == [0, 2, 1, 3, 4, 5]


def test_the_report_has_every_table():
    seconds = measure.summary([0.1, 0.2, 0.3])
    row = measure.result("DPO step", "a case", "s per step", seconds, {"TRL": measure.summary([0.8])}, goal=6)
    row |= {"losses": {"ours": 0.7, "TRL": 0.70001}, "floor": {"ours": 60.0, "TRL": 10.0}, "rate": {"median": 2e11}}
    row |= {"loader": {"TRL": 0.08}, "encode": 0.01, "head": 0.2, "with_reference": 0.25, "weights": {"head": 1000}}
    whole = {"whole_process": {"ours": seconds, "TRL": seconds}, "table": "Memory"}
    parts = {"dpo_step": {"rows": [row], "precomputed_reference": "trl/x.py:9: refused"}, "sft_step": {"rows": []}}
    parts |= {"memory": {"rows": [row | whole]}}
    text = run.report(parts, measure.machine() | {"gpu": "Unmeasured.", "seconds": 1.0})
    assert "| a case | 0.2 (0.1 to 0.3) | TRL | 0.8 (0.8 to 0.8) | **4.00** | 6 | 60 | 10 |" in text
    assert "refused" in text and "`trl/x.py:9`" in text and "3.20 instead of 4.00" in text and "Unmeasured." in text


@pytest.mark.skipif(not RESULTS.exists(), reason="no bench/results.json: make bench writes it")
def test_results_md_is_the_report_of_results_json():
    results = json.loads(RESULTS.read_text())
    parts = {name: results[name] for name in run.SCRIPTS}
    assert run.report(parts, results) == RESULTS.with_name("RESULTS.md").read_text()
    rows = [row for part in parts.values() for row in part["rows"]]
    assert all(system["runs"] >= 5 for row in rows for system in [row["ours"], *row["others"].values()])


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_command_of_a_study_is_one_of_its_script(name):
    own = study.STUDIES[name]
    assert prepare_data.parse(study.prepare_command(own)[1:]).out == Path("data") / name
    assert sasrec.parse(study.sasrec_command(own, 3)[2:]).seed == 3
    for arm, settings in own.arms.items():
        command = study.training_command(own, arm, 3)
        options = {"sft.py": sft, "dpo_hano.py": dpo_hano}[command[0]].parse(command[1:])
        assert (str(options.out), options.seed) == (own.run_folder(arm, 3), 3)
        assert settings.script == "sft.py" or str(options.sft) == own.run_folder("sft", 3)
    assert {"sft", "continued"} <= set(own.arms)


def test_arms_differ_and_a_family_shares_its_recipe():
    for own in study.STUDIES.values():
        commands = [study.training_command(own, arm, 1) for arm in own.arms]
        options = [" ".join(word for word in command if word != command[4]) for command in commands]
        assert commands[0][3] == "--out" and len(set(options)) == len(options)
        assert {arm.family for arm in own.arms.values()} >= set(own.recipes)
        assert set(own.grid) == set(own.recipes) - {"paper"} and {len(own.grid[family]) for family in own.grid} == {4}
        for family, recipes in own.grid.items():
            for recipe in recipes:
                command = study.grid_command(own, family, recipe)
                assert f"{dpo_hano.parse(command[1:]).lr:g}" == f"{float(recipe.split()[1]):g}"


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A study with a finished SFT run of seed 1; collects the jobs instead of running them."""
    monkeypatch.setattr(study, "ROOT", tmp_path)
    for finished in ("data/demo/manifest.json", "data/demo/sasrec-1/config.json"):
        (tmp_path / finished).parent.mkdir(parents=True)
        (tmp_path / finished).touch()
    run_folder = tmp_path / "runs/demo/sft-1"
    run_folder.mkdir(parents=True)
    (run_folder / "result.json").write_text("{}")
    for split in ("test", "test_hard"):
        (run_folder / tables.predictions_name(split)).touch()
    options = {"data": "data/demo", "out": "runs/demo/sft-1", "seed": 1}
    (run_folder / "config.json").write_text(json.dumps({"options": options}))
    jobs = []
    monkeypatch.setattr(study, "run", lambda command, core, log: jobs.append((command, core)))
    return tmp_path, jobs


def test_a_study_skips_what_is_finished_and_starts_sft_first(started):
    _, jobs = started
    demo = study.STUDIES["demo"]
    study.train(demo, [1, 2], [0, 1])
    outs = [re.search(r"--out (\S+)", " ".join(command)).group(1) for command, _ in jobs]
    expected = {demo.run_folder(arm, seed) for arm in demo.arms for seed in (1, 2)} - {"runs/demo/sft-1"}
    assert outs[0] == "data/demo/sasrec-2" and set(outs[1:]) == expected and len(outs) == len(expected) + 1
    assert max(outs.index(f"runs/demo/{arm}-2") for arm in ("sft", "titles")) < outs.index("runs/demo/dpo-1")
    assert {core for _, core in jobs} <= {0, 1}
    assert study.STUDIES["demo"].splits == ["test", "test_hard"] and jobs[-1][0][-2:] == ["test", "test_hard"]


def test_a_run_of_other_options_is_not_taken_for_the_arms_run(started):
    folder, _ = started
    command = study.training_command(study.STUDIES["demo"], "sft", 1)
    assert study.finished(command) and not study.finished(study.training_command(study.STUDIES["demo"], "sft", 2))
    config = json.loads((folder / "runs/demo/sft-1/config.json").read_text())
    config["options"]["seed"] = 7
    (folder / "runs/demo/sft-1/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trained with another seed"):
        study.finished(command)


def test_a_study_replaces_its_section_alone(tmp_path):
    page = tmp_path / "results.md"
    text = "before\n<!-- study a -->\nold\n<!-- end of study a -->\nafter\n"
    page.write_text(text)
    tables.write_section(page, "a", "new\n")
    assert page.read_text() == text.replace("old", "new")
    with pytest.raises(ValueError, match="lacks the marks"):
        tables.write_section(page, "b", "new\n")


@pytest.fixture
def measured(prepared, tmp_path, monkeypatch):
    """Two arms with a gain of some users that is equal in every seed, beside large differences of seeds and users.

    `continued` has the seeds 1 to 3, and so has `sft`, which is equal. `dpo` has 2 to 4, with its lines in another
    order. Returns (the study, Measured, the examples, NDCG@3 by arm and seed).
    """
    opened = Opened(prepared)
    examples, rng, values = opened.examples("test"), np.random.default_rng(0), {}
    study_of_two = replace(study.STUDIES["demo"], name="two", seeds=[1, 2, 3, 4])
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "two").symlink_to(prepared)
    targets = np.array([example.candidates.index(example.target) for example in examples])
    rows = np.arange(len(examples))
    for seed in study_of_two.seeds:
        for arm in ("sft", "continued", "dpo"):
            scores = np.tile(np.arange(len(examples[0].candidates), dtype=float), (len(examples), 1))
            second = np.random.default_rng(seed).random(len(examples)) < seed / 5  # the users whose target has rank 2
            second[:4] = arm == "dpo"  # these gain it, in every seed
            scores[rows, targets] = np.where(second, len(scores[0]) - 1.5, -1)
            values[arm, seed] = ranking_metrics(scores, targets)["NDCG@3"]
            if seed != (1 if arm == "dpo" else 4):
                order = rng.permutation(len(examples)) if arm == "dpo" else rows
                path = tmp_path / study_of_two.run_folder(arm, seed) / tables.predictions_name("test")
                path.parent.mkdir(parents=True)
                write_predictions(path, opened.items.ids, [examples[n] for n in order], scores[order], scores[order])
    return study_of_two, tables.Measured(study_of_two, study_of_two.seeds, "test"), examples, values


def cells_of(table):
    """The cells of a Markdown table, line by line."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_differences_are_paired_by_user_and_seed(measured):
    """The two shared seeds differ by the four users alone, so the interval is the bootstrap's of that difference."""
    _, found, examples, values = measured
    assert found.reference == "continued" and found.users == len(examples) and set(found.minus) == {"sft", "dpo"}
    gain = values["dpo", 2] - values["continued", 2]
    assert (gain == values["dpo", 3] - values["continued", 3]).all() and (gain > 0).sum() == 4
    assert found.minus["dpo"].values["NDCG@3"] == pytest.approx(gain.mean())
    draws = np.random.default_rng(0).multinomial(len(gain), np.full(len(gain), 1 / len(gain)), size=1000)
    expected = np.percentile(draws @ gain / len(gain), [2.5, 97.5])
    assert found.minus["dpo"].interval("NDCG@3") == pytest.approx(expected)
    apart = [values[arm, seed].mean() for arm, seed in (("dpo", 2), ("dpo", 3), ("continued", 1), ("continued", 2))]
    assert apart[0] + apart[1] - apart[2] - apart[3] > 3 * gain.mean()  # seeds in order would give another value


def test_slices_of_a_study_by_hand(measured):
    """A cell is the mean gain of the slice's users, in bold if its interval excludes 0; popularity is left out."""
    study_of_two, found, examples, values = measured
    corner, *rows = cells_of(tables.slices_table(study_of_two, found, "test"))
    data = tables.DataFolder(tables.ROOT / "data" / "two")
    masks = {
        f"{slicing}, {name}": mask
        for slicing, parts in tables.slicings_of(data, examples).items()
        for name, mask in parts.items()
        if slicing != "popularity of the target"
    }
    assert corner == ["test: NDCG@3 minus SFT continued", *masks]
    (_, (label, *cells)) = rows
    assert label == "DPO" and len(cells) == len(masks) > 6
    gain = values["dpo", 2] - values["continued", 2]
    bold = set()
    for cell, mask in zip(cells, masks.values(), strict=True):
        value, low, high = re.fullmatch(r"\**(\S+) ±.000 \[(\S+), (\S+?)\]\**", cell).groups()
        assert value == three_decimals(gain[mask].mean()) and float(low) <= float(value) <= float(high)
        assert cell.startswith("**") == (float(low) > 0)
        bold.add(cell.startswith("**"))
    assert bold == {True, False}


def test_a_figure_spans_its_interval(measured):
    """One arm is drawn. The panel begins and ends where its interval does, and the circle is at its mean."""
    study_of_two, found, *_ = measured
    result = found.minus["dpo"]
    low, high = result.interval("NDCG@3")
    colour = "#3b8f4d" if low > 0 else "#b9c4d0"
    svg = tables.figure(study_of_two, {"test": found})
    assert f'<path d="M290.0 50H590.0" stroke="{colour}"' in svg
    (centre,) = re.findall(r'<circle cx="([\d.]+)" cy="50"', svg)
    assert float(centre) == round(290 + 300 * (result.values["NDCG@3"] - low) / (high - low), 1)
    assert re.findall(r">(test: [^<]+)<", svg) == ["test: NDCG@3 minus SFT continued"]


def test_the_papers_ablation_stands_beside_ours(measured):
    """Both columns are differences to the full method: the paper's in units of 1, not in percent."""
    study_of_two, found, *_ = measured
    found.runs |= {"paper": found.runs["continued"], "wo_nodo": found.runs["dpo"]}
    (row,) = [row for row in cells_of(tables.published_table(study_of_two, found)) if "w/o NoDO" in row[0]]
    published = (54.38 - 56.73, 71.45 - 73.60, 77.24 - 78.52)
    assert row[1::2] == [three_decimals(difference / 100) for difference in published]
    assert row[2::2] == [tables.difference_cell(found.minus["dpo"], name) for name in ("NDCG@3", "HR@3", "AUC")]


def test_the_table_of_logs_by_hand(measured, tmp_path):
    study_of_two, *_ = measured
    for seed in (2, 3):
        lines = [
            {"loss": 1.0, "margin": float(step), "eta": seed, "noise_kl": step if step % 50 == 0 else None}
            for step in range(1, 101)
        ]
        lines += [{"val_select": select, "val_NDCG@3": select / 10} for select in (2, 4, 3)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / study_of_two.run_folder("dpo", seed) / "metrics.jsonl").write_text(text)
    header, _, row = cells_of(tables.training_table(study_of_two, [2, 3], ["dpo"]))
    found = dict(zip(header, row, strict=True))
    assert found["arm"] == "DPO" and found["eta"] == "2.5" and found["NDCG@3 on validation"] == "0.4"
    assert found["reward gap"] == "75.5"  # steps 51 to 100
    assert found["KL of noise and dropout, nats a token"] == "75"  # steps 50 and 100
    assert found["lambda in a batch, 1% to 99%"] == "- to -"


def test_the_printed_effect_of_noise(sft_run, tmp_path, capsys):
    """A line for each setting; more noise of a kind disturbs more. The largest NoDO is compared with PyTorch's KL."""
    folder = dpo(sft_run, tmp_path / "dpo", "--lr", 0.02)
    found = noise.main(["--run", str(folder), "--batches", "1"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if re.search(r"e[-+]\d\d$", line)]
    assert lines == [[kind, str(size), f"{kl:.2e}"] for (kind, size), kl in found.items()]
    assert [*found] == [*noise.NOISES, *(("dropout", probability) for probability in noise.DROPOUTS)]
    for kind in ("relative", "absolute", "embeddings", "dropout"):
        kls = [kl for (own, _), kl in found.items() if own == kind]
        assert kls[0] > 0 and kls == sorted(kls) and kls[-1] > 5 * kls[0]
    assert found["dropout", 0.001] < found["relative", 0.05] / 2  # it is measured without NoDO
    opened = Opened(json.loads((folder / "config.json").read_text())["options"]["data"])
    packed, prompts = PackedMLLM(load_finished(folder, opened.encoding, torch.float32)), opened.prompts()
    for name, weight in packed.named_parameters():
        weight.requires_grad_("lora_A" in name or "lora_B" in name)
    trees = [prompts.pair_tree(example, k) for example in opened.examples("train")[:8] for k in ("rank", "yes", "no")]
    batch = packed.collate(trees, opened.tokens)
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([0, 0, 1]).generate_state(1)[0]))
    with torch.no_grad():
        clean = packed.eval()(batch, tokens=True)
        with noisy_lora(packed, 0.05, relative=False, generator=generator):
            noisy = packed(batch, tokens=True)
    expected = torch.nn.functional.kl_div(clean, noisy, log_target=True, reduction="batchmean")
    assert found["absolute", 0.05] == pytest.approx(float(expected), rel=1e-3)
