"""Load a backbone: its model, config, tokenizer and image processor, from the hub or a folder."""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it at the top
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from hanorec.model import families
from hanorec.run.files import UserError

TINY = "tiny"
TINY_MAX_PIXELS = 6272  # eight image tokens of 28 x 28 pixels
MAX_PIXELS = 262144  # the paper's image_max_pixels


@contextlib.contextmanager
def loading(name: str | Path, problem: str) -> Iterator[None]:
    """Inside, every failure becomes a UserError: the files come from elsewhere, and their readers raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own; read that code, then give --trust-remote-code"
        raise UserError(f"'{name}' {problem}: {reason}") from error


def load_model(
    name: str | Path,
    dtype: torch.dtype | None = None,
    attn: str = "sdpa",
    quantize: str | None = None,
    trust: bool = False,
):
    """Load an image-text model with all weights frozen.

    Args:
        name: a hub name or a folder.
        dtype: float32 if None.
        attn: an attention that transformers knows.
        quantize: `4bit` (bitsandbytes, NF4), or None.
        trust: run Python code that comes with the model (--trust-remote-code); so for the other loaders.
    """
    disable_progress_bar()  # of loading and saving; the scripts' own bars stay
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft's
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a faster kernel that is not used
    load_config(name, trust)  # its error is the plainer one
    dtype, further = dtype or torch.float32, {}
    if quantize:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("--quantize 4bit needs bitsandbytes, which is not installed")
        further["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=outside_decoder(name, trust),
        )
    with loading(name, "cannot be loaded as an image-text model"):
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attn,
            trust_remote_code=trust,
            use_safetensors=True,  # never a pickle
            **further,
        )
    return model.requires_grad_(False).eval()


def outside_decoder(name: str | Path, trust: bool) -> list[str]:
    """The linear layers that are not quantized: the head, and the vision tower, whose image tokens must not change."""
    with loading(name, "cannot be built"), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(load_config(name, trust), trust_remote_code=trust)
    inside = f"{families.decoder_name(model)}."
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(inside)]


def pick_dtype(name: str, accelerator) -> torch.dtype:
    """--dtype as a torch dtype. auto is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if accelerator.device.type == "cuda" else "float32"
    return getattr(torch, name)


def load_config(name: str | Path, trust: bool = False):
    with loading(name, "cannot be loaded"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust)


def load_tokenizer(name: str | Path, trust: bool = False):
    with loading(name, "has no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        if not tokenizer.chat_template:  # older repositories keep it with the processor
            path = cached_file(name, "chat_template.json", _raise_exceptions_for_missing_entries=False)
            tokenizer.chat_template = json.loads(Path(path).read_text())["chat_template"] if path else None
    return tokenizer


def load_image_processor(name: str | Path, max_pixels: int, trust: bool = False):
    """Load the image processor, set so that it keeps every image within max_pixels pixels."""
    with loading(name, "has no usable image processor"):  # backend pil: torchvision has no CPU build
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=trust)
        families.limit_pixels(processor, max_pixels)
    return processor


def save_with_processors(model, folder: Path, source: str | Path, max_pixels: int, trust: bool, **settings) -> None:
    """Save a model to `folder` with the tokenizer and the image processor of `source`, so that it loads by itself."""
    model.save_pretrained(folder, **settings)
    load_tokenizer(source, trust).save_pretrained(folder)
    load_image_processor(source, max_pixels, trust).save_pretrained(folder)
