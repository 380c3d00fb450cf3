"""The reference of DPO: compute its log-probabilities once, keep them in a file, compare the policy with them."""

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import save_file

from hanorec.model.encoding import Encoding, backbone_weights
from hanorec.model.images import load_tensors
from hanorec.model.lora import without_trained_adapter
from hanorec.model.packing import PackedMLLM, answer_sums
from hanorec.model.pairs import PairBatch, Pairs
from hanorec.run.files import UserError, replacing, value_hash
from hanorec.run.launch import shared_out
from hanorec.run.progress import progress
from hanorec.run.training import micro_batches, reshard


def planned_pairs(pairs: Pairs, steps: int, steps_per_epoch: int, options, accelerator) -> list[int]:
    """Return the numbers of the pairs that the run will train on: all, or fewer if it ends before one epoch."""
    if steps >= steps_per_epoch:
        return list(range(len(pairs)))
    count = steps * options.batch_size * options.grad_accum * accelerator.num_processes
    (planned,) = next(micro_batches(len(pairs.examples), len(pairs.kinds), count, 1, 1, 0, options.seed))
    return sorted(planned)


def score_pairs(packed: PackedMLLM, encoding: Encoding, pairs: Pairs, numbers: list[int], accelerator) -> torch.Tensor:
    """Return the log-probabilities of the answers of these pairs: [all pairs, 1 + K], NaN in the other rows.

    Each process scores a part of the pairs, and every process gets all.
    """
    size = 32 if encoding.tiny else 8
    chunks = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    computed = []  # (pair number, [chosen, rejected, ...])
    packed.eval()
    for chunk in progress(shared_out(chunks, accelerator), desc="reference", unit="batch"):
        batch = pairs.batch(chunk, packed, encoding.tokens).to(accelerator.device)
        with torch.no_grad():
            logps = batch.lay_out(packed(batch.trees))
        computed += zip(chunk, logps.tolist(), strict=True)
    reshard(packed)
    logps = torch.full((len(pairs), 1 + pairs.rejected), torch.nan)
    for number, values in gather_object(computed):
        logps[number] = torch.tensor(values)
    return logps


def reference_logps(
    packed: PackedMLLM, encoding: Encoding, pairs: Pairs, planned: list[int], hashes: dict, options, accelerator
) -> torch.Tensor:
    """Return the reference's log-probabilities of the chosen answers and of the whole pool: [pairs, 1 + P].

    They are NaN for pairs that are not planned. A file in reference/ of the SFT run keeps them. The main process looks
    for it and sends its values to the others, because a shared disk may show it to them later. If it does not exist,
    all processes compute the values, and the main process writes it.

    planned: see `planned_pairs`. hashes: of the data and of the SFT weights, by name.
    """
    pairs = pairs.whole()
    sources = {  # everything that decides the log-probabilities
        "hashes": hashes,
        "kinds": pairs.kinds,
        "max_length": pairs.max_length,
        "pairs": planned,
        "pool": pairs.pool,
        "prompts": pairs.prompts.hash(),
        "dtype": str(next(packed.core.parameters()).dtype),
        "quantize": options.quantize,
        "backbone": backbone_weights(encoding.source),
        "live_images": encoding.tokens.live_files(),
    }
    key = value_hash(sources)
    path = options.sft / "reference" / f"{key[:16]}.safetensors"
    kept = [None]
    if accelerator.is_main_process and path.exists():
        shape = (len(pairs), 1 + pairs.rejected)
        kept = [load_tensors(path, {"logps": shape}, "delete it; it will be computed again")["logps"]]
    (logps,) = broadcast_object_list(kept)
    if logps is None:
        with without_trained_adapter(packed.model):
            logps = score_pairs(packed, encoding, pairs, planned, accelerator)
        if accelerator.is_main_process:
            with replacing(path) as new:
                save_file({"logps": logps}, new, metadata={"key": key})
    return logps


PAPER_BETA = 0.1  # the reward gaps of check_start are at this beta, whatever --beta is
TOLERANCE = 1e-4  # of a reward gap in float32


def check_start(packed: PackedMLLM, batch: PairBatch) -> None:
    """Check that every reward gap is 0 before the first step, without noise and dropout.

    The policy's batches differ from the reference's, so sums are rounded in another order. Each scored token of both
    answers may change the gap by what one rounding changes its logit: half the dtype's eps (2**-8 for bfloat16, 2**-11
    for float16) times the size of the largest logit. This size is taken as half the spread of the log-probabilities.

    Raises:
        UserError: a reward gap is larger, or NaN.
    """
    packed.eval()
    with torch.no_grad():
        distributions = packed(batch.trees, tokens=True)  # [S, V]
    reshard(packed)
    logps = distributions.gather(1, batch.trees.target[:, None])[:, 0]
    log_ratios = batch.lay_out(answer_sums(batch.trees, logps)) - batch.reference
    gaps = PAPER_BETA * (log_ratios[:, :1] - log_ratios[:, 1:]).abs()
    largest_logit = (distributions.amax(1) - distributions.amin(1)).max() / 2
    tokens = batch.lay_out(batch.trees.answers.to(logps.dtype))
    rounding = torch.finfo(next(packed.core.parameters()).dtype).eps / 2 * largest_logit
    allowed = (PAPER_BETA * rounding * (tokens[:, :1] + tokens[:, 1:])).clamp_min(TOLERANCE)
    absent = batch.reference[:, 1:].isnan()
    absent[:, 0] = False  # each pair has one rejected answer; a Yes/No pair has no more
    if not ((gaps <= allowed) | absent).all():  # also if a gap is NaN
        largest = float(gaps[~absent].max())
        raise UserError(
            f"before the first step the reward gap is {largest:.2e}, not 0: policy and reference differ. The kept "
            "reference is probably of other weights or another dtype: delete reference/ in the SFT run and try again"
        )
