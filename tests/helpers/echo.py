"""A writer of texts that loads no model, and summarize.py with it."""

import json
from types import SimpleNamespace

from hanorec.run import runs
from mllm_srec import srec, summarize, writers


class Echo:
    """Writes texts that depend on every word of the prompt; `break_after` replies it falls over."""

    batch_size, asked, break_after = 4, 0, None

    def length(self, parts):
        return len(str(parts))

    def __call__(self, many):
        self.asked += len(many)
        if self.break_after is not None and self.asked > self.break_after:
            raise KeyboardInterrupt
        return [writers.Reply(f"Summary: w{runs.value_hash(parts)[:8]} Film") for parts in many]


def write(data, name, writer, monkeypatch, *options):
    """summarize.py with this writer into the folder of this name."""
    writer = writer or Echo()
    made_by = {"by": getattr(writer, "name", type(writer).__name__)}
    monkeypatch.setattr(summarize, "load_writer", lambda *_: (writer, made_by))
    summarize.main(["--data", str(data), "--name", name, *map(str, options)])
    return data / "summaries" / name


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def story_of(data):
    """A story that is written by Echo, in memory: for folders whose files are changed at will."""
    writer, options = Echo(), SimpleNamespace(window=3, step=3, before=0)
    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    catalogue, timelines = data.catalogue, data.timelines()
    record = SimpleNamespace(done=[], written=[])
    record.finish = lambda order: list(record.written)
    record.add = record.written.extend
    texts = srec.read_texts(srec.TEXTS)
    summarize.write_items(writer, texts, "both", catalogue, record, accelerator)
    summaries = {line["item"]: line["summary"] for line in record.written}
    story = srec.Story(texts, catalogue, timelines, [summaries[item] for item in catalogue.ids], {})
    record.written.clear()
    summarize.write_preferences(writer, story, summarize.chains_of(data, story, options), record, accelerator)
    for line in sorted(record.written, key=lambda line: line["end"]):
        story.users.setdefault(line["user"], []).append((line["end"], line["paragraph"], line["profile"]))
    return story
