"""Export a finished run as a model that loads with transformers and peft alone, with a model card.

    python -m hanorec.export --run runs/demo/sft --to exported/sft
    python -m hanorec.export --run runs/ml-1m/dpo_hano --to exported/ml-1m

Writes README.md (the model card) and merged/, the complete model in float32 with its tokenizer and image processor. A
run with LoRA gets adapter/ too. After DPO its base is the SFT model, which is then written as base/.
"""

if __name__ == "__main__":
    from hanorec.run import interrupts

    interrupts.stop_at_once()  # before the other imports

import argparse
import shutil
from pathlib import Path

from hanorec.run.files import UserError, one_line_errors, printable, read_json, replacing, write_json
from hanorec.run.options import TRUST, Option, Parser
from hanorec.run.runs import read_run

OPTIONS = {
    "": [
        Option("--run", Path, None, "a finished run of sft.py or dpo_hano.py"),
        Option("--to", Path, None, "folder to write; it must not exist", metavar="DIR"),
        TRUST,
    ],
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, OPTIONS)
    options = parser.parse_args(argv)
    if not options.run or not options.to:
        parser.error("give --run RUN and --to DIR")
    return options


@one_line_errors
def checked_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """Parse the options and read the run. Return (options, the run's config.json)."""
    options = parse(argv)
    if options.to.exists():
        raise UserError(f"{options.to} exists; choose another --to, or delete it")
    return options, read_run(options.run)


if __name__ == "__main__":
    checked_options()  # prints --help and errors before the slow imports

from hanorec.data.folder import DataFolder
from hanorec.model.card import model_card
from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.load import save_with_processors
from mllm_srec.chain_of_thought import load_run_prompts, training_hash


def write_model(run: Path, encoding: Encoding, folder: Path) -> None:
    """Write the model of a finished run with all adapters merged."""
    pixels = encoding.manifest["max_pixels"]
    save_with_processors(load_finished(run, encoding), folder, encoding.source, pixels, encoding.trust)


def export(run: Path, config: dict, to: Path, trust: bool = False) -> None:
    """Write an export of a finished run into the new folder `to`.

    Args:
        config: the run's config.json.
        trust: run the backbone's own Python code.

    Raises:
        UserError: the data folder or the prompts have changed since the training; the model card describes both.
    """
    options = config["options"]
    data = DataFolder(Path(options["data"]))
    encoding = Encoding(data, options["model"], options["blank_images"], trust=trust)
    if config["data"] != training_hash(data, encoding, options.get("summaries")):
        raise UserError(f"{run} was trained on an earlier {data.folder}; train it again, or prepare that data again")
    prompts = load_run_prompts(run, config, data, encoding)
    start = Path(options["sft"]) if config["stage"] == "dpo_hano" else None
    with replacing(to) as new:
        new.mkdir()
        write_model(run, encoding, new / "merged")
        if start:
            write_model(start, encoding, new / "base")
        if (run / "adapter").exists():
            blank_card = shutil.ignore_patterns("README.md")  # PEFT's, without content
            shutil.copytree(run / "adapter", new / "adapter", ignore=blank_card)
            path = new / "adapter" / "adapter_config.json"
            base = str((to / "base").resolve()) if start else str(encoding.source)
            write_json(path, read_json(path, {}, "train the run again") | {"base_model_name_or_path": base})
        (new / "README.md").write_text(model_card(run, config, prompts, encoding), encoding="utf-8")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    options, config = checked_options(argv)
    export(options.run, config, options.to, options.trust_remote_code)
    parts = ", ".join(sorted(path.name for path in options.to.iterdir()))
    print(printable(f"{options.to}: {parts}; README.md says how to load it"))


if __name__ == "__main__":
    main()
