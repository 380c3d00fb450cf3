"""Stage 2: HaNoRec preference optimisation, DPO with HaRS (a beta per pair) and NoDO (noise in the LoRA weights).

    accelerate launch dpo_hano.py --sigma 0.05                                           # the demo: after sft.py
    accelerate launch dpo_hano.py --sft runs/ml-1m/sft --out runs/ml-1m/dpo_hano --sigma 0.1
    accelerate launch dpo_hano.py --hardness none --responsiveness none --sigma 0        # plain DPO

Starts from the SFT result merged into the backbone and trains a fresh LoRA; with that LoRA off the model is the
reference, whose log-probabilities are computed once and kept in the SFT run (reference/). Writes config.json,
metrics.jsonl, adapter/ (PEFT's format, of the epoch that validated best), and with --export DIR the models in DIR/base,
DIR/adapter and DIR/merged, which load without this project. The same command continues a run that was interrupted.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path

import numpy as np

from hanorec.run import checkpoints, runs, training
from hanorec.run.runs import UserError

TINY_RECIPE = {"lr": 1e-4, "epochs": 1, "max_steps": 120, "batch_size": 24, "grad_accum": 1, "eval_limit": 200}
RECIPE = {"lr": 1e-4, "epochs": 5, "batch_size": 4, "grad_accum": 8, "eval_limit": 0}  # the paper
INHERITED = ("data", "model", "tasks", "summaries", "candidate_images", "blank_images", "images", "max_length")
INHERITED += ("no_pack", "attn", "quantize")
LORA = ("lora_rank", "lora_alpha", "lora_dropout")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = runs.Parser(__doc__)
    parser.add_argument("--sft", type=Path, default=Path("runs/demo/sft"), help="finished SFT run [runs/demo/sft]")
    parser.add_argument("--out", type=Path, help="run folder to write [dpo_hano beside the SFT run]")
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="also write the models, loadable without this project"
    )
    method = parser.add_argument_group("method")
    method.add_argument("--beta", type=runs.positive_float, default=0.1, help="beta0 of equation (7) [0.1]")
    method.add_argument(
        "--sigma",
        type=runs.non_negative_float,
        default=0.05,
        help="NoDO's noise; the paper: 0.05 (MicroLens), 0.1 (Netflix, MovieLens-1M); 0: w/o NoDO [0.05]",
    )
    method.add_argument(
        "--noise",
        choices=["relative", "absolute"],
        default="relative",
        help="sigma in units of each matrix's RMS, or as it is (the authors' code) [relative]",
    )
    method.add_argument(
        "--hardness",
        choices=["topk", "cosine", "none"],
        default="topk",
        help="lambda from neighbour profiles (the paper), from the pair's own similarity (w/o SAM), or 1 [topk]",
    )
    method.add_argument("--top-k", type=runs.positive_int, default=10, help="neighbours K of a profile [10]")
    method.add_argument(
        "--responsiveness",
        choices=["batch", "ema", "none"],
        default="batch",
        help="eta of equation (8), DAMA's moving average, or 1; w/o HaRS: none, with --hardness none [batch]",
    )
    training.add_training_options(parser, batch_size=4, grad_accum=8)
    options = parser.parse_args(argv)
    options.out = options.out or options.sft.parent / "dpo_hano"
    return options


def pair_hardness(options, data, model, tokenizer, rows):
    """lambda [rows] of each row's (target, rejected), equation (6), from the embeddings that DPO starts with."""
    import torch

    import hanorec_loss
    from hanorec.model import mllm

    chosen, rejected = torch.tensor([[row.target, row.rejected] for row in rows]).T
    if options.hardness == "none":
        return torch.ones(len(rows))
    text = mllm.mean_embeddings(model, tokenizer, data.catalogue.titles)
    vectors = hanorec_loss.fuse_item_vectors(text, data.catalogue.image_means())
    if options.hardness == "cosine":
        distance = hanorec_loss.cosine_distance(vectors, chosen, rejected)
        distance = (distance - distance.mean()) / distance.std().clamp_min(1e-8)
        return hanorec_loss.hardness_weight(distance, 0.0)
    if options.top_k >= len(vectors):
        raise UserError(f"--top-k {options.top_k} needs more items than {len(vectors)}")
    distance = hanorec_loss.pair_distance(hanorec_loss.neighbor_profiles(vectors, options.top_k), chosen, rejected)
    return hanorec_loss.hardness_weight(distance, distance.mean())


