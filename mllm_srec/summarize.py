"""MLLM-SRec's stage before training: summaries of items, then each user's preferences as they move over time.

    accelerate launch -m mllm_srec.summarize --data data/ml-1m    # -> data/ml-1m/summaries/<backbone>/
    accelerate launch -m mllm_srec.summarize --data data/ml-1m --window 0 --name whole   # no window
    python -m mllm_srec.summarize --data data/ml-1m --server http://localhost:8000/v1     # the same prompts to a server
    python -m mllm_srec.summarize --data data/ml-1m --show 2   # print the prompts, and write nothing

Writes items.jsonl (item, summary, reply), preferences.jsonl (user, items, paragraph, profile: a line for each position
of the window), prompts.txt and manifest.json. Texts are written batch by batch as they come: a run that was cut off
goes on where it was, and one with another model, prompt or option starts anew. A text that is empty, refused, cut at
the limit or without the form that was asked for is counted and left out.
"""

import argparse
import contextlib
import shutil
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from hanorec.run import runs
from hanorec.run.runs import UserError
from mllm_srec import srec


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = runs.Parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="data folder [data/demo]")
    parser.add_argument("--model", help="which of the data's encodings, where there are several")
    parser.add_argument("--run", type=Path, help="a finished run of teach.py or sft.py that writes, not the backbone")
    parser.add_argument("--name", help="folder to write under <data>/summaries [the backbone's name]")
    texts = parser.add_argument_group("prompts")
    texts.add_argument("--prompts", type=Path, default=srec.TEXTS, help="file of all prompts [mllm_srec.txt]")
    sees = "what an item's summary is made of: both fused, its image alone (MLLM-MSR), its text alone [both]"
    texts.add_argument("--sees", choices=["both", "image", "text"], default="both", help=sees)
    texts.add_argument("--window", type=runs.non_negative_int, default=3, help="items; 0: the whole history [3]")
    texts.add_argument("--step", type=runs.positive_int, default=3, help="items from one window to the next [3]")
    before = "begin a user's windows so many items before the first row's history ends; 0: at the beginning [0]"
    texts.add_argument("--before", type=runs.non_negative_int, default=0, help=before)
    texts.add_argument("--max-tokens", type=runs.positive_int, default=256, help="most tokens of a text [256]")
    texts.add_argument("--show", type=runs.non_negative_int, default=0, metavar="N", help="print N rendered prompts")
    run = parser.add_argument_group("how")
    run.add_argument("--batch-size", type=runs.positive_int, help="texts at once [tiny: 64, else 8; server: 64]")
    run.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bf16 on GPUs")
    run.add_argument("--server", metavar="URL", help="an OpenAI-compatible server, its address up to /v1")
    run.add_argument("--server-model", metavar="NAME", help="the model's name there [the first that it lists]")
    run.add_argument("--parallel", type=runs.positive_int, default=16, help="requests at a time [16]")
    run.add_argument("--retries", type=runs.non_negative_int, default=5, help="of a request, ever later [5]")
    run.add_argument(
        "--seed", type=runs.non_negative_int, default=42, help="sent to the server; here all is greedy [42]"
    )
    runs.add_trust_option(run)
    options = parser.parse_args(argv)
    if options.run and options.server:
        parser.error("--run writes with a model here; it does not go with --server")
    if options.server_model and not options.server:
        parser.error("--server-model is for --server")
    if options.before and not options.window:
        parser.error("--before is for windows; --window 0 reads the whole history")
    return options


class Counts:
    """How many texts were written, by earlier runs (`done`) and by this one, and how many of them are at fault for
    which reason."""

    def __init__(self, what: str, done: Iterable[dict], enough: int = 64):
        self.what, self.enough, self.faults, self.first = what, enough, Counter(), ""
        self.add(done)

    def add(self, lines: Iterable[dict]) -> None:
        for line in lines:
            self.faults[line["fault"] or "usable"] += 1
            self.first = self.first or (line["reply"] if line["fault"] else "")

    def check(self, last: bool = False) -> None:
        """UserError where after many texts (or with the last) none is usable."""
        total = sum(self.faults.values())
        if total and not self.faults["usable"] and (last or total >= self.enough):
            raise UserError(
                f"none of {total} {self.what} is usable ({self}); the first reply is {self.first[:200]!r}; give a "
                "model that can write (the tiny backbone must be taught first: teach.py), or other --prompts"
            )

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))


