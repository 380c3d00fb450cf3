"""Write the texts of MLLM-SRec before training: summaries of items, then each user's preferences as they change.

    accelerate launch -m mllm_srec.summarize --data data/ml-1m    # -> data/ml-1m/summaries/<backbone>/
    accelerate launch -m mllm_srec.summarize --data data/ml-1m --window 0 --name whole   # the whole history at once
    python -m mllm_srec.summarize --data data/ml-1m --server http://localhost:8000/v1    # a server writes the texts
    python -m mllm_srec.summarize --data data/ml-1m --show 2      # print the prompts, and write nothing

Writes items.jsonl (a line for each item), preferences.jsonl (a line for each window of each user), prompts.txt and
manifest.json; docs/mllm_srec.md lists their fields. After a crash, the same command continues. With another model,
prompt or option, it writes the texts anew. Unusable texts (empty, refused, cut at the limit, without the requested
form) are counted, and prompts go without them.
"""

if __name__ == "__main__":
    from hanorec.run import interrupts

    interrupts.stop_at_once()  # before the other imports

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
from hanorec.run.options import DATA, DTYPE, ENCODING, TRUST, Option, Parser, non_negative_int, positive_int
from hanorec.run.runs import json_options, next_command, weights_hash
from mllm_srec.texts import PROMPTS_FILE, fill, item_prompt, read_texts

OPTIONS = {
    "": [
        DATA,
        ENCODING,
        Option("--run", Path, None, "a finished run of mllm_srec.teach, sft.py or dpo_hano.py that writes the texts"),
        Option("--name", str, None, "folder to write under <data>/summaries", shown="the backbone's name"),
    ],
    "prompts": [
        Option("--prompts", Path, PROMPTS_FILE, "file of all prompts", shown="mllm_srec/prompts.txt"),
        Option("--sees", ["both", "image", "text"], "both", "what an item's summary is written from"),
        Option("--window", non_negative_int, 3, "items in a window; 0: the whole history"),
        Option("--step", positive_int, 3, "items from one window to the next"),
        Option("--before", non_negative_int, 0, "begin N items before the first example; 0: at the start", metavar="N"),
        Option("--max-tokens", positive_int, 256, "most tokens of a text"),
        Option("--show", non_negative_int, 0, "print N prompts of each kind, and write nothing", metavar="N"),
    ],
    "how": [
        Option("--batch-size", positive_int, None, "texts at once", shown="tiny: 64, else 8; server: 64"),
        DTYPE,
        Option("--server", str, None, "OpenAI-compatible server that writes the texts, up to /v1", metavar="URL"),
        Option("--server-model", str, None, "the server's name for the model", metavar="NAME", shown="its first"),
        Option("--parallel", positive_int, 16, "requests to the server at a time"),
        Option("--retries", non_negative_int, 5, "how often a request is sent again, after longer and longer pauses"),
        Option("--seed", non_negative_int, 42, "sent to the server; without a server, decoding is greedy"),
        TRUST,
    ],
}


