"""What bench/fakes.py and bench/rehearse_cuda.py see, at tiny size on the CPU."""

import json
import re
import statistics
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "bench"))
import at_scale
import fakes
import full_steps
import operations
import rehearse_cuda
import trl_side

from hanorec.model import packing
from hanorec.model.lora import add_lora
from hanorec.model.packing import PackedMLLM

against_trl = pytest.mark.skipif(not trl_side.installed(), reason="trl is not installed (bench/requirements.txt)")
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def small(monkeypatch):
    """Three narrow backbones of two layers, under the names of the whole ones."""
    backbones = {}
    for name in ("Qwen2.5-VL-3B", "LLaVA-NeXT-7B", "Qwen3-VL-4B"):
        backbone = fakes.shortened(fakes.BACKBONES[name], 2, 1, 2)
        backbone.text.update(SMALL, head_dim=128)
        if "out_hidden_size" in backbone.vision:
            backbone.vision["out_hidden_size"] = 256
        backbones[name] = backbone
    monkeypatch.setattr(fakes, "BACKBONES", backbones)
    return backbones


def real_model(backbone, folder, checkpointing):
    """A policy of real float32 tensors, a batch of one pair, and a function that makes its loss."""
    config, prompts, examples, tokens = fakes.make_data(folder, backbone, dtype=torch.float32)
    core = fakes.transformers.AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    )
    packed = PackedMLLM(add_lora(core.requires_grad_(False), 8, 32, 0.0, 0))
    if checkpointing:
        packed.enable_checkpointing()
    batch = packed.collate([prompts.pair_tree(examples[0], "rank")], tokens)
    return config, packed.train(), batch


def loss_of(packed, batch):
    chosen, rejected = packed(batch)
    return -torch.nn.functional.logsigmoid(chosen - rejected)


def test_backbones_have_their_published_number_of_weights(tmp_path):
    for name, backbone in fakes.BACKBONES.items():
        model = fakes.meta_model(fakes.make_data(tmp_path / name, backbone, 1)[0])
        assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(backbone.weights, abs=0.006)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_by_hand_is_autograds(small, tmp_path, checkpointing):
    _, packed, batch = real_model(small["Qwen2.5-VL-3B"], tmp_path, checkpointing)
    weights = [weight for weight in packed.parameters() if weight.requires_grad]
    loss_of(packed, batch).backward()
    expected = [weight.grad.clone() for weight in weights]
    packed.zero_grad()
    fakes.backward(loss_of(packed, batch))
    assert any(grad.abs().max() > 0 for grad in expected)
    for weight, grad in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, grad, rtol=1e-5, atol=1e-7)


