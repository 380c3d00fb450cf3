# ruff: noqa: F401, F811 (the fixture `backbone` is imported)
"""The packed and the plain forward equal the model's own forward, for every family in tiny_backbones."""

import copy
from types import SimpleNamespace

import pytest
import tiny_backbones
import torch
from tiny_backbones import TITLES, backbone

from hanorec.data.folder import Example, Items
from hanorec.model import attention, families
from hanorec.model import prompts as prompt_trees
from hanorec.model.check import load_packed
from hanorec.model.families import decoder_name
from hanorec.model.images import encode_images, encode_items
from hanorec.model.load import load_model, load_tokenizer
from hanorec.model.lora import add_lora
from hanorec.model.packing import PackedMLLM
from hanorec.model.prompts import Prompts, fit_to_length
from hanorec.model.template import ChatTemplate, load_template
from hanorec.model.trees import Node, tree_length
from hanorec.run.files import UserError
from hanorec_loss import noisy_lora


def path_to(tree: list[Node], node: Node) -> list[Node]:
    """The nodes from the root to this node."""
    path = [node]
    while path[0].parent is not None:
        path.insert(0, tree[path[0].parent])
    return path


def plain_logps(backbone, tree: list[Node]) -> list[torch.Tensor]:
    """The log-probability of each scored node, by the model's own forward over its whole path with pixels."""
    core, result = backbone.packed.core, []
    for node in (node for node in tree if node.scored):
        path = path_to(tree, node)
        ids = torch.tensor([[token for part in path for token in part.ids]])
        images = [backbone.images[item] for part in path for item in part.images]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        kinds = (ids == core.config.image_token_id).int()
        if images:
            inputs |= tiny_backbones.processor_inputs(backbone.family, backbone.processor, images)
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = kinds
        if backbone.family == "gemma3":
            inputs["token_type_ids"] = kinds
        logps = core(**inputs).logits[0].log_softmax(-1)
        end = ids.shape[1]
        start = end - len(node.ids)
        result.append(logps[torch.arange(start - 1, end - 1), ids[0, start:]].sum())
    return result


def examples():
    first = Example("a", [0, 1, 3, 4], 5, [2, 5, 0, 1, 3, 4], 2)
    second = Example("b", [4], 0, [0, 3, 2, 5, 1], 3)
    return [first, second]


@pytest.mark.parametrize("pack", [True, False])
def test_packed_and_plain_equal_separate_forwards(backbone, pack):
    packed, prompts = PackedMLLM(backbone.packed.core, pack), backbone.prompts
    trees = [prompts.evaluation_tree(example, task) for example in examples() for task in ("rank", "yesno")]
    trees += [prompts.pair_tree(example, kind) for example in examples() for kind in ("rank", "yes", "no")]
    with torch.no_grad():
        found = packed(packed.collate(trees, backbone.tokens))
        expected = torch.stack([logp for tree in trees for logp in plain_logps(backbone, tree)])
    assert len(found) == 6 + 2 * 6 + 5 + 2 * 5 + 12
    assert expected.std() > 1  # the answers' scores differ
    if backbone.family in tiny_backbones.WINDOWS:
        assert max(map(tree_length, trees)) > 2 * tiny_backbones.WINDOWS[backbone.family]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pack", [True, False])
def test_gradients_equal_separate_forwards(backbone, pack):
    packed, prompts = PackedMLLM(backbone.packed.core, pack), backbone.prompts
    weights = [p.requires_grad_(True) for p in packed.core.get_decoder().parameters()]
    trees = [prompts.pair_tree(examples()[0], "rank"), prompts.pair_tree(examples()[1], "yes")]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    try:
        found = torch.autograd.grad((packed(packed.collate(trees, backbone.tokens)) * signs).sum(), weights)
        expected = torch.stack([logp for tree in trees for logp in plain_logps(backbone, tree)])
        expected = torch.autograd.grad((expected * signs).sum(), weights)
    finally:
        packed.requires_grad_(False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * max(1.0, float(other.abs().max())), rtol=1e-4)


def test_plain_language_modelling_equals_the_packed(backbone):
    """The root has scored titles, with and without an answer behind it."""
    trees = [backbone.prompts.language_tree([0, 1, 3, 4, 5], 4096, candidates) for candidates in ((), (2, 5))]
    assert all(tree[0].scored for tree in trees)
    found = []
    for pack in (True, False):
        model = PackedMLLM(backbone.packed.core, pack)
        with torch.no_grad():
            found.append(model(model.collate(trees, backbone.tokens)))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("pack", [True, False])
