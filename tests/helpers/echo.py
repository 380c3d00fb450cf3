"""A writer of texts that loads no model, and summarize.py with it."""

import json
from types import SimpleNamespace

from hanorec.model.template import load_template
from hanorec.run.files import value_hash
from mllm_srec import summarize, writers
from mllm_srec.chain_of_thought import ThoughtPrompts
from mllm_srec.preferences import UserTexts, timelines
from mllm_srec.texts import PROMPTS_FILE, read_texts
from mllm_srec.writing import users_windows, write_items, write_preferences


class Echo:
    """Writes texts that depend on every word of the prompt; `break_after` replies it falls over."""

    batch_size, asked, break_after = 4, 0, None

    def length(self, parts):
        return len(str(parts))

    def __call__(self, many):
        self.asked += len(many)
        if self.break_after is not None and self.asked > self.break_after:
            raise KeyboardInterrupt
        return [writers.Reply(f"Summary: w{value_hash(parts)[:8]} Film") for parts in many]


def write(data, name, writer, monkeypatch, *options):
    """mllm_srec.summarize with this writer into the folder of this name."""
    writer = writer or Echo()
    identity = {"by": getattr(writer, "name", type(writer).__name__)}
    monkeypatch.setattr(summarize, "load_writer", lambda *_: (writer, identity))
    summarize.main(["--data", str(data), "--name", name, *map(str, options)])
    return data / "summaries" / name


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts_of(loaded):
    """UserTexts that are written by Echo, in memory: for folders whose files are changed at will."""
    writer, options = Echo(), SimpleNamespace(window=3, step=3, before=0)
    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    lines_of, items = timelines(loaded.data), loaded.items
    record = SimpleNamespace(done=[], written=[])
    record.finish = lambda order: list(record.written)
    record.add = record.written.extend
    texts = read_texts(PROMPTS_FILE)
    write_items(writer, texts, "both", loaded.encoding, record, accelerator)
    summaries = {line["item"]: line["summary"] for line in record.written}
    user_texts = UserTexts(texts, items, lines_of, [summaries[item] for item in items.ids], {})
    record.written.clear()
    examples = [example for split in ("train", "val", "test") for example in loaded.examples(split)]
    write_preferences(writer, user_texts, users_windows(examples, user_texts, options), record, accelerator)
    for line in sorted(record.written, key=lambda line: line["end"]):
        user_texts.users.setdefault(line["user"], []).append((line["end"], line["paragraph"], line["profile"]))
    return user_texts


def thought_prompts(loaded):
    return ThoughtPrompts(texts_of(loaded), load_template(loaded.source), loaded.items, loaded.tokens)
