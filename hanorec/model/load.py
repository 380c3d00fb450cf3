"""Load a backbone from the hub or a folder: its model, config, tokenizer and image processor."""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # hidden at the top without torchvision
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from hanorec.model import families
from hanorec.run.files import UserError
from hanorec.run.runs import TINY, is_run

TINY_MAX_PIXELS = 6272  # eight image tokens of 28 x 28 pixels each
MAX_PIXELS = 262144  # the paper's image_max_pixels
QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


@contextlib.contextmanager
def loading(name: str | Path, problem: str) -> Iterator[None]:
    """Turn every exception inside into a UserError. Readers of strange files may raise any exception.

    Args:
        name: what is loaded.
        problem: the message after the name, e.g. "cannot be loaded".
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it needs its own Python code; read that code, then give --trust-remote-code"
        raise UserError(f"'{name}' {problem}: {reason}") from error


def load_model(
    name: str | Path, dtype: torch.dtype | None = None, attn="sdpa", quantize: str | None = None, trust: bool = False
):
    """Load an image-text model with all weights frozen.

    Args:
        name: a hub name or a folder.
        dtype: the dtype of the weights; None: float32.
        attn: the name of an attention implementation of transformers.
        quantize: `4bit` (bitsandbytes, NF4), or None.
        trust: run Python code that comes with the model (--trust-remote-code). The other loaders have it too.
    """
    disable_progress_bar()  # of transformers, for loading and saving weights
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # from peft
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it warns that a faster kernel is missing
    config = load_config(name, trust)  # first, because its error message is clearer than the model's
    dtype = dtype or torch.float32
    settings = {}
    if quantize:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("--quantize 4bit needs bitsandbytes, which is not installed")
        with loading(name, "cannot be built"), torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust)
        decoder = f"{families.decoder_name(model)}."
        linear = [layer for layer, module in model.named_modules() if isinstance(module, nn.Linear)]
        # Not quantized: the head, and the vision tower, whose image tokens are stored and must stay the same
        skipped = [layer for layer in linear if not layer.startswith(decoder)]
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped
        )
    with loading(name, "cannot be loaded as an image-text model"):
        model = AutoModelForImageTextToText.from_pretrained(  # safetensors, because unpickling can run code
            name, dtype=dtype, attn_implementation=attn, trust_remote_code=trust, use_safetensors=True, **settings
        )
    return model.requires_grad_(False).eval()


def pick_dtype(name: str, accelerator) -> torch.dtype:
    """Return --dtype as a torch dtype. auto is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if accelerator.device.type == "cuda" else "float32"
    return getattr(torch, name)


def check_name(name: str | Path) -> None:
    """Raise UserError if `name` is no folder, is not in the hub's cache, and the hub does not know it.

    The loaders try six times to reach the hub, which takes half a minute.
    """
    if Path(name).is_dir():
        return
    with loading(name, "is no folder here, and the hub does not give it: check the name, or you are offline"):
        if cached_file(name, "config.json", local_files_only=True, **QUIET):
            return
        try:
            HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except RepositoryNotFoundError:
            raise
        except HfHubHTTPError:  # the server may be a mirror that has the files alone
            return


def load_config(name: str | Path, trust: bool = False):
    """Load the config."""
    check_name(name)
    with loading(name, "cannot be loaded"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust)


def load_tokenizer(name: str | Path, trust: bool = False):
    """Load the tokenizer with its chat template (None if the backbone has none)."""
    with loading(name, "has no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        if not tokenizer.chat_template:  # older repositories keep the template in a file of the processor
            path = cached_file(name, "chat_template.json", _raise_exceptions_for_missing_entries=False)
            tokenizer.chat_template = json.loads(Path(path).read_text())["chat_template"] if path else None
    return tokenizer


def load_image_processor(name: str | Path, max_pixels: int, trust: bool = False):
    """Load the image processor and limit the size of images (see `families.limit_pixels`)."""
    with loading(name, "has no usable image processor"):
        # backend pil, because the default needs torchvision, which requirements.txt does not install
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=trust)
        families.limit_pixels(processor, max_pixels)
    return processor


def usual_pixels(backbone: str, trust: bool = False) -> int:
    """Return the pixel limit of a backbone's images if the user gives none. A run's own model keeps its limit."""
    if backbone == TINY:
        return TINY_MAX_PIXELS
    if not is_run(Path(backbone).parent):
        return MAX_PIXELS
    with loading(backbone, "has no usable image processor"):
        processor = AutoImageProcessor.from_pretrained(backbone, backend="pil", trust_remote_code=trust)
    return families.pixel_limit(processor) or MAX_PIXELS


def save_with_processors(model, folder: Path, source: str | Path, max_pixels: int, trust: bool, **settings) -> None:
    """Save a model to `folder` with the tokenizer and the image processor of `source`.

    Args:
        settings: further arguments of the model's save_pretrained.
    """
    model.save_pretrained(folder, **settings)
    load_tokenizer(source, trust).save_pretrained(folder)
    load_image_processor(source, max_pixels, trust).save_pretrained(folder)