@one_line_errors
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, check that they go together, and read the prompts file so that a mistake is reported early."""
    parser = Parser(__doc__, OPTIONS)
    options = parser.parse_args(argv)
    if options.run and options.server:
        parser.error("--run does not go with --server: either the run writes the texts, or the server")
    if options.server_model and not options.server:
        parser.error("--server-model is for --server")
    if options.before and not options.window:
        parser.error("--before is for windows, and --window 0 has none")
    read_texts(options.prompts)
    return options


# The prompts from which paragraphs and profiles are written
PREFERENCE_TEXTS = ("line", "line without a summary", "first preference", "preference", "profile", "nothing")


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before the slow imports

import contextlib
import shutil
from collections import Counter
from functools import partial

from hanorec.data.folder import DataFolder
from hanorec.model.check import load_packed
from hanorec.model.encoding import Encoding, backbone_weights
from hanorec.model.finished import load_finished
from hanorec.model.load import load_model, pick_dtype
from hanorec.model.prompts import plain_prompts
from hanorec.run.launch import start_accelerator
from hanorec.run.records import Record
from mllm_srec import preferences
from mllm_srec.chain_of_thought import ThoughtPrompts, load_prompts
from mllm_srec.preferences import UserTexts, load_user_texts, timelines
from mllm_srec.server import Server
from mllm_srec.writers import Local, titles_with_control_tokens
from mllm_srec.writing import users_windows, write_items, write_preferences


def load_writer(options: argparse.Namespace, data: DataFolder, encoding: Encoding, accelerator):
    """Load the text generator: a Local or a Server. Returns (generator, a dict that identifies it)."""
    options.batch_size = options.batch_size or (64 if encoding.tiny or options.server else 8)
    identity = {"max_tokens": options.max_tokens}
    if options.server:
        writer = Server(options.server, options.server_model, encoding, options)
        return writer, identity | {"server_model": writer.model, "seed": options.seed}
    dtype = pick_dtype(options.dtype, accelerator)
    identity |= {"backbone": encoding.backbone, "dtype": str(dtype)}
    if options.run:
        model = load_finished(options.run, encoding, dtype)
        identity["weights"] = weights_hash(options.run)
    else:
        model = load_model(encoding.source, dtype, trust=encoding.trust)
        identity["weights"] = backbone_weights(encoding.source)
    core = load_packed(model, encoding, False, accelerator.device).core  # generation does not pack
    prompts = load_prompts(data, encoding)
    return Local(core, prompts, encoding.tokens, options.max_tokens, options.batch_size), identity


def write_file(path: Path, old_manifest: dict, manifest: dict, key: str, accelerator, write) -> list[dict]:
    """Write items.jsonl or preferences.jsonl, or keep the file if it is still valid. Returns its lines.

    Args:
        manifest: the new manifest. It gets an entry for the file. It is saved without that entry before `write` begins.
        key: a hash of everything that the lines are computed from.
        write: from (a Record, accelerator) to the lines.
    """
    name, previous = path.stem, old_manifest.get(path.stem, {})
    if not previous:
        reason = "is not complete"
    elif not path.exists():
        reason = "is missing"
    elif previous["key"] != key:
        reason = "is not of this model, these prompts and options"
    elif previous["hash"] != file_hash(path):
        reason = "was changed after it was written"
    else:
        accelerator.print(f"{path} is kept")
        manifest[name] = previous
        return read_jsonl(path, {}, "delete it")
    accelerator.print(f"{path} {reason}: it is written now")
    if accelerator.is_main_process:
        write_json(path.with_name("manifest.json"), manifest)
    lines = write(Record(path, key, accelerator), accelerator)
    faults = Counter(line["fault"] or "usable" for line in lines)
    faults += Counter(f"profile {line['profile_fault']}" for line in lines if line.get("profile_fault"))
    manifest[name] = {"key": key, "lines": len(lines), "faults": dict(faults), "hash": file_hash(path)}
    counted = ", ".join(f"{count} {fault}" for fault, count in sorted(faults.items()))
    accelerator.print(f"{path}: {len(lines)} lines, {counted}")
    return lines


def show(options: argparse.Namespace, data: DataFolder, encoding: Encoding, texts: dict[str, str]) -> None:
    """Print the first prompts of each kind as the model sees them, with "..." for texts that are not written yet."""

    def print_prompt(title: str, tree: list) -> None:
        print(f"\n--- {printable(title)}", *map(printable, prompts.show(tree).split("\n")), sep="\n")

    prompts = plain_prompts(encoding)
    for item in range(min(options.show, len(encoding.items))):
        parts = item_prompt(texts, options.sees, encoding, item)
        print_prompt(f"item {encoding.items.ids[item]}", [prompts.complete_prompt(parts)])
    timeline_of = timelines(data)
    try:
        folder = preferences.summaries_folder(data, encoding, options.name)
        user_texts = load_user_texts(folder, encoding, timeline_of)
        user_texts.texts = texts
    except UserError as error:
        print(f"\n({error}: below, ... is in the place of texts that are not written yet)")
        users = {user: [(0, "...", "...")] for user in timeline_of}
        user_texts = UserTexts(texts, encoding.items, timeline_of, ["..."] * len(encoding.items), users)
    for example in data.examples("train", options.show):
        user, values = example.user, user_texts.prompt_values(example)
        window = timeline_of[user][: options.window or user_texts.cut(example)]
        for previous in (None, values["preference"]):
            parts = user_texts.preference_prompt(window, previous)
            print_prompt(f"user {user}, preference", [prompts.complete_prompt(parts)])
        parts = fill(texts["profile"], preference=values["preference"])
        print_prompt(f"user {user}, profile", [prompts.complete_prompt(parts)])
        thought = ThoughtPrompts(user_texts, prompts.template, encoding.items, encoding.tokens)
        print_prompt(f"user {user}, chain of thought", thought.sft_tree(example, "yesno"))


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    data = DataFolder(options.data)
    encoding = Encoding(data, options.model, trust=options.trust_remote_code)
    texts = read_texts(options.prompts)
    if options.show:
        show(options, data, encoding, texts)
        return
    accelerator = start_accelerator()
    folder = preferences.summaries_folder(data, encoding, options.name)
    with locked(folder) if accelerator.is_main_process else contextlib.nullcontext():
        examples = [example for split in ("train", "val", "test") for example in data.examples(split)]
        timeline_of, path = timelines(data), folder / "manifest.json"
        old_manifest = read_json(path, preferences.MANIFEST, "delete it") if path.exists() else {}
        accelerator.wait_for_everyone()  # until every process has read the old manifest
        writer, identity = load_writer(options, data, encoding, accelerator)
        data_hash, pictures = preferences.sources(encoding, timeline_of)
        manifest = {
            "data": data_hash,
            "prompts": value_hash(texts),
            "titles_with_control_tokens": titles_with_control_tokens(encoding),
            "pictures": None if options.sees == "text" else pictures,
            "made_by": identity,
            "options": json_options(options),
        }
        if manifest["titles_with_control_tokens"]:
            accelerator.print(f"{manifest['titles_with_control_tokens']} titles spell control tokens, which stay text")
        if accelerator.is_main_process:
            with replacing(folder / "prompts.txt") as new:
                shutil.copyfile(options.prompts, new)

        # Items
        item_texts = {name: text for name, text in texts.items() if name.startswith("item")}
        key = value_hash([identity, options.sees, encoding.manifest, item_texts])
        write = partial(write_items, writer, texts, options.sees, encoding)
        lines = write_file(folder / "items.jsonl", old_manifest, manifest, key, accelerator, write)
        summaries = {line["item"]: line["summary"] for line in lines}

        # Users
        summary_of = [summaries[item] for item in encoding.items.ids]
        user_texts = UserTexts(texts, encoding.items, timeline_of, summary_of, {})
        users = users_windows(examples, user_texts, options)
        windows = [[each.user, each.ends, sorted(each.read)] for each in users]
        preference_texts = [texts[name] for name in PREFERENCE_TEXTS]
        key = value_hash([identity, preference_texts, options.window, summaries, manifest["data"], *windows])
        write = partial(write_preferences, writer, user_texts, users)
        write_file(folder / "preferences.jsonl", old_manifest, manifest, key, accelerator, write)
        if accelerator.is_main_process:
            write_json(path, manifest)
    next_options = argparse.Namespace(data=options.data, name=folder.name)
    accelerator.print(f"next: {next_command('summarize', next_options)}")


if __name__ == "__main__":
    main()
