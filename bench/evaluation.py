"""Compare ways to score ten candidates: python bench/evaluation.py [--json FILE]

- Packed: score_examples on stored image tokens.
- Plain forwards: the same without packing, one forward for each candidate.
- generate: greedy decoding from the image files, in batches of examples, up to the longest title. It gives one answer
  for an example and no ranks.
"""

from functools import partial
from pathlib import Path

import measure
import ours
import torch
import trl_side
import workload

from hanorec.model.images import open_image
from hanorec.ranking.scoring import score_examples
from hanorec.run.launch import start_accelerator

EXAMPLES, BATCH = 8, 4
OPTIONS = {"tasks": ["rank"], "max_length": 100_000}


def generator(work, core, batch: int):
    """A function that answers all examples by greedy decoding, as a user of transformers would."""
    pairs = work.pairs()
    examples = [trl_side.texts(work, pairs.tree(number)) for number in range(len(pairs))]
    longest = max(len(work.prompts.text(title)) for title in work.items.titles) + 1
    processor = trl_side.processor(work)

    def answer() -> list[str]:
        answers = []
        for start in range(0, len(examples), batch):
            chosen = examples[start : start + batch]
            images = [[open_image(Path(path)) for path in paths] for _, _, paths in chosen]
            inputs = processor(
                images=images, text=[text for text, _, _ in chosen], return_tensors="pt", padding=True,
                padding_side="left",
            ).to(core.device)  # fmt: skip
            ids = core.generate(**inputs, do_sample=False, max_new_tokens=longest)
            answers += processor.tokenizer.batch_decode(
                ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
        return answers

    return answer


def compare(folder: Path, shape: str, side: int, device="cpu", dtype=None, examples: int = EXAMPLES) -> dict:
    """Measure one backbone and image size. Returns the result row.

    LoRA is not merged into the weights, as in a run in half precision.
    """
    work, core = workload.make(folder, shape, side, examples, device=device, dtype=dtype)
    accelerator = start_accelerator()
    packed = ours.trainable(core)
    # A second model, because packing changes the attention of the first
    plain = ours.trainable(workload.load(folder, device, dtype), pack=False)
    for model in (packed, plain):
        ours.randomize(model)

    def score(model):
        return score_examples(model, work, work.prompts, work.examples, OPTIONS, accelerator, BATCH)[0]

    works = {"ours": partial(score, packed), "plain forwards": partial(score, plain)}
    difference = abs(works["ours"]() - works["plain forwards"]()).max()
    own = workload.load(folder, device, dtype, attn=trl_side.attention(device))
    works["generate"] = torch.inference_mode()(generator(work, ours.trainable(own, pack=False).model, BATCH))
    (mine, forwards, generated), rate = measure.alternating(*works.values(), device=device, dtype=dtype)
    trees = [work.prompts.evaluation_tree(example, "rank") for example in work.examples]
    flops = measure.floor(core, trees, training=False)
    others = {"plain forwards": forwards, "generate": generated}
    row = measure.result(
        "Evaluation",
        f"{shape}, {side} px, {examples} examples of {workload.CANDIDATES} candidates",
        "s",
        mine,
        others,
        goal=8,
        difference=float(difference),
        flops=flops,
        per_step=examples,
        rate=rate,
        memory=measure.peaks(works, core, device),
    )
    del row["floor"]["generate"]  # it does not score ten candidates
    return row


def main(argv: list[str] | None = None) -> None:
    measure.script(argv, __doc__, lambda folder: [compare(folder, "scaled", side) for side in (112, 224)])


if __name__ == "__main__":
    main()
