"""Compare an SFT step with TRL's SFTTrainer: python bench/sft_step.py [--json FILE]

Both systems train the same LoRA on the same answers of the same examples. Both times include the loader. First both
losses are shown to be the same. With both tasks an example gives two samples in this project, because its Yes and its
No share a prompt; with --history-first all three answers share the history. In TRL it gives three.
"""

from pathlib import Path

import measure
import ours
import torch
import trl_side
import workload

from hanorec.model.trees import merge_trees

STEPS, EXAMPLES = 3, 72
BOTH = ("rank", "yesno")
# (tasks, history first, examples in a step, samples in a step of this project, samples in a step of TRL)
CASES = {
    "ranking": (("rank",), False, 4, 4, 4),
    "ranking and Yes/No": (BOTH, False, 2, 4, 6),
    "ranking and Yes/No, --history-first": (BOTH, True, 2, 4, 6),
}


def same_loss(steps: ours.Sft, trainer, tasks: int, examples: int) -> dict:
    """The loss of both systems, with the same LoRA weights, over the first examples: nats per answer token.

    Args:
        tasks: the number of tasks.
        examples: the number of examples; TRL has as many samples in a batch.
    """
    for model in (steps.packed, trainer.model):
        ours.randomize(model)
    trees = [steps.answers.tree(n) for n in range(examples * tasks)]
    batch = steps.collate(trees).to(steps.accelerator.device)
    kinds = 2 * tasks - 1  # answers of an example
    order = trl_side.in_batches(len(steps.work.examples), kinds, examples)[: examples * kinds]
    numbers = sorted(range(len(order)), key=order.__getitem__)  # back to the order of the examples
    trl_batch = trainer.data_collator([trainer.train_dataset[n] for n in numbers])
    assert trl_side.same_tokens(trl_batch, trees), "not the same tokens"
    with torch.no_grad():
        loss = -steps.packed(batch).sum() / batch.answers.sum()
        theirs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trl_batch))
    return {"ours": float(loss), "TRL": float(theirs)}


def compare(
    folder: Path, shape: str, side: int, case: str, device="cpu", dtype=None, examples=EXAMPLES, size=STEPS, **trl
) -> dict:
    """Measure one case. Returns its result row.

    Args:
        case: a key of CASES. The other arguments are those of compare in dpo_step.py.
    """
    tasks, history_first, per_step, samples, trl_samples = CASES[case]
    work, core = workload.make(folder, shape, side, examples, device=device, dtype=dtype, history_first=history_first)
    answers = [work.prompts.sft_tree(example, task) for example in work.examples for task in tasks]
    trees = [tree for tree, _ in merge_trees(answers)]
    flops = measure.floor(core, trees, training=True) * per_step / len(work.examples)
    steps = ours.Sft(work, ours.trainable(core), samples, tasks)
    turns = measure.Turns(steps.step, size, device=device, dtype=dtype)
    trainer, losses = None, None
    if trl_side.installed():
        other = workload.load(folder, device, dtype, attn=trl_side.attention(device))
        trainer = trl_side.sft_trainer(work, other, trl_samples, turns.steps, tasks, device, **trl)
        trainer.add_callback(trl_side.between(turns))
        losses = same_loss(steps, trainer, len(tasks), trl_samples)
    turns.run(trainer)
    mine, theirs, rate = turns.summaries()
    others = {"TRL": theirs} if trainer else {}
    return measure.result(
        "SFT step",
        f"{shape}, {side} px, {case}, {per_step} examples",
        "s per step",
        mine,
        others,
        goal=3,
        losses=losses,
        flops=flops,
        rate=rate,
        memory=turns.memory(core, ["ours", *others]),
        per_step=per_step,
    )


def main(argv: list[str] | None = None) -> None:
    measure.script(
        argv, __doc__, lambda folder: [compare(folder, "scaled", side, case) for side in (112, 224) for case in CASES]
    )


if __name__ == "__main__":
    main()
