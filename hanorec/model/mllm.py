"""The multimodal LLM as the stages share it: load it, add or load LoRA, encode items once.

The vision tower is frozen, so each image is encoded once, by `encode_items`, and read back from a memory map as image
tokens. How prompts are scored is in packing.py, and what differs between families of models in backbones.py.
"""

import contextlib
import importlib.util
import json
import logging
import re
import shutil
import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from hanorec.model import backbones
from hanorec.model.backbones import BackboneError

TINY = "tiny"
TINY_MAX_PIXELS = 6272  # eight image tokens of 28 x 28 pixels: the tiny backbone is for laptops
MAX_PIXELS = 262144  # the paper's image_max_pixels


# ---------------------------------------------------------------------------------------------------------------------
# The model


@contextlib.contextmanager
def loading(name: str | Path, what: str) -> Iterator[None]:
    """Inside, whatever fails is a BackboneError: these are files from elsewhere, and the libraries that read them raise
    anything, plain Exceptions too."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "exit_code"):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own; read that code, then give --trust-remote-code"
        raise BackboneError(f"'{name}' {what}: {reason}") from error


def load_model(
    name: str | Path,
    dtype: torch.dtype | None = None,
    attn: str = "sdpa",
    quantize: str | None = None,
    trust: bool = False,
):
    """The pretrained image-text model `name` (a hub name or a folder) in `dtype` (float32), everything frozen.

    attn: an attention that transformers knows. quantize: `4bit` (bitsandbytes, NF4), or None. trust: run Python code
    that comes with the model (--trust-remote-code); the other loaders have it too.
    """
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving; the scripts' own bars stay
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft's
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a faster kernel even where it is not used
    load_config(name, trust)  # its error is the plainer one
    dtype, further = dtype or torch.float32, {}
    if quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise BackboneError("--quantize 4bit needs bitsandbytes, which is not installed")
    if quantize:
        further = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        further["llm_int8_skip_modules"] = outside_decoder(name, trust)
        further = {"quantization_config": BitsAndBytesConfig(**further)}
    further |= {"trust_remote_code": trust, "use_safetensors": True}  # never a pickle
    with loading(name, "cannot be loaded as an image-text model"):
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, attn_implementation=attn, **further)
    return model.requires_grad_(False).eval()


def outside_decoder(name: str | Path, trust: bool) -> list[str]:
    """The linear layers that are not quantized: head and vision tower, whose image tokens stay what they were."""
    from transformers import AutoModelForImageTextToText

    with loading(name, "cannot be built"), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(load_config(name, trust), trust_remote_code=trust)
    inside = f"{backbones.decoder_name(model)}."
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(inside)]


def pick_dtype(name: str, accelerator) -> torch.dtype:
    """--dtype as a torch dtype; auto is bf16 on a GPU and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if accelerator.device.type == "cuda" else "float32"
    return getattr(torch, name)


def load_config(name: str | Path, trust: bool = False):
    from transformers import AutoConfig

    with loading(name, "cannot be loaded"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust)


def load_tokenizer(name: str | Path, trust: bool = False):
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    with loading(name, "has no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        if not tokenizer.chat_template:  # older repositories keep it with the processor alone
            path = cached_file(name, "chat_template.json", _raise_exceptions_for_missing_entries=False)
            tokenizer.chat_template = json.loads(Path(path).read_text())["chat_template"] if path else None
    return tokenizer


def load_image_processor(name: str | Path, max_pixels: int, trust: bool = False):
    """The image processor of `name`, set so that it keeps every image within max_pixels pixels."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it at the top

    with loading(name, "has no usable image processor"):  # torchvision has no CPU build
        images = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=trust)
        backbones.limit_pixels(images, max_pixels)
    return images


def lora_targets(model) -> str:
    """A regular expression over the language model's linear layers. Suffix lists, and peft's `all-linear`, also hit the
    vision tower."""
    decoder = backbones.decoder_name(model)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{decoder}.")]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    return rf"{re.escape(decoder)}\..*\.({'|'.join(leaves)})"


def add_lora(model, rank: int, alpha: int, dropout: float, seed: int):
    """`model` with a fresh, trainable LoRA on every linear layer of its language model; the draw depends on seed. An
    adapter that the model has already stays as it is, frozen and active."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from hanorec.model import lora

    first = model.peft_config.get(FROZEN) if isinstance(model, PeftModel) else None
    targets = first.target_modules if first else lora_targets(model)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not first:
            return lora.lean(get_peft_model(model, config))
        model.add_adapter(TRAINED, config)
    for module in model.modules():
        if FROZEN in getattr(module, "lora_dropout", {}):
            module.lora_dropout[FROZEN] = nn.Identity()  # it is part of the base now, and of the reference
    return activate(model)


def load_adapter(model, folder: str | Path, merge: bool = True, name: str = "default"):
    """`model` with the LoRA adapter of `folder`, merged into its weights (in the dtype they have) or, under this name,
    beside them and beside the adapters that it has already."""
    from peft import PeftModel

    with loading(folder, "is no adapter of this backbone"):
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name)
            model = activate(model)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    model = model.requires_grad_(False).eval()
    return model.merge_and_unload() if merge else model


