"""Compare a DPO step with TRL's DPOTrainer: python bench/dpo_step.py [--json FILE]

Both systems train the same LoRA on the same pairs of the same examples. Both times include the loader. First both
losses are shown to be the same. This project's step is HaNoRec as dpo_hano.py trains it (noise, hardness,
responsiveness), which is more work than DPO.

"All kinds of pairs" are the pairs that dpo_hano.py trains on, in its order. The two Yes/No pairs of an example share
their history; with --history-first the ranking pair shares it too. Ranking pairs alone share nothing. Nine rejected
answers stand behind one prompt; TRL takes nine pairs for them.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import measure
import ours
import torch
import trl_side
import workload

import hanorec_loss
from hanorec.model.trees import merge_trees

BATCH = 4  # pairs in a step
STEPS = 3  # steps in a turn, one for each kind of pairs
EXAMPLES = 64


@dataclass
class Pairs:
    """The pairs of a case.

    Args:
        kinds: of pairs. rejected: answers of a ranking pair. history_first: in the ranking prompt.
        goal: for the ratio to TRL.
    """

    kinds: tuple[str, ...]
    rejected: int = 1
    history_first: bool = False
    goal: int = 6


KINDS = {
    "all kinds of pairs": Pairs(("rank", "yes", "no")),
    "all kinds of pairs, --history-first": Pairs(("rank", "yes", "no"), history_first=True),
    "ranking pairs": Pairs(("rank",)),
    "ranking pairs, nine rejected": Pairs(("rank",), rejected=9, goal=15),
}
CASES = [("scaled", side, case) for case in KINDS for side in (112, 224)]
CASES += [("demo", side, "all kinds of pairs") for side in (112, 224)]


def same_loss(steps: ours.Dpo, trainer, batch: int, kinds: int) -> dict:
    """The plain DPO loss of both systems, with the same LoRA weights, over the first pairs of each kind."""
    for model in (steps.packed, trainer.model):
        ours.randomize(model)
    chosen = trl_side.in_batches(len(steps.work.examples), kinds, batch)[: batch * kinds]
    inputs = steps.micro(chosen).to(steps.accelerator.device)
    trl_batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(chosen))])
    assert trl_side.same_tokens(trl_batch, [steps.pairs.tree(n) for n in chosen], pairs=True), "not the same tokens"
    with torch.no_grad():
        logps = inputs.lay_out(steps.packed(inputs.trees))
        losses, _ = hanorec_loss.hanorec_loss(*logps.T, *inputs.reference.T, inputs.hardness[:, 0], ours.BETA, 1.0)
        theirs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trl_batch))
    return {"ours": float(losses.mean()), "TRL": float(theirs)}


def compare(
    folder: Path,
    shape: str,
    side: int,
    case: str,
    device="cpu",
    dtype=None,
    examples=EXAMPLES,
    size=STEPS,
    batch=BATCH,
    **trl,
) -> dict:
    """Measure one case. Returns its result row.

    Args:
        shape: the backbone's, a key of workload.SHAPES.
        side: width and height of the images in pixels.
        case: a key of KINDS.
        examples: how many examples the pairs come from.
        size: steps in a turn.
        batch: pairs in a step.
        trl: more settings for TRL's config.
    """
    kinds, rejected, first = KINDS[case].kinds, KINDS[case].rejected, KINDS[case].history_first
    work, core = workload.make(folder, shape, side, examples, device=device, dtype=dtype, history_first=first)
    pairs = work.pairs(kinds, rejected)
    trees = [tree for tree, _ in merge_trees(map(pairs.tree, range(len(pairs))))]
    flops = measure.floor(core, trees, training=True) * batch / len(work.examples) / len(kinds)
    steps = ours.Dpo(work, ours.trainable(core), batch, kinds, rejected=rejected)
    turns = measure.Turns(steps.step, size, device=device, dtype=dtype)
    trainer, losses, loader = None, None, {"ours": measure.timed(lambda: steps.micro([*range(batch)]))}
    if trl_side.installed():
        other, clock = workload.load(folder, device, dtype, attn=trl_side.attention(device)), trl_side.HeadClock()
        trainer = trl_side.dpo_trainer(work, other, batch, turns.steps, kinds, device, **trl)
        trainer.add_callback(trl_side.between(turns))
        losses = same_loss(steps, trainer, batch, len(kinds)) if rejected == 1 else None
        loader["TRL"] = measure.timed(lambda: trainer.data_collator([trainer.train_dataset[n] for n in range(batch)]))
        clock.seconds = 0.0
    turns.run(trainer)
    mine, theirs, rate = turns.summaries()
    others = {"TRL": measure.scaled(theirs, rejected)} if trainer else {}
    head = clock.seconds / turns.steps / theirs["median"] if trainer else None
    with_reference = mine["median"] + batch * steps.reference_seconds / 5  # the paper trains 5 epochs
    return measure.result(
        "DPO step",
        f"{shape}, {side} px, {case}, batch {batch}",
        "s per step",
        mine,
        others,
        goal=KINDS[case].goal,
        losses=losses,
        flops=flops,
        rate=rate,
        with_reference=with_reference,
        loader=loader,
        head=head,
        encode=work.encode_seconds,
        weights=measure.weights(core),
        memory=turns.memory(core, ["ours", *others]),
        per_step=batch,
    )


def refusal(folder: Path) -> str:
    """TRL's answer when it is told to compute the reference once."""
    return trl_side.refusal(*workload.make(folder, "demo", 112, examples=4))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    measure.cpu_only()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for shape, side, case in CASES:
            rows.append(compare(Path(name) / shape, shape, side, case))
        precomputed_reference = refusal(Path(name) / "demo")
    measure.save(options.json, {"rows": rows, "precomputed_reference": precomputed_reference})


if __name__ == "__main__":
    main()
