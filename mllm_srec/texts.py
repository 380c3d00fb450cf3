"""The prompts of MLLM-SRec as texts: read a prompts file, and fill its {words} in."""

import re
from pathlib import Path

from hanorec.run.files import UserError

PROMPTS_FILE = Path(__file__).with_name("prompts.txt")
WORDS = {  # the {words} that each prompt may use
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
        UserError: a prompt is missing, unknown or there twice, or uses a {word} that it cannot have.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a file like {PROMPTS_FILE.name}") from error
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            continue
        heading = re.fullmatch(r"\[(.+)\]\s*", line)
        if heading:
            name = heading[1]
            if name in found or name not in WORDS:
                raise UserError(
                    f"{path}, line {number}: [{name}] stands there twice, or is not among {', '.join(WORDS)}"
                )
            found[name] = []
        elif found:
            found[name].append(line)
        elif line.strip():
            raise UserError(f"{path}, line {number}: text before the first [name]")
    texts = {name: "\n".join(lines).strip() for name, lines in found.items()}
    for name, allowed in WORDS.items():
        if not texts.get(name):
            raise UserError(f"{path} has no [{name}]; {PROMPTS_FILE.name} has it")
        unknown = set(re.findall(r"{(\w+)}", texts[name])) - allowed
        if unknown:
            words = ", ".join(sorted(allowed)) or "nothing"
            raise UserError(f"{path}, [{name}]: {{{min(unknown)}}} cannot stand there, only {words}")
    return texts


def without_words(texts: dict[str, str]) -> list[str]:
    """The prompts without their {words}: what a tokenizer shall know."""
    return [re.sub(r"{\w+}", "", text) for text in texts.values()]


def fill(text: str, **values) -> list[str | int]:
    """Fill the {words} of a text in. Returns the parts of a prompt: texts, and item indices for images.

    Args:
        values: by word; an integer is the item index of an image.
    """
    parts: list = [""]
    for number, piece in enumerate(re.split(r"{(\w+)}", text)):
        value = values[piece] if number % 2 else piece
        if isinstance(value, int):
            parts += [value, ""]
        else:
            parts[-1] += value
    return [part for part in parts if part != ""]


def fill_text(text: str, **values: str) -> str:
    """The same for a text without images."""
    return "".join(fill(text, **values))


def item_prompt(texts: dict[str, str], sees: str, encoding, item: int) -> list[str | int]:
    """The prompt for an item's summary. sees: `both` its image and its text, its `image` alone, or its `text` alone."""
    if sees == "text" or not encoding.tokens.length(item):
        text = texts["item without a picture"]
    else:
        text = texts["item by its picture alone" if sees == "image" else "item"]
    return fill(text, title=encoding.items.titles[item], image=item)
