"""Scoring ten candidates: packed, by ten plain forwards, and generating one answer instead: python bench/evaluation.py

The first two are score_examples, packed and not, on stored image tokens. The third is `generate` with greedy
decoding from the image files, a batch of rows at a time, up to the longest title: it gives one answer a row, no ranks.
"""

from pathlib import Path

import measure
import ours
import torch
import trl_side
import workload

from hanorec.model.images import open_image
from hanorec.ranking.scoring import score_examples
from hanorec.run.launch import start_accelerator

ROWS, BATCH = 8, 4
OPTIONS = {"tasks": ["rank"], "max_length": 100_000}


def generator(work, core, batch: int):
    """A function that answers all rows by greedy decoding, as one does it without this project."""
    pairs = work.pairs()
    examples = [trl_side.texts(work, pairs.tree(number)) for number in range(len(pairs))]
    longest = max(len(work.prompts.text(title)) for title in work.items.titles) + 1
    processor = trl_side.processor(work)

    def answer() -> list[str]:
        found = []
        for start in range(0, len(examples), batch):
            chosen = examples[start : start + batch]
            images = [[open_image(Path(path)) for path in paths] for _, _, paths in chosen]
            inputs = processor(
                images=images, text=[text for text, _, _ in chosen], return_tensors="pt", padding=True,
                padding_side="left",
            ).to(core.device)  # fmt: skip
            ids = core.generate(**inputs, do_sample=False, max_new_tokens=longest)
            found += processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return found

    return answer


def compare(folder: Path, shape: str, side: int, device="cpu", dtype=None, rows: int = ROWS) -> dict:
    """The result row of one shape at one image size. LoRA stays beside the weights, as in a half-precision run."""
    work, core = workload.make(folder, shape, side, rows, device=device, dtype=dtype)
    accelerator = start_accelerator()
    packed = ours.trainable(core)
    plain = ours.trainable(
        workload.load(folder, device, dtype), pack=False
    )  # packing installs its attention in a model
    for model in (packed, plain):
        ours.randomize(model)
    score = {
        name: lambda model=model: score_examples(model, work, work.prompts, work.examples, OPTIONS, accelerator, BATCH)[
            0
        ]
        for name, model in (("ours", packed), ("plain forwards", plain))
    }
    difference = abs(score["ours"]() - score["plain forwards"]()).max()
    own = workload.load(folder, device, dtype, attn=trl_side.attention(device))
    answer = torch.inference_mode()(generator(work, ours.trainable(own, pack=False).model, BATCH))
    (mine, forwards, generated), rate = measure.alternating(
        score["ours"], score["plain forwards"], answer, device=device, dtype=dtype
    )
    trees = [work.prompts.evaluation_tree(row, "rank") for row in work.examples]
    flops = measure.floor(core, trees, training=False)
    others = {"plain forwards": forwards, "generate": generated}
    row = measure.result(
        "Evaluation",
        f"{shape}, {side} px, {rows} rows of {workload.CANDIDATES} candidates",
        "s",
        mine,
        others,
        goal=8,
        difference=float(difference),
        flops=flops,
        per_step=rows,
        rate=rate,
        memory=measure.peaks(score | {"generate": answer}, core, device),
    )
    del row["floor"]["generate"]  # it does not score ten candidates
    return row


def main(argv: list[str] | None = None) -> None:
    measure.script(argv, __doc__, lambda folder: [compare(folder, "scaled", side) for side in (112, 224)])


if __name__ == "__main__":
    main()
