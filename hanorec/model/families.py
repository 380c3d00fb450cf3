"""What differs between families of image-text models, in one place; everything else treats them alike.

Each family's processor writes other text around an image's tokens, each image processor has another knob for the size,
and some models want more than the tokens: grids for their positions (Qwen), features for deeper layers (Qwen3-VL),
attention in both directions inside an image (Gemma 3), a window in some layers (Gemma 3, Mistral, Qwen2). A family that
is not named here is treated like the rest, and the check of a loaded model (check.py) decides whether that is right.

Left out: splitting an image into tiles with text between them (Idefics3, SmolVLM, Gemma 3's pan and scan) is switched
off, since one tile has about as many pixels as --max-pixels allows. LLaVA-OneVision sees each image in one view, as it
does by itself if a prompt has several.
"""

import inspect
from types import SimpleNamespace

import torch
from torch import nn

from hanorec.run.files import UserError

# What the chat template writes for an image, and what the family's processor makes of it; {} are the image tokens
IMAGE_TEXTS = {
    "gemma3": ("<start_of_image>", "\n\n<start_of_image>{}<end_of_image>\n\n"),
    "idefics3": ("<image>", "<fake_token_around_image><global-img>{}<fake_token_around_image>"),
    "internvl": ("<IMG_CONTEXT>", "<img>{}</img>"),
    "smolvlm": ("<image>", "<fake_token_around_image><global-img>{}<fake_token_around_image>"),
}
BIDIRECTIONAL = ("gemma3",)  # the tokens of an image attend to each other in both directions
# Families whose forward takes all image tokens as one tensor; the others take a list of tensors
ONE_TENSOR = ("aria", "aya_vision", "cohere2_vision", "fast_vlm", "gemma3", "gemma3n", "got_ocr2", "idefics3")
ONE_TENSOR += ("internvl", "ovis2", "paligemma", "perception_lm", "qianfan_ocr", "smolvlm", "vipllava")
NOT_FOR_THE_MODEL = ("num_patches", "num_crops", "rows", "cols")  # an image processor tells them its processor alone


def limit_pixels(processor, max_pixels: int) -> None:
    """Set an image processor so that an image has at most max_pixels pixels, or the least that the family allows."""
    pinpoints = getattr(processor, "image_grid_pinpoints", None)
    if pinpoints:  # LLaVA-NeXT counts in whole tiles: those that fit, or the smallest
        fitting = [p for p in pinpoints if p[0] * p[1] <= max_pixels]
        processor.image_grid_pinpoints = fitting or [min(pinpoints, key=lambda p: p[0] * p[1])]
    elif hasattr(processor, "crop_to_patches"):  # InternVL likewise; with several tiles it adds a thumbnail
        processor.max_patches = max(1, max_pixels // (processor.size["height"] * processor.size["width"]))
        processor.crop_to_patches = processor.max_patches > 1
    elif hasattr(processor, "merge_size"):  # Qwen, whose "edges" are numbers of pixels
        processor.size = {"shortest_edge": min(56 * 56, max_pixels), "longest_edge": max_pixels}
    for switch in ("do_image_splitting", "do_pan_and_scan"):
        if hasattr(processor, switch):
            setattr(processor, switch, False)


def image_inputs(processor, images: list, device) -> dict[str, torch.Tensor]:
    """The image processor's outputs for PIL images, each an image of its own in one prompt, on `device`."""
    if "batch_num_images" in processor.model_input_names:  # LLaVA-OneVision: one view each, if there are several
        inputs = processor(images=[[*images, images[-1]]], return_tensors="pt")
        inputs = {name: inputs[name][:-1] for name in ("pixel_values", "image_sizes")}
        inputs["batch_num_images"] = torch.tensor([len(images) + 1])
    else:
        nested = hasattr(processor, "do_image_splitting")  # Idefics3 counts the tiles of each prompt, not of each image
        inputs = processor(images=[[image] for image in images] if nested else images, return_tensors="pt")
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}


def match_tiles(core, processor) -> None:
    """Let a model that computes an image's tiles itself (LLaVA-NeXT) choose among those of the image processor."""
    if getattr(processor, "image_grid_pinpoints", None):
        core.config.image_grid_pinpoints = processor.image_grid_pinpoints


