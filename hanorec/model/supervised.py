"""Supervised training on answers, as sft.py and mllm_srec.teach share it: the model, an optimizer step, the weights."""

import argparse

import torch

from hanorec.model.check import load_packed
from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.load import load_model, pick_dtype, save_with_processors
from hanorec.model.lora import add_lora
from hanorec.model.packing import PackedMLLM
from hanorec.run.files import UserError, replacing
from hanorec.run.training import first_device, micro_step


def check_tuning(options: argparse.Namespace, encoding: Encoding) -> None:
    """Decide --tune if it is not given, and raise UserError for options that do not go with it."""
    options.model, options.tune = encoding.backbone, options.tune or ("full" if encoding.tiny else "lora")
    if options.quantize and options.tune == "full":
        raise UserError("--quantize is for --tune lora; rounded weights cannot be trained")
    if options.tune == "lora" and options.start:
        raise UserError("--start is for --tune full; LoRA starts from the backbone")
    if options.tune == "lora" and options.dropout:
        raise UserError("--dropout is for --tune full; LoRA has --lora-dropout")


def mixed_precision(options: argparse.Namespace) -> str:
    """bf16 if full training computes in bfloat16: its master weights stay in float32. LoRA's base is cast instead."""
    half = options.dtype == "bfloat16" or (options.dtype == "auto" and torch.cuda.is_available())
    return "bf16" if options.tune == "full" and half else "no"


def trainable_model(options: argparse.Namespace, encoding: Encoding, accelerator) -> PackedMLLM:
    """The backbone, or the run of --start, with the weights that --tune names made trainable."""
    if options.tune == "full":
        if options.start:
            model = load_finished(options.start, encoding, attn=options.attn)
        else:
            model = load_model(encoding.source, torch.float32, options.attn, trust=encoding.trust)  # master weights
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


def supervised_step(model, micro: list, parameters: list, optimizer, schedule, accelerator):
    """One optimizer step: the mean negative log-likelihood of the answer tokens of all micro-batches and processes.

    Args:
        micro: this process's micro-batches, a Batch each.

    Returns (loss in nats per answer token, the gradient's norm before clipping at 1).
    """
    tokens = torch.tensor(float(sum(int(batch.answers.sum()) for batch in micro)), device=accelerator.device)
    tokens = accelerator.reduce(tokens)
    loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(micro, 1):
        with micro_step(model, accelerator, last=number == len(micro)):
            with accelerator.autocast():
                nll = -model(batch.to(accelerator.device)).sum() / tokens
            accelerator.backward(nll * accelerator.num_processes)  # gradients are averaged over processes
        loss += nll.detach()
    norm = accelerator.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return accelerator.reduce(loss), norm


def save_trained(model, weights: dict, encoding: Encoding, options: argparse.Namespace) -> None:
    """Write adapter/ (PEFT's format) or, with --tune full, model/ with its tokenizer. weights: the whole state dict."""
    if options.tune == "full":
        with replacing(options.out / "model") as new:
            pixels = encoding.manifest["max_pixels"]
            save_with_processors(model, new, encoding.source, pixels, encoding.trust, state_dict=weights)
    else:
        with replacing(options.out / "adapter") as new:
            model.save_pretrained(new, state_dict=weights)
