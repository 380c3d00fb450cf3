"""The packed forward against the model's own plain forward, one per answer, on three families of backbones."""

import pytest
import torch
import transformers
from PIL import Image

import demo
import mllm
import prompts as prompt_trees

TITLES = ["Toy Story", "Toy Story 2", "Heat", "<|im_end|> <|image_pad|> <image>", "Amélie 😀", "Up"]


def tokenizer(folder):
    demo.build_tiny(folder, TITLES, width=64)
    return mllm.load_tokenizer(folder)


def tiny_config(family: str, ids: dict, vocabulary: int):
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": None}
    if family == "llava_next":
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": 56, "patch_size": 14, "projection_dim": 32, "model_type": "clip_vision_model"}
        return transformers.LlavaNextConfig(
            text_config={"model_type": "mistral", **text, "head_dim": 16, "sliding_window": None},
            vision_config=vision,
            image_token_index=ids["<|image_pad|>"],
            image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
            vision_feature_layer=-1,
        )
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    tokens = {"image_token_id": ids["<|image_pad|>"], "vision_start_token_id": ids["<|vision_start|>"]}
    tokens |= {"vision_end_token_id": ids["<|vision_end|>"], "video_token_id": ids["<|endoftext|>"]}
    if family == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl", "llava_next"])
def backbone(request, tmp_path_factory):
    """(packed model, prompts, catalogue, image processor, PIL images) of one family, images of several sizes."""
    folder = tmp_path_factory.mktemp(request.param)
    tokens = tokenizer(folder / "tokenizer")
    ids = {t: tokens.convert_tokens_to_ids(t) for t in tokens.all_special_tokens}
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        tiny_config(request.param, ids, len(tokens)), attn_implementation="sdpa"
    )
    model.requires_grad_(False).eval()
    with torch.no_grad():  # larger weights than a fresh model's, so that a wrong mask or position shows
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    if request.param == "llava_next":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=[[56, 112], [112, 112]],
        )
    else:
        processor = mllm.load_image_processor(folder / "tokenizer", 10000)
    sizes = [(60, 90), (112, 56), (84, 84), None, (28, 140), (100, 75)]
    generator = torch.Generator().manual_seed(1)
    paths = []
    for number, size in enumerate(sizes):
        paths.append(folder / f"{number}.png" if size else None)
        if size:
            pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(paths[-1])
    encoded = folder / "encoded"
    encoded.mkdir()
    mllm.encode_items(model, tokens, processor, TITLES, paths, encoded)
    catalogue = mllm.Catalogue([{"item": str(i), "title": t, "image": None} for i, t in enumerate(TITLES)], encoded)
    prompts = prompt_trees.Prompts(tokens, model.config.image_token_id, catalogue, candidate_images=True)
    images = [mllm.open_image(path) if path else None for path in paths]
    return mllm.PackedMLLM(model), prompts, catalogue, processor, images


def plain_logps(backbone, tree: list[prompt_trees.Node]) -> list[torch.Tensor]:
    """The log-probability of each scored node by the model's own forward over its whole path, pixels and all."""
    packed, _, _, processor, images = backbone
    core, result = packed.core, []
    for node in (node for node in tree if node.scored):
        path, step = [node], node
        while step.parent is not None:
            step = tree[step.parent]
            path.insert(0, step)
        ids = torch.tensor([[token for part in path for token in part.ids]])
        rows = [row for part in path for row in part.images]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if rows:
            inputs |= processor(images=[images[row] for row in rows], return_tensors="pt")
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == core.config.image_token_id).int()
        logps = core(**inputs).logits[0].log_softmax(-1)
        end = ids.shape[1]
        start = end - len(node.ids)
        result.append(logps[torch.arange(start - 1, end - 1), ids[0, start:]].sum())
    return result


def rows():
    first = prompt_trees.Row("a", [0, 1, 3, 4], 5, [2, 5, 0, 1, 3, 4], 2)
    second = prompt_trees.Row("b", [4], 0, [0, 3, 2, 5, 1], 3)
    return [first, second]


def test_packed_equals_separate_forwards(backbone):
    packed, prompts, catalogue, *_ = backbone
    trees = [prompts.evaluation_tree(row, task) for row in rows() for task in ("rank", "yesno")]
    trees += [prompts.pair_tree(row, kind) for row in rows() for kind in ("rank", "yes", "no")]
    with torch.no_grad():
        found = packed(packed.collate(trees, catalogue))
        expected = torch.stack([logp for tree in trees for logp in plain_logps(backbone, tree)])
    assert len(found) == 6 + 2 * 6 + 5 + 2 * 5 + 12
    assert expected.std() > 1  # the answers do differ
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_packed_gradients_equal_separate_forwards(backbone):
    packed, prompts, catalogue, *_ = backbone
    weights = [p.requires_grad_(True) for p in packed.core.model.language_model.parameters()]
    trees = [prompts.pair_tree(rows()[0], "rank"), prompts.pair_tree(rows()[1], "yes")]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    try:
        found = torch.autograd.grad((packed(packed.collate(trees, catalogue)) * signs).sum(), weights)
        expected = torch.stack([logp for tree in trees for logp in plain_logps(backbone, tree)])
        expected = torch.autograd.grad((expected * signs).sum(), weights)
    finally:
        packed.requires_grad_(False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * max(1.0, float(other.abs().max())), rtol=1e-4)


@pytest.mark.parametrize("relative", [True, False])
def test_noisy_gradients_of_the_packed_model_do_not_depend_on_checkpointing(backbone, relative):
    import copy

    from hanorec_loss import noisy_lora

    packed, prompts, catalogue, *_ = backbone
    batch = packed.collate([prompts.pair_tree(rows()[0], "rank")], catalogue)
    found = {}
    for mode in (None, False, True):
        model = mllm.PackedMLLM(mllm.add_lora(copy.deepcopy(packed.core), 4, 8, 0.0, seed=0))
        assert all(".language_model." in name for name, p in model.named_parameters() if p.requires_grad)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero in a fresh adapter: nothing would flow into A
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        if mode is not None:
            model.enable_checkpointing(reentrant=mode)
        model.train()
        with noisy_lora(model, 0.3, relative, torch.Generator().manual_seed(1)):
            (model(batch) * torch.tensor([1.0, -1.0])).sum().backward()
        found[mode] = [p.grad for p in model.parameters() if p.requires_grad]
        assert any(float(grad.abs().max()) > 0 for grad in found[mode])
    for mode in (False, True):
        for one, other in zip(found[mode], found[None], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
