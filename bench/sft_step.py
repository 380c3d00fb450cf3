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

STEPS, ROWS = 3, 72
# (tasks, rows in a step, samples in a step here, and in TRL)
CASES = {"ranking": (("rank",), 4, 4, 4), "ranking and Yes/No": (("rank", "yesno"), 2, 4, 6)}


def same_loss(steps: ours.Sft, trainer, tasks: int, there: int) -> dict:
    """Both losses of the first rows, as many as TRL has samples in a batch, LoRA drawn alike in both: nats per answer
    token."""
    for model in (steps.packed, trainer.model):
        ours.randomize(model)
    trees = [steps.answers.tree(n) for n in range(there * tasks)]
    batch = steps.collate(trees).to(steps.accelerator.device)
    kinds = 2 * tasks - 1  # answers of a row
    order = trl_side.in_batches(len(steps.work.examples), kinds, there)[: there * kinds]
    numbers = sorted(range(len(order)), key=order.__getitem__)  # back to the order of rows
    examples = trainer.data_collator([trainer.train_dataset[n] for n in numbers])
    assert trl_side.same_tokens(examples, trees), "not the same tokens"
    with torch.no_grad():
        loss = -steps.packed(batch).sum() / batch.answers.sum()
        theirs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(examples))
    return {"ours": float(loss), "TRL": float(theirs)}


def compare(
    folder: Path, shape: str, side: int, case: str, device="cpu", dtype=None, rows=ROWS, size=STEPS, **trl
) -> dict:
    """The result row of one shape, image size and choice of tasks; rows, size and trl as in dpo_step.py."""
    tasks, taken, here, there = CASES[case]
    work, core = workload.make(folder, shape, side, rows, device=device, dtype=dtype)
    trees = [work.prompts.sft_tree(row, task) for row in work.examples for task in tasks]
    flops = measure.floor(core, trees, training=True) * taken / len(work.examples)
    steps = ours.Sft(work, ours.trainable(core), here, tasks)
    turns = measure.Turns(steps.step, size, device=device, dtype=dtype)
    trainer, losses = None, None
    if trl_side.installed():
        other = workload.load(folder, device, dtype, attn=trl_side.attention(device))
        trainer = trl_side.sft_trainer(work, other, there, turns.steps, tasks, device, **trl)
        trainer.add_callback(trl_side.between(turns))
        losses = same_loss(steps, trainer, len(tasks), there)
    turns.run(trainer)
    mine, theirs, rate = turns.summaries()
    others = {"TRL": theirs} if trainer else {}
    return measure.result(
        "SFT step",
        f"{shape}, {side} px, {case}, {taken} rows",
        "s per step",
        mine,
        others,
        goal=3,
        losses=losses,
        flops=flops,
        rate=rate,
        memory=turns.memory(core, ["ours", *others]),
        per_step=taken,
    )


def main(argv: list[str] | None = None) -> None:
    measure.script(
        argv, __doc__, lambda folder: [compare(folder, "scaled", side, case) for side in (112, 224) for case in CASES]
    )


if __name__ == "__main__":
    main()
