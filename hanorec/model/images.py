"""Images of items: open them, encode each once with the frozen vision tower, and read their image tokens back.

encoded/<backbone>/ holds items.safetensors (per item: the text vector and the mean image token, and where its image
tokens stand) and image_tokens.safetensors (all image tokens end to end, read through a memory map).
"""

import json
import shutil
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hanorec.data.folder import Items
from hanorec.model import families
from hanorec.run.files import UserError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow starts other programs for some further formats


def open_image(path: Path) -> Image.Image:
    """Open an image as RGB: upright, the first frame, 16 bits scaled to 8, transparent parts white.

    Raises:
        UserError: the image cannot be read, or has more pixels than Pillow thinks safe.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("it is no file")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if max(image.size) > 150 * min(image.size):
                raise ValueError(f"{image.width} x {image.height} is too narrow")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = image.convert("I").point(lambda value: value / 257).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # decoders of broken files raise anything
        raise UserError(
            f"image {path} cannot be read ({error}); mend or restore it, or prepare the data again without it"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Reading image tokens back


def load_tensors(path: Path, shapes: dict[str, tuple], remedy: str) -> dict[str, torch.Tensor]:
    """Load a safetensors file through a memory map.

    Args:
        shapes: the shape that each of these tensors must have; None stands for any size.

    Raises:
        UserError: the file cannot be read, or a tensor is missing or of another shape.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error
    for name, expected in shapes.items():
        shape = tuple(tensors[name].shape) if name in tensors else ()
        fits = len(shape) == len(expected) and all(e in (None, s) for e, s in zip(expected, shape, strict=True))
        if not fits:
            raise UserError(f"{path}: {name} is {list(shape)}, not of the shape that is due; {remedy}")
    return tensors


class ImageTokens:
    """The encoded images of a data folder's items, by item index.

    Args:
        folder: a folder that `encode_items` wrote.
        blank_images: every image is replaced by one neutral grey image.
        live: None to read image tokens from `folder`; else (folder of the image paths, image processor), to compute
            them in each batch from the pictures.
    """

    def __init__(self, items: Items, folder: Path, blank_images: bool = False, live=None):
        self.ids, self.paths = items.ids, items.images
        self.blank_images, self.live = blank_images, None if blank_images else live
        path, remedy, count = folder / "items.safetensors", "encode the data again", len(items)
        shapes = {"text": (count, None), "image": (count, None), "grid": (count, 3), "neutral_grid": (3,)}
        self.vectors = load_tensors(path, shapes | {"offsets": (count + 1,), "neutral": (None, None)}, remedy)
        offsets, width = self.vectors["offsets"], self.vectors["neutral"].shape[1]
        if offsets.is_floating_point() or offsets[0] or (offsets.diff() < 0).any():
            raise UserError(f"{path}: the offsets are no offsets; {remedy}")
        self.offsets = offsets.tolist()
        if self.live is None and not blank_images:
            shapes = {"image_tokens": (self.offsets[-1], width)}
            self.stored = load_tensors(folder / "image_tokens.safetensors", shapes, remedy)["image_tokens"]

    def length(self, item: int) -> int:
        """The number of image tokens of an item, 0 without an image."""
        length = self.offsets[item + 1] - self.offsets[item]
        return len(self.vectors["neutral"]) if length and self.blank_images else length

    def of(self, item: int) -> torch.Tensor:
        """[n, d]: the image tokens of an item that has an image."""
        return (
            self.vectors["neutral"] if self.blank_images else self.stored[self.offsets[item] : self.offsets[item + 1]]
        )

    def grid(self, item: int) -> torch.Tensor:
        """[3]: time, height and width in patches; zeros if the backbone's positions need none."""
        return self.vectors["neutral_grid"] if self.blank_images else self.vectors["grid"][item]

    def means(self) -> torch.Tensor:
        """[N, d] float32: each item's mean image token, zeros without an image."""
        means = self.vectors["image"]
        if not self.blank_images:
            return means
        neutral = self.vectors["neutral"][:, : means.shape[1]].float().mean(0)
        return (means.abs().sum(-1, keepdim=True) > 0) * neutral

    def pixels(self, items: list[int]) -> dict[str, torch.Tensor]:
        """The vision tower's inputs for the pictures of these items, for live images."""
        folder, processor = self.live
        return families.image_inputs(processor, [open_image(folder / self.paths[item]) for item in items], "cpu")

    def sizes(self, items: Iterable[int]) -> list[tuple[str, int]]:
        """(item id, number of image tokens) of these items, for `check_sizes`."""
        return [(self.ids[item], self.length(item)) for item in items]


def check_sizes(sizes: list[tuple[str, int]], images: list[torch.Tensor]) -> None:
    """UserError if a live image has not the number of tokens that it was prepared with."""
    for (item, size), tokens in zip(sizes, images, strict=True):
        if len(tokens) != size:
            raise UserError(f"the image of item {item} is another than when it was prepared; encode it again")


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


