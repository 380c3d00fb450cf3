"""A text generator that loads no model, and mllm_srec.summarize with it."""

from types import SimpleNamespace

from hanorec.model.template import load_template
from hanorec.run.files import value_hash
from mllm_srec import summarize, writers
from mllm_srec.chain_of_thought import ThoughtPrompts
from mllm_srec.preferences import UserTexts, timelines
from mllm_srec.texts import PROMPTS_FILE, read_texts
from mllm_srec.writing import users_windows, write_items, write_preferences


class Echo:
    """A text generator whose texts depend on every word of the prompt. It fails after `break_after` replies."""

    batch_size = 4
    replies = 0  # so far
    break_after = None

    def length(self, parts):
        return len(str(parts))

    def __call__(self, many):
        self.replies += len(many)
        if self.break_after is not None and self.replies > self.break_after:
            raise KeyboardInterrupt
        return [writers.Reply(f"Summary: w{value_hash(parts)[:8]} Film") for parts in many]


def write(data, name, writer, monkeypatch, *options):
    """Run mllm_srec.summarize with this writer (None: Echo). Returns the folder that it wrote."""
    writer = writer or Echo()
    identity = {"by": getattr(writer, "name", type(writer).__name__)}
    monkeypatch.setattr(summarize, "load_writer", lambda *_: (writer, identity))
    summarize.main(["--data", str(data), "--name", name, *map(str, options)])
    return data / "summaries" / name


def texts_of(loaded):
    """UserTexts with texts by Echo. No file is written."""
    writer, options = Echo(), SimpleNamespace(window=3, step=3, before=0)
    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    items, written = loaded.items, []
    record = SimpleNamespace(done=[], add=written.extend, finish=lambda order: sorted(written, key=order))
    texts, timeline_of = read_texts(PROMPTS_FILE), timelines(loaded.data)
    lines = write_items(writer, texts, "both", loaded.encoding, record, accelerator)
    user_texts = UserTexts(texts, items, timeline_of, [line["summary"] for line in lines], {})
    written.clear()
    examples = [example for split in ("train", "val", "test") for example in loaded.examples(split)]
    users = users_windows(examples, user_texts, options)
    for line in write_preferences(writer, user_texts, users, record, accelerator):
        user_texts.users.setdefault(line["user"], []).append((line["end"], line["paragraph"], line["profile"]))
    return user_texts


def thought_prompts(loaded):
    return ThoughtPrompts(texts_of(loaded), load_template(loaded.source), loaded.items, loaded.tokens)
