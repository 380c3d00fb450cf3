"""Save the weights that a run has trained, and load the model of a finished run."""

from pathlib import Path

import torch
from peft import PeftModel

from hanorec.data.folder import DataFolder
from hanorec.model.encoding import Encoding
from hanorec.model.images import encode_images, neutral_image
from hanorec.model.load import load_image_processor, load_model, load_tokenizer, save_with_processors
from hanorec.model.lora import FROZEN, TRAINED, lean, load_adapter
from hanorec.model.packing import PackedMLLM
from hanorec.model.prompts import Prompts
from hanorec.run.files import UserError, print_main, read_json, replacing
from hanorec.run.runs import COMMANDS, backbone_files, read_run, same_backbone, weights_hash

SAME_TOKENS = 0.05  # relative difference of an image's tokens; half precision changes less, another tower much more


def load_finished(run: Path, encoding: Encoding, dtype: torch.dtype | None = None, attn: str | None = None):
    """Load the model of a finished run: the backbone or the run's own weights, then the adapters of SFT and DPO.

    Args:
        dtype: of the model, None for float32. With None all adapters are merged; in float32 all but the last. In half
            precision or on a quantized backbone none is merged: rounding would lose a part of what it has learned.
        attn: the attention implementation; None for that of the run.
    """
    config = finished_config(run, encoding)
    options = config["options"]
    attn, quantize = attn or options.get("attn", "sdpa"), options.get("quantize")
    runs = [(run, config)]
    if config["stage"] == "dpo_hano":
        start = Path(options["sft"])
        if weights_hash(start) != config["sft_weights"]:
            raise UserError(f"{run} was trained on other weights of {start}; run dpo_hano.py again")
        runs.insert(0, (start, finished_config(start, encoding)))  # the SFT run, before the DPO run
    adapters = [(folder, own["stage"]) for folder, own in runs if own["options"].get("tune") != "full"]
    half = dtype not in (None, torch.float32)
    apart = half or bool(quantize and dtype)
    # The model is loaded in its dtype: model.to(dtype) would round the frequencies of its positions too
    model = load_base(*runs[0], encoding, dtype, attn)
    for folder, stage in adapters:
        merge = dtype is None or not (apart or (folder, stage) == adapters[-1])
        name = FROZEN if apart and stage != "dpo_hano" else TRAINED
        model = load_adapter(model, folder / "adapter", merge, name)
    return lean(model) if half else model  # the layers that trained it: in half precision, sums in another order differ


def finished_config(run: Path, encoding: Encoding) -> dict:
    """Read the config.json of a finished run. UserError if its backbone or its weights are not the expected ones."""
    config = read_run(run, ("teach", "sft", "dpo_hano"))
    backbone, command = config["options"]["model"], COMMANDS[config["stage"]]
    if backbone != encoding.backbone and not same_backbone(backbone_files(run), encoding.backbone):
        folder = encoding.data.folder
        raise UserError(f"{run} is a run of {backbone}, and {folder} is encoded for {encoding.backbone}")
    ended = read_json(run / "result.json", {"weights": str}, f"run {command} --out {run} again")
    if weights_hash(run) != ended["weights"]:
        raise UserError(f"the weights in {run} have changed since the run finished; run {command} again")
    return config


def load_base(run: Path, config: dict, encoding: Encoding, dtype: torch.dtype | None, attn: str):
    """Load the model without adapters: the run's own model/ with --tune full, else the backbone."""
    options = config["options"]
    if options["tune"] == "full":
        run_tokenizer = load_tokenizer(run / "model", encoding.trust)
        data_tokenizer = load_tokenizer(encoding.source, encoding.trust)
        if run_tokenizer.get_vocab() != data_tokenizer.get_vocab():
            remedy = f"run prepare_data.py --out {encoding.data.folder} --encode-only --model {run}"
            fault = f"{run} has another tokenizer than {encoding.data.folder}: it was trained on other titles"
            raise UserError(f"{fault}; {remedy}")
        return load_model(run / "model", dtype, attn, trust=encoding.trust)
    quantize = options.get("quantize")
    model = load_model(encoding.source, dtype, attn, quantize, encoding.trust)
    # dequantize: float32 weights with the quantized values, to merge the adapter that was trained on these values
    return model.dequantize() if quantize and dtype is None else model


def open_encoding(run: Path, data: DataFolder, trust: bool = False) -> Encoding:
    """Open the encoding of a data folder for a run, which may have been trained on an earlier data folder.

    It is the encoding that the run's own model made (prepare_data.py --model RUN), or that of the run's backbone.
    """
    options = read_run(run)["options"]
    own = backbone_files(run)
    names = [name for name in data.encodings() if same_backbone(name, own)]
    names += [name for name in data.encodings() if name == options["model"]]
    if not names:
        encoded_for = ", ".join(data.encodings()) or "no backbone"
        remedy = f"run prepare_data.py --out {data.folder} --encode-only --model {run}"
        raise UserError(f"{data.folder} is encoded for {encoded_for}, not for {run}; {remedy}")
    return Encoding(data, names[0], options["blank_images"], options.get("images"), trust)


@torch.no_grad()
def check_vision(run: Path, model, encoding: Encoding) -> None:
    """UserError if the image tokens of the encoding are not those of the model's vision tower.

    The neutral image is encoded again and compared with its stored tokens.
    """
    processor = load_image_processor(encoding.source, encoding.manifest["max_pixels"], encoding.trust)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens, stored = encode_images(core, processor, [neutral_image()])[0][0], encoding.tokens.vectors["neutral"]
    if tokens.shape == stored.shape:
        difference = (tokens.float() - stored.float()).abs().mean()
        if difference <= SAME_TOKENS * stored.float().abs().mean():
            return
    remedy = f"run prepare_data.py --out {encoding.data.folder} --encode-only --model {run}"
    raise UserError(f"{encoding.folder} was made by another vision tower than that of {run}; {remedy}")


def check_prompts(run: Path, config: dict, prompts: Prompts) -> None:
    """Check the prompts of a finished run. If its config.json has no hash of them, print that they are not checked.

    Raises:
        UserError: the texts of the prompts are not those that the run was trained on.
    """
    options, trained_on = config["options"], config.get("prompts")
    if trained_on is None:
        print_main(f"{run} was trained before prompts were recorded: whether it knows today's prompts is not checked")
    elif trained_on != prompts.hash():
        file = "prompts.txt of its summaries" if options.get("summaries") else "hanorec/model/prompts.py"
        cause = f"{run} was trained on other prompts than those of today ({file}, or the backbone's chat template)"
        raise UserError(f"{cause}; restore them, or train it again")


def save_trained(model, packed: PackedMLLM, encoding: Encoding, out: Path, accelerator) -> None:
    """Write the trained weights: out/adapter (PEFT's format) if there is a LoRA, else out/model with its tokenizer.

    All processes must call this. model: the module that accelerator.prepare returned for `packed`.
    """
    weights = accelerator.get_state_dict(model)  # of a PackedMLLM, gathered on the main process
    if not accelerator.is_main_process:
        return
    weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    if isinstance(packed.model, PeftModel):
        with replacing(out / "adapter") as new:
            packed.model.save_pretrained(new, selected_adapters=[TRAINED], state_dict=weights)
    else:
        pixels = encoding.manifest["max_pixels"]
        with replacing(out / "model") as new:
            save_with_processors(packed.model, new, encoding.source, pixels, encoding.trust, state_dict=weights)