def batch_responsiveness(reward_gap):
    """Equation (8), with a batch whose gaps are within rounding of 0, as all are before the first step, taken as 0: eta
    would magnify the rounding, which another number of processes does otherwise. reward_gap: [B]. Returns a scalar."""
    from hanorec_loss import responsiveness

    return responsiveness(reward_gap * (reward_gap.abs().mean() > 1e-5))


class MovingResponsiveness:
    """DAMA's eta (arXiv 2502.01943): sigmoid of the trimmed mean reward gap over sigmoid of its moving average."""

    def __init__(self, decay: float = 0.9):
        self.decay, self.average = decay, None

    def __call__(self, reward_gap):
        """reward_gap: [B] of all processes. Returns a scalar; the first batch gives 1."""
        from hanorec_loss import trimmed_mean

        mean = trimmed_mean(reward_gap.float())
        self.average = mean if self.average is None else self.decay * self.average + (1 - self.decay) * mean
        return mean.sigmoid() / self.average.sigmoid()

    def state_dict(self) -> dict:
        return {"average": None if self.average is None else float(self.average)}

    def load_state_dict(self, state: dict) -> None:
        import torch

        self.average = None if state["average"] is None else torch.tensor(state["average"])


def reference_logps(packed, data, pairs, wanted: list[int], key: str, folder: Path, accelerator):
    """[pairs, 2]: log-probabilities of the chosen and the rejected answer of the `wanted` pairs (NaN for the others),
    the adapter off; read from `folder` where a file of that key exists, else computed by all processes and kept."""
    import torch
    from accelerate.utils import gather_object, tqdm
    from safetensors.torch import save_file

    from hanorec.model import mllm

    path = folder / f"{key[:16]}.safetensors"
    if not path.exists():
        size = 32 if data.backbone == mllm.TINY else 8
        chunks = [wanted[i : i + size] for i in range(0, len(wanted), size)]
        mine, found = runs.shared_out(chunks, accelerator), []
        packed.eval()
        for chunk in tqdm(mine, desc="reference", unit="batch"):
            batch = packed.collate([pairs[i]() for i in chunk], data.catalogue)
            with mllm.reference(packed.model), torch.no_grad():
                logps = packed(batch.to(accelerator.device))
            found += list(zip(chunk, logps.view(-1, 2).tolist(), strict=True))
        found = gather_object(found) if accelerator.num_processes > 1 else found
        logps = torch.full((len(pairs), 2), torch.nan)
        for number, values in found:
            logps[number] = torch.tensor(values)
        if accelerator.is_main_process:
            with runs.replacing(path) as beside:
                save_file({"logps": logps}, beside, metadata={"key": key})
        accelerator.wait_for_everyone()
    return mllm.load_tensors(path, {"logps": (len(pairs), 2)}, "delete it, and it is computed again")["logps"]


def planned_pairs(rows: int, kinds: int, steps: int, steps_per_epoch: int, options, accelerator) -> list[int]:
    """The pairs that the run will use: all of them, or those of its few steps."""
    if steps >= steps_per_epoch:
        return list(range(rows * kinds))
    per_step = options.batch_size * options.grad_accum * accelerator.num_processes
    batches = training.micro_batches(rows, kinds, per_step, 1, 1, 0, options.seed)
    return sorted({number for step in itertools.islice(batches, steps) for number in step[0]})


def check_start(packed, batch, reference, device) -> None:
    """UserError unless the reward gap, without noise and dropout, is 0 before the first step."""
    import torch

    packed.eval()
    with torch.no_grad():
        gain = packed(batch.to(device)).view(-1, 2) - reference.to(device)
    worst = float((0.1 * (gain[:, 0] - gain[:, 1])).abs().max())  # at the paper's beta, whatever --beta is
    dtype = next(packed.core.parameters()).dtype
    if not worst <= (1e-4 if dtype == torch.float32 else 5e-2):
        raise UserError(
            f"before the first step the reward gap is {worst:.2e}, not 0: policy and reference differ. The likely "
            "cause is a reference kept from other weights or another dtype: delete reference/ in the SFT run, try again"
        )


