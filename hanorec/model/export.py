"""Export a DPO run as models that can be loaded without this project."""

import argparse
import json
from pathlib import Path

from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.load import save_with_processors
from hanorec.model.lora import load_adapter
from hanorec.run.files import replacing, write_json


def export(options: argparse.Namespace, encoding: Encoding, adapter: Path) -> None:
    """Write three models in float32 into the folder options.export.

    base: the SFT model. adapter: the LoRA of DPO, with the path of `base` in its config. merged: both in one.

    Args:
        adapter: the adapter/ that DPO trained.
    """
    pixels = encoding.manifest["max_pixels"]
    model = load_finished(options.sft, encoding)
    with replacing(options.export / "base") as new:
        save_with_processors(model, new, encoding.source, pixels, encoding.trust)
    model = load_adapter(model, adapter, merge=False)
    with replacing(options.export / "adapter") as new:
        model.save_pretrained(new)
        config = json.loads((new / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str((options.export / "base").resolve())
        write_json(new / "adapter_config.json", config)
    with replacing(options.export / "merged") as new:
        save_with_processors(model.merge_and_unload(), new, encoding.source, pixels, encoding.trust)
