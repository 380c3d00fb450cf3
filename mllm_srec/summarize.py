"""MLLM-SRec's stage before training: summaries of items, then each user's preferences as they change over time.

    accelerate launch -m mllm_srec.summarize --data data/ml-1m    # -> data/ml-1m/summaries/<backbone>/
    accelerate launch -m mllm_srec.summarize --data data/ml-1m --window 0 --name whole   # no window
    python -m mllm_srec.summarize --data data/ml-1m --server http://localhost:8000/v1    # prompts go to a server
    python -m mllm_srec.summarize --data data/ml-1m --show 2      # print the prompts, and write nothing

Writes items.jsonl (item, summary, reply), preferences.jsonl (user, items, paragraph, profile: a line for each window),
prompts.txt and manifest.json. Texts are appended batch by batch: a run that was cut off continues, and a run with
another model, prompt or option starts anew. A text that is empty, refused, cut at the limit or without the requested
form is counted and left out.
"""

import argparse
from pathlib import Path

from hanorec.run.files import (
    UserError,
    file_hash,
    locked,
    one_line_errors,
    printable,
    read_json,
    read_jsonl,
    replacing,
    value_hash,
    write_json,
)
from hanorec.run.options import DTYPE, TRUST, Option, Parser, non_negative_int, positive_int
from hanorec.run.runs import json_options, read_run, weights_hash
from mllm_srec.texts import PROMPTS_FILE, fill, item_prompt, read_texts

OPTIONS = {
    "": [
        Option("--data", Path, Path("data/demo"), "data folder"),
        Option("--model", str, None, "which of the data's encodings, if there are several"),
        Option("--run", Path, None, "a finished run of mllm_srec.teach or sft.py that writes, not the backbone"),
        Option("--name", str, None, "folder to write under <data>/summaries", shown="the backbone's name"),
    ],
    "prompts": [
        Option("--prompts", Path, PROMPTS_FILE, "file of all prompts", shown="mllm_srec/prompts.txt"),
        Option(
            "--sees",
            ["both", "image", "text"],
            "both",
            "what an item's summary is made of: both, its image alone (MLLM-MSR), its text alone",
        ),
        Option("--window", non_negative_int, 3, "items in a window; 0: the whole history"),
        Option("--step", positive_int, 3, "items from one window to the next"),
        Option(
            "--before",
            non_negative_int,
            0,
            "begin a user's windows so many items before the first example's history ends; 0: at the beginning",
        ),
        Option("--max-tokens", positive_int, 256, "most tokens of a text"),
        Option("--show", non_negative_int, 0, "print N rendered prompts", metavar="N"),
    ],
    "how": [
        Option("--batch-size", positive_int, None, "texts at once", shown="tiny: 64, else 8; server: 64"),
        DTYPE,
        Option("--server", str, None, "an OpenAI-compatible server, its address up to /v1", metavar="URL"),
        Option("--server-model", str, None, "the model's name there", metavar="NAME", shown="the first that it lists"),
        Option("--parallel", positive_int, 16, "requests at a time"),
        Option("--retries", non_negative_int, 5, "tries of a request after the first, with longer and longer pauses"),
        Option("--seed", non_negative_int, 42, "sent to the server; a model here writes greedily"),
        TRUST,
    ],
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, OPTIONS)
    options = parser.parse_args(argv)
    if options.run and options.server:
        parser.error("--run writes with a model here; it does not go with --server")
    if options.server_model and not options.server:
        parser.error("--server-model is for --server")
    if options.before and not options.window:
        parser.error("--before is for windows; --window 0 reads the whole history")
    return options