def write_items(writer, texts, sees, catalogue, record, accelerator) -> list[dict]:
    """items.jsonl: a line for each item, those with prompts of one length together."""
    from accelerate.utils import tqdm

    known = {line["item"] for line in record.done}
    open_rows = [row for row, item in enumerate(catalogue.ids) if item not in known]
    mine = open_rows[accelerator.process_index :: accelerator.num_processes]
    prompts = {row: srec.item_prompt(texts, sees, catalogue, row) for row in mine}
    mine.sort(key=lambda row: writer.length(prompts[row]))
    counts = Counts("summaries", record.done)
    with tqdm(total=len(mine), desc="items", unit="item") as bar:
        for start in range(0, len(mine), writer.batch_size):
            rows = mine[start : start + writer.batch_size]
            lines = []
            for row, reply in zip(rows, writer([prompts[row] for row in rows]), strict=True):
                summary = reply.summary()
                made_of = "text" if sees == "text" or not catalogue.image_length(row) else sees
                lines.append({"item": catalogue.ids[row], "summary": summary.line(), "made_of": made_of})
                lines[-1] |= {"fault": summary.fault, "reply": reply.text}
            record.add(lines)
            counts.add(lines)
            bar.update(len(rows))
            counts.check()
    found = record.finish(lambda line: catalogue.row_of[line["item"]])
    Counts("summaries", found).check(last=True)
    return found


class Chain:
    """A user's windows: where they end, how many are written, and the last usable paragraph."""

    def __init__(self, user: str, line: list[int], cuts: list[int], options):
        self.user, self.line, self.window = user, line, options.window
        self.ends = srec.window_ends(cuts, options.window, options.step, options.before)
        places = [max((end for end in self.ends if end <= cut), default=None) for cut in set(cuts)]
        self.wanted = set(places)  # ends whose paragraph a row reads: those get a profile
        self.number, self.paragraph = 0, None

    def left(self) -> int:
        return len(self.ends) - self.number

    def take(self, paragraph: str | None) -> None:
        """What was written for the next window, None if it is of no use."""
        self.number += 1
        self.paragraph = paragraph or self.paragraph

    def items(self) -> list[int]:
        """Of the next window."""
        end = self.ends[self.number]
        return self.line[end - self.window if self.window else 0 : end]

    def prompt(self, story: srec.Story) -> list:
        return story.preference_prompt(self.items(), self.paragraph if self.window else None)


def write_preferences(writer, story: srec.Story, chains: list[Chain], record, accelerator) -> list[dict]:
    """preferences.jsonl: a line for each window of each user. A user's windows wait for each other, so that a batch is
    of many users, those with most windows left first."""
    from accelerate.utils import tqdm

    place = {chain.user: chain for chain in chains}
    for line in sorted(record.done, key=lambda line: line["end"]):
        place[line["user"]].take(line["paragraph"])
    mine = chains[accelerator.process_index :: accelerator.num_processes]
    ids, counts = story.catalogue.ids, Counts("paragraphs", record.done)
    with tqdm(total=sum(chain.left() for chain in mine), desc="preferences", unit="paragraph") as bar:
        while mine := sorted((chain for chain in mine if chain.left()), key=Chain.left, reverse=True):
            batch = mine[: writer.batch_size]
            replies = writer([chain.prompt(story) for chain in batch])
            lines = []
            for chain, reply in zip(batch, replies, strict=True):
                line = {"user": chain.user, "end": chain.ends[chain.number]}
                line["items"] = [ids[item] for item in chain.items()]
                line |= {"paragraph": reply.line(), "fault": reply.fault, "profile": None, "profile_fault": None}
                lines.append(line | {"reply": reply.text if reply.fault else None})
                chain.take(reply.line())
            read = [n for n, chain in enumerate(batch) if chain.paragraph and lines[n]["end"] in chain.wanted]
            asked = [srec.fill(story.texts["profile"], preference=batch[n].paragraph) for n in read]
            for n, reply in zip(read, writer(asked) if asked else [], strict=True):
                lines[n] |= {"profile": reply.line(), "profile_fault": reply.fault}
            record.add(lines)
            counts.add(lines)
            bar.update(len(batch))
            counts.check()
    order = {user: number for number, user in enumerate(place)}
    found = record.finish(lambda line: (order[line["user"]], line["end"]))
    Counts("paragraphs", found).check(last=True)
    return found


