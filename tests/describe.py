"""Describe MovieLens's films for mllm_srec.teach: genre, decade, and the poster's light.

    python tests/describe.py --data data/movielens-small --source movielens-small/

Writes descriptions.jsonl in the data folder. A description has the first genre in movies.csv, the decade of the year in
the title, and two facts about the poster's mean colour: dark, dim or bright; warm, plain or cold. A fact that is not
known is left out. Afterwards run `prepare_data.py --encode-only`, so that the tiny backbone's tokenizer learns these
words.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hanorec.model.images import open_image
from hanorec.run.files import one_line_errors, read_jsonl, write_jsonl


def poster_facts(path: Path) -> dict[str, str]:
    """The light and the tone of a picture, from its mean red, green and blue (0 to 255)."""
    red, green, blue = open_image(path).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    mean = (red + green + blue) / 3
    light = "dark" if mean < 85 else "bright" if mean > 140 else "dim"
    return {"light": light, "tone": "warm" if red - blue > 15 else "cold" if blue - red > 15 else "plain"}


def describe(item: dict, genres: str, poster: Path | None) -> dict | None:
    """The line of a film in descriptions.jsonl; None if no fact about it is known."""
    facts = {}
    if genres and not genres.startswith("("):  # "(no genres listed)"
        facts["genre"] = genres.split("|")[0]
    if year := re.search(r"\((\d{3})\d\)\s*$", item["title"]):
        facts["decade"] = f"{year[1]}0s"
    words = [facts.get("genre", ""), "film", f"of the {facts['decade']}" if "decade" in facts else ""]
    text = " ".join(word for word in words if word)
    if poster:
        facts |= poster_facts(poster)
        text += f", its poster {facts['light']} and {facts['tone']}"
    return {"item": item["item"], "text": f"{text}.", "facts": facts} if facts else None


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data folder that prepare_data.py wrote")
    parser.add_argument("--source", type=Path, required=True, help="folder with movies.csv and posters/")
    options = parser.parse_args(argv)
    with (options.source / "movies.csv").open(newline="", encoding="utf-8") as file:
        genres = {line["movieId"]: line["genres"] for line in csv.DictReader(file)}
    lines = []
    for item in read_jsonl(options.data / "items.jsonl", {"item": str, "title": str}, "run prepare_data.py"):
        poster = options.source / "posters" / f"{item['item']}.jpg"
        line = describe(item, genres.get(item["item"], ""), poster if poster.exists() else None)
        if line:
            lines.append(line)
    path = options.data / "descriptions.jsonl"
    write_jsonl(path, lines)
    print(f"{path}: {len(lines)} descriptions")


if __name__ == "__main__":
    main()
