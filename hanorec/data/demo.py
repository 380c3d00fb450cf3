"""What the project makes by itself: the demo's films, posters and users, and the tiny untrained backbone."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from hanorec.data import readers
from hanorec.model import prompts
from hanorec.run import runs
from mllm_srec import srec

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny(
    folder: Path, texts: Iterable[str], seed: int = 42, vocabulary: int = 3072, width: int = 128, layers: int = 2
) -> None:
    """Write an untrained Qwen2.5-VL of about a million weights, its tokenizer (byte-level BPE trained on `texts` and
    the project's own prompts), chat template and image processor to `folder`, loadable like any pretrained model."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    control = re.compile("|".join(map(re.escape, special)))  # a word that spells one would be merged into its id
    texts = [control.sub(" ", text) for text in texts]
    asked = [re.sub(r"{\w+}", "", text) for text in srec.read_texts(srec.TEXTS).values()]
    texts += [*prompts.TEXTS, *asked, "user\n", "assistant\n"] * 100  # so often that each prompt word is one token
    bpe = Tokenizer(models.BPE())
    # A year in brackets stays one word, and a word the same token whatever stands behind it
    words = pre_tokenizers.Split(Regex(r"\n|[.,:;?]+| ?[^ \n.,:;?]+| "), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=special[1:]
    )
    tokenizer.chat_template = CHATML
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "initializer_range": 0.05,  # at 0.02 so narrow a model hardly learns to look back at earlier titles
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    text["rope_parameters"]["mrope_section"] = [width // 32, width * 3 // 64, width * 3 // 64]
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": width}
    vision |= {"window_size": 112, "fullatt_block_indexes": [1]}
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "video_token_id": ids["<|vision_end|>"],  # no videos here; it must not be an id of its own
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    for part in (model, tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)


PLACES = """
    Alder Avon Basil Birch Cairn Cedar Clover Cobalt Delta Dover Ember Fallow Fern Garnet Glen Harbor Hazel
    Heron Indigo Iris Jasper Juniper Kestrel Larch Linden Lotus Maple Marlow Mercer Nettle Nova Oakley Olive
    Opal Orchid Pebble Piper Quartz Raven Reed Robin Rowan Saffron Sorrel Sterling Thistle Umber Vesper Willow
    Yarrow
""".split()
GENRES = ["Romance", "Mystery", "Western", "Comedy", "Horror", "Fantasy", "Thriller", "Musical"]
COLOURS = [(200, 30, 40), (240, 140, 20), (240, 220, 40), (40, 160, 60), (40, 200, 220), (40, 60, 200), (130, 40, 170)]
COLOURS += [(240, 130, 190)]
COLOUR_NAMES = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]


def read_demo(options: argparse.Namespace) -> readers.Raw:
    """The embedded demo, its posters drawn into the data folder."""
    rows, titles, images = make_demo(options.out, options.seed)
    return readers.Raw(readers.collect(enumerate(rows), options.out, user=0, item=1, time=2), titles, images, [])


def make_demo(folder: Path, seed: int, users: int = 400) -> tuple[list[tuple], dict[str, str], dict[str, Path]]:
    """The embedded demo: 400 films (8 genres x 50 places, both in the title) whose posters have one of 8 colours, that
    no title tells. A user's next film is, with probability 0.5, of the genre that belongs to the last poster's colour;
    with 0.35 of the last film's genre; else of any. Films of some places are more popular than others. Returns (user,
    item, time) of each interaction, and titles and posters by item."""
    rng = np.random.default_rng([seed, 7])
    count = len(GENRES) * len(PLACES)
    genre, colour = np.arange(count) // len(PLACES), rng.integers(len(COLOURS), size=count)
    next_genre = rng.permutation(len(GENRES))  # of each colour
    popularity = np.tile(rng.permutation(np.arange(1, len(PLACES) + 1)) ** -0.5, len(GENRES))
    rows = []
    for user in range(users):
        seen: list[int] = [int(rng.choice(count, p=popularity / popularity.sum()))]
        for _ in range(rng.integers(9, 15)):
            draw = rng.random()
            wanted = next_genre[colour[seen[-1]]] if draw < 0.5 else genre[seen[-1]] if draw < 0.85 else None
            weight = popularity * (genre == wanted if wanted is not None else True)
            weight[seen] = 0
            seen.append(int(rng.choice(count, p=weight / weight.sum())))
        rows += [(f"user{user:03d}", f"film{item:03d}", time) for time, item in enumerate(seen)]
    ids = [f"film{item:03d}" for item in range(count)]
    images = {ids[item]: folder / "images" / f"{ids[item]}.png" for item in range(count)}
    with runs.replacing(folder / "images") as beside:
        beside.mkdir()
        named = enumerate(images.values())
        shapes = [draw_poster(beside / path.name, COLOURS[colour[item]], rng) for item, path in named]
    titles = {ids[item]: f"{GENRES[genre[item]]} in {PLACES[item % len(PLACES)]}" for item in range(count)}
    facts = ((GENRES[genre[item]], COLOUR_NAMES[colour[item]], shapes[item]) for item in range(count))
    runs.write_jsonl(folder / "descriptions.jsonl", (describe(ids[n], *known) for n, known in enumerate(facts)))
    return rows, titles, images


def describe(item: str, genre: str, colour: str, shape: str) -> dict:
    """The truth about a film and its poster: what teach.py teaches, and measures summaries by."""
    return {
        "item": item,
        "text": f"{genre} film, its poster {colour} with a {shape}.",
        "facts": {"genre": genre, "colour": colour, "shape": shape},
    }


def descriptions(folder: Path) -> list[str]:
    """The texts of a data folder's descriptions.jsonl, where there is one: the tiny backbone's tokenizer knows them."""
    path, remedy = folder / "descriptions.jsonl", "mend or delete it"
    return [line["text"] for line in runs.read_jsonl(path, {"text": str}, remedy)] if path.exists() else []


def draw_poster(path: Path, colour: tuple[int, int, int], rng: np.random.Generator) -> str:
    """A poster of 84 x 112 pixels: the colour, a shape and a bar of lettering that mean nothing. Returns the shape."""
    from PIL import Image, ImageDraw

    image = Image.new(
        "RGB", (84, 112), tuple(int(c) for c in np.clip(np.array(colour) + rng.integers(-12, 13, 3), 0, 255))
    )
    draw = ImageDraw.Draw(image)
    x, y, size = (int(v) for v in rng.integers((10, 15, 16), (45, 55, 32)))
    shade = int(rng.choice([20, 235]))
    box = (x, y, x + size, y + size)
    kind = rng.integers(3)
    if kind == 0:
        draw.ellipse(box, fill=(shade,) * 3)
    elif kind == 1:
        draw.rectangle(box, fill=(shade,) * 3)
    else:
        draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=(shade,) * 3)
    for line in range(2):
        left, right = (int(v) for v in (rng.integers(8, 25), rng.integers(50, 76)))
        draw.rectangle((left, 94 + 8 * line, right, 96 + 8 * line), fill=(255 - shade,) * 3)
    image.save(path)
    return ("circle", "square", "triangle")[kind]
