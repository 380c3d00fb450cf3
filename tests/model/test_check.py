"""The check of a loaded model, for a deep model in half precision that is sure of its answers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_backbones
import torch
import transformers

from hanorec.model import check, families
from hanorec.model.load import load_model
from hanorec.model.packing import PackedMLLM
from hanorec.run.files import UserError

SEEDS = (1, 5, 12)  # in bfloat16, the answers' log-probabilities differ by 0.07 to 0.13 nats
SURE, RIVAL = 25.0, 24.0  # logits of the scored token and of one other; bfloat16 has steps of 0.125 here


def build(folder, seed):
    """Write a Qwen2.5-VL of twelve layers to `folder`."""
    tokenizer = tiny_backbones.build_tokenizer("qwen2_5_vl", folder, tiny_backbones.TITLES)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 4}
    text = tiny_backbones.TEXT | sizes | {"vocab_size": len(tokenizer), "head_dim": 64}
    config = tiny_backbones.qwen_config("qwen2_5_vl", text, tokenizer.convert_tokens_to_ids)
    config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
    config.vision_config.out_hidden_size = 256
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3.0)
    model.save_pretrained(folder)
    tiny_backbones.build_image_processor("qwen2_5_vl").save_pretrained(folder)


def make_sure(model, encoding, seed):
    """Change the head: in the check's prompt, each scored token gets the logit SURE and another token RIVAL."""
    head, inputs, batches = model.get_output_embeddings(), [], []
    packed = PackedMLLM(model)
    packed.register_forward_pre_hook(lambda _, args: batches.append(args[0]))
    hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    check.score_both_ways(packed, encoding)
    hook.remove()
    batch = batches[-1]
    hidden = next(tensor for tensor in inputs if tensor.shape[0] == len(batch.predicting))
    weight, generator = head.weight.data, torch.Generator().manual_seed(seed)
    weight *= 10 / float((hidden @ weight.T).abs().max())
    logits = hidden @ weight.T
    change = torch.zeros_like(logits)
    scored = list(zip(batch.predicted_by.tolist(), batch.target.tolist(), strict=True))
    for place, _ in scored:
        rival = int(torch.randint(logits.shape[1], (), generator=generator))
        change[place, rival] = RIVAL - logits[place, rival]
    for place, target in scored:
        change[place, target] = SURE - logits[place, target]
    weight += (torch.linalg.pinv(hidden) @ change).T


@pytest.fixture(scope="module", params=SEEDS)
def sure(request, tmp_path_factory):
    """(the model in float32, what the check reads of its Encoding)."""
    folder = tmp_path_factory.mktemp("sure")
    build(folder, request.param)
    encoding = SimpleNamespace(source=folder, manifest={"max_pixels": 13000}, backbone="it", trust=False)
    model = load_model(folder)
    make_sure(model, encoding, request.param)
    return model, encoding


def wrong_position(monkeypatch):
    """The last token of each node stands one position too late."""
    positions = families.positions

    def late(core, ids, grids):
        found = positions(core, ids, grids).clone()
        found[:, -1] += 1
        return found

    monkeypatch.setattr(families, "positions", late)


def dropped_image(monkeypatch):
    logits = PackedMLLM.packed_logits
    without = lambda packed, batch: logits(packed, replace(batch, image_tokens=batch.image_tokens * 0))  # noqa: E731
    monkeypatch.setattr(PackedMLLM, "packed_logits", without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_sure_is_not_refused(sure, dtype, monkeypatch):
    """Wrong models are refused in half precision too."""
    model, encoding = sure
    model = model.to(dtype)
    check.load_packed(model, encoding, True, "cpu")
    logps, expected = check.score_both_ways(PackedMLLM(model), encoding)
    assert (logps - expected).abs().max() < 1e-4 and expected.min() > -5
    for break_it in (wrong_position, dropped_image):
        with monkeypatch.context() as patch:
            break_it(patch)
            with pytest.raises(UserError, match=r"packed prompts do not work with it .log-probabilities differ"):
                check.load_packed(model, encoding, True, "cpu")
    assert all(weight.dtype == dtype for weight in model.parameters())


def test_weights_come_back_after_an_error(sure):
    model, _ = sure
    model = model.to(torch.bfloat16)
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    seen = []

    def stop(layer, args):
        seen.append((layer.weight.dtype, args[0].dtype))
        raise RuntimeError("stop")

    hook = model.get_decoder().layers[3].mlp.up_proj.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad(), check.in_float32(model):
        model(torch.tensor([[5, 6, 7]]))
    hook.remove()
    assert seen == [(torch.float32, torch.float32)]
    assert before == {name: weight.data_ptr() for name, weight in model.named_parameters()}
    assert not model.get_decoder().layers[3]._forward_pre_hooks and model.dtype == torch.bfloat16


@pytest.mark.parametrize(("attention", "flash"), [("sdpa", False), ("flash_attention_2", True)])
def test_flash_attention_is_compared_in_its_own_dtype(attention, flash):
    """Its kernels refuse float32, so a right model would be refused."""
    assert check.has_flash(SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention))) == flash