def load_writer(options, data, accelerator):
    """(who writes, what it is: for the key of what is written)."""
    import evaluate
    from hanorec.model import mllm, packing
    from mllm_srec import server, writers

    tiny = data.backbone == mllm.TINY
    runs.set_defaults(options, batch_size=64 if tiny or options.server else 8)
    made_by = {"max_tokens": options.max_tokens}
    if options.server:
        writer = server.Server(options.server, options.server_model, data, options)
        return writer, made_by | {"server_model": writer.model, "seed": options.seed}
    dtype = mllm.pick_dtype(options.dtype, accelerator)
    made_by |= {"backbone": data.backbone, "dtype": str(dtype)}
    if options.run:
        runs.read_run(options.run, ["teach", "sft", "dpo_hano"])
        made_by["weights"] = runs.weights_hash(options.run)
        model = evaluate.load_result(options.run, data, dtype)
    else:
        model, files = mllm.load_model(data.source, dtype, trust=data.trust), Path(data.source).glob("*.safetensors")
        made_by["weights"] = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    core = packing.load_packed(model, data, True, accelerator.device).core
    prompts = packing.load_prompts(data.source, data.catalogue, trust=data.trust)
    return writers.Local(core, prompts, data.catalogue, options.max_tokens, options.batch_size), made_by


def stage(name: str, folder: Path, made: dict, manifest: dict, made_of, accelerator, write) -> list[dict]:
    """The lines of folder/<name>.jsonl: those that stand there if they are made of the same, else written anew. made:
    what the manifest told of the file before. manifest: what it tells now, of whole files alone, in order."""
    from mllm_srec import records

    key, path = runs.value_hash(made_of), folder / f"{name}.jsonl"
    if path.exists() and made.get("key") == key and made["hash"] == runs.file_hash(path):
        accelerator.print(f"{path} stands")
        manifest[name] = made
        return runs.read_jsonl(path, {}, "delete it")
    if made:
        accelerator.print(f"{path} is not of this model, these prompts and options: it is written anew")
    if accelerator.is_main_process:
        runs.write_json(folder / "manifest.json", manifest)
    lines = write(records.Record(path, key, accelerator))
    counts = Counter(line["fault"] or "usable" for line in lines)
    counts += Counter(f"profile {line['profile_fault']}" for line in lines if line.get("profile_fault"))
    manifest[name] = {"key": key, "lines": len(lines), "faults": dict(counts), "hash": runs.file_hash(path)}
    if accelerator.is_main_process:
        runs.write_json(folder / "manifest.json", manifest)
    told = ", ".join(f"{n} {fault}" for fault, n in sorted(counts.items()))
    accelerator.print(f"{path}: {len(lines)} lines, {told}")
    return lines


