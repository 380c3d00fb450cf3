"""Texts per second of summarize.py's writer on one thread, batched against one by one; a JSON object on stdout.

The seconds are the processor's own, so that other work on the machine does not count.

python bench/summaries.py --run runs/demo/teach      # after teach.py on the demo, and summarize.py with it
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def rate(writer, prompts: list, size: int) -> float:
    """Texts per second of the processor, in batches of this size."""
    began = time.process_time()
    for start in range(0, len(prompts), size):
        writer(prompts[start : start + size])
    return len(prompts) / (time.process_time() - began)


def main() -> None:
    import torch

    import evaluate
    import packing
    import srec
    import writers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="data folder with summaries")
    parser.add_argument("--run", type=Path, default=Path("runs/demo/teach"), help="run of teach.py that writes")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--texts", type=int, default=64, help="batched; one by one, an eighth of them")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = evaluate.Data(options.data, None, story="")
    story = srec.load_story(data.story, data.catalogue, data.timelines())
    core = packing.PackedMLLM(evaluate.load_result(options.run, data, torch.float32)).core
    prompts = packing.load_prompts(data.source, data.catalogue)
    writer = writers.Local(core, prompts, data.catalogue, 120, options.batch_size)
    items = [srec.item_prompt(story.texts, "both", data.catalogue, row) for row in range(len(data.catalogue.ids))]
    points = ((story.lines[user], point) for user, found in story.users.items() for point in found if point[1])
    windows = (story.preference_prompt(line[max(0, end - 3) : end], told) for line, (end, told, _) in points)
    kinds = {"items": items[: options.texts], "paragraphs": list(itertools.islice(windows, options.texts))}
    found = {"batch_size": options.batch_size, "threads": torch.get_num_threads()}
    for kind, prompts_ in kinds.items():
        few = prompts_[:: max(1, len(prompts_) // (options.texts // 8))]
        pairs = [(rate(writer, few, 1), rate(writer, prompts_, options.batch_size)) for _ in range(options.repeats)]
        single, batched = (sorted(column)[len(pairs) // 2] for column in zip(*pairs, strict=True))
        found[kind] = {"one_by_one": round(single, 2), "batched": round(batched, 2)}
        found[kind]["times"] = round(sorted(b / s for s, b in pairs)[len(pairs) // 2], 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
