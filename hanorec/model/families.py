"""The differences between families of image-text models, in one place. All other code treats the families alike.

The families differ in
- the text that a family's processor writes around an image's tokens,
- the setting of the image processor that limits an image's size,
- what the language model needs beside the image tokens: grids for positions (Qwen), features for deeper layers
  (Qwen3-VL),
- attention: in both directions inside an image (Gemma 3), or within a window in some layers (Gemma 3, Mistral, Qwen2).

A family that is not named here is treated as the simplest case. The check of a loaded model (check.py) then finds out
whether that is right.

Splitting an image into tiles with text between them (Idefics3, SmolVLM, Gemma 3's pan and scan) is switched off.
LLaVA-OneVision gets each image in one view, as its own processor does for a prompt with several images.
"""

import inspect
from types import SimpleNamespace

import torch
from torch import nn

from hanorec.run.files import UserError

# By family: what the chat template writes for an image, and the text that the family's processor puts in its place
# ({} stands for the image tokens)
IMAGE_TEXTS = {
    "gemma3": ("<start_of_image>", "\n\n<start_of_image>{}<end_of_image>\n\n"),
    "idefics3": ("<image>", "<fake_token_around_image><global-img>{}<fake_token_around_image>"),
    "internvl": ("<IMG_CONTEXT>", "<img>{}</img>"),
    "smolvlm": ("<image>", "<fake_token_around_image><global-img>{}<fake_token_around_image>"),
}
BIDIRECTIONAL = ("gemma3",)  # the tokens of an image attend to each other in both directions
# Families whose forward takes the image tokens of all images in one tensor; the others take a list of tensors
ONE_TENSOR = ("aria", "aya_vision", "cohere2_vision", "fast_vlm", "gemma3", "gemma3n", "got_ocr2", "idefics3")
ONE_TENSOR += ("internvl", "ovis2", "paligemma", "perception_lm", "qianfan_ocr", "smolvlm", "vipllava")
NOT_FOR_THE_MODEL = ("num_patches", "num_crops", "rows", "cols")  # outputs of image processors that no model takes
QWEN_MIN_PIXELS = 56 * 56  # Qwen enlarges smaller images, unless --max-pixels is smaller


# ---------------------------------------------------------------------------------------------------------------------
# Images


def limit_pixels(processor, max_pixels: int) -> None:
    """Set an image processor to at most max_pixels pixels an image, as far as the family allows.

    - Qwen: at most max_pixels.
    - LLaVA-NeXT: its tilings of at most max_pixels, or its smallest one. One tile of the whole image is added.
    - InternVL: as many tiles as max_pixels allows, at least one. With several, one tile of the whole image is added.
    - Others (Gemma 3, PaliGemma, Idefics3, SmolVLM): one view of the family's fixed size. max_pixels has no effect.
      LLaVA-OneVision has one such view too (see `image_inputs`).
    """
    tilings = getattr(processor, "image_grid_pinpoints", None)
    if tilings:
        fitting = [(height, width) for height, width in tilings if height * width <= max_pixels]
        smallest = min(tilings, key=lambda size: size[0] * size[1])
        processor.image_grid_pinpoints = fitting or [smallest]
    elif hasattr(processor, "crop_to_patches"):  # InternVL
        processor.max_patches = max(1, max_pixels // (processor.size["height"] * processor.size["width"]))
        processor.crop_to_patches = processor.max_patches > 1
    elif hasattr(processor, "merge_size"):  # Qwen: an "edge" of its processor is a number of pixels
        processor.size = {"shortest_edge": min(QWEN_MIN_PIXELS, max_pixels), "longest_edge": max_pixels}
    for switch in ("do_image_splitting", "do_pan_and_scan"):
        if hasattr(processor, switch):
            setattr(processor, switch, False)


def pixel_limit(processor) -> int | None:
    """Return the limit that `limit_pixels` set, where the image processor states it as a number of pixels (Qwen)."""
    return int(processor.size["longest_edge"]) if hasattr(processor, "merge_size") else None


def image_inputs(processor, images: list, device) -> dict[str, torch.Tensor]:
    """Return the image processor's outputs on `device`, for PIL images that stand one by one in a prompt."""
    if "batch_num_images" in processor.model_input_names:
        # LLaVA-OneVision cuts a single image into tiles. So one more image is added, and its outputs are removed
        inputs = processor(images=[[*images, images[-1]]], return_tensors="pt")
        inputs = {name: inputs[name][:-1] for name in ("pixel_values", "image_sizes")}
        inputs["batch_num_images"] = torch.tensor([len(images) + 1])  # still counted: after 1, the model expects tiles
    else:
        if hasattr(processor, "do_image_splitting"):  # Idefics3 takes a list of images for each prompt
            images = [[image] for image in images]
        inputs = processor(images=images, return_tensors="pt")
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}


def match_tiles(core, processor) -> None:
    """Give a model that computes an image's tiling itself (LLaVA-NeXT) the tilings of the image processor."""
    if getattr(processor, "image_grid_pinpoints", None):
        core.config.image_grid_pinpoints = processor.image_grid_pinpoints


