"""An SFT step against TRL's SFTTrainer: python bench/sft_step.py [--json FILE]

Both train on the same answers of the same rows with the same LoRA, loaders included; first their losses are shown to
be the same. With both tasks a row is two samples here (its Yes and its No share a prompt) and three there.
"""

from pathlib import Path

import measure
import ours
import torch
import trl_side
import workload

STEPS = 3
# (tasks, rows in a step, samples in a step here, and in TRL)
CASES = {"ranking": (("rank",), 4, 4, 4), "ranking and Yes/No": (("rank", "yesno"), 2, 4, 6)}


def same_loss(steps: ours.Sft, trainer, here: int, there: int) -> dict:
    """Both losses of the first rows, LoRA drawn alike in both: nats per answer token."""
    for model in (steps.packed, trainer.model):
        ours.randomize(model)
    trees = [steps.answers[n]() for n in range(here)]
    batch = steps.collate(trees).to(steps.accelerator.device)
    examples = trainer.data_collator([trainer.train_dataset[n] for n in range(there)])
    assert trl_side.same_tokens(examples, trees), "not the same tokens"
    with torch.no_grad():
        loss = -steps.packed(batch).sum() / batch.answers.sum()
        theirs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(examples))
    return {"ours": float(loss), "TRL": float(theirs)}


def compare(folder: Path, shape: str, side: int, case: str, device="cpu", dtype=None, size=STEPS, **trl) -> dict:
    """The result row of one shape, image size and choice of tasks; size and trl as in dpo_step.py."""
    tasks, rows, here, there = CASES[case]
    work, core = workload.make(folder, shape, side, 64, device=device, dtype=dtype)
    trees = [work.prompts.sft_tree(row, task) for row in work.rows for task in tasks]
    flops = measure.floor(core, trees, training=True) * rows / len(work.rows)
    steps = ours.Sft(work, ours.trainable(core), here, tasks)
    turns = measure.Turns(steps.step, size, device=device, dtype=dtype)
    trainer, losses = None, None
    if trl_side.installed():
        other = workload.load(folder, device, dtype)
        trainer = trl_side.sft_trainer(work, other, there, turns.steps, tasks, device, **trl)
        trainer.add_callback(trl_side.between(turns))
        losses = same_loss(steps, trainer, here, there)
    turns.run(trainer)
    mine, theirs, rate = turns.summaries()
    others = {"TRL": theirs} if trainer else {}
    return measure.result(
        "SFT step",
        f"{shape}, {side} px, {case}, {rows} rows",
        "s per step",
        mine,
        others,
        goal=3,
        losses=losses,
        flops=flops,
        rate=rate,
        memory=turns.memory(core, ["ours", *others]),
        per_step=rows,
    )


def main(argv: list[str] | None = None) -> None:
    measure.script(
        argv, __doc__, lambda folder: [compare(folder, "scaled", side, case) for side in (112, 224) for case in CASES]
    )


if __name__ == "__main__":
    main()