def export(options, data, adapter: Path) -> None:
    """DIR/base (backbone and SFT merged), DIR/adapter (DPO's, naming DIR/base), DIR/merged (both), in float32."""
    import json

    from peft import PeftModel

    import evaluate
    from hanorec.model import mllm

    for name in ("base", "merged"):
        model = evaluate.load_result(options.sft, data)
        if name == "merged":
            model = mllm.load_adapter(model, adapter)
        with runs.replacing(options.export / name) as beside:
            model.save_pretrained(beside)
            mllm.load_tokenizer(data.source, data.trust).save_pretrained(beside)
            mllm.load_image_processor(data.source, data.encoding["max_pixels"], data.trust).save_pretrained(beside)
    with runs.replacing(options.export / "adapter") as beside:
        PeftModel.from_pretrained(evaluate.load_result(options.sft, data), adapter).save_pretrained(beside)
        config = json.loads((beside / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str((options.export / "base").resolve())
        runs.write_json(beside / "adapter_config.json", config)


def take_step(step: int, micro: list[tuple], model, packed, optimizer, schedule, eta, options, accelerator) -> dict:
    """One optimizer step over this process's micro-batches (batch, reference [B, 2], hardness [B]). Returns the metrics
    as means over micro-batches and processes. The noise is new in each micro-batch and the same on every process."""
    import torch

    from hanorec_loss import hanorec_loss, noisy_lora

    model.train()
    sums = {}
    for number, (batch, reference, hardness) in enumerate(micro, 1):
        draw = np.random.SeedSequence([options.seed, step, number]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(draw))
        with (
            training.micro_step(model, accelerator, last=number == len(micro)),
            noisy_lora(packed, options.sigma, options.noise == "relative", generator) as noise,
        ):
            reference, hardness = reference.to(accelerator.device), hardness.to(accelerator.device)
            logps = model(batch.to(accelerator.device)).view(-1, 2)
            losses, metrics = hanorec_loss(
                *logps.T, *reference.T, hardness, options.beta, eta, gather=accelerator.gather
            )
            accelerator.backward(losses.mean() / len(micro))
        for name, value in (metrics | {"noise": noise.to(accelerator.device)}).items():
            sums[name] = sums.get(name, 0) + value / len(micro)
    norm = accelerator.clip_grad_norm_([p for p in packed.parameters() if p.requires_grad], 1.0)
    rate = schedule.get_last_lr()[0]
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    means = accelerator.reduce(torch.stack(list(sums.values())), "mean")
    return dict(zip(sums, means.unbind(), strict=True)) | {"grad_norm": norm, "lr": rate}


def load_policy(options, data, rows, accelerator):
    """(policy, hardness [rows]): the SFT result merged in float32 (on a quantized base kept as a frozen adapter), then
    a fresh LoRA."""
    import evaluate
    from hanorec.model import mllm, packing

    dtype = mllm.pick_dtype(options.dtype, accelerator)
    if options.quantize:
        base = evaluate.load_result(options.sft, data, dtype, options.attn)
    else:
        base = evaluate.load_result(options.sft, data, attn=options.attn).to(dtype)
    hardness = pair_hardness(options, data, base, mllm.load_tokenizer(data.source, data.trust), rows)
    low, high = (float(hardness.quantile(q)) for q in (0.01, 0.99))
    model = mllm.add_lora(base, options.lora_rank, options.lora_alpha, options.lora_dropout, options.seed)
    packed = packing.load_packed(model, data, not options.no_pack, training.first_device(model, accelerator))
    if options.gradient_checkpointing:
        packed.enable_checkpointing()
    trained = sum(p.numel() for p in packed.parameters() if p.requires_grad)
    accelerator.print(f"{data.backbone}: {trained:,} trained weights, {dtype}")
    accelerator.print(f"lambda ({options.hardness}): mean {hardness.mean():.4f}, 1%-99% {low:.4f} to {high:.4f}")
    return packed, hardness


@runs.one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    runs.check_out(options.out, "dpo_hano")
    sft = runs.read_run(options.sft, ["sft"])
    runs.inherit(options, sft, INHERITED, options.sft)
    import torch

    import evaluate
    from hanorec.model import mllm, packing

    data = evaluate.Data(
        Path(options.data),
        options.model,
        options.blank_images,
        options.images,
        options.summaries,
        trust=options.trust_remote_code,
    )
    if data.hash() != sft["data"]:
        raise UserError(f"{options.sft} was trained on an earlier {options.data}; run sft.py again")
    tiny = data.backbone == mllm.TINY
    runs.inherit(options, sft, LORA, options.sft)
    recipe = TINY_RECIPE if tiny else RECIPE
    if options.epochs:  # whoever says how many wants all of them
        recipe = {name: value for name, value in recipe.items() if name != "max_steps"}
    runs.set_defaults(options, **recipe, attn="sdpa")
    packing.check_attention(options.attn, not options.no_pack)
    accelerator = runs.start_accelerator(report_to=options.report_to, out=options.out)
    hashes = {"data": data.hash(), "sft_weights": runs.weights_hash(options.sft)}
    checkpoints.check(options, accelerator, **hashes)
    if options.sigma and accelerator.distributed_type.value == "DEEPSPEED":
        raise UserError("DeepSpeed steps before NoDO's noise is out of the weights: configs/fsdp2.yaml, or --sigma 0")
    prompts = data.prompts(options.candidate_images)
    rows, val_rows = data.rows("train"), data.rows("val", options.eval_limit)
    packed, hardness = load_policy(options, data, rows, accelerator)

    # Pairs: pair r * kinds + k is kind k of row r
    kinds = [kind for task in options.tasks for kind in {"rank": ["rank"], "yesno": ["yes", "no"]}[task]]
    builds = [partial(prompts.pair_tree, kind=kind) for kind in kinds]
    prompts.check_fit(builds, rows, options.max_length)
    pairs = [partial(prompts.fitting, build, row, options.max_length) for row in rows for build in builds]
    accelerator.print(
        f"{data.folder}: {len(rows)} rows x {len(kinds)} pairs ({', '.join(kinds)}) = {len(pairs)} samples"
    )
    steps, steps_per_epoch = training.plan_steps(len(pairs), options, accelerator)
    shape = {"processes": accelerator.num_processes, "rank": accelerator.process_index, "seed": options.seed}
    optimizer = training.adamw(packed, options.lr)
    schedule = training.cosine(optimizer, steps)
    model, optimizer = accelerator.prepare(packed, optimizer)
    batches = training.micro_batches(len(rows), len(kinds), options.batch_size, options.grad_accum, **shape)
    batches = itertools.islice(batches, steps)
    wanted = planned_pairs(len(rows), len(kinds), steps, steps_per_epoch, options, accelerator)
    made_of = [hashes["sft_weights"], data.hash(), kinds, options.max_length, wanted, prompts.texts]
    made_of += [prompts.tokenizer.chat_template, str(next(packed.core.parameters()).dtype), options.quantize]
    key = runs.value_hash(made_of)
    reference = reference_logps(packed, data, pairs, wanted, key, options.sft / "reference", accelerator)

    moving = MovingResponsiveness() if options.responsiveness == "ema" else None
    eta = {"batch": batch_responsiveness, "ema": moving, "none": 1.0}[options.responsiveness]
    torch.manual_seed(options.seed + accelerator.process_index)  # LoRA's dropout

    def load(step: int, numbers: list[list[int]]) -> tuple[int, list[list[int]], list[tuple]]:
        batches = [packed.collate([pairs[n]() for n in chosen], data.catalogue) for chosen in numbers]
        weights = [hardness[[n // len(kinds) for n in chosen]] for chosen in numbers]
        return step, numbers, list(zip(batches, [reference[chosen] for chosen in numbers], weights, strict=True))

    def names(numbers: list[int]) -> str:
        return "users " + ", ".join(dict.fromkeys(rows[n // len(kinds)].user for n in numbers))

    with training.started(options, "dpo_hano", accelerator, steps, **hashes) as log:
        done = log.resume(packed, optimizer, prompts.shortened, schedule=schedule, eta=moving)
        for step, numbers, micro in training.loaded(load, batches, done, accelerator.device):
            if step == 1:
                check_start(packed, *micro[0][:2], accelerator.device)
            metrics = take_step(step, micro, model, packed, optimizer, schedule, eta, options, accelerator)
            chosen = [n for batch in numbers for n in batch]
            log.step(step, metrics, len(chosen), f"--lr {options.lr}", partial(names, chosen))
            validated = step % steps_per_epoch == 0 or step == steps
            if validated:
                log.flush()
                found = evaluate.validate(packed, data, prompts, val_rows, options, accelerator)
                if log.validation(step, step / steps_per_epoch, found):
                    weights = training.whole_weights(model, accelerator)
                    if accelerator.is_main_process:
                        with runs.replacing(options.out / "adapter") as beside:
                            packed.model.save_pretrained(beside, selected_adapters=[mllm.TRAINED], state_dict=weights)
            log.end_step(step, save=validated)
        if options.export and accelerator.is_main_process:
            export(options, data, options.out / "adapter")
        log.finish()


if __name__ == "__main__":
    main()
