"""Draw one ranked test example as a PNG: the history's posters, then the candidates in the run's order.

    python bench/picture.py                          # runs/demo/dpo_hano, the first test user -> docs/ranked.png
    python bench/picture.py --run runs/ml-1m/sft --user 42 --out ml-1m.png

Reads config.json and predictions.jsonl in the run folder, which evaluate.py writes, and items.jsonl and test.jsonl in
the run's data folder. The same files give the same picture. Needs Pillow and nothing else.
"""

import argparse
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, POSTER, LINE = 900, 30, 112, 30  # pixels; POSTER is the height of a poster, LINE of a candidate
PAPER, INK, GREY, FRAME = "#fbfaf7", "#1f2328", "#57606a", "#c9c7c0"
MARK, BAR, TARGET_BAR = "#e3f1e5", "#b9c4d0", "#3b8f4d"
COLUMNS = {"rank": 45, "title": 90, "score": 540, "bar": 565, "share": 755, "note": 775}  # x of each column


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a .jsonl file; SystemExit where the file is missing."""
    if not path.exists():
        raise SystemExit(f"picture.py: error: {path} does not exist; run evaluate.py first (the demo: make demo)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def wrap(draw: ImageDraw.ImageDraw, text: str, font, width: int, most: int = 2) -> list[str]:
    """`text` in at most `most` lines, none wider than `width` pixels; "..." stands where text is left out."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = [shorten(draw, line, font, width) for line in lines[:most]]
    if len(lines) > most:
        shown[-1] = shorten(draw, f"{lines[most - 1]} {lines[most]}", font, width)
    return shown


def shorten(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> str:
    """`text`; if it is wider than `width` pixels, it is cut and ends in "..."."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(f"{text}...", font=font) > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def draw_history(image: Image.Image, draw, top: int, items: list[dict], data: Path, font) -> None:
    """The history, oldest first: each item's poster, and its title below in two lines."""
    cell = (WIDTH - 2 * MARGIN) // len(items)
    for number, item in enumerate(items):
        centre = MARGIN + cell * number + cell // 2
        if item["image"]:
            poster = Image.open(data / item["image"]).convert("RGB")
            poster.thumbnail((cell - 20, POSTER))
        else:
            poster = Image.new("RGB", (POSTER * 3 // 4, POSTER), "#d8d6d0")
        left = centre - poster.width // 2
        image.paste(poster, (left, top + POSTER - poster.height))
        draw.rectangle((left, top + POSTER - poster.height, left + poster.width, top + POSTER), outline=FRAME)
        for line, text in enumerate(wrap(draw, item["title"], font, cell - 12)):
            draw.text((centre, top + POSTER + 8 + 20 * line), text, INK, font, "ma")


def draw_candidates(draw, top: int, ranked: list[tuple[float, dict]], target: str, font) -> None:
    """The candidates, best first: rank, title, score, and the share of the probability among the candidates."""
    total = sum(math.exp(score - ranked[0][0]) for score, _ in ranked)
    for number, (score, item) in enumerate(ranked):
        y, share, is_target = top + LINE * number, math.exp(score - ranked[0][0]) / total, item["item"] == target
        if is_target:
            draw.rectangle((MARGIN, y, WIDTH - MARGIN, y + LINE - 4), fill=MARK)
            draw.text((COLUMNS["note"], y + 13), "the target", TARGET_BAR, font, "lm")
        title = shorten(draw, item["title"], font, COLUMNS["score"] - COLUMNS["title"] - 80)
        draw.text((COLUMNS["rank"] + 20, y + 13), str(number + 1), GREY, font, "rm")
        draw.text((COLUMNS["title"], y + 13), title, INK, font, "lm")
        draw.text((COLUMNS["score"], y + 13), f"{score:.2f}", INK, font, "rm")
        end = COLUMNS["bar"] + max(2, round(150 * share))
        draw.rectangle((COLUMNS["bar"], y + 7, end, y + 19), fill=TARGET_BAR if is_target else BAR)
        draw.text((COLUMNS["share"], y + 13), f"{share:.0%}", GREY, font, "rm")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo/dpo_hano"), help="an evaluated run")
    parser.add_argument("--user", help="the user whose example is drawn [the first in predictions.jsonl]")
    parser.add_argument("--out", type=Path, default=Path("docs/ranked.png"), help="the PNG to write")
    options = parser.parse_args(argv)
    predictions = {line["user"]: line for line in read_lines(options.run / "predictions.jsonl")}
    data = Path(json.loads((options.run / "config.json").read_text(encoding="utf-8"))["options"]["data"])
    items = {item["item"]: item for item in read_lines(data / "items.jsonl")}
    examples = {line["user"]: line for line in read_lines(data / "test.jsonl")}
    user = options.user or next(iter(predictions))
    if user not in predictions or user not in examples:
        raise SystemExit(f"picture.py: error: {options.run}/predictions.jsonl has no user {user}")
    prediction = predictions[user]
    scored = zip(prediction["scores"], (items[item] for item in prediction["candidates"]), strict=True)
    ranked = sorted(scored, key=lambda pair: -pair[0])

    body, head = ImageFont.load_default(17), ImageFont.load_default(20)
    height = 300 + LINE * len(ranked)
    image = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, WIDTH - 1, height - 1), outline=FRAME)
    draw.text((MARGIN, 20), f"History of {user}, oldest first", INK, head)
    draw_history(image, draw, 60, [items[item] for item in examples[user]["history"]], data, body)
    draw.text((MARGIN, 240), f"{len(ranked)} candidates, ranked by log-likelihood", INK, head)
    draw_candidates(draw, 280, ranked, prediction["target"], body)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(128).save(options.out, optimize=True)
    print(f"{options.out}: user {user}, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