def image_tokens(core, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The image tokens of each image of `image_inputs`: [n, d], or [n, d + layers * d] if deeper layers take features
    too (Qwen3-VL)."""
    if not hasattr(core, "get_image_features"):
        raise UserError(f"a {core.config.model_type} has no get_image_features: its images cannot be encoded")
    output = core.get_image_features(**for_model(inputs), return_dict=True)
    tokens = list(output.pooler_output)
    if "num_patches" in inputs:  # InternVL answers by tile
        tiles = torch.as_tensor(inputs["num_patches"]).tolist()
        tokens = [image.flatten(0, 1) for image in torch.stack(tokens).split(tiles)]
    deep = getattr(output, "deepstack_features", None) or []  # by layer: of all images, or by image
    deep = [layer.split(list(map(len, tokens))) if torch.is_tensor(layer) else layer for layer in deep]
    return [torch.cat([one, *(layer[number] for layer in deep)], dim=-1) for number, one in enumerate(tokens)]


def for_model(inputs: dict) -> dict:
    """The inputs without those that only a processor needs."""
    return {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}


# ---------------------------------------------------------------------------------------------------------------------
# The language model


def decoder_name(core) -> str:
    """The name of the language model inside an image-text model: model.language_model, model.text_model, ..."""
    decoder = core.get_decoder()
    name = next((name for name, module in core.named_modules() if module is decoder), "")
    if not name:
        raise UserError(f"a {core.config.model_type} has no language model inside that could be trained by itself")
    return name


def inner(core):
    """The model inside, without a head. It calls the vision tower and computes positions."""
    return getattr(core, "model", core)


def positions(core, ids: list[int], grids: list[torch.Tensor]) -> torch.Tensor:
    """[P, len(ids)]: positions from 0. P is 3 if the backbone has multimodal positions (Qwen), else 1."""
    if not hasattr(inner(core), "get_rope_index"):
        return torch.arange(len(ids))[None]
    if not grids:
        return torch.arange(len(ids)).expand(3, -1)
    row = torch.tensor([ids])
    kinds = (row == core.config.image_token_id).int()
    return inner(core).get_rope_index(row, mm_token_type_ids=kinds, image_grid_thw=torch.stack(grids))[0][:, 0]


def check_layers(config) -> None:
    """UserError if a layer of the language model attends otherwise than to all earlier tokens or to a window."""
    other = set(getattr(config.get_text_config(), "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if other:
        raise UserError(f"packing knows no mask for layers of {', '.join(sorted(other))}: give --no-pack")


def image_numbers(config, ids: torch.Tensor) -> torch.Tensor | None:
    """[T]: 1, 2, ... for the tokens of the first, second, ... image in ids [T], 0 for others.

    None if the family attends to images like text.
    """
    if config.model_type not in BIDIRECTIONAL:
        return None
    is_image = ids == config.image_token_id
    starts = is_image & ~nn.functional.pad(is_image, (1, 0))[:-1]
    return torch.where(is_image, starts.cumsum(0), 0)


def deep_features(tokens: torch.Tensor, width: int, is_image: torch.Tensor) -> dict:
    """The language model's further arguments, for features [n, layers * width] that its first layers add."""
    if tokens.shape[-1] <= width:
        return {}
    return {"visual_pos_masks": is_image, "deepstack_visual_embeds": list(tokens[:, width:].split(width, dim=-1))}


# ---------------------------------------------------------------------------------------------------------------------
# The model's own forward


def token_inputs(core, ids: torch.Tensor, valid: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the arguments of the model's own forward for tokens ids [B, L]. valid [B, L] is 0 for padding."""
    is_image = (ids == core.config.image_token_id).int()
    accepted = inspect.signature(core.forward).parameters
    types = {name: is_image for name in ("mm_token_type_ids", "token_type_ids") if name in accepted}
    return {"input_ids": ids, "attention_mask": valid, **types}


def encoder_outputs(core, tokens: torch.Tensor, grids: torch.Tensor) -> dict:
    """Return the arguments that replace pixels in the model's own forward, so that its vision tower does not run.

    Args:
        tokens: [all, d], the image tokens of all images in order (see `image_tokens`).
        grids: [images, 3], zeros if the model's positions need none.
    """
    if not len(grids):
        return {}
    width = core.get_input_embeddings().weight.shape[1]
    first, *deep = tokens.to(core.device, core.dtype).split(width, dim=-1)
    # In one tensor, each token is an image of its own: [all, 1, d] fits images of any length
    pooled = first[:, None] if core.config.model_type in ONE_TENSOR else [first]
    output = SimpleNamespace(pooler_output=pooled, deepstack_features=[[layer] for layer in deep])
    inputs = {"mm_encoder_outputs": {"image": output}}
    if hasattr(inner(core), "get_rope_index"):
        inputs["image_grid_thw"] = grids.to(core.device)
    return inputs


def own_logits(core, ids: torch.Tensor, images: dict, keep: int = 0) -> torch.Tensor:
    """Return the logits of the model's own forward over ids [1, L].

    Args:
        images: `image_inputs`, or what stands for them (`encoder_outputs`).
        keep: only the last `keep` tokens are computed, if the model can; 0: all of them.

    Returns: [1, L or keep, V].
    """
    inputs = token_inputs(core, ids, torch.ones_like(ids)) | for_model(images)
    if "logits_to_keep" in inspect.signature(core.forward).parameters:
        inputs["logits_to_keep"] = keep
    return core(**inputs, use_cache=False).logits
