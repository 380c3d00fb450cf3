"""Images of items: open them, encode each once with the frozen vision tower, and read their image tokens.

encoded/<backbone>/ holds manifest.json and two files with tensors of N items:
- items.safetensors: text and image [N, d] (means of a title's embeddings and of an image's tokens), offsets [N + 1]
  (item i has the image tokens offsets[i] to offsets[i + 1]), grid [N, 3], and a neutral grey image: neutral [n, width]
  and neutral_grid [3].
- image_tokens.safetensors: image_tokens [sum of all lengths, width], all image tokens end to end, in the model's dtype.
  The width is d, or more for a backbone whose deeper layers take features of the image too.
"""

import json
import shutil
import struct
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hanorec.data.folder import Items
from hanorec.model import families
from hanorec.run.files import UserError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow starts other programs for some of the other formats
MAX_SIDE_RATIO = 150  # of the longer side to the shorter; Qwen's image processor fails above 200


def open_image(path: Path) -> Image.Image:
    """Open an image as RGB: upright, the first frame, 16 bits scaled to 8, transparent parts white.

    Raises:
        UserError: the image cannot be read, is too narrow, or has more pixels than Pillow's limit.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("not a regular file")
        bomb_is_error = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
        with bomb_is_error, Image.open(path, formats=IMAGE_FORMATS) as image:
            if max(image.size) > MAX_SIDE_RATIO * min(image.size):
                raise ValueError(f"{image.width} x {image.height} is too narrow")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits; 65535 / 257 = 255
                image = image.convert("I").point(lambda value: value / 257).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # a decoder of a broken file may raise any exception
        raise UserError(
            f"image {path} cannot be read ({error}); repair or restore it, or prepare the data again without it"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Reading image tokens


def load_tensors(path: Path, shapes: dict[str, tuple], remedy: str) -> dict[str, torch.Tensor]:
    """Load a safetensors file through a memory map.

    Args:
        shapes: the expected shape of each tensor by name; None stands for any size.
        remedy: what the user can do, for the message.

    Raises:
        UserError: the file cannot be read, or a tensor is missing or has another shape.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error
    for name, expected in shapes.items():
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name}; {remedy}")
        shape = list(tensors[name].shape)
        sizes_fit = [size in (None, actual) for size, actual in zip(expected, shape, strict=False)]
        if len(shape) != len(expected) or not all(sizes_fit):
            raise UserError(f"{path}: {name} has shape {shape}, expected {list(expected)} (None: any); {remedy}")
    return tensors


