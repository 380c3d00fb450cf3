"""Text generators: a model on this machine (a server: see server.py); and what makes a text unusable."""

import re
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from hanorec.model import families
from hanorec.model.encoding import Encoding
from hanorec.model.images import ImageTokens, check_sizes
from hanorec.model.load import load_tokenizer
from hanorec.model.prompts import Prompts
from hanorec.model.trees import Node

CANNOT = (
    r"(i (can['\u2019]?t|cannot|can not|do(n['\u2019]?t| not) have the ability)|(i['\u2019]?m|i am) (unable|not able))"
)
REFUSAL = re.compile(
    r"\W*((i['\u2019]?m|i am) (sorry|afraid)|i apologi[sz]e|as an ai (\w+ )?(model|assistant)|"
    rf"(sorry|unfortunately)\W+(but )?{CANNOT}|"
    rf"{CANNOT} (\w+ )?(answer|assist|describe|do|help|identify|provide|see|to|view))\b",
    re.I,
)
SUMMARY = re.compile(r"^\W*summary\W*:", re.I | re.M)


@dataclass
class Reply:
    """A text, and why it cannot be used.

    Args:
        fault: None, or `empty`, `refused`, `limit` (cut off, also by a server for another reason), `control` (it has
            control tokens), `nonsense` (a server's answer without a text), `no_summary`.
    """

    text: str
    fault: str | None = None

    def checked(self) -> "Reply":
        """The reply with its white space in order, and with a fault if its text is empty or a refusal."""
        lines = (" ".join(line.split()) for line in self.text.splitlines())
        text = "\n".join(line for line in lines if line)
        fault = self.fault
        if not fault and not re.search(r"\w", text):
            fault = "empty"
        elif not fault and REFUSAL.match(text):
            fault = "refused"
        return Reply(text, fault)

    def line(self) -> str | None:
        """The text on one line; None if it cannot be used."""
        return None if self.fault else " ".join(self.text.split())

    def summary(self) -> "Reply":
        """The part behind the last "Summary:"."""
        parts = SUMMARY.split(self.text)
        fault = self.fault or ("no_summary" if len(parts) == 1 else None)
        return Reply(self.text, fault) if fault else Reply(parts[-1].lstrip(" *_\n")).checked()


def control_tokens(tokenizer) -> dict[str, int]:
    """The tokens that are no text, with their ids."""
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def titles_with_control_tokens(encoding: Encoding) -> int:
    """How many titles contain the spelling of a control token."""
    control = control_tokens(load_tokenizer(encoding.source, encoding.trust))
    return sum(any(token in title for token in control) for title in encoding.items.titles)


PADDING = 0  # stands before the shorter prompts of a batch, and is masked


def stop_tokens(core, prompts: Prompts) -> list[int]:
    """The tokens that end a text: the chat template's end of turn, and the model's own."""
    own = getattr(core.generation_config, "eos_token_id", None)  # a model may come without a generation_config
    own = own if isinstance(own, list) else [own]
    return sorted({prompts.template.end_of_turn, *(token for token in own if token is not None)})


class Local:
    """A text generator on this machine. Called with prompts (lists of parts), it returns a Reply to each.

    Args:
        core: an image-text model of transformers. Its generation_config is replaced: the model may come with sampling,
            penalties or forced tokens, and greedy generation has none.
        max_tokens: the most tokens of a text.
        batch_size: the number of prompts that the caller should give at once.
    """

    def __init__(self, core, prompts: Prompts, tokens: ImageTokens, max_tokens: int, batch_size: int):
        self.core, self.prompts, self.tokens, self.batch_size = core.eval(), prompts, tokens, batch_size
        core.generation_config = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=stop_tokens(core, prompts),
            pad_token_id=PADDING,
        )
        self.special = {*control_tokens(prompts.tokenizer).values(), prompts.template.image_token}

    def length(self, parts: list) -> int:
        """The number of tokens of a prompt. Prompts of about the same length should share a batch."""
        return len(self.prompts.complete_prompt(parts).ids)

    def __call__(self, prompts: list[list]) -> list[Reply]:
        nodes = [self.prompts.complete_prompt(parts) for parts in prompts]
        return [self.reply(ids, ended) for ids, ended in self.generate(nodes)]

    @torch.no_grad()
    def generate(self, nodes: list[Node]) -> list[tuple[list[int], bool]]:
        """Write the most likely continuation of each prompt, token by token.

        Returns for each prompt its new tokens without the stop token, and whether there was a stop token.
        """
        inputs, config, texts = self.inputs(nodes), self.core.generation_config, []
        ids = self.core.generate(**inputs, generation_config=config)
        for tokens in ids[:, inputs["input_ids"].shape[1] :].tolist():
            stops = [position for position, token in enumerate(tokens) if token in config.eos_token_id]
            texts.append((tokens[: stops[0]] if stops else tokens, bool(stops)))
        return texts

    def inputs(self, nodes: list[Node]) -> dict:
        """The model's arguments for a batch of prompts, padded on the left."""
        rows, items = [torch.tensor(node.ids) for node in nodes], [item for node in nodes for item in node.images]
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        ids, valid = pad(rows, padding_value=PADDING), pad([torch.ones_like(row) for row in rows])
        inputs = families.token_inputs(self.core, ids.to(self.core.device), valid.to(self.core.device))
        if items:
            grids = torch.stack([self.tokens.grid(item) for item in items])
            inputs |= families.encoder_outputs(self.core, self.image_tokens(items), grids)
        return inputs

    def image_tokens(self, items: list[int]) -> torch.Tensor:
        """[all, d]: the image tokens of these items in order, stored, or computed from the pictures now."""
        if not self.tokens.live:
            return torch.cat([self.tokens.of(item) for item in items])
        pixels = self.tokens.pixels(items)
        pixels = {n: value.to(self.core.device) if torch.is_tensor(value) else value for n, value in pixels.items()}
        images = families.image_tokens(self.core, pixels)
        check_sizes(self.tokens.sizes(items), images)
        return torch.cat(images)

    def reply(self, ids: list[int], ended: bool) -> Reply:
        fault = None
        if not ended:
            fault = "limit"
        elif self.special & set(ids):
            fault = "control"
        return Reply(self.prompts.tokenizer.decode(ids, skip_special_tokens=True), fault).checked()
