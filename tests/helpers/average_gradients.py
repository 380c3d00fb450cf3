"""Launched in two processes. Each process has its own batch; both must end with the average of the two gradients."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import Opened

from hanorec.model.load import load_model
from hanorec.model.lora import add_lora
from hanorec.model.packing import PackedMLLM

accelerator = Accelerator()
assert accelerator.num_processes == 2, accelerator.num_processes
data = Opened(Path(sys.argv[1]))
prompts, examples = data.prompts(), data.examples("train", 8)
batches = [[prompts.sft_tree(example, "rank") for example in examples[start : start + 4]] for start in (0, 4)]


def fresh():
    torch.manual_seed(0)
    return PackedMLLM(add_lora(load_model(data.source), 4, 8, 0.0, seed=0))


def gradients(model, scored):
    scored.sum().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


expected = []
for batch in batches:
    alone = fresh()
    expected.append(gradients(alone, alone(alone.collate(batch, data.tokens))))
packed = fresh()
model = accelerator.prepare(packed)
found = gradients(packed, model(packed.collate(batches[accelerator.process_index], data.tokens)))
assert max(float((a - b).abs().max()) for a, b in zip(*expected, strict=True)) > 1e-3  # the two gradients differ
for one, first, second in zip(found, *expected, strict=True):
    torch.testing.assert_close(one, (first + second) / 2)
(Path(sys.argv[2]) / str(accelerator.process_index)).touch()
accelerator.end_training()