def profiled_peak(packed, batch) -> int:
    """The peak of memory in a real step, in bytes. On a busy machine the profiler has once missed allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_of(packed, batch).backward()
    packed.zero_grad()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_fake_tensors_is_what_a_real_step_allocates(small, tmp_path, checkpointing):
    """The profiler sees each allocation of the real step."""
    config, packed, batch = real_model(small["Qwen2.5-VL-3B"], tmp_path, checkpointing)
    loss_of(packed, batch).backward()
    packed.zero_grad()
    peak = statistics.median(profiled_peak(packed, batch) for _ in range(3))
    fake = fakes.packed_model(config, FakeTensorMode(allow_non_fake_inputs=True), "cpu", checkpointing, torch.float32)
    for module in fake.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    counting = fakes.Counting(block=1)
    counting.hold([*fake.parameters(), *fake.buffers(), *vars(batch).values()])
    before = counting.live
    with counting:
        loss_of(fake, batch).backward()
    assert counting.peak - before == pytest.approx(peak, rel=0.02) and peak > 10 * 2**20


def test_operations_are_those_of_pytorchs_counter(small, tmp_path):
    _, packed, batch = real_model(small["Qwen2.5-VL-3B"], tmp_path, True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_of(packed, batch).backward()
    with sdpa_kernel(SDPBackend.MATH), fakes.Counting() as counting:
        loss_of(packed, batch).backward()
    assert counting.flops == counter.get_total_flops() > 1e9
    with fakes.Counting() as fused:  # attention in one kernel, whose backward computes one product again
        loss_of(packed, batch).backward()
    assert 1 < fused.flops / counting.flops < 1.1


def test_a_wait_is_seen_with_its_place():
    mode = FakeTensorMode()
    values = mode.from_tensor(torch.zeros(3, 4))
    with fakes.Watch("cpu", trues={3: 2}) as watch:
        assert values.sum().item() == 1.0
        assert bool(values[0, 0] > 0) is True
        assert values[values[:, 0] > 0].shape == (2, 4)
    here = "tests/test_rehearsal.py"
    assert sorted(reason for reason, _ in watch.waits) == ["a value for the host"] * 2 + ["an index by a mask"]
    assert all(place.startswith(here) for _, place in watch.waits) and not watch.mixed


def test_mixed_devices_and_copies_are_seen(capsys):
    mode = FakeTensorMode()
    host, gpu = (FakeTensor(mode, torch.empty(3, device="meta"), device=torch.device(name)) for name in ("cpu", "cuda"))
    with fakes.Watch("cuda") as watch:
        gpu.to("cpu", non_blocking=True)
    assert [reason for reason, _ in watch.reads] == ["copied for later reading"] and not watch.waits
    with watch:
        gpu.to("cpu")
    for free in (False, True):  # not gpu.copy_(host): a PyTorch for the CPU refuses it
        watch.copy(torch.ops.aten.copy_.default, (gpu, host), {"non_blocking": free})
    assert sorted(reason for reason, _ in watch.waits) == ["a copy to the GPU", "a copy to the host"]
    assert not watch.mixed
    with watch, pytest.raises(FakeTensorDeviceMismatchError):
        gpu + host
    assert [operation for operation, _ in watch.mixed] == ["aten.add.Tensor"]
    alone = fakes.Watch("cuda")
    assert rehearse_cuda.report("x", "evaluation", alone, "")
    alone.mixed = watch.mixed
    assert not rehearse_cuda.report("x", "evaluation", alone, "")
    assert "mixed devices, 1 times: aten.add.Tensor at tests/test_rehearsal.py" in capsys.readouterr().out


def test_only_the_log_may_wait_and_once_a_step():
    watch = fakes.Watch("cuda")
    watch.steps = 2
    with rehearse_cuda.without_gpu(watch):
        torch.cuda.Event().synchronize()
    ((reason, place),) = watch.waits
    assert reason == "an event" and place.startswith("tests/test_rehearsal.py")
    assert not rehearse_cuda.report("x", "dpo", watch, "")  # not the log
    for waits, reader, good in ((2, "run/log.py", True), (3, "run/log.py", False), (2, "model/packing.py", False)):
        watch.waits, watch.reads = Counter({("an event", "hanorec/run/log.py:50 read"): waits}), Counter()
        watch.reads["copied for later reading", f"hanorec/{reader}:36 __init__"] = 2
        assert rehearse_cuda.report("x", "dpo", watch, "") is good


@pytest.mark.parametrize("name", ["Qwen2.5-VL-3B", "LLaVA-NeXT-7B", "Qwen3-VL-4B"])
def test_no_part_waits_without_a_reason(small, tmp_path, name):
    """Two waits seen here are none on a GPU, where these values lie on the CPU too: tokens of a batch, read metrics."""
    rehearsal = rehearse_cuda.Rehearsal(name, "cpu", tmp_path)
    dpo = ("dpo", "s_dpo", "controls", "noise_effect", "generation") if name == "Qwen2.5-VL-3B" else ()
    for part in (*dpo, "sft", "evaluation"):
        watch, stopped = rehearsal.part(part)
        assert watch.steps == {"dpo": 2, "s_dpo": 1, "controls": 2, "noise_effect": 1, "sft": 2}.get(part, 0)
        places = {place for _, place in watch.waits if not rehearse_cuda.reason_to_wait(part, place)}
        on_the_host = {re.sub(r":\d+", "", place) for place in places}
        assert not stopped and on_the_host <= {"hanorec/run/log.py read", "hanorec/model/supervised.py <genexpr>"}


def test_a_planted_wait_fails_the_rehearsal(small, tmp_path, monkeypatch, capsys):
    """`unique` in the packed forward is what the rehearsal was written for."""
    logits = packing.PackedMLLM.packed_logits

    def waits(packed, batch):
        batch.predicting.unique()
        return logits(packed, batch)

    monkeypatch.setattr(packing.PackedMLLM, "packed_logits", waits)
    rehearsal = rehearse_cuda.Rehearsal("Qwen2.5-VL-3B", "cpu", tmp_path)
    assert not rehearse_cuda.report("x", "evaluation", *rehearsal.part("evaluation"))
    assert "stopped: DynamicOutputShapeException" in capsys.readouterr().out


@pytest.mark.parametrize("work", ["sft", pytest.param("trl_dpo", marks=against_trl)])
def test_depth_counts_as_the_whole_backbone(small, tmp_path, work):
    """From few layers of each kind to a whole backbone: five of the language model, three and four of the tower."""
    whole = small["Qwen2.5-VL-3B"] = fakes.shortened(small["Qwen2.5-VL-3B"], 5, 3, 4)
    expected = getattr(full_steps.Case(whole, tmp_path), work)(checkpointing=True)
    found = operations.at_full_depth(tmp_path, "Qwen2.5-VL-3B", work, checkpointing=True)
    assert found["tflop"] == pytest.approx(expected["tflop"], rel=1e-6)
    assert found["gib"] == pytest.approx(expected["gib"], rel=1e-3)


@against_trl
def test_the_operations_of_trls_step_are_those_of_pytorchs_counter(small, tmp_path, monkeypatch):
    """Of a real step of TRL's loss, with its tower, against the count on fake tensors."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: SimpleNamespace(step=lambda: None))
    case = full_steps.Case(small["Qwen2.5-VL-3B"], tmp_path)
    with sdpa_kernel(SDPBackend.MATH):
        found = case.trl_dpo(checkpointing=False)["tflop"]

    def count(model, work, trues):
        model.to_empty(device="cpu")
        for values in [*model.parameters(), *model.buffers()]:
            values.data.fill_(0.01)
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() / 1e12

    monkeypatch.setattr(fakes, "to_fake", lambda model, *_: model)
    monkeypatch.setattr(case, "fake", lambda *shape, dtype=torch.bfloat16: torch.zeros(shape, dtype=dtype))
    monkeypatch.setattr(case, "count", count)
    with sdpa_kernel(SDPBackend.MATH):
        expected = case.trl_dpo(checkpointing=False)
    assert found == pytest.approx(expected, rel=1e-6) and found > 0.01


