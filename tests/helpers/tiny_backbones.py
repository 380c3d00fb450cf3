"""A tiny untrained backbone of each family, from its own config class, with its own image processor."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

from hanorec.data.folder import Items
from hanorec.model.images import ImageTokens, encode_items, open_image
from hanorec.model.load import load_image_processor, load_model, load_tokenizer
from hanorec.model.packing import PackedMLLM
from hanorec.model.prompts import Prompts
from hanorec.model.template import load_template
from hanorec.model.tiny import CHATML, build_tiny
from hanorec.run.files import UserError

TITLES = ["Toy Story", "Toy Story 2", "Heat", "<|im_end|> <|image_pad|> <image>", "Amélie 😀", "Up"]
CHATML_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TOKENS = {  # (image token, the text for an image in the chat template, more tokens of the family)
    "gemma3": ("<image_soft_token>", "<start_of_image>", ["<end_of_image>"]),
    "idefics3": ("<image>", "<image>", ["<fake_token_around_image>", "<global-img>"]),
    "internvl": ("<IMG_CONTEXT>", "<IMG_CONTEXT>\n", ["<img>", "</img>"]),
    "paligemma": ("<image>", "<image>", []),
    "llava_onevision": ("<image>", "<image>\n", ["<video>"]),
    "smolvlm": ("<image>", "<image>", ["<fake_token_around_image>", "<global-img>"]),
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "eos_token_id": None, "head_dim": 16, "pad_token_id": 0, "bos_token_id": None}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TILE = {"height": 56, "width": 56}
WINDOWS = {"llava_next_window": 24, "llava_onevision": 24, "gemma3": 24}
FAMILIES = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava_next", "llava_next_window", "llava_onevision"]
FAMILIES += ["idefics3", "smolvlm", "internvl", "gemma3"]


def build_tokenizer(family: str, folder, titles):
    """Write a small tokenizer to `folder`, with the family's tokens and its placeholder in a ChatML template."""
    build_tiny(folder, titles, width=64)
    tokenizer = load_tokenizer(folder)
    if family in TOKENS:
        image, placeholder, more = TOKENS[family]
        tokenizer.add_tokens(list(dict.fromkeys([image, placeholder.strip(), *more])), special_tokens=True)
        template = CHATML.replace(CHATML_IMAGE, placeholder.replace("\n", "{{ '\\n' }}"))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return tokenizer


def build_config(family: str, tokenizer):
    """A tiny config of the family."""
    ids = tokenizer.convert_tokens_to_ids
    text = TEXT | {"vocab_size": len(tokenizer)}
    if family.startswith("qwen"):
        return qwen_config(family, text, ids)
    if family.startswith("llava_next"):
        vision = VISION | {"image_size": 56, "patch_size": 14, "projection_dim": 32, "model_type": "clip_vision_model"}
        return transformers.LlavaNextConfig(
            text_config={"model_type": "mistral", **text, "sliding_window": WINDOWS.get(family)},
            vision_config=vision,
            image_token_index=ids("<|image_pad|>"),
            image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
            vision_feature_layer=-1,
        )
    token = ids(TOKENS[family][0])
    siglip = VISION | {"image_size": 56, "patch_size": 14, "model_type": "siglip_vision_model"}
    windowed = {"use_sliding_window": True, "sliding_window": WINDOWS.get(family), "max_window_layers": 1}
    if family == "llava_onevision":
        return transformers.LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **text, **windowed},
            vision_config=siglip,
            image_token_index=token,
            video_token_index=ids("<video>"),
            image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112]],
            vision_feature_layer=-1,
        )
    if family == "paligemma":
        return transformers.PaliGemmaConfig(
            text_config={"model_type": "gemma", **text},
            vision_config=siglip | {"projection_dim": 32},
            image_token_index=token,
            projection_dim=32,
            hidden_size=32,
        )
    if family == "internvl":
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision |= {"image_size": [56, 56], "patch_size": [14, 14]}
        return transformers.InternVLConfig(
            text_config={"model_type": "qwen2", **text}, vision_config=vision, image_token_id=token, image_seq_length=4
        )
    if family == "gemma3":
        layers = {"sliding_window": WINDOWS[family], "layer_types": ["sliding_attention", "full_attention"]}
        layers |= {"num_hidden_layers": 2, "query_pre_attn_scalar": 16}
        return transformers.Gemma3Config(
            text_config={**text, **layers},
            vision_config=siglip,
            mm_tokens_per_image=4,
            image_token_index=token,
            boi_token_index=ids("<start_of_image>"),
            eoi_token_index=ids("<end_of_image>"),
        )
    config_class = {"idefics3": transformers.Idefics3Config, "smolvlm": transformers.SmolVLMConfig}[family]
    vision = VISION | {"image_size": 56, "patch_size": 14}
    text = {"model_type": "llama", **text}
    return config_class(text_config=text, vision_config=vision, image_token_id=token, scale_factor=2)


def qwen_config(family: str, text: dict, ids):
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    tokens = {"image_token_id": ids("<|image_pad|>"), "vision_start_token_id": ids("<|vision_start|>")}
    tokens |= {"vision_end_token_id": ids("<|vision_end|>"), "video_token_id": ids("<|endoftext|>")}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    if family == "qwen3_vl":
        vision |= {"depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16, "patch_size": 14}
        return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    if family == "qwen2_5_vl":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)


