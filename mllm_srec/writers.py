"""Who writes a text to a prompt: a model on this machine (or a server, see server.py); and what is no usable text."""

import functools
import re
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from hanorec.model import backbones, mllm

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
    """A text, and the reason why it cannot be used: `empty`, `refused`, `limit` (cut off, also by a server for another
    reason), `control` (control tokens in it), `nonsense` (a server's answer that holds no text), `no_summary`; or
    None."""

    text: str
    fault: str | None = None

    def checked(self) -> "Reply":
        """The same with its white space in order, and its fault where the text itself is at fault."""
        lines = (" ".join(line.split()) for line in self.text.splitlines())
        text = "\n".join(line for line in lines if line)
        fault = "empty" if not re.search(r"\w", text) else "refused" if REFUSAL.match(text) else None
        return Reply(text, self.fault or fault)

    def line(self) -> str | None:
        """All of it in one line; None where it is at fault."""
        return None if self.fault else " ".join(self.text.split())

    def summary(self) -> "Reply":
        """What stands behind the last "Summary:"."""
        parts = SUMMARY.split(self.text)
        fault = self.fault or ("no_summary" if len(parts) == 1 else None)
        return Reply(self.text, fault) if fault else Reply(parts[-1].lstrip(" *_\n")).checked()


def control_tokens(tokenizer) -> dict[str, int]:
    """The tokens that are no text, with their ids."""
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def spelling_control(titles: list[str], tokenizer) -> int:
    """How many titles hold what spells a control token."""
    control = control_tokens(tokenizer)
    return sum(any(token in title for token in control) for title in titles)


PADDING = 0  # stands before the shorter prompts of a batch, and is masked


def stop_tokens(core, prompts) -> list[int]:
    """Return the tokens that end a text: the chat template's end of turn, and the model's own."""
    own = core.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({prompts.end_of_turn, *(token for token in own if token is not None)})


class Local:
    """A text generator on this machine. It is called with prompts and returns a Reply to each.

    Args:
        core: an image-text model of transformers. Its generation_config is replaced: the model may come with sampling,
            penalties or forced tokens, and greedy generation has none.
        max_tokens: the most tokens of a text.
        batch_size: the number of prompts that the caller should give at once.
    """

    def __init__(self, core, prompts, catalogue, max_tokens: int, batch_size: int):
        from transformers import GenerationConfig

        self.core, self.prompts, self.catalogue = core.eval(), prompts, catalogue
        self.batch_size, stop = batch_size, stop_tokens(core, prompts)
        greedy = {"max_new_tokens": max_tokens, "do_sample": False, "num_beams": 1}
        core.generation_config = GenerationConfig(**greedy, eos_token_id=stop, pad_token_id=PADDING)
        self.special = {*control_tokens(prompts.tokenizer).values(), prompts.image_token}

    def length(self, parts: list) -> int:
        """Return the tokens of a prompt. Prompts of about the same length should share a batch."""
        return len(self.prompts.whole(parts).ids)

    def __call__(self, many: list[list]) -> list[Reply]:
        """Reply to prompts, each a list of parts (see `srec.fill`)."""
        nodes = [self.prompts.whole(parts) for parts in many]
        return [self.reply(ids, ended) for ids, ended in self.generate(nodes)]

    @torch.no_grad()
    def generate(self, nodes: list) -> list[tuple[list[int], bool]]:
        """Write the most likely continuation of each prompt, token by token.

        Returns: for each prompt, its new tokens without the stop token, and whether there was a stop token.
        """
        inputs, options, texts = self.inputs(nodes), self.core.generation_config, []
        ids = self.core.generate(**inputs, generation_config=options)
        for tokens in ids[:, inputs["input_ids"].shape[1] :].tolist():
            stops = [index for index, token in enumerate(tokens) if token in options.eos_token_id]
            texts.append((tokens[: stops[0]] if stops else tokens, bool(stops)))
        return texts

    def inputs(self, nodes: list) -> dict:
        """Return the model's arguments for a batch of prompts, padded on the left."""
        rows, items = [torch.tensor(node.ids) for node in nodes], [item for node in nodes for item in node.images]
        pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        ids, valid = pad(rows, padding_value=PADDING), pad([torch.ones_like(row) for row in rows])
        inputs = backbones.token_inputs(self.core, ids.to(self.core.device), valid.to(self.core.device))
        if items:
            grids = torch.stack([self.catalogue.grid(item) for item in items])
            inputs |= backbones.encoder_outputs(self.core, self.image_tokens(items), grids)
        return inputs

    def image_tokens(self, items: list[int]) -> torch.Tensor:
        """Return the image tokens [all, d] of these items in order: stored, or computed from the pictures now."""
        if not self.catalogue.live:
            return torch.cat([self.catalogue.image_tokens(item) for item in items])
        pixels = self.catalogue.pixels(items).items()
        pixels = {name: value.to(self.core.device) if torch.is_tensor(value) else value for name, value in pixels}
        images = backbones.image_tokens(self.core, pixels)
        mllm.check_sizes(self.catalogue.sizes(items), images)
        return torch.cat(images)

    def reply(self, ids: list[int], ended: bool) -> Reply:
        fault = "limit" if not ended else "control" if self.special & set(ids) else None
        return Reply(self.prompts.tokenizer.decode(ids, skip_special_tokens=True), fault).checked()