def image_tokens(core, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the image tokens [n, d] of each image of `image_inputs`.

    If deeper layers take features of the image too (Qwen3-VL), these stand beside the tokens: [n, d + layers * d].
    """
    if not hasattr(core, "get_image_features"):
        raise UserError(f"a {core.config.model_type} has no get_image_features: its images cannot be encoded")
    output = core.get_image_features(**for_model(inputs), return_dict=True)
    tokens = list(output.pooler_output)
    if "num_patches" in inputs:  # InternVL returns one tensor a tile
        tiles = torch.as_tensor(inputs["num_patches"]).tolist()
        tokens = [image.flatten(0, 1) for image in torch.stack(tokens).split(tiles)]
    lengths = [len(image) for image in tokens]
    parts = [tokens]
    for layer in getattr(output, "deepstack_features", None) or []:  # one tensor of all images, or one for each image
        parts.append(layer.split(lengths) if torch.is_tensor(layer) else layer)
    return [torch.cat(image_parts, dim=-1) for image_parts in zip(*parts, strict=True)]


def for_model(inputs: dict) -> dict:
    """Return the outputs of an image processor that are inputs of the model."""
    return {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}


# ---------------------------------------------------------------------------------------------------------------------
# The language model


def decoder_name(core) -> str:
    """Return the name of the language model inside an image-text model: model.language_model, model.text_model, ..."""
    decoder = core.get_decoder()
    for name, module in core.named_modules():
        if module is decoder and name:
            return name
    raise UserError(f"a {core.config.model_type} has no language model inside that can be trained alone")


def positions(core, ids: list[int], grids: torch.Tensor) -> torch.Tensor:
    """Return the positions [P, len(ids)] of tokens, from 0. P is 3 for multimodal positions (Qwen), else 1.

    Args:
        grids: [images, 3], time, height and width in patches of each image in `ids`.
    """
    inner = getattr(core, "model", core)  # without the head
    if not hasattr(inner, "get_rope_index"):
        return torch.arange(len(ids))[None]
    if not len(grids):
        return torch.arange(len(ids)).expand(3, -1)
    batch = torch.tensor([ids])
    types = (batch == core.config.image_token_id).int()  # 0 text, 1 image
    return inner.get_rope_index(batch, mm_token_type_ids=types, image_grid_thw=grids)[0][:, 0]


def image_numbers(config, ids: torch.Tensor) -> torch.Tensor | None:
    """Return the number of each token's image for ids [T]: [T], from 1, and 0 for text.

    None if the family's attention to images is causal, as for text.
    """
    if config.model_type not in BIDIRECTIONAL:
        return None
    is_image = ids == config.image_token_id
    starts = is_image & ~nn.functional.pad(is_image, (1, 0))[:-1]
    return torch.where(is_image, starts.cumsum(0), 0)


def deep_features(tokens: torch.Tensor, width: int, is_image: torch.Tensor) -> dict:
    """Return the language model's arguments for features that its first layers add; {} for a family without them.

    Args:
        tokens: [n, d + layers * d], image tokens and the features beside them (see `image_tokens`).
        width: d, the hidden size of the language model.
        is_image: [1, T], True at the image tokens.
    """
    if tokens.shape[-1] <= width:
        return {}
    return {"visual_pos_masks": is_image, "deepstack_visual_embeds": list(tokens[:, width:].split(width, dim=-1))}


def avoid_waits(core) -> None:
    """Let the first layers of a model with deep features (Qwen3-VL) add them without a wait for the GPU.

    transformers selects the image tokens by a mask, and the host has to wait for their number: twice a layer in a
    forward, and again in backward.
    """
    decoder = core.get_decoder()
    if hasattr(decoder, "_deepstack_process"):
        decoder._deepstack_process = add_deep_features


def add_deep_features(hidden: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Add features [n, d] to the image tokens of hidden states [1, T, d]. is_image: [1, T]."""
    return hidden + torch.zeros_like(hidden).masked_scatter(is_image[..., None], features.to(hidden.dtype))


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
        tokens: [n, d] or [n, d + layers * d], the image tokens of all images in order (see `image_tokens`).
        grids: [images, 3], zeros if the model's positions need none.
    """
    if not len(grids):
        return {}
    width = core.get_input_embeddings().weight.shape[1]
    first, *deep = tokens.to(core.device, core.dtype).split(width, dim=-1)
    # [n, 1, d]: each token passes for an image of one token. So images of several lengths fit into one tensor
    pooled = first[:, None] if core.config.model_type in ONE_TENSOR else [first]
    output = SimpleNamespace(pooler_output=pooled, deepstack_features=[[layer] for layer in deep])
    inputs = {"mm_encoder_outputs": {"image": output}}
    if hasattr(getattr(core, "model", core), "get_rope_index"):
        inputs["image_grid_thw"] = grids.to(core.device)
    return inputs


def own_logits(core, ids: torch.Tensor, images: dict, keep: int = 0) -> torch.Tensor:
    """Return the logits [1, L, V] of the model's own forward over ids [1, L].

    Args:
        images: the arguments for the images: `image_inputs` (pixels) or `encoder_outputs` (image tokens).
        keep: if not 0 and the model can, only the logits of the last `keep` tokens are computed: [1, keep, V].
    """
    inputs = token_inputs(core, ids, torch.ones_like(ids)) | for_model(images)
    if "logits_to_keep" in inspect.signature(core.forward).parameters:
        inputs["logits_to_keep"] = keep
    return core(**inputs, use_cache=False).logits