def test_images_encoded_in_the_step_give_the_stored_numbers(backbone, pack):
    """Gradients are equal too. An image that occurs several times is encoded once."""
    live = copy.copy(backbone.tokens)
    live.live, live.paths = (backbone.folder, backbone.processor), [f"{item}.png" for item in range(len(TITLES))]
    model = PackedMLLM(backbone.packed.core, pack).train()
    trees = [backbone.prompts.pair_tree(examples()[0], kind) for kind in ("rank", "yes")]
    weights = [p.requires_grad_(True) for p in model.core.get_decoder().parameters()]
    found = []
    try:
        for tokens in (backbone.tokens, live):
            batch = model.collate(trees, tokens)
            logps = model(batch)
            found.append((logps.detach(), *torch.autograd.grad(logps[0] - logps[1], weights)))
    finally:
        model.eval().requires_grad_(False)
    assert len(set(batch.distinct)) < len(batch.distinct) == len(batch.grids) and not len(batch.image_tokens)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * max(1.0, float(other.abs().max())), rtol=1e-4)


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "llava_next"], indirect=True)
def test_an_image_that_was_exchanged_is_refused(backbone):
    """With more or fewer tokens it would move the tokens of the images after it."""
    live = copy.copy(backbone.tokens)
    live.live, live.paths = (backbone.folder, backbone.processor), [f"{item}.png" for item in range(len(TITLES))]
    live.paths[0] = "4.png"
    batch = backbone.packed.collate([backbone.prompts.pair_tree(examples()[0], "rank")], live)
    with pytest.raises(UserError, match="image of item 0 has changed since the data was encoded"):
        backbone.packed(batch)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_batches_before_one_backward(backbone, reentrant):
    """Checkpointing computes the first batch again after the second. It must use the first batch's own forest."""
    trees = [backbone.prompts.pair_tree(example, "rank") for example in examples()]
    batches = [backbone.packed.collate([tree], backbone.tokens) for tree in trees]
    gradients = []
    for checkpointing in (False, True):
        model = PackedMLLM(load_model(backbone.folder))
        weights = [p.requires_grad_(True) for p in model.core.get_decoder().parameters()]
        if checkpointing:
            model.enable_checkpointing(reentrant)
        model.train()
        sum(model(batch)[0] for batch in batches).backward()
        gradients.append([p.grad for p in weights])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=1e-4)


