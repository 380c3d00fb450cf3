"""The tiny backbone: an untrained Qwen2.5-VL of about a million weights, for laptops and tests."""

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


def build_tiny(
    folder: Path,
    texts: Iterable[str],
    seed: int = 42,
    further_prompts: Iterable[str] = (),
    vocabulary: int = 3072,
    width: int = 128,
    layers: int = 2,
) -> None:
    """Write the tiny backbone to `folder`, loadable like any pretrained one: model, tokenizer, image processor.

    Args:
        texts: what the tokenizer is trained on, beside the prompts.
        seed: of the weights.
        further_prompts: prompts of another system, which the tokenizer shall know like our own.
    """
    tokenizer = train_tokenizer(texts, further_prompts, vocabulary)
    config = tiny_config(tokenizer, width, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    for part in (model, tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)


def tiny_config(tokenizer, width: int, layers: int) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of this width and depth for this tokenizer."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [width // 32, width * 3 // 64, width * 3 // 64],
        },
        "bos_token_id": None,
        "initializer_range": 0.05,  # at 0.02 so narrow a model hardly learns to look back at earlier titles
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": width,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "video_token_id": ids["<|vision_end|>"],  # no videos here; it must not be an id of its own
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)


def train_tokenizer(texts: Iterable[str], further_prompts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on these texts and on the prompts, with a ChatML template."""
    control = re.compile("|".join(map(re.escape, SPECIAL)))  # a word that spells one would be merged into its id
    texts = [control.sub(" ", text) for text in texts]
    texts += [*TEXTS, *further_prompts, "user\n", "assistant\n"] * 100  # so often that each prompt word is one token
    bpe = Tokenizer(models.BPE())
    # A year in brackets stays one word, and a word is the same token whatever follows it
    words = pre_tokenizers.Split(Regex(r"\n|[.,:;?]+| ?[^ \n.,:;?]+| "), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=SPECIAL[1:]
    )
    tokenizer.chat_template = CHATML
    return tokenizer
