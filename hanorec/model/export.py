"""Export a DPO run as models that load without this project."""

import argparse
import json
from pathlib import Path

from peft import PeftModel

from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.load import save_with_processors
from hanorec.model.lora import load_adapter
from hanorec.run.files import replacing, write_json


def export(options: argparse.Namespace, encoding: Encoding, adapter: Path) -> None:
    """Write DIR/base (backbone and SFT merged), DIR/adapter (DPO's, naming DIR/base), DIR/merged (both), in float32."""
    pixels = encoding.manifest["max_pixels"]
    for name in ("base", "merged"):
        model = load_finished(options.sft, encoding)
        model = load_adapter(model, adapter) if name == "merged" else model
        with replacing(options.export / name) as new:
            save_with_processors(model, new, encoding.source, pixels, encoding.trust)
    with replacing(options.export / "adapter") as new:
        PeftModel.from_pretrained(load_finished(options.sft, encoding), adapter).save_pretrained(new)
        config = json.loads((new / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str((options.export / "base").resolve())
        write_json(new / "adapter_config.json", config)