def test_prompts_equal_those_of_the_models_processor(backbone, monkeypatch):
    """The model's own processor gives the same tokens for the same chat with two images."""
    processor = tiny_backbones.build_processor(backbone.family, backbone.folder, backbone.processor, monkeypatch)
    images = [backbone.images[0], backbone.images[1]]
    content = [{"type": "text", "text": "Toy Story\n"}, {"type": "image"}, {"type": "text", "text": "Toy Story 2\n"}]
    content += [{"type": "image"}, {"type": "text", "text": "Heat\n"}]
    messages = [{"role": "user", "content": content}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = processor(text=[text], images=[images], return_tensors="pt")["input_ids"][0].tolist()
    node = Node(None, list(backbone.prompts.template.head))
    for item, image in ((0, True), (1, True), (2, False)):
        backbone.prompts.add_item(node, item, image)
    assert node.ids + backbone.prompts.template.tail == expected


def test_an_images_tokens_do_not_depend_on_its_batch(backbone):
    """Encode the images one by one and all together."""
    images = [image for image in backbone.images if image]
    together, _ = encode_images(backbone.packed.core, backbone.processor, images)
    for image, tokens in zip(images, together, strict=True):
        (alone,), _ = encode_images(backbone.packed.core, backbone.processor, [image])
        torch.testing.assert_close(alone, tokens, atol=1e-5, rtol=1e-4)
    layers = 3 if backbone.family == "qwen3_vl" else 1
    assert {tokens.shape[1] for tokens in together} == {32 * layers}
    assert backbone.tokens.means().shape == (len(TITLES), 32)


def loaded_from(backbone):
    """What the check reads of an Encoding."""
    return SimpleNamespace(source=backbone.folder, manifest={"max_pixels": 13000}, backbone="it", trust=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_checked(backbone, monkeypatch, dtype):
    """A correct model passes. A wrong mask, wrong positions or wrong features are refused in one line."""
    core = load_model(backbone.folder, dtype)
    before = {name: (weight.data_ptr(), weight.dtype) for name, weight in core.named_parameters()}
    for pack in (True, False):
        load_packed(core, loaded_from(backbone), pack, "cpu")
    broken = {"gemma3": ("BIDIRECTIONAL", ()), "qwen3_vl": ("deep_features", lambda *_: {})}
    plain = ("positions", lambda core, ids, grids: torch.arange(len(ids))[None] // 2)
    if backbone.family in tiny_backbones.WINDOWS and backbone.family != "gemma3":
        pieces = attention.Forest.pieces
        monkeypatch.setattr(attention.Forest, "pieces", lambda forest, window: pieces(forest, None))
    else:
        monkeypatch.setattr(families, *broken.get(backbone.family, plain))
    line = r"packed prompts do not work with it .log-probabilities differ by .*; give --no-pack"
    with pytest.raises(UserError, match=line):
        load_packed(core, loaded_from(backbone), True, "cpu")
    load_packed(core, loaded_from(backbone), False, "cpu")
    assert before == {name: (weight.data_ptr(), weight.dtype) for name, weight in core.named_parameters()}


@pytest.mark.parametrize("backbone", ["qwen2_5_vl"], indirect=True)
def test_a_forward_that_raises_fails_the_check(backbone, monkeypatch):
    def broken(*_, **__):
        raise TypeError("unexpected keyword")

    monkeypatch.setattr(families, "positions", broken)
    with pytest.raises(UserError, match=r"packed prompts do not work with it .TypeError: unexpected keyword"):
        load_packed(backbone.packed.core, loaded_from(backbone), True, "cpu")


@pytest.mark.parametrize("backbone", ["qwen2_5_vl"], indirect=True)
def test_out_of_memory_does_not_fail_the_check(backbone, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(families, "positions", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_packed(backbone.packed.core, loaded_from(backbone), True, "cpu")


@pytest.mark.parametrize("backbone", ["qwen2_5_vl"], indirect=True)
def test_the_first_token_of_a_prompt_cannot_be_scored(backbone):
    ids = backbone.prompts.complete_prompt(["Heat"]).ids
    for pack in (True, False):
        with pytest.raises(ValueError, match="no token predicts it"):
            PackedMLLM(backbone.packed.core, pack).collate([[Node(None, ids, scored=[0])]], backbone.tokens)


@pytest.mark.parametrize("backbone", ["qwen2_5_vl"], indirect=True)
def test_image_tokens_with_another_dtype_than_the_model_are_refused(backbone, monkeypatch, tmp_path):
    image_tokens = families.image_tokens
    monkeypatch.setattr(families, "image_tokens", lambda *args: [image.double() for image in image_tokens(*args)])
    tools = backbone.packed.core, backbone.prompts.tokenizer, backbone.processor
    with pytest.raises(UserError, match=r"the model is torch.float32, but its image tokens are torch.float64"):
        encode_items(*tools, ["Heat"], [backbone.folder / "0.png"], tmp_path)


def test_layers_without_a_known_mask_are_refused():
    text = SimpleNamespace(layer_types=["linear_attention", "full_attention"])
    core = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    with pytest.raises(UserError, match="no mask for layers of linear_attention: give --no-pack"):
        attention.install(core)


@pytest.mark.parametrize("backbone", ["smolvlm"], indirect=True)
@pytest.mark.parametrize(
    ("template", "after"),
    [
        (
            "User:{% if m[0].content[0].type != 'image' %} {% endif %}"
            "{% for p in m[0].content %}{{ p.text or '<image>' }}",
            "",
        ),
        (
            "{% for p in m[0].content if p.type == 'image' %}<image>\n{% endfor %}"
            "{% for p in m[0].content if p.type != 'image' %}{{ p.text }}",
            "\n",
        ),
    ],
    ids=["space only before text", "images first"],
)
def test_chat_templates_that_place_images_differently(backbone, template, after):
    """The text around an image does not include text that the template writes elsewhere."""
    tokenizer = load_tokenizer(backbone.folder)
    tokenizer.chat_template = (
        "{% set m = messages %}" + template + "{% endfor %}{% for x in m[1:] %}{{ x.content[0].text }}"
    )
    tokenizer.chat_template += "{% endfor %}"
    text = ("<image>", "[{}]")
    template = ChatTemplate(tokenizer, backbone.prompts.template.image_token, text)
    around = [*template.image_head, template.image_token, *template.image_tail]
    assert tokenizer.decode(around) == "[<image>]" + after


@pytest.mark.parametrize("backbone", ["idefics3"], indirect=True)
def test_a_tokenizer_without_the_familys_tokens_is_refused(backbone):
    text = ("<image>", "<no_such_token>{}")
    with pytest.raises(UserError, match="has no token <no_such_token>"):
        ChatTemplate(backbone.prompts.tokenizer, backbone.prompts.template.image_token, text)


@pytest.mark.parametrize(("relative", "pack"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "qwen3_vl", "llava_next", "gemma3"], indirect=True)
def test_noisy_gradients_do_not_depend_on_checkpointing(backbone, relative, pack):
    batch = PackedMLLM(backbone.packed.core, pack).collate(
        [backbone.prompts.pair_tree(examples()[0], "rank")], backbone.tokens
    )
    found = {}
    for mode in (None, False, True):
        model = PackedMLLM(add_lora(copy.deepcopy(backbone.packed.core), 4, 8, 0.0, seed=0), pack)
        assert all(".language_model." in name for name, p in model.named_parameters() if p.requires_grad)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # B is zero in a fresh adapter, and A would get no gradient
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


def test_lora_lies_in_the_language_model_alone(backbone):
    model = add_lora(copy.deepcopy(backbone.packed.core), 4, 8, 0.0, seed=0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    decoder = decoder_name(backbone.packed.core)
    assert names and all(f".{decoder}.layers." in name for name in names)
