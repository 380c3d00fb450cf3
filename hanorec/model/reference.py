"""DPO's reference: its log-probabilities, computed once, kept, and compared with the policy's before the first step."""

from pathlib import Path

import torch
from accelerate.utils import gather_object, tqdm
from safetensors.torch import save_file

from hanorec.model.encoding import Encoding
from hanorec.model.images import load_tensors
from hanorec.model.lora import without_trained_adapter
from hanorec.model.packing import PackedMLLM
from hanorec.model.prompts import Prompts
from hanorec.model.samples import Samples
from hanorec.run.files import UserError, replacing, value_hash
from hanorec.run.launch import shared_out
from hanorec.run.training import micro_batches


def planned_pairs(pairs: Samples, steps: int, steps_per_epoch: int, options, accelerator) -> list[int]:
    """The numbers of the pairs that the run will use: all, or those of its few steps."""
    if steps >= steps_per_epoch:
        return list(range(len(pairs)))
    per_step = options.batch_size * options.grad_accum * accelerator.num_processes
    batches = micro_batches(len(pairs.examples), len(pairs.kinds), per_step, 1, 1, 0, options.seed)
    return sorted({number for _ in range(steps) for number in next(batches)[0]})


def reference_key(
    hashes: dict, pairs: Samples, planned: list[int], packed: PackedMLLM, prompts: Prompts, quantize: str | None
) -> str:
    """A hash of everything that the reference's log-probabilities are made of. hashes: of the data and the SFT run."""
    return value_hash(
        {
            "hashes": hashes,
            "kinds": pairs.kinds,
            "max_length": pairs.max_length,
            "pairs": planned,
            "texts": prompts.texts,
            "chat_template": prompts.tokenizer.chat_template,
            "dtype": str(next(packed.core.parameters()).dtype),
            "quantize": quantize,
        }
    )


def reference_logps(
    packed: PackedMLLM, encoding: Encoding, pairs: Samples, planned: list[int], key: str, folder: Path, accelerator
) -> torch.Tensor:
    """[pairs, 2]: the reference's log-probabilities of the chosen and the rejected answer (NaN for pairs not planned).

    They are read from `folder` if it has a file of that key; else all processes compute them, and they are kept.
    """
    path = folder / f"{key[:16]}.safetensors"
    if not path.exists():
        size = 32 if encoding.tiny else 8
        chunks = [planned[i : i + size] for i in range(0, len(planned), size)]
        found = []
        packed.eval()
        for chunk in tqdm(shared_out(chunks, accelerator), desc="reference", unit="batch"):
            batch = packed.collate([pairs.tree(number) for number in chunk], encoding.tokens)
            with without_trained_adapter(packed.model), torch.no_grad():
                logps = packed(batch.to(accelerator.device))
            found += list(zip(chunk, logps.view(-1, 2).tolist(), strict=True))
        found = gather_object(found) if accelerator.num_processes > 1 else found
        logps = torch.full((len(pairs), 2), torch.nan)
        for number, values in found:
            logps[number] = torch.tensor(values)
        if accelerator.is_main_process:
            with replacing(path) as new:
                save_file({"logps": logps}, new, metadata={"key": key})
        accelerator.wait_for_everyone()
    return load_tensors(path, {"logps": (len(pairs), 2)}, "delete it, and it is computed again")["logps"]


PAPER_BETA = 0.1


def check_start(packed: PackedMLLM, batch, reference: torch.Tensor, device) -> None:
    """UserError unless the reward gap, without noise and dropout, is 0 before the first step."""
    packed.eval()
    with torch.no_grad():
        gain = packed(batch.to(device)).view(-1, 2) - reference.to(device)
    worst = float((PAPER_BETA * (gain[:, 0] - gain[:, 1])).abs().max())
    exact = next(packed.core.parameters()).dtype == torch.float32
    if not worst <= (1e-4 if exact else 5e-2):
        raise UserError(
            f"before the first step the reward gap is {worst:.2e}, not 0: policy and reference differ. The likely "
            "cause is a reference kept from other weights or another dtype: delete reference/ in the SFT run, try again"
        )
