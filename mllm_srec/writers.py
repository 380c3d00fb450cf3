"""Generate texts with a model on this machine, and tell usable texts from unusable ones. For servers see server.py."""

import re
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import send_to_device
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from hanorec.model import families
from hanorec.model.encoding import Encoding
from hanorec.model.images import ImageTokens, check_sizes
from hanorec.model.load import load_tokenizer
from hanorec.model.prompts import Prompts
from hanorec.model.trees import Node

# How a refusal begins
CANNOT = (
    r"(i (can['\u2019]?t|cannot|can not|do(n['\u2019]?t| not) have the ability)|(i['\u2019]?m|i am) (unable|not able))"
)
REFUSAL = re.compile(
    r"\W*((i['\u2019]?m|i am) (sorry|afraid)|i apologi[sz]e|as an ai (\w+ )?(model|assistant)|"
    rf"(sorry|unfortunately)\W+(but )?{CANNOT}|"
    rf"{CANNOT} (\w+ )?(answer|assist|describe|do|help|identify|provide|see|to|view))\b",
    re.I,
)
SUMMARY_HEADING = re.compile(r"^\W*summary\W*:", re.I | re.M)
PADDING = 0  # the token before the shorter prompts of a batch; attention does not see it


@dataclass
class Reply:
    """A generated text, and why it is unusable.

    Args:
        fault: None if the text is usable. Otherwise `empty` (no word), `refused`, `limit` (it did not end by itself),
            `control` (it has control tokens), `nonsense` (the server refused the prompt, or its answer cannot be read)
            or `no_summary`.
    """

    text: str
    fault: str | None = None

    @classmethod
    def checked(cls, text: str, ended: bool = True, control: bool = False) -> "Reply":
        """Return a Reply to a text: without superfluous white space, and with the fault of the text.

        Args:
            ended: the text ended by itself, not at a limit.
            control: the text has control tokens.
        """
        lines = (" ".join(line.split()) for line in text.splitlines())
        text, fault = "\n".join(line for line in lines if line), None
        if not ended:
            fault = "limit"
        elif control:
            fault = "control"
        elif not re.search(r"\w", text):
            fault = "empty"
        elif REFUSAL.match(text):
            fault = "refused"
        return cls(text, fault)

    def line(self) -> str | None:
        """Return the text on one line, or None if it is unusable."""
        return None if self.fault else " ".join(self.text.split())

    def summary(self) -> "Reply":
        """Return a Reply of the text after the last "Summary:"."""
        parts = SUMMARY_HEADING.split(self.text)
        if self.fault or len(parts) == 1:
            return Reply(self.text, self.fault or "no_summary")
        return Reply.checked(parts[-1].lstrip(" *_\n"))


def control_tokens(tokenizer) -> dict[str, int]:
    """Return the ids of all control tokens by their spelling."""
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def titles_with_control_tokens(encoding: Encoding) -> int:
    """Return how many titles contain the spelling of a control token."""
    control = control_tokens(load_tokenizer(encoding.source, encoding.trust))
    return sum(any(token in title for token in control) for title in encoding.items.titles)


class Local:
    """A text generator on this machine. Call it with prompts (lists of parts) to get a Reply to each.

    Args:
        core: an image-text model of transformers. Its generation_config is replaced by plain greedy generation: the
            model's own may have sampling, penalties or forced tokens. A text ends at the chat template's end of turn,
            or at a token that ends a text in the model's own generation_config.
        tokens: the ImageTokens of the items.
        max_tokens: the most tokens of a text.
        batch_size: the number of prompts that the caller should give at once.
    """

    def __init__(self, core, prompts: Prompts, tokens: ImageTokens, max_tokens: int, batch_size: int):
        self.core, self.prompts, self.tokens, self.batch_size = core.eval(), prompts, tokens, batch_size
        eos = getattr(core.generation_config, "eos_token_id", None)  # a model may come without a generation_config
        stops = eos if isinstance(eos, list) else [eos]
        core.generation_config = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted({prompts.template.end_of_turn, *stops} - {None}),
            pad_token_id=PADDING,
        )
        self.control = {*control_tokens(prompts.tokenizer).values(), prompts.template.image_token}

    def length(self, parts: list) -> int:
        """Return the number of tokens of a prompt. A batch is fastest with prompts of about the same length."""
        return len(self.prompts.complete_prompt(parts).ids)

    def __call__(self, prompts: list[list]) -> list[Reply]:
        nodes, replies = [self.prompts.complete_prompt(parts) for parts in prompts], []
        for ids, ended in self.generate(nodes):
            text = self.prompts.tokenizer.decode(ids, skip_special_tokens=True)
            replies.append(Reply.checked(text, ended, control=bool(self.control & set(ids))))
        return replies

    @torch.no_grad()
    def generate(self, nodes: list[Node]) -> list[tuple[list[int], bool]]:
        """Continue each prompt by the most likely next token, again and again.

        Returns:
            For each prompt its new tokens without the stop token, and whether there was a stop token.
        """
        inputs, config, texts = self.inputs(nodes), self.core.generation_config, []
        ids = self.core.generate(**inputs, generation_config=config)
        for tokens in ids[:, inputs["input_ids"].shape[1] :].tolist():
            stops = (position for position, token in enumerate(tokens) if token in config.eos_token_id)
            length = next(stops, len(tokens))
            texts.append((tokens[:length], length < len(tokens)))
        return texts

    def inputs(self, nodes: list[Node]) -> dict:
        """Return the model's arguments for a batch of prompts, padded on the left.

        The image tokens are read from the data folder or, for live images, computed from the pictures.
        """
        rows = [torch.tensor(node.ids) for node in nodes]
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        ids, valid = pad(rows, padding_value=PADDING), pad([torch.ones_like(row) for row in rows])
        inputs = families.token_inputs(self.core, ids.to(self.core.device), valid.to(self.core.device))
        items = [item for node in nodes for item in node.images]
        if not items:
            return inputs
        if self.tokens.live:
            pixels, sizes = self.tokens.pixels(items)
            images = families.image_tokens(self.core, send_to_device(pixels, self.core.device))
            check_sizes(sizes, images)
        else:
            images = [self.tokens.of(item) for item in items]
        return inputs | families.encoder_outputs(self.core, torch.cat(images), self.tokens.grids[items])
