"""Measure how fast texts are written, in batches and one by one: python bench/summaries.py [--json FILE]

The demo's tiny backbone writes texts for the prompts of mllm_srec.summarize. mllm_srec.teach first trains it for some
steps, so that its texts end by themselves, at different lengths. A batch has prompts of about the same length, as in
mllm_srec.summarize. The same generator then gets every eighth prompt alone.
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

BATCH = 64
MAX_TOKENS = 120  # of a text
STEPS = 400  # of mllm_srec.teach


def compare(folder: Path) -> list[dict]:
    """Measure the texts of items and the paragraphs. Returns their result rows."""
    data_folder, run = folder / "data", folder / "run"
    data_folder.mkdir()
    prepare_data.main(["--out", str(data_folder)])
    teach.main(["--data", str(data_folder), "--out", str(run), "--max-steps", str(STEPS)])
    summarize.main(["--data", str(data_folder), "--run", str(run), "--max-tokens", str(MAX_TOKENS)])
    data = DataFolder(data_folder)
    encoding = Encoding(data)
    user_texts = load_user_texts(summaries_folder(data, encoding, None), encoding, timelines(data))
    core = PackedMLLM(load_finished(run, encoding, torch.float32)).core
    writer = writers.Local(core, load_prompts(data, encoding), encoding.tokens, MAX_TOKENS, BATCH)
    items = [item_prompt(user_texts.texts, "both", encoding, item) for item in range(BATCH)]
    paragraphs = []
    for user, windows in user_texts.users.items():
        for end, paragraph, _ in windows:
            if paragraph:
                window = user_texts.timelines[user][end - 3 : end]
                paragraphs.append(user_texts.preference_prompt(window, paragraph))
    return [rates(writer, "items", items), rates(writer, "paragraphs", paragraphs[:BATCH])]


def rates(writer: writers.Local, name: str, prompts: list) -> dict:
    """Measure one kind of prompts. Returns its result row."""
    prompts = sorted(prompts, key=writer.length)
    alone = prompts[::8]
    usable = sum(reply.fault is None for reply in writer(prompts))
    (batched, single), _ = measure.alternating(lambda: writer(prompts), lambda: [writer([prompt]) for prompt in alone])
    batched, single = measure.scaled(batched, 1 / len(prompts)), measure.scaled(single, 1 / len(alone))
    case = f"{name}, batches of {len(prompts)}"
    return measure.result("Summaries", case, "s per text", batched, {"one by one": single}, goal=5, usable=usable)


def main(argv: list[str] | None = None) -> None:
    measure.script(argv, __doc__, compare)


if __name__ == "__main__":
    main()