def test_a_layer_of_four_bits_is_as_large_as_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    settings = {"bias": False, "quant_type": "nf4", "compress_statistics": False}
    expected = bitsandbytes.nn.Linear4bit(256, 512, **settings).to("cpu").weight
    found = full_steps.FourBit(torch.nn.Linear(256, 512, bias=False))
    assert found.weight.nbytes + found.scales.nbytes == expected.nbytes + expected.quant_state.absmax.nbytes


def test_the_amounts_in_the_document_about_scale_are_those_of_the_script(tmp_path):
    counts = json.loads((ROOT / "bench" / "results.json").read_text())["operations"]["counts"]
    tower = at_scale.tower_tflop(tmp_path)
    # 32 layers of 19.7 million weights each take most of it: 2 operations a weight for each of 1,296 patches
    assert 1.6 < tower < 1.3 * 2 * 32 * 19.7e6 * 1296 / 1e12
    document = (ROOT / "docs" / "scale.md").read_text()
    head, *rows = at_scale.table(counts, tower)
    assert len(rows) == 13 and all(len(row) == len(head) for row in rows)
    for name, amount, _ in rows[1:]:
        assert re.search(rf"(?<![\d.,]){re.escape(amount.split()[0])}(?![\d.,]*\d)", document), (name, amount)


def test_pairs_that_fit():
    one, two = {"gib": 2.0}, {"gib": 3.5}
    assert operations.pairs_that_fit(10.0, one, two, 23.5) == 1 + int((23.5 * 0.95 - 1 - 10 - 2) / 1.5)
    assert operations.pairs_that_fit(22.0, one, two, 23.5) == 0
