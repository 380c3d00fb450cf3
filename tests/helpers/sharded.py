"""Launched in two processes: NoDO and checkpoints with weights that are sharded by torch's fully_shard."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch.distributed.fsdp import fully_shard

from hanorec.run import checkpoints
from hanorec.run.training import reshard
from hanorec_loss import noisy_lora


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.lora_A, self.lora_B = (torch.nn.Linear(*s, bias=False) for s in ((6, 5), (6, 3), (3, 5)))
        self.base.requires_grad_(False)

    def forward(self, x):
        return (self.base(x) + self.lora_B(self.lora_A(x))).tanh()


def fresh(sharded: bool):
    torch.manual_seed(0)
    model = Layer()
    model = fully_shard(model) if sharded else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def take_step(number: int, model, optimizer, schedule, relative: bool):
    """Take a step on a batch that is the same on both processes. Returns the gradients and the size of the noise."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
    with noisy_lora(model, 0.3, relative, torch.Generator().manual_seed(number)) as size:
        model(x).square().mean().backward()
    gradients = [whole(p.grad) for p in model.parameters() if p.requires_grad]
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return [*gradients, size]


def whole(tensor):
    """A copy of a tensor, gathered from all processes if it is sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights(model):
    return [whole(p) for p in model.parameters()]


accelerator = Accelerator()
assert accelerator.num_processes == 2, accelerator.num_processes
for relative in (True, False):
    plain, sharded = fresh(sharded=False), fresh(sharded=True)
    assert hasattr(sharded[0].lora_A.weight, "device_mesh")
    for number in range(3):
        expected = take_step(number, *plain, relative)
        torch.testing.assert_close(take_step(number, *sharded, relative), expected)
        assert 0.2 < float(expected[-1]) < 0.4 or not relative
    torch.testing.assert_close(weights(sharded[0]), weights(plain[0]))

before = weights(sharded[0])
with noisy_lora(sharded[0], 0.3, True, torch.Generator().manual_seed(9)):
    changed = weights(sharded[0])
assert all(torch.equal(a, b) for a, b in zip(before, weights(sharded[0]), strict=True))  # bit for bit
assert [torch.equal(a, b) for a, b in zip(before, changed, strict=True)] == [True, False, False]

try:
    with noisy_lora(sharded[0], 0.3, True, torch.Generator().manual_seed(9)), torch.no_grad():
        sharded[0].lora_A.weight.add_(1.0)
except RuntimeError as error:
    assert "changed inside noisy_lora" in str(error), error
else:
    raise AssertionError("a change of sharded weights inside noisy_lora was lost without a word")

held = fully_shard(Layer(), reshard_after_forward=False)  # after a forward without gradients it is gathered
with torch.no_grad():
    held(torch.ones(2, 6))
reshard(held)
with noisy_lora(held, 0.3, True, torch.Generator().manual_seed(9)) as size:
    assert all(hasattr(weight, "device_mesh") for weight in held.parameters()) and 0.2 < float(size) < 0.4

out = Path(sys.argv[1])
with torch.no_grad():
    sharded[0](torch.ones(2, 6))  # a validation
checkpoints.save(out, 3, *sharded[:2], {"schedule": sharded[2]}, 2, accelerator)
with safe_open(checkpoints.newest(out) / "state.safetensors", "pt") as file:
    kept = {f"{key}/{name}.weight" for key in ("weight", "exp_avg", "exp_avg_sq") for name in ("lora_A", "lora_B")}
    assert kept <= set(file.keys()), file.keys()

continued, continued_plain = fresh(sharded=True), fresh(sharded=False)
for model, optimizer, schedule in (continued, continued_plain):
    folder = checkpoints.newest(out)
    assert checkpoints.load(folder, model, optimizer, {"schedule": schedule}, accelerator) == 3
expected = take_step(3, *sharded, True)
for one, other in zip(take_step(3, *continued, True), expected, strict=True):
    assert torch.equal(one, other)  # bit for bit
assert all(torch.equal(a, b) for a, b in zip(weights(continued[0]), weights(sharded[0]), strict=True))
torch.testing.assert_close(take_step(3, *continued_plain, True), expected)
torch.testing.assert_close(weights(continued_plain[0]), weights(sharded[0]))
(out / str(accelerator.process_index)).touch()
accelerator.wait_for_everyone()
os._exit(0)  # in an ordinary exit gloo's threads sometimes abort
