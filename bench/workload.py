"""The work that is measured: three sizes of one backbone; films, posters and examples drawn from a seed.

No weights are downloaded. A random model computes exactly as fast as a trained one.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np  # noqa: E402
import torch  # noqa: E402

from hanorec.data.demo import GENRES, PLACES  # noqa: E402
from hanorec.data.folder import Example, Items  # noqa: E402
from hanorec.model.images import ImageTokens, encode_items  # noqa: E402
from hanorec.model.load import load_image_processor, load_tokenizer  # noqa: E402
from hanorec.model.pairs import Pairs, pools  # noqa: E402
from hanorec.model.prompts import Prompts  # noqa: E402
from hanorec.model.template import load_template  # noqa: E402
from hanorec.model.tiny import build_tiny  # noqa: E402

# Qwen2.5-VL-3B, as its config.json describes it
FULL_TEXT = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
FULL_TEXT |= {"num_key_value_heads": 2, "vocab_size": 151936}
FULL_TEXT["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
FULL_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
FULL_VISION |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}

# The same, an eighth as wide and a sixth as deep: vision tower and language model keep about their proportion. Heads
# are half as wide. The vocabulary is so small that the output head stays a tenth of the language model.
SCALED_TEXT = {"hidden_size": 256, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 4}
SCALED_TEXT |= {"num_key_value_heads": 1, "vocab_size": 3072}
SCALED_TEXT["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
SCALED_VISION = {"depth": 5, "hidden_size": 160, "intermediate_size": 428, "num_heads": 2, "out_hidden_size": 256}
SCALED_VISION |= {"window_size": 112, "fullatt_block_indexes": [4]}

SHAPES = {"scaled": (SCALED_TEXT, SCALED_VISION), "demo": ({}, {}), "full": (FULL_TEXT, FULL_VISION)}
ITEMS, CANDIDATES = 96, 10


@dataclass
class Workload:
    """Everything that a step needs: see `make`."""

    folder: Path
    backbone: str
    paths: list[Path]
    items: Items
    tokens: ImageTokens
    prompts: Prompts
    examples: list[Example]
    max_pixels: int
    encode_seconds: float  # per image
    tiny: bool = False  # as Encoding.tiny

    @property
    def source(self) -> Path:
        """The folder of the backbone, as Encoding.source."""
        return self.folder

    def pairs(self, kinds=("rank",), rejected: int = 1) -> Pairs:
        """The examples' pairs of these kinds, in the order of dpo_hano.py, with `rejected` answers a ranking pair."""
        return Pairs(self.prompts, self.examples, kinds, 100_000, pools(self.examples, rejected, "data"))


def build_backbone(folder: Path, shape: str, titles: list[str]) -> None:
    """Write config, tokenizer, chat template and image processor to `folder`. The weights are drawn by `load`."""
    from transformers import AutoConfig

    build_tiny(folder, titles)
    (folder / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(folder)
    for part, changes in zip((config.text_config, config.vision_config), SHAPES[shape], strict=True):
        part.update(changes)
    text = config.text_config
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    config.save_pretrained(folder)


def load(folder: Path, device="cpu", dtype=None, seed: int = 0, attn: str = "sdpa"):
    """The backbone with frozen weights that are drawn on `device` from the seed."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(seed)
    with torch.device(device):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype or torch.float32, attn_implementation=attn)
    return model.to(device).requires_grad_(False).eval()


def draw_poster(path: Path, side: int, rng: np.random.Generator) -> None:
    """Write a smooth JPEG of side x side pixels. It takes as long to decode as a real poster of that size."""
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def make(
    folder: Path,
    shape: str,
    side: int,
    examples: int,
    history: int = 5,
    device="cpu",
    dtype=None,
    seed: int = 0,
    history_first: bool = False,
) -> tuple[Workload, torch.nn.Module]:
    """Draw titles, posters and examples, and encode every poster. Returns (the workload, the backbone from `load`).

    Args:
        folder: the folder to write backbone, posters and encoding to.
        shape: the size of the backbone, a key of SHAPES.
        side: width and height of the posters in pixels.
        examples: the number of examples.
        history: the number of items in a history.
        history_first: as of Prompts.
    """
    rng = np.random.default_rng([seed, side])
    places = [" and ".join(rng.choice(PLACES, 2, replace=False)) for _ in range(ITEMS)]
    titles = [f"{rng.choice(GENRES)} in {place} ({1940 + i % 80})" for i, place in enumerate(places)]
    encoded = folder / f"encoded{side}"
    encoded.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        build_backbone(folder, shape, titles)
    core = load(folder, device, dtype)
    paths = [folder / f"poster{side}_{item}.jpg" for item in range(ITEMS)]
    for path in paths:
        draw_poster(path, side, rng)
    began = time.perf_counter()
    processor = load_image_processor(folder, side * side)
    encode_items(core, load_tokenizer(folder), processor, titles, paths, encoded)
    seconds = (time.perf_counter() - began) / ITEMS
    items = Items([{"item": str(i), "title": title} for i, title in enumerate(titles)])
    tokens = ImageTokens(items, encoded)
    prompts = Prompts(load_template(folder), items, tokens, history_first=history_first)
    drawn = draw_examples(examples, history, rng)
    return Workload(folder, shape, paths, items, tokens, prompts, drawn, side * side, seconds), core


def draw_examples(count: int, history: int, rng: np.random.Generator) -> list[Example]:
    examples = []
    for number in range(count):
        items = rng.choice(ITEMS, history + CANDIDATES, replace=False).tolist()
        candidates = items[history:]
        target, rejected = (candidates[i] for i in rng.choice(CANDIDATES, 2, replace=False))
        examples.append(Example(f"user{number}", items[:history], target, candidates, rejected))
    return examples
