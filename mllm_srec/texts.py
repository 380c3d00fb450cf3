"""Read a file of MLLM-SRec's prompts, and replace the placeholders in them, such as {title}."""

import functools
import re
from pathlib import Path

from hanorec.run.files import UserError

PROMPTS_FILE = Path(__file__).with_name("prompts.txt")
PLACEHOLDERS = {  # by prompt: the placeholders that it may have
    "item": {"title", "image"},
    "item without a picture": {"title"},
    "item by its picture alone": {"image"},
    "line": {"title", "summary"},
    "line without a summary": {"title"},
    "first preference": {"items"},
    "preference": {"items", "preference"},
    "profile": {"preference"},
    "user": {"profile", "preference", "since"},
    "candidate": {"title", "image"},
    "steps": {"profile", "preference", "since", "last", "title", "summary", "common"},
    "yes": set(),
    "no": set(),
    "nothing": set(),
}


def read_texts(path: Path = PROMPTS_FILE) -> dict[str, str]:
    """Read a prompts file. Returns the prompts by name.

    Raises:
        UserError: a prompt is missing, unknown or defined twice, or has a placeholder that it may not have.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a file like {PROMPTS_FILE.name}") from error
    prompt_lines: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            continue
        heading = re.fullmatch(r"\[(.+)\]\s*", line)
        if heading:
            name = heading[1]
            if name in prompt_lines or name not in PLACEHOLDERS:
                names = ", ".join(PLACEHOLDERS)
                raise UserError(f"{path}, line {number}: [{name}] is there twice, or is not one of {names}")
            prompt_lines[name] = []
        elif prompt_lines:
            prompt_lines[name].append(line)
        elif line.strip():
            raise UserError(f"{path}, line {number}: text before the first [name]")
    texts = {name: "\n".join(lines).strip() for name, lines in prompt_lines.items()}
    for name, allowed in PLACEHOLDERS.items():
        if not texts.get(name):
            raise UserError(f"{path} has no text for [{name}]; take it from {PROMPTS_FILE.name}")
        not_allowed = set(re.findall(r"{(\w+)}", texts[name])) - allowed
        if not_allowed:
            names = ", ".join(sorted(allowed)) or "none"
            raise UserError(f"{path}, [{name}]: {{{min(not_allowed)}}} is not allowed there; allowed are: {names}")
    return texts


def without_words(texts: dict[str, str]) -> list[str]:
    """Return the prompts without their placeholders. The tiny backbone's tokenizer is trained on them."""
    return [re.sub(r"{\w+}", "", text) for text in texts.values()]


@functools.lru_cache(maxsize=100)
def pieces(text: str) -> list[str]:
    """Split a prompt into text and names of placeholders, in turn."""
    return re.split(r"{(\w+)}", text)


def fill(text: str, **values) -> list[str | int]:
    """Replace the placeholders of a text. Returns the parts of a prompt: strings, and item indices for images.

    Args:
        values: by placeholder: a string, or the item index of an image. Placeholders in these strings are not replaced.
    """
    parts: list = [""]
    for number, piece in enumerate(pieces(text)):
        value = values[piece] if number % 2 else piece
        if isinstance(value, int):
            parts += [value, ""]
        else:
            parts[-1] += value
    return [part for part in parts if part != ""]


def item_prompt(texts: dict[str, str], sees: str, encoding, item: int) -> list[str | int]:
    """Return the parts of the prompt for an item's summary.

    Args:
        texts: the prompts by name.
        sees: what the prompt shows of an item that has an image: `image`, `text` or `both`. Without an image: the text.
    """
    if sees == "text" or not encoding.tokens.lengths[item]:
        name = "item without a picture"
    elif sees == "image":
        name = "item by its picture alone"
    else:
        name = "item"
    return fill(texts[name], title=encoding.items.titles[item], image=item)
