"""Who writes a text to a prompt: a model on this machine (or a server, see server.py); and what is no usable text."""

import re
from dataclasses import dataclass

from mllm_srec import generation

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


class Local:
    """A model on this machine. Called with prompts (lists of parts, see `srec.fill`), it gives a Reply to each."""

    def __init__(self, core, prompts, catalogue, max_tokens: int, batch_size: int):
        self.core, self.prompts, self.catalogue = core.eval(), prompts, catalogue
        self.max_tokens, self.batch_size = max_tokens, batch_size
        self.stop = generation.stop_tokens(core, prompts)
        self.special = {*control_tokens(prompts.tokenizer).values(), prompts.image_token}

    def length(self, parts: list) -> int:
        """Of a prompt, in tokens: those of one length go well together."""
        return len(self.prompts.whole(parts).ids)

    def __call__(self, many: list[list]) -> list[Reply]:
        nodes = [self.prompts.whole(parts) for parts in many]
        found = generation.generate(self.core, nodes, self.catalogue, self.stop, self.max_tokens)
        return [self.reply(ids, ended) for ids, ended in found]

    def reply(self, ids: list[int], ended: bool) -> Reply:
        fault = "limit" if not ended else "control" if self.special & set(ids) else None
        return Reply(self.prompts.tokenizer.decode(ids, skip_special_tokens=True), fault).checked()