class ImageTokens:
    """The image tokens of a data folder's items, by item index.

    Args:
        items: the Items of the data folder.
        folder: a folder that `encode_items` wrote.
        blank_images: replace every image by the neutral image.
        live: None to read image tokens from `folder`; (data folder, image processor) to compute them in each batch.

    Attributes:
        image_of: for each item the item whose image it has: itself, unless `give_images` was called.
        lengths: [N], the number of image tokens of each item, 0 without an image.
        grids: [N, 3], time, height and width of each item's image in patches; zeros if positions need no grid.
    """

    def __init__(self, items: Items, folder: Path, blank_images: bool = False, live=None):
        self.ids, self.paths, self.blank_images = items.ids, items.images, blank_images
        self.image_of = list(range(len(items)))
        self.live = None if blank_images else live  # the neutral image's tokens are always stored
        path, count = folder / "items.safetensors", len(items)
        remedy = "encode the data again"
        shapes = {"text": (count, None), "image": (count, None), "grid": (count, 3), "neutral_grid": (3,)}
        self.vectors = load_tensors(path, shapes | {"offsets": (count + 1,), "neutral": (None, None)}, remedy)
        offsets, width = self.vectors["offsets"], self.vectors["neutral"].shape[1]
        if offsets.is_floating_point() or offsets[0] or (offsets.diff() < 0).any():
            raise UserError(f"{path}: offsets must be whole numbers that begin with 0 and never fall; {remedy}")
        self.offsets, lengths, self.grids = offsets.tolist(), offsets.diff(), self.vectors["grid"]
        if blank_images:
            lengths = (lengths > 0) * len(self.vectors["neutral"])
            self.grids = self.vectors["neutral_grid"].expand(count, 3)
        self.lengths = lengths.tolist()
        if self.live is None and not blank_images:
            shapes = {"image_tokens": (self.offsets[-1], width)}
            self.stored = load_tensors(folder / "image_tokens.safetensors", shapes, remedy)["image_tokens"]

    def give_images(self, image_of: list[int]) -> None:
        """Give each item the image of another one. An item with an image must get one, an item without none.

        Args:
            image_of: for each item the item whose image it gets.
        """
        self.image_of = image_of
        self.lengths, self.grids = [self.lengths[item] for item in image_of], self.grids[image_of]

    def of(self, item: int) -> torch.Tensor:
        """Return the stored image tokens [n, width] of an item that has an image."""
        if self.blank_images:
            return self.vectors["neutral"]
        source = self.image_of[item]
        return self.stored[self.offsets[source] : self.offsets[source + 1]]

    def means(self) -> torch.Tensor:
        """Return each item's mean image token [N, d], float32; zeros for an item without an image."""
        means = self.vectors["image"][self.image_of]
        if not self.blank_images:
            return means
        has_image = means.abs().sum(-1, keepdim=True) > 0
        return has_image * self.vectors["neutral"][:, : means.shape[1]].float().mean(0)

    def live_files(self) -> list[tuple] | None:
        """Return (path, size, time of change) of each image file, for live images; None for stored image tokens.

        A missing file is left out. `pixels` reports it.
        """
        if not self.live:
            return None
        folder = self.live[0]
        stats = {path: (folder / path).stat() for path in self.paths if path and (folder / path).exists()}
        return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in sorted(stats.items())]

    def pixels(self, items: list[int]) -> tuple[dict[str, torch.Tensor], list[tuple[str, int]]]:
        """Open the images of these items, for live images.

        Returns (the vision tower's inputs, item id and number of image tokens of each image for `check_sizes`).
        """
        folder, processor = self.live
        images = [open_image(folder / self.paths[self.image_of[item]]) for item in items]
        sizes = [(self.ids[self.image_of[item]], self.lengths[item]) for item in items]
        return families.image_inputs(processor, images, "cpu"), sizes


def check_sizes(sizes: list[tuple[str, int]], images: list[torch.Tensor]) -> None:
    """UserError if an image, encoded now, has not as many tokens as when the data was encoded.

    Args:
        sizes: (item id, number of tokens) of each image when the data was encoded.
        images: the tokens [n, width] of each image.
    """
    for (item, size), tokens in zip(sizes, images, strict=True):
        if len(tokens) != size:
            raise UserError(f"the image of item {item} has changed since the data was encoded; encode it again")


# ---------------------------------------------------------------------------------------------------------------------
# Encoding

BATCH_SIZE = 16  # images
SAMPLE_SIZE = 32  # images from which the size of all is estimated
USABLE_SPACE = 0.95  # the share of the disk's free space that image tokens may take
HEADER_BYTES = 256  # reserved at the file's start, because the shape is known only after the last image


def neutral_image() -> Image.Image:
    """Return the grey image that replaces all images of a run with --blank-images."""
    return Image.new("RGB", (112, 112), (128, 128, 128))


@torch.inference_mode()
def encode_images(model, image_processor, images: list) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Encode PIL images.

    Returns (image tokens: a tensor [n, width] for each image, grids [images, 3]: zeros if positions need none).
    """
    families.match_tiles(model, image_processor)
    inputs = families.image_inputs(image_processor, images, model.device)
    tokens = families.image_tokens(model, inputs)
    grids = inputs.get("image_grid_thw", torch.zeros(len(images), 3, dtype=torch.long))
    return [image.detach().cpu() for image in tokens], grids.cpu()


def mean_embeddings(model, tokenizer, titles: list[str]) -> torch.Tensor:
    """Return the mean input embedding of each title's tokens [N, d], float32; zeros for an empty title."""
    table = model.get_input_embeddings().weight.detach().float().cpu()
    ids = [tokenizer.encode(title, add_special_tokens=False, split_special_tokens=True) for title in titles]
    return torch.stack([table[tokens].mean(0) if tokens else table.new_zeros(table.shape[1]) for tokens in ids])


