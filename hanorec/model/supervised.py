"""Supervised training on answers, shared by sft.py and mllm_srec.teach: options, trainable model, optimizer step."""

import argparse

import torch

from hanorec.model.check import load_packed
from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.load import load_model, pick_dtype
from hanorec.model.lora import add_lora
from hanorec.model.packing import Batch, PackedMLLM
from hanorec.run.files import UserError
from hanorec.run.training import first_device, micro_step


def check_tuning(options: argparse.Namespace, encoding: Encoding) -> None:
    """Set options.model, and options.tune if it is not given. UserError for options that contradict --tune."""
    options.model = encoding.backbone
    options.tune = options.tune or ("full" if encoding.tiny else "lora")
    if options.quantize and options.tune == "full":
        raise UserError("--quantize is for --tune lora; quantized weights cannot be trained")
    if options.tune == "lora" and options.start:
        raise UserError("--start is for --tune full; LoRA starts from the backbone")
    if options.tune == "lora" and options.dropout:
        raise UserError("--dropout is for --tune full; LoRA has --lora-dropout")


def mixed_precision(options: argparse.Namespace) -> str:
    """Return accelerate's mixed precision: bf16 for full training in bfloat16, else no.

    In full training the weights stay in float32. With LoRA the frozen backbone itself is loaded in bfloat16.
    """
    half = options.dtype == "bfloat16" or (options.dtype == "auto" and torch.cuda.is_available())
    return "bf16" if options.tune == "full" and half else "no"


def trainable_model(options: argparse.Namespace, encoding: Encoding, accelerator) -> PackedMLLM:
    """Load the backbone, or the model of --start, and make it trainable: the language model, or a new LoRA on it."""
    if options.tune == "full":
        if options.start:
            model = load_finished(options.start, encoding, attn=options.attn)
        else:
            model = load_model(encoding.source, torch.float32, options.attn, trust=encoding.trust)
        for part in (model.get_decoder(), model.get_output_embeddings()):
            part.requires_grad_(True)
    else:
        dtype = pick_dtype(options.dtype, accelerator)
        model = load_model(encoding.source, dtype, options.attn, options.quantize, encoding.trust)
        model = add_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout, options.seed)
    packed = load_packed(model, encoding, not options.no_pack, first_device(model, accelerator))
    if options.tune == "full":
        packed.set_dropout(options.dropout)
    if options.gradient_checkpointing:
        packed.enable_checkpointing()
    return packed


def supervised_step(model, micro_batches: list[Batch], weights: list, optimizer, schedule, accelerator):
    """Make one optimizer step on the mean negative log-likelihood of all answer tokens of the step.

    Args:
        model: the module that accelerator.prepare returned.
        micro_batches: this process's part of the step.
        weights: the trained weights. optimizer, schedule: of these weights.

    Returns (loss in nats per answer token, the norm of the gradient before clipping at 1).
    """
    own_tokens = sum(int(batch.answers.sum()) for batch in micro_batches)
    tokens = accelerator.reduce(torch.full((), float(own_tokens), device=accelerator.device))  # of all processes
    loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(micro_batches, 1):
        with micro_step(model, accelerator, last=number == len(micro_batches)):
            with accelerator.autocast():
                nll = -model(batch.to(accelerator.device)).sum() / tokens
            accelerator.backward(nll * accelerator.num_processes)  # accelerate averages gradients
        loss += nll.detach()
    norm = accelerator.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return accelerator.reduce(loss), norm