def build_image_processor(family: str):
    """The family's image processor without torchvision. Its sizes fit the tiny vision tower."""
    names = {"llava_next_window": "llava_next", "internvl": "got_ocr2", "paligemma": "siglip"}
    name = names.get(family, "qwen2_vl" if family.startswith("qwen") else family)
    module = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    make = next(value for key, value in vars(module).items() if key.endswith("ImageProcessorPil"))
    if family.startswith("llava_next"):
        pinpoints = [[56, 112], [112, 112]]
        return make(size={"shortest_edge": 56}, crop_size=TILE, image_grid_pinpoints=pinpoints)
    if family == "llava_onevision":
        return make(size=TILE, image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112]])
    if family in ("idefics3", "smolvlm"):
        return make(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    return make(size=TILE) if family in ("internvl", "gemma3", "paligemma") else make()


def processor_inputs(family: str, processor, images: list) -> dict:
    """The model's inputs for the images of one prompt, from the family's image processor."""
    if family == "llava_onevision":  # a single image would be cut into tiles, so one is added and removed again
        inputs = processor(images=[[*images, images[0]]], return_tensors="pt")
        inputs = {name: value[: len(images)] for name, value in inputs.items()}
        return inputs | {"batch_num_images": torch.tensor([len(images) + 1])}
    nested = family in ("idefics3", "smolvlm")
    inputs = dict(processor(images=[images] if nested else images, return_tensors="pt"))
    return {name: value for name, value in inputs.items() if name not in ("num_patches", "num_crops")}


def build_processor(family: str, folder, image_processor, monkeypatch):
    """The family's processor. If it has a video part, which needs torchvision, an empty object replaces that part."""
    name = family.replace("_window", "")
    module = importlib.import_module(f"transformers.models.{name}.processing_{name}")
    tokenizer = load_tokenizer(folder)
    attributes = {}
    if family == "gemma3":
        attributes = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": TOKENS[family][0]}
    elif family == "internvl":
        attributes = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<|endoftext|>"}
        attributes["context_image_token"] = "<IMG_CONTEXT>"
    for attribute, token in attributes.items():
        setattr(tokenizer, attribute, token)
        setattr(tokenizer, f"{attribute}_id", tokenizer.convert_tokens_to_ids(token))
    count = {"idefics3": "image_seq_len", "smolvlm": "image_seq_len"}.get(family, "image_seq_length")
    options = {count: 4} if family in ("idefics3", "smolvlm", "gemma3", "internvl") else {}
    if family.startswith("llava_next"):
        options = {"patch_size": 14, "num_additional_image_tokens": 1, "image_token": "<|image_pad|>"}
        options["vision_feature_select_strategy"] = "default"
    if family == "llava_onevision":
        options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    if family not in ("llava_next", "llava_next_window", "idefics3", "gemma3"):
        monkeypatch.setattr(module.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        options["video_processor"] = SimpleNamespace(model_input_names=[], unused_input_names=[])
    if family == "smolvlm":
        monkeypatch.setattr(module, "num2words", str)  # it would spell out the number of frames of a video
    wanted = name.replace("_", "") + "processor"
    processor_class = next(v for k, v in vars(module).items() if k.lower().replace("_", "") == wanted)
    return processor_class(image_processor=image_processor, tokenizer=tokenizer, **options)


def build_backbone(family: str, folder, titles) -> None:
    """Write a tiny backbone of the family to `folder`. It loads like a pretrained one."""
    tokenizer = build_tokenizer(family, folder, titles)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        build_config(family, tokenizer), attn_implementation="sdpa"
    )
    with torch.no_grad():  # larger weights than those of a fresh model make a wrong mask or position visible
        for name, parameter in model.named_parameters():
            if "mm_input_projection" in name or "position_embed" in name:  # zeros in a fresh model
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    build_image_processor(family).save_pretrained(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request, tmp_path_factory):
    """A tiny backbone of each family, with its prompts, image tokens, image processor, and images of several sizes."""
    folder = tmp_path_factory.mktemp(request.param)
    build_backbone(request.param, folder, TITLES)
    model = load_model(folder)
    try:
        processor = load_image_processor(folder, 13000)
    except UserError as error:
        if request.param not in ("idefics3", "smolvlm") or "None of these classes could be imported" not in str(error):
            raise
        pytest.skip(
            f"transformers {transformers.__version__} hides this processor where torchvision is missing: {error}"
        )
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
    encode_items(model, load_tokenizer(folder), processor, TITLES, paths, encoded)
    items = Items([{"item": str(i), "title": t, "image": None} for i, t in enumerate(TITLES)])
    tokens = ImageTokens(items, encoded)
    return SimpleNamespace(
        family=request.param,
        folder=folder,
        packed=PackedMLLM(model),
        prompts=Prompts(load_template(folder), items, tokens, candidate_images=True),
        tokens=tokens,
        processor=processor,
        images=[open_image(path) if path else None for path in paths],
    )