def show(options, data, texts: dict[str, str], lines: dict[str, list[int]]) -> None:
    """Print the prompts of the first items, users and rows as the model sees them; what is not written yet as "..."."""
    from hanorec.model import packing

    def say(title: str, text: str) -> None:
        print(f"\n--- {runs.printable(title)}", *map(runs.printable, text.split("\n")), sep="\n")

    prompts = packing.load_prompts(data.source, data.catalogue, trust=data.trust)
    for row in range(min(options.show, len(data.catalogue.ids))):
        whole = prompts.whole(srec.item_prompt(texts, options.sees, data.catalogue, row))
        say(f"item {data.catalogue.ids[row]}", prompts.show([whole]))
    try:
        story = srec.load_story(data.story, data.catalogue, lines, data.encoding)
        story.texts = texts
    except UserError as error:
        print(f"\n({error}: ... stands for what is not written)")
        items = ["..."] * len(data.catalogue.ids)
        story = srec.Story(texts, data.catalogue, lines, items, {user: [(0, "...", "...")] for user in lines})
    for row in data.rows("train", options.show):
        known = story.at(row)
        for before in (None, known["preference"]):
            parts = story.preference_prompt(lines[row.user][: options.window or story.cut(row)], before)
            say(f"user {row.user}, preference", prompts.show([prompts.whole(parts)]))
        parts = srec.fill(texts["profile"], preference=known["preference"])
        say(f"user {row.user}, profile", prompts.show([prompts.whole(parts)]))
        thought = packing.load_prompts(
            data.source, data.catalogue, trust=data.trust, kind=partial(srec.SRecPrompts, story)
        )
        say(f"user {row.user}, chain of thought", thought.show(thought.sft_tree(row, "yesno")))


def chains_of(data, story: srec.Story, options) -> list[Chain]:
    """The windows of every user that has rows."""
    cuts: dict[str, list[int]] = {}
    for split in ("train", "val", "test"):
        for row in data.rows(split):
            cuts.setdefault(row.user, []).append(story.cut(row))
    return [Chain(user, story.lines[user], cuts[user], options) for user in cuts]


@runs.one_line_errors
def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    texts = srec.read_texts(options.prompts)
    import evaluate
    from hanorec.model import mllm
    from mllm_srec import writers

    data = evaluate.Data(options.data, options.model, story=options.name or "", trust=options.trust_remote_code)
    folder = data.story
    catalogue, lines = data.catalogue, data.timelines()
    if options.show:
        show(options, data, texts, lines)
        return
    accelerator = runs.start_accelerator()
    main_process = accelerator.is_main_process
    with runs.locked(folder) if main_process else contextlib.nullcontext():
        before = folder / "manifest.json"
        manifest = runs.read_json(before, srec.MANIFEST, "delete it") if before.exists() else {}
        made = {name: manifest.pop(name, {}) for name in ("items", "preferences")}
        accelerator.wait_for_everyone()
        writer, made_by = load_writer(options, data, accelerator)
        spelling = writers.spelling_control(catalogue.titles, mllm.load_tokenizer(data.source, data.trust))
        if spelling:
            accelerator.print(f"{spelling} titles spell control tokens, which stay text")
        manifest |= {
            "data": srec.data_hash(catalogue, lines),
            "prompts": runs.value_hash(texts),
            "titles_with_control_tokens": spelling,
            "pictures": None if options.sees == "text" else {name: data.encoding[name] for name in srec.PICTURES},
        }
        manifest |= {"made_by": made_by, "options": runs.plain(options)}
        if main_process:
            with runs.replacing(folder / "prompts.txt") as beside:
                shutil.copyfile(options.prompts, beside)

        made_of = [made_by, options.sees, data.encoding, {n: text for n, text in texts.items() if n.startswith("item")}]
        write = partial(write_items, writer, texts, options.sees, catalogue, accelerator=accelerator)
        found = stage("items", folder, made["items"], manifest, made_of, accelerator, write)
        summaries = {line["item"]: line["summary"] for line in found}
        story = srec.Story(texts, catalogue, lines, [summaries[item] for item in catalogue.ids], {})

        chains = chains_of(data, story, options)
        names = ("line", "line without a summary", "first preference", "preference", "profile", "nothing")
        made_of = [made_by, [texts[name] for name in names], options.window, summaries, manifest["data"]]
        made_of += [[chain.user, chain.ends, sorted(chain.wanted - {None})] for chain in chains]
        write = partial(write_preferences, writer, story, chains, accelerator=accelerator)
        stage("preferences", folder, made["preferences"], manifest, made_of, accelerator, write)
        if main_process:
            runs.write_json(folder / "manifest.json", manifest)


if __name__ == "__main__":
    main()