@one_line_errors
def checked_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, and read the prompts file once so that a mistake in it is reported early."""
    options = parse(argv)
    read_texts(options.prompts)
    return options


# The prompts that paragraphs and profiles are made of
PREFERENCE_TEXTS = ("line", "line without a summary", "first preference", "preference", "profile", "nothing")


if __name__ == "__main__":
    checked_options()  # --help and mistakes are answered before the slow imports

import contextlib
import shutil
from collections import Counter

from hanorec.data.folder import DataFolder
from hanorec.model.check import load_packed
from hanorec.model.encoding import Encoding
from hanorec.model.finished import load_finished
from hanorec.model.load import load_model, pick_dtype
from hanorec.model.prompts import Prompts
from hanorec.model.template import load_template
from hanorec.run.launch import start_accelerator
from mllm_srec import preferences
from mllm_srec.chain_of_thought import ThoughtPrompts, load_prompts
from mllm_srec.preferences import UserTexts, load_user_texts, timelines
from mllm_srec.records import Record
from mllm_srec.server import Server
from mllm_srec.writers import Local, titles_with_control_tokens
from mllm_srec.writing import users_windows, write_items, write_preferences


def load_writer(options: argparse.Namespace, data: DataFolder, encoding: Encoding, accelerator):
    """Load the text generator: a model here, or a server. Returns (generator, a dict that identifies it)."""
    options.batch_size = options.batch_size or (64 if encoding.tiny or options.server else 8)
    identity = {"max_tokens": options.max_tokens}
    if options.server:
        writer = Server(options.server, options.server_model, encoding, options)
        return writer, identity | {"server_model": writer.model, "seed": options.seed}
    dtype = pick_dtype(options.dtype, accelerator)
    identity |= {"backbone": encoding.backbone, "dtype": str(dtype)}
    if options.run:
        read_run(options.run, ["teach", "sft", "dpo_hano"])
        identity["weights"] = weights_hash(options.run)
        model = load_finished(options.run, encoding, dtype)
    else:
        model = load_model(encoding.source, dtype, trust=encoding.trust)
        files = Path(encoding.source).glob("*.safetensors")
        identity["weights"] = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    core = load_packed(model, encoding, True, accelerator.device).core
    prompts = load_prompts(data, encoding)
    return Local(core, prompts, encoding.tokens, options.max_tokens, options.batch_size), identity


def write_stage(name: str, folder: Path, previous: dict, manifest: dict, key: str, accelerator, write) -> list[dict]:
    """Write <name>.jsonl, or keep it if it is made of the same. Returns its lines.

    Args:
        previous: this file's entry in the old manifest; empty without one.
        manifest: the new one, which is written too; it lists complete files only.
        key: a hash of what the lines are made of.
        write: from a Record to the lines.
    """
    path = folder / f"{name}.jsonl"
    if path.exists() and previous.get("key") == key and previous["hash"] == file_hash(path):
        accelerator.print(f"{path} stands")
        manifest[name] = previous
        return read_jsonl(path, {}, "delete it")
    if previous:
        accelerator.print(f"{path} is not of this model, these prompts and options: it is written anew")
    if accelerator.is_main_process:
        write_json(folder / "manifest.json", manifest)
    lines = write(Record(path, key, accelerator))
    faults = Counter(line["fault"] or "usable" for line in lines)
    faults += Counter(f"profile {line['profile_fault']}" for line in lines if line.get("profile_fault"))
    manifest[name] = {"key": key, "lines": len(lines), "faults": dict(faults), "hash": file_hash(path)}
    if accelerator.is_main_process:
        write_json(folder / "manifest.json", manifest)
    counted = ", ".join(f"{count} {fault}" for fault, count in sorted(faults.items()))
    accelerator.print(f"{path}: {len(lines)} lines, {counted}")
    return lines


def show(options: argparse.Namespace, data: DataFolder, encoding: Encoding, texts: dict[str, str]) -> None:
    """Print the first prompts of each kind as the model sees them; "..." stands for what is not written yet."""

    def print_prompt(title: str, tree: list) -> None:
        lines = prompts.show(tree).split("\n")
        print(f"\n--- {printable(title)}", *map(printable, lines), sep="\n")

    prompts = Prompts(load_template(encoding.source, encoding.trust), encoding.items, encoding.tokens)
    for item in range(min(options.show, len(encoding.items))):
        parts = item_prompt(texts, options.sees, encoding, item)
        print_prompt(f"item {encoding.items.ids[item]}", [prompts.complete_prompt(parts)])
    lines = timelines(data)
    try:
        folder = preferences.summaries_folder(data, encoding, options.name)
        user_texts = load_user_texts(folder, encoding, lines)
        user_texts.texts = texts
    except UserError as error:
        print(f"\n({error}: ... stands for what is not written)")
        users = {user: [(0, "...", "...")] for user in lines}
        user_texts = UserTexts(texts, encoding.items, lines, ["..."] * len(encoding.items), users)
    for example in data.examples("train", options.show):
        user, values = example.user, user_texts.at(example)
        first = lines[user][: options.window or user_texts.cut(example)]
        for before in (None, values["preference"]):
            parts = user_texts.preference_prompt(first, before)
            print_prompt(f"user {user}, preference", [prompts.complete_prompt(parts)])
        parts = fill(texts["profile"], preference=values["preference"])
        print_prompt(f"user {user}, profile", [prompts.complete_prompt(parts)])
        thought = ThoughtPrompts(user_texts, prompts.template, encoding.items, encoding.tokens)
        print_prompt(f"user {user}, chain of thought", thought.sft_tree(example, "yesno"))


def write_all(options: argparse.Namespace, folder: Path, data: DataFolder, encoding: Encoding, accelerator) -> None:
    """Write both files and the manifest of a summaries folder."""
    texts, lines = read_texts(options.prompts), timelines(data)
    path = folder / "manifest.json"
    before = read_json(path, preferences.MANIFEST, "delete it") if path.exists() else {}
    accelerator.wait_for_everyone()
    writer, identity = load_writer(options, data, encoding, accelerator)
    manifest = describe(options, encoding, texts, lines, identity)
    if manifest["titles_with_control_tokens"]:
        accelerator.print(f"{manifest['titles_with_control_tokens']} titles spell control tokens, which stay text")
    if accelerator.is_main_process:
        with replacing(folder / "prompts.txt") as new:
            shutil.copyfile(options.prompts, new)

    def write_file(name: str, key: str, write) -> list[dict]:
        return write_stage(name, folder, before.get(name, {}), manifest, key, accelerator, write)

    item_texts = {name: text for name, text in texts.items() if name.startswith("item")}
    key = value_hash([identity, options.sees, encoding.manifest, item_texts])
    settings = (writer, texts, options.sees, encoding)
    found = write_file("items", key, lambda record: write_items(*settings, record, accelerator))
    summaries = {line["item"]: line["summary"] for line in found}
    user_texts = UserTexts(texts, encoding.items, lines, [summaries[item] for item in encoding.items.ids], {})

    examples = [example for split in ("train", "val", "test") for example in data.examples(split)]
    users = users_windows(examples, user_texts, options)
    used = [texts[name] for name in PREFERENCE_TEXTS]
    windows = [[each.user, each.ends, sorted(each.read)] for each in users]
    key = value_hash([identity, used, options.window, summaries, manifest["data"], *windows])
    write_file("preferences", key, lambda record: write_preferences(writer, user_texts, users, record, accelerator))
    if accelerator.is_main_process:
        write_json(path, manifest)


def describe(options, encoding: Encoding, texts: dict, lines: dict[str, list[int]], identity: dict) -> dict:
    """The manifest of a summaries folder, before its files are written. identity: of the text generator."""
    pictures = {name: encoding.manifest[name] for name in preferences.PICTURES}
    return {
        "data": preferences.data_hash(encoding.items, lines),
        "prompts": value_hash(texts),
        "titles_with_control_tokens": titles_with_control_tokens(encoding),
        "pictures": None if options.sees == "text" else pictures,
        "made_by": identity,
        "options": json_options(options),
    }


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = checked_options(argv)
    data = DataFolder(options.data)
    encoding = Encoding(data, options.model, trust=options.trust_remote_code)
    if options.show:
        show(options, data, encoding, read_texts(options.prompts))
        return
    accelerator = start_accelerator()
    folder = preferences.summaries_folder(data, encoding, options.name)
    with locked(folder) if accelerator.is_main_process else contextlib.nullcontext():
        write_all(options, folder, data, encoding, accelerator)


if __name__ == "__main__":
    main()