def encode_items(
    model, tokenizer, image_processor, titles, paths: list[Path | None], folder: Path, progress=iter, keep: bool = True
) -> None:
    """Encode every item once and write both files (see the module's docstring) to `folder`.

    Args:
        paths: each item's image; None for an item without one.
        progress: a function that wraps the list of batches, for a progress bar.
        keep: False writes no image tokens, only their number and mean.

    Raises:
        UserError: an image cannot be read, or its tokens have another dtype than the model.
    """
    neutral, neutral_grid = encode_images(model, image_processor, [neutral_image()])
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
    """Encode the images and write each batch of tokens to image_tokens.safetensors at once.

    Args:
        path: the file to write.
        width: the width of an image token.

    Returns (number of image tokens [N], their mean [N, d], grid [N, 3]) of the items.
    """
    with_image = [item for item, image in enumerate(paths) if image is not None]
    hidden = model.get_input_embeddings().weight.shape[1]
    lengths, means = torch.zeros(len(paths), dtype=torch.long), torch.zeros(len(paths), hidden)
    grid = torch.zeros(len(paths), 3, dtype=torch.long)
    with open(path, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for batch in progress([with_image[i : i + BATCH_SIZE] for i in range(0, len(with_image), BATCH_SIZE)]):
            images, grids = encode_images(model, image_processor, [open_image(paths[item]) for item in batch])
            for item, tokens, item_grid in zip(batch, images, grids, strict=True):
                if tokens.dtype != model.dtype:
                    raise UserError(f"the model is {model.dtype}, but its image tokens are {tokens.dtype}")
                lengths[item], grid[item] = len(tokens), item_grid
                means[item] = tokens[:, :hidden].float().mean(0)
                if keep:
                    file.write(tokens.contiguous().view(torch.uint8).numpy().tobytes())
        count = int(lengths.sum()) if keep else 0
        code = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[model.dtype]
        end = count * width * model.dtype.itemsize
        header = {"image_tokens": {"dtype": code, "shape": [count, width], "data_offsets": [0, end]}}
        file.seek(0)  # the format allows spaces after the header
        file.write(struct.pack("<Q", HEADER_BYTES - 8) + json.dumps(header).encode().ljust(HEADER_BYTES - 8))
    return lengths, means, grid


def check_disk(model, processor, paths: list[Path], pixels: int, folder: Path) -> None:
    """Estimate the bytes of all image tokens from a sample of the images, and print them.

    Args:
        pixels: the value of --max-pixels.

    Raises:
        UserError: the disk of `folder` has too little free space.
    """
    sample = [open_image(path) for path in paths[:: max(1, len(paths) // SAMPLE_SIZE)][:SAMPLE_SIZE]]
    encoded = encode_images(model, processor, sample)[0]
    tokens, width = sum(map(len, encoded)) / len(sample), encoded[0].shape[1]
    needed = int(len(paths) * tokens * width * model.dtype.itemsize)
    each = f"{tokens:.1f} tokens x {width} x {model.dtype.itemsize} bytes"
    print(f"encoding {len(paths)} images x {each} = about {needed:,} bytes")
    free = shutil.disk_usage(folder).free
    if needed > USABLE_SPACE * free:
        fitting = int(pixels * USABLE_SPACE * free / needed)
        remedy = f"give --tokens live, or about --max-pixels {fitting} if the backbone's image size can be changed"
        raise UserError(f"{folder} has {free:,} bytes free; {remedy}")
