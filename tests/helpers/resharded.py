"""Launched in two processes: after each forward without gradients, sharded weights are shards again."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard

from hanorec.data.folder import DataFolder
from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.lora import add_lora
from hanorec.model.noise import noise_effect, perturbation
from hanorec.model.packing import PackedMLLM
from hanorec.model.pairs import Pairs, pools
from hanorec.model.reference import check_start, score_pairs
from hanorec.ranking.scoring import score_examples
from mllm_srec.chain_of_thought import load_prompts

data, run, out = (Path(word) for word in sys.argv[1:])
accelerator = Accelerator()
assert accelerator.num_processes == 2, accelerator.num_processes
folder = DataFolder(data)
encoding = Encoding(folder)
prompts, examples = load_prompts(folder, encoding), folder.examples("train")[:2]
pairs = Pairs(prompts, examples, ("rank", "yes", "no"), 4096, pools(examples, 1, "data"))
numbers = list(range(len(pairs)))


def policy(sharded: bool) -> PackedMLLM:
    packed = PackedMLLM(add_lora(load_finished(run, encoding), 4, 8, 0.0, 0))
    return fully_shard(packed, reshard_after_forward=False) if sharded else packed


def check(model: PackedMLLM) -> None:
    """The weights of the sharded policy are shards."""
    assert model is plain or all(hasattr(weight, "device_mesh") for weight in model.parameters())


plain, packed = policy(False), policy(True)
scores = {}
for name, model in (("plain", plain), ("sharded", packed)):
    reference = score_pairs(model, encoding, pairs, numbers, accelerator)
    check(model)
    batch = pairs.batch(numbers, model, encoding.tokens, reference, torch.ones(len(pairs), 1))
    check_start(model, batch)
    check(model)
    ranked, _ = score_examples(model, encoding, prompts, examples, {"tasks": ["rank"], "max_length": 4096}, accelerator)
    check(model)
    with torch.no_grad():  # LoRA's B, which is 0, would have no noise
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.add_(0.05)
    options = SimpleNamespace(seed=1, noise="relative", sigma=0.5)
    effect = noise_effect(model, batch, perturbation(model, options, 1, 1))
    check(model)
    scores[name] = [reference, torch.tensor(ranked), *effect.values()]
for one, other in zip(*scores.values(), strict=True):
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
assert float(scores["plain"][2]) > 1e-4  # the noise has an effect
(out / str(accelerator.process_index)).touch()
accelerator.wait_for_everyone()
os._exit(0)  # in an ordinary exit gloo's threads sometimes abort