@torch.inference_mode()
def encode_images(model, image_processor, images: list) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Encode PIL images. Returns the image tokens, a list of [n_i, d] (d: see `families.image_tokens`), and the grids
    [len(images), 3] (zeros if the backbone needs none)."""
    families.match_tiles(model, image_processor)
    inputs = families.image_inputs(image_processor, images, model.device)
    tokens = families.image_tokens(model, inputs)
    grids = inputs.get("image_grid_thw", torch.zeros(len(images), 3, dtype=torch.long))
    return [image.detach().cpu() for image in tokens], grids.cpu()


def mean_embeddings(model, tokenizer, titles: list[str]) -> torch.Tensor:
    """[N, d] float32: the mean input embedding of each title's tokens (zeros for an empty title)."""
    table = model.get_input_embeddings().weight.detach().float().cpu()
    ids = [tokenizer.encode(title, add_special_tokens=False, split_special_tokens=True) for title in titles]
    return torch.stack([table[tokens].mean(0) if tokens else table.new_zeros(table.shape[1]) for tokens in ids])


def encode_items(
    model, tokenizer, image_processor, titles, paths: list[Path | None], folder: Path, progress=iter, keep: bool = True
) -> None:
    """Encode every item once and write the files of this module's docstring to `folder`.

    items.safetensors: text and image [N, d], offsets [N + 1], grid [N, 3], the neutral image. image_tokens.safetensors:
    [sum of n_i, d] in the model's dtype, written while it is computed; wider than d by the features of deeper layers,
    for a backbone that has them.

    Args:
        progress: wraps the iterable of batches.
        keep: write the image tokens; without, only their number and mean is kept.

    Raises:
        UserError: an image cannot be read.
    """
    neutral, neutral_grid = encode_images(model, image_processor, [Image.new("RGB", (112, 112), (128, 128, 128))])
    path = folder / "image_tokens.safetensors"
    lengths, means, grid = write_image_tokens(model, image_processor, paths, path, progress, keep, neutral[0].shape[1])
    tensors = {
        "text": mean_embeddings(model, tokenizer, titles),
        "image": means,
        "grid": grid,
        "offsets": F.pad(lengths.cumsum(0), (1, 0)),
        "neutral": neutral[0],
        "neutral_grid": neutral_grid[0],
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "items.safetensors")


def write_image_tokens(model, image_processor, paths: list[Path | None], path: Path, progress, keep: bool, width: int):
    """Write image_tokens.safetensors while it is computed. width: of an image token.

    Returns of each item: number of image tokens [N], their mean [N, d], grid [N, 3].
    """
    with_image = [item for item, image in enumerate(paths) if image is not None]
    hidden = model.get_input_embeddings().weight.shape[1]
    lengths, means = torch.zeros(len(paths), dtype=torch.long), torch.zeros(len(paths), hidden)
    grid = torch.zeros(len(paths), 3, dtype=torch.long)
    with open(path, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for batch in progress([with_image[i : i + 16] for i in range(0, len(with_image), 16)]):
            images, grids = encode_images(model, image_processor, [open_image(paths[item]) for item in batch])
            for item, tokens, item_grid in zip(batch, images, grids, strict=True):
                lengths[item], grid[item] = len(tokens), item_grid
                means[item] = tokens[:, :hidden].float().mean(0)
                if keep:
                    file.write(tokens.contiguous().view(torch.uint8).numpy().tobytes())
        file.seek(0)
        file.write(safetensors_header("image_tokens", model.dtype, [int(lengths.sum()) * keep, width]))
    return lengths, means, grid


def check_disk(model, processor, paths: list[Path], pixels: int, folder: Path) -> None:
    """Print the bytes that encoding will write, estimated from 32 images. UserError if the disk cannot hold them."""
    sample = [open_image(path) for path in paths[:: max(1, len(paths) // 32)][:32]]
    encoded = encode_images(model, processor, sample)[0]
    tokens, width = sum(map(len, encoded)) / len(sample), encoded[0].shape[1]
    needed = int(len(paths) * tokens * width * model.dtype.itemsize)
    each = f"{tokens:.1f} tokens x {width} x {model.dtype.itemsize} bytes"
    print(f"encoding {len(paths)} images x {each} = about {needed:,} bytes")
    free = shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        fitting = int(pixels * 0.95 * free / needed)
        raise UserError(f"{folder} has {free:,} bytes free; --max-pixels {fitting} would fit")


HEADER_BYTES = 256  # reserved at the file's head, so that tokens are written before their number is known


def safetensors_header(name: str, dtype: torch.dtype, shape: list[int]) -> bytes:
    """The head of a safetensors file of one tensor, padded with spaces (as the format allows) to HEADER_BYTES."""
    code = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    entry = {"dtype": code, "shape": shape, "data_offsets": [0, shape[0] * shape[1] * dtype.itemsize]}
    return struct.pack("<Q", HEADER_BYTES - 8) + json.dumps({name: entry}).encode().ljust(HEADER_BYTES - 8)
