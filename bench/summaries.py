"""Writing texts, batched against one by one: python bench/summaries.py [--json FILE]

What summarize.py asks for, written by the demo's tiny backbone, which teach.py first teaches to write for some steps,
so that texts end where a text ends and differ in length. Batches are made of prompts of about one length, as
summarize.py makes them; the same writer then gets every eighth prompt alone.
"""

from pathlib import Path

import measure
import torch
import workload  # noqa: F401 (puts the project on the path)

import evaluate
import prepare_data
from hanorec.model import packing
from mllm_srec import srec, summarize, teach, writers

BATCH, EIGHTH = 64, 8
LIMIT = 120  # tokens of a text
STEPS = 400  # of teach.py


def compare(folder: Path) -> list[dict]:
    """The result rows of items and paragraphs."""
    data_folder, run = folder / "data", folder / "run"
    data_folder.mkdir()
    prepare_data.main(["--out", str(data_folder)])
    teach.main(["--data", str(data_folder), "--out", str(run), "--max-steps", str(STEPS)])
    summarize.main(["--data", str(data_folder), "--run", str(run), "--max-tokens", str(LIMIT)])
    data = evaluate.Data(data_folder, None, story="")
    story = srec.load_story(data.story, data.catalogue, data.timelines(), data.encoding)
    core = packing.PackedMLLM(evaluate.load_result(run, data, torch.float32)).core
    writer = writers.Local(core, packing.load_prompts(data.source, data.catalogue), data.catalogue, LIMIT, BATCH)
    items = [srec.item_prompt(story.texts, "both", data.catalogue, row) for row in range(len(data.catalogue.ids))]
    points = ((story.lines[user], point) for user, found in story.users.items() for point in found if point[1])
    paragraphs = [story.preference_prompt(line[max(0, end - 3) : end], told) for line, (end, told, _) in points]
    return [rates(writer, name, every[:BATCH]) for name, every in (("items", items), ("paragraphs", paragraphs))]


def rates(writer: writers.Local, name: str, prompts: list) -> dict:
    """The result row of one kind of prompts."""
    prompts = sorted(prompts, key=writer.length)
    few = prompts[::EIGHTH]
    ended = sum(reply.fault is None for reply in writer(prompts))
    (batched, single), _ = measure.alternating(lambda: writer(prompts), lambda: [writer([prompt]) for prompt in few])
    each = [measure.scaled(found, 1 / len(own)) for found, own in ((batched, prompts), (single, few))]
    case = f"{name}, batches of {len(prompts)}"
    return measure.result("Summaries", case, "s per text", each[0], {"one by one": each[1]}, goal=5, usable=ended)


def main(argv: list[str] | None = None) -> None:
    measure.script(argv, __doc__, compare)


if __name__ == "__main__":
    main()