TRAINED = "default"  # the adapter in training; PEFT writes the one of this name to the folder itself
FROZEN = "sft"  # the SFT adapter, where the base is quantized and it cannot be merged without rounding


def activate(model):
    """Have all adapters of a PeftModel added up, the one in training alone trainable."""
    model.base_model.set_adapter(list(model.peft_config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and f".{FROZEN}." not in name)
    return model


@contextlib.contextmanager
def reference(model) -> Iterator[None]:
    """Inside, a PeftModel is without the adapter in training: DPO's reference."""
    if FROZEN not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.base_model.set_adapter([FROZEN])
    try:
        yield
    finally:
        activate(model)


# ---------------------------------------------------------------------------------------------------------------------
# Items: titles, and image tokens encoded once


def load_tensors(path: Path, shapes: dict[str, tuple], remedy: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file through a memory map; BackboneError where it cannot be read, or where one of
    `shapes` (None: any size) is not there in that shape."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{path} cannot be read ({error}); {remedy}") from error
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else ()
        if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
            raise BackboneError(f"{path}: {name} is {list(found)}, not of the shape that is due; {remedy}")
    return tensors


def check_sizes(sizes: list[tuple[str, int]], images: list[torch.Tensor]) -> None:
    """BackboneError where a live image has not its (item, tokens): it would move into the next one's place."""
    for (item, size), tokens in zip(sizes, images, strict=True):
        if len(tokens) != size:
            raise BackboneError(f"the image of item {item} is another than when it was prepared; encode it again")


class Catalogue:
    """The items of a data folder: ids, titles, and their encoded images by row. Rows are line numbers of items.jsonl.

    items: the lines of items.jsonl. encoded: a folder written by `encode_items`, or None for texts alone.
    blank_images: every image is replaced by one neutral grey image. live: None, or what is needed where the image
    tokens are not read from `encoded` but made in each step: the folder of the images' paths and the image processor.
    """

    def __init__(self, items: list[dict], encoded: Path | None = None, blank_images: bool = False, live=None):
        self.ids = [item["item"] for item in items]
        self.titles = [item["title"] for item in items]
        self.row_of = {item: row for row, item in enumerate(self.ids)}
        self.blank_images, self.live = blank_images, None if blank_images else live
        self.paths = [item.get("image") for item in items]
        if len(self.row_of) < len(items):
            raise BackboneError("items.jsonl has an item twice; prepare the data again")
        if encoded is None:
            return
        path, remedy, count = encoded / "items.safetensors", "encode the data again", len(items)
        shapes = {"text": (count, None), "image": (count, None), "grid": (count, 3), "neutral_grid": (3,)}
        self.vectors = load_tensors(path, shapes | {"offsets": (count + 1,), "neutral": (None, None)}, remedy)
        offsets, width = self.vectors["offsets"], self.vectors["neutral"].shape[1]
        if offsets.is_floating_point() or offsets[0] or (offsets.diff() < 0).any():
            raise BackboneError(f"{path}: the offsets are no offsets; {remedy}")
        self.offsets = offsets.tolist()
        if self.live is None and not blank_images:
            wanted = {"image_tokens": (self.offsets[-1], width)}
            self.tokens = load_tensors(encoded / "image_tokens.safetensors", wanted, remedy)["image_tokens"]

    def pixels(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """What the vision tower takes for the images of items, where they are encoded live."""
        folder, processor = self.live
        return backbones.image_inputs(processor, [open_image(folder / self.paths[row]) for row in rows], "cpu")

    def has_image(self, row: int) -> bool:
        return self.offsets[row + 1] > self.offsets[row]

    def sizes(self, items: Iterable[int]) -> list[tuple[str, int]]:
        """(item, tokens of its image) of these rows, for `check_sizes`."""
        return [(self.ids[item], self.image_length(item)) for item in items]

    def image_length(self, row: int) -> int:
        """Image tokens of the item's image, 0 without one."""
        if self.has_image(row) and self.blank_images:
            return len(self.vectors["neutral"])
        return self.offsets[row + 1] - self.offsets[row]

    def image_tokens(self, row: int) -> torch.Tensor:
        """[n, d] of an item that has an image."""
        return self.vectors["neutral"] if self.blank_images else self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def image_means(self) -> torch.Tensor:
        """[N, d] float32: the mean image token of each item, zeros without an image."""
        means = self.vectors["image"]
        if not self.blank_images:
            return means
        neutral = self.vectors["neutral"][:, : means.shape[1]].float().mean(0)
        return (means.abs().sum(-1, keepdim=True) > 0) * neutral

    def grid(self, row: int) -> torch.Tensor:
        """[3], time, height and width in patches; zeros where the backbone's positions need none."""
        return self.vectors["neutral_grid"] if self.blank_images else self.vectors["grid"][row]


IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # some others are read by programs that Pillow starts


def open_image(path: Path):
    """The RGB image at `path`, upright: the first frame, 16 bits scaled to 8, transparent parts white. BackboneError if
    it cannot be read, or has more pixels than Pillow thinks safe."""
    from PIL import Image, ImageOps

    try:
        if not path.is_file():  # a pipe would be waited for
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
    except Exception as error:  # of a decoder that was given anything at all
        raise BackboneError(
            f"image {path} cannot be read ({error}); mend or restore it, or prepare the data again without it"
        ) from error


@torch.inference_mode()
def encode_images(model, image_processor, images: list) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Image tokens of PIL images: a list of [n_i, d] (d: see `backbones.image_tokens`), and the grids [len(images), 3]
    (zeros where none are needed)."""
    backbones.match_tiles(model, image_processor)
    inputs = backbones.image_inputs(image_processor, images, model.device)
    tokens = backbones.image_tokens(model, inputs)
    grids = inputs.get("image_grid_thw", torch.zeros(len(images), 3, dtype=torch.long))
    return [t.detach().cpu() for t in tokens], grids.cpu()


def mean_embeddings(model, tokenizer, titles: list[str]) -> torch.Tensor:
    """[N, d] float32: the mean of the input-embedding rows of each title's tokens (zeros for an empty title)."""
    table = model.get_input_embeddings().weight.detach().float().cpu()
    ids = [tokenizer.encode(t, add_special_tokens=False, split_special_tokens=True) for t in titles]
    return torch.stack([table[i].mean(0) if i else table.new_zeros(table.shape[1]) for i in ids])


def encode_items(
    model, tokenizer, image_processor, titles, paths: list[Path | None], folder: Path, progress=iter, keep: bool = True
) -> None:
    """Encode every item once into `folder`: items.safetensors (text and image [N, d], offsets [N + 1], grid [N, 3], the
    neutral image) and, with `keep`, image_tokens.safetensors ([sum n_i, d], in the model's dtype, written as it is
    computed; wider than d by the features of deeper layers, for a backbone that has such).

    progress: wraps the iterable of batches. Raises BackboneError on an unreadable image.
    """
    from PIL import Image
    from safetensors.torch import save_file

    rows = [row for row, path in enumerate(paths) if path is not None]
    width = model.get_input_embeddings().weight.shape[1]
    lengths, image_means = torch.zeros(len(paths), dtype=torch.long), torch.zeros(len(paths), width)
    grid = torch.zeros(len(paths), 3, dtype=torch.long)
    neutral, neutral_grid = encode_images(model, image_processor, [Image.new("RGB", (112, 112), (128, 128, 128))])
    with open(folder / "image_tokens.safetensors", "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for batch in progress([rows[i : i + 16] for i in range(0, len(rows), 16)]):
            tokens, grids = encode_images(model, image_processor, [open_image(paths[row]) for row in batch])
            for row, item_tokens, item_grid in zip(batch, tokens, grids, strict=True):
                lengths[row], grid[row] = len(item_tokens), item_grid
                image_means[row] = item_tokens[:, :width].float().mean(0)
                if keep:
                    file.write(item_tokens.contiguous().view(torch.uint8).numpy().tobytes())
        file.seek(0)
        file.write(safetensors_header("image_tokens", model.dtype, [int(lengths.sum()) * keep, neutral[0].shape[1]]))
    tensors = {"text": mean_embeddings(model, tokenizer, titles), "image": image_means, "grid": grid}
    tensors |= {"offsets": F.pad(lengths.cumsum(0), (1, 0)), "neutral": neutral[0], "neutral_grid": neutral_grid[0]}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "items.safetensors")


def check_disk(model, processor, paths: list[Path], pixels: int, folder: Path) -> None:
    """Print the bytes that encoding will write, judged by 32 images; BackboneError where the disk cannot hold them."""
    sample = [open_image(path) for path in paths[:: max(1, len(paths) // 32)][:32]]
    encoded = encode_images(model, processor, sample)[0]
    tokens, width = sum(map(len, encoded)) / len(sample), encoded[0].shape[1]
    needed = int(len(paths) * tokens * width * model.dtype.itemsize)
    each = f"{tokens:.1f} tokens x {width} x {model.dtype.itemsize} bytes"
    print(f"encoding {len(paths)} images x {each} = about {needed:,} bytes")
    if needed > 0.95 * (free := shutil.disk_usage(folder).free):
        fitting = int(pixels * 0.95 * free / needed)
        raise BackboneError(f"{folder} has {free:,} bytes free; --max-pixels {fitting} would fit")


HEADER_BYTES = 256  # reserved at the file's head, so that tokens are streamed to disk before their number is known


def safetensors_header(name: str, dtype: torch.dtype, shape: list[int]) -> bytes:
    """The head of a safetensors file of one tensor, padded with spaces (as the format allows) to HEADER_BYTES."""
    code = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    entry = {"dtype": code, "shape": shape, "data_offsets": [0, shape[0] * shape[1] * dtype.itemsize]}
    return struct.pack("<Q", HEADER_BYTES - 8) + json.dumps({name: entry}).encode().ljust(HEADER_BYTES - 8)
