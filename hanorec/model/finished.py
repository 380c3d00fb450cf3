"""The model that a finished run ended with: the backbone or the run's own weights, and the adapters on it."""

from pathlib import Path

import torch

from hanorec.model.encoding import Encoding
from hanorec.model.load import load_model, load_tokenizer
from hanorec.model.lora import FROZEN, TRAINED, load_adapter
from hanorec.run.files import UserError, read_json
from hanorec.run.runs import COMMANDS, read_run, weights_hash


def load_finished(run: Path, encoding: Encoding, dtype: torch.dtype | None = None, attn: str | None = None):
    """Load the model that a finished run ended with.

    Args:
        dtype: None merges all adapters, in float32. With a dtype the last adapter stays an adapter, as in training:
            rounded into half-precision weights, most of what it learned would be lost. On a quantized base every
            adapter stays one.
        attn: the attention; the run's if None.
    """
    config = finished_config(run, encoding)
    options = config["options"]
    attn, quantize = attn or options.get("attn", "sdpa"), options.get("quantize")
    runs = [(run, config)]  # the SFT run first, then the DPO run on it
    if config["stage"] == "dpo_hano":
        start = Path(options["sft"])
        if weights_hash(start) != config["sft_weights"]:
            raise UserError(f"{run} was trained on other weights of {start}; run dpo_hano.py again")
        runs.insert(0, (start, finished_config(start, encoding)))
    adapters = [(folder, own["stage"]) for folder, own in runs if own["options"].get("tune") != "full"]
    model = load_base(*runs[0], encoding, dtype if quantize or not adapters else None, attn)
    for folder, stage in adapters:
        last = (folder, stage) == adapters[-1]
        if last and not quantize and dtype is not None:
            model = model.to(dtype)
        merge = dtype is None or not (last or quantize)
        name = FROZEN if quantize and stage != "dpo_hano" else TRAINED
        model = load_adapter(model, folder / "adapter", merge, name)
    return model


def finished_config(run: Path, encoding: Encoding) -> dict:
    """The config of a finished run of this backbone whose weights are those that it ended with; else UserError."""
    config = read_run(run, ("teach", "sft", "dpo_hano"))
    backbone, command = config["options"]["model"], COMMANDS[config["stage"]]
    if backbone != encoding.backbone:
        folder = encoding.data.folder
        raise UserError(f"{run} is a run of {backbone}, and {folder} is encoded for {encoding.backbone}")
    ended = read_json(run / "result.json", {"weights": str}, f"run {command} --out {run} again")
    if weights_hash(run) != ended["weights"]:
        raise UserError(f"{run} does not hold the weights that it ended with; run {command} again")
    return config


def load_base(run: Path, config: dict, encoding: Encoding, dtype: torch.dtype | None, attn: str):
    """The model below the adapters: the run's own with --tune full, else the backbone."""
    options = config["options"]
    if options["tune"] == "full":
        own, given = (load_tokenizer(name, encoding.trust).get_vocab() for name in (run / "model", encoding.source))
        if own != given:
            raise UserError(f"{run} has another tokenizer than {encoding.data.folder}: it was trained on other titles")
        return load_model(run / "model", dtype, attn, trust=encoding.trust)
    quantize = options.get("quantize")
    model = load_model(encoding.source, dtype, attn, quantize, encoding.trust)
    return model.dequantize() if quantize and dtype is None else model  # to the values that it was trained with
