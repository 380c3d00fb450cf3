"""A DPO step against TRL's DPOTrainer: python bench/dpo_step.py [--json FILE]

Both train on the same pairs of the same rows with the same LoRA, loaders included; first their losses are shown to be
the same. Ours is HaNoRec as dpo_hano.py trains it (noise, hardness, responsiveness), which is more than DPO. All kinds
of pairs are what dpo_hano.py trains on, in its order: a row's two Yes/No pairs share their history. Ranking pairs alone
share nothing.
"""

import argparse
import tempfile
from pathlib import Path

import measure
import ours
import torch
import trl_side
import workload

import hanorec_loss
from hanorec.model.trees import merge_trees

BATCH, STEPS, ROWS = 4, 3, 64  # pairs in a step; steps in a turn, one for each kind of pairs; rows they are made of
KINDS = {"all kinds of pairs": ("rank", "yes", "no"), "ranking pairs": ("rank",)}
CASES = [("scaled", side, case) for case in KINDS for side in (112, 224)]
CASES += [("demo", side, "all kinds of pairs") for side in (112, 224)]


def same_loss(steps: ours.Dpo, trainer, batch: int, kinds: int) -> dict:
    """Both losses of the first pairs of each kind, LoRA drawn alike in both; plain DPO."""
    for model in (steps.packed, trainer.model):
        ours.randomize(model)
    chosen = trl_side.in_batches(len(steps.work.examples), kinds, batch)[: batch * kinds]
    inputs, reference, hardness = steps.micro(chosen)
    examples = trainer.data_collator([trainer.train_dataset[n] for n in range(len(chosen))])
    assert trl_side.same_tokens(examples, [steps.pairs.tree(n) for n in chosen], pairs=True), "not the same tokens"
    device = steps.accelerator.device
    with torch.no_grad():
        logps = steps.packed(inputs.to(device)).view(-1, 2)
        losses, _ = hanorec_loss.hanorec_loss(*logps.T, *reference.to(device).T, hardness.to(device), ours.BETA, 1.0)
        theirs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(examples))
    return {"ours": float(losses.mean()), "TRL": float(theirs)}


def compare(
    folder: Path, shape: str, side: int, case: str, device="cpu", dtype=None, rows=ROWS, size=STEPS, batch=BATCH, **trl
) -> dict:
    """The result row of one shape, image size and choice of pairs. rows: that the pairs are made of. size: steps in a
    turn. trl: further settings of TRL's."""
    kinds = KINDS[case]
    work, core = workload.make(folder, shape, side, rows, device=device, dtype=dtype)
    pairs = work.pairs(kinds)
    trees = [tree for tree, _ in merge_trees(map(pairs.tree, range(len(pairs))))]
    flops = measure.floor(core, trees, training=True) * batch / len(work.examples) / len(kinds)
    steps = ours.Dpo(work, ours.trainable(core), batch, kinds)
    turns = measure.Turns(steps.step, size, device=device, dtype=dtype)
    trainer, losses, loader = None, None, {"ours": measure.timed(lambda: steps.micro([*range(batch)]))}
    if trl_side.installed():
        other, clock = workload.load(folder, device, dtype, attn=trl_side.attention(device)), trl_side.HeadClock()
        trainer = trl_side.dpo_trainer(work, other, batch, turns.steps, kinds, device, **trl)
        trainer.add_callback(trl_side.between(turns))
        losses = same_loss(steps, trainer, batch, len(kinds))
        loader["TRL"] = measure.timed(lambda: trainer.data_collator([trainer.train_dataset[n] for n in range(batch)]))
        clock.seconds = 0.0
    turns.run(trainer)
    mine, theirs, rate = turns.summaries()
    others = {"TRL": theirs} if trainer else {}
    head = clock.seconds / turns.steps / theirs["median"] if trainer else None
    once = mine["median"] + batch * steps.reference_seconds / 5  # the paper trains 5 epochs
    return measure.result(
        "DPO step",
        f"{shape}, {side} px, {case}, batch {batch}",
        "s per step",
        mine,
        others,
        goal=6,
        losses=losses,
        flops=flops,
        rate=rate,
        with_reference=once,
        loader=loader,
        head=head,
        encode=work.encode_seconds,
        weights=measure.weights(core),
        memory=turns.memory(core, ["ours", *others]),
        per_step=batch,
    )


def refusal(folder: Path) -> str:
    return trl_side.refusal(*workload.make(folder, "demo", 112, rows=4))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    measure.cpu_only()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for shape, side, case in CASES:
            rows.append(compare(Path(name) / shape, shape, side, case))
        answer = refusal(Path(name) / "demo")
    measure.save(options.json, {"rows": rows, "precomputed_reference": answer})


if __name__ == "__main__":
    main()
