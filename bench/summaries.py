"""Writing texts, batched against one by one: python bench/summaries.py [--json FILE]

What mllm_srec.summarize asks for, written by the demo's tiny backbone. mllm_srec.teach first teaches it for some steps,
so that texts end where a text ends and differ in length. Batches are made of prompts of about one length, as
mllm_srec.summarize makes them; the same writer then gets every eighth prompt alone.
"""

from pathlib import Path

import measure
import torch
import workload  # noqa: F401 (puts the project on the path)

import prepare_data
from hanorec.data.folder import DataFolder
from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.packing import PackedMLLM
from mllm_srec import summarize, teach, writers
from mllm_srec.chain_of_thought import load_prompts
from mllm_srec.preferences import load_user_texts, summaries_folder, timelines
from mllm_srec.texts import item_prompt

BATCH, EIGHTH = 64, 8
LIMIT = 120  # tokens of a text
STEPS = 400  # of mllm_srec.teach


def compare(folder: Path) -> list[dict]:
    """The result rows of items and paragraphs."""
    data_folder, run = folder / "data", folder / "run"
    data_folder.mkdir()
    prepare_data.main(["--out", str(data_folder)])
    teach.main(["--data", str(data_folder), "--out", str(run), "--max-steps", str(STEPS)])
    summarize.main(["--data", str(data_folder), "--run", str(run), "--max-tokens", str(LIMIT)])
    data = DataFolder(data_folder)
    encoding = Encoding(data)
    texts = load_user_texts(summaries_folder(data, encoding, None), encoding, timelines(data))
    core = PackedMLLM(load_finished(run, encoding, torch.float32)).core
    writer = writers.Local(core, load_prompts(data, encoding), encoding.tokens, LIMIT, BATCH)
    items = [item_prompt(texts.texts, "both", encoding, item) for item in range(len(data.items))]
    points = ((texts.timelines[user], point) for user, found in texts.users.items() for point in found if point[1])
    paragraphs = [texts.preference_prompt(line[max(0, end - 3) : end], before) for line, (end, before, _) in points]
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
