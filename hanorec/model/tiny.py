"""The tiny backbone: an untrained Qwen2.5-VL of about a million weights, for laptops and tests."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hanorec.model.prompts import TEXTS

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
VOCABULARY = 3072  # tokens at most
TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": None}
TEXT["initializer_range"] = 0.05  # with 0.02, so narrow a model hardly learns to attend to earlier titles
VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "window_size": 112}
VISION["fullatt_block_indexes"] = [1]


def build_tiny(
    folder: Path, texts: Iterable[str], seed: int = 42, further_prompts: Iterable[str] = (), width: int = 128
) -> None:
    """Write the tiny backbone to `folder`: model, tokenizer and image processor, loadable like a pretrained one.

    Args:
        texts: the texts that the tokenizer is trained on, beside the prompts.
        seed: of the weights.
        further_prompts: prompts of another system; the tokenizer is trained on them as on our own.
        width: the hidden size of the language model.
    """
    tokenizer = train_tokenizer(texts, further_prompts)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    sections = [width // 32, width * 3 // 64, width * 3 // 64]  # time, height, width: in all, half of a head's size
    text = TEXT | {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=VISION | {"out_hidden_size": width},
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        video_token_id=ids["<|vision_end|>"],  # there are no videos; the config needs the id of some token
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    for part in (model, tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)


def train_tokenizer(texts: Iterable[str], further_prompts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on these texts and on the prompts. It has a ChatML template."""
    special = re.compile("|".join(map(re.escape, SPECIAL)))  # BPE would merge the spelling of such a token into its id
    texts = [special.sub(" ", text) for text in texts]
    texts += [*TEXTS, *further_prompts, "user\n", "assistant\n"] * 100  # 100 times, so each prompt word is one token
    bpe = Tokenizer(models.BPE())
    # "(1999)" is one word. Punctuation and line ends are split off, so that a word has the same tokens before them
    words = pre_tokenizers.Split(Regex(r"\n|[.,:;?]+| ?[^ \n.,:;?]+| "), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=SPECIAL[1:]
    )
    tokenizer.chat_template = CHATML
    return tokenizer
