"""A base model in four bits: trained and frozen weights; evaluation and export use the same model."""

import json
import math

import pytest
import torch
from conftest import Opened
from safetensors import safe_open

import dpo_hano
import sft
from hanorec import export
from hanorec.model import check
from hanorec.model.finished import load_finished
from hanorec.model.load import load_model, load_tokenizer
from hanorec.model.lora import add_lora, without_trained_adapter

bitsandbytes = pytest.importorskip("bitsandbytes")
# On CPUs with bf16 instructions bitsandbytes repacks the weights at the first evaluation, and then cannot train
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
STEPS = "--max-steps 2 --batch-size 3 --grad-accum 1 --eval-limit 1".split()


@pytest.fixture(scope="module")
def quantized(prepared, tmp_path_factory):
    """An SFT run with LoRA on a base model in four bits, and a HaNoRec run on it, with its export."""
    folder = tmp_path_factory.mktemp("quantized")
    argv = ["--data", str(prepared), "--out", str(folder / "sft"), *"--tune lora --quantize 4bit --lr 1e-2".split()]
    sft.main([*argv, *STEPS])
    argv = ["--sft", str(folder / "sft"), "--out", str(folder / "dpo"), "--lr", "1e-2", "--sigma", "0.05"]
    dpo_hano.main([*argv, *STEPS])
    export.main(["--run", str(folder / "dpo"), "--to", str(folder / "export")])
    return folder


def test_the_sft_adapter_stays_a_frozen_adapter(prepared, quantized):
    data = Opened(prepared)
    model = load_finished(quantized / "sft", data.encoding, torch.float32)
    model = add_lora(model, 8, 32, 0.0, 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".default." in name for name in trained)
    assert any(".sft." in name for name, _ in model.named_parameters())
    layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == "Linear4bit" and layer.active_adapters == ["sft", "default"]
    with without_trained_adapter(model):
        assert layer.active_adapters == ["sft"]
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_vision_tower_is_not_quantized(prepared):
    """Its image tokens stay those that were stored."""
    model = load_model(prepared / "tiny", quantize="4bit")
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}
    quantized = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert quantized == {name for name in kinds if name.startswith("model.language_model.")}


def test_a_quantized_model_is_checked_in_float32(prepared):
    data = Opened(prepared)
    packed = check.load_packed(
        load_model(prepared / "tiny", torch.bfloat16, quantize="4bit"), data.encoding, True, "cpu"
    )
    logps, expected = check.score_both_ways(packed, data.encoding)
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
    layers = [module for module in packed.modules() if hasattr(module, "compute_dtype")]
    assert layers and all(layer.compute_dtype == torch.bfloat16 for layer in layers)


def test_dpo_trains_its_own_adapter_alone(quantized):
    with safe_open(quantized / "dpo" / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert any(file.get_tensor(name).abs().max() > 0 for name in file.keys() if "lora_B" in name)  # noqa: SIM118
    assert not (quantized / "dpo" / "adapter" / "sft").exists()
    first = json.loads((quantized / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert json.loads((quantized / "dpo" / "config.json").read_text())["options"]["quantize"] == "4bit"


def test_the_exported_model_equals_the_quantized_one(prepared, quantized):
    data = Opened(prepared)
    with_adapters = load_finished(quantized / "dpo", data.encoding, torch.float32)
    merged = load_model(quantized / "export" / "merged")
    text = load_tokenizer(prepared / "tiny")("Film 3, The (1999)", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**text).logits, with_adapters(**text).logits, atol=1e-3, rtol=0)


def test_quantized_weights_cannot_be_tuned(prepared, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sft.main(["--data", str(prepared), "--quantize", "4bit", "--out", str(tmp_path / "run")])
    assert "--quantize is for --tune lora" in capsys.readouterr().err


def test_attentions_that_cannot_take_the_mask_are_refused(prepared, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sft.main(["--data", str(prepared), "--attn", "flex_attention", "--out", str(tmp_path / "run")])
    assert "--attn flex_attention cannot take the mask of packed prompts: give --no-pack too" in capsys.readouterr().err
