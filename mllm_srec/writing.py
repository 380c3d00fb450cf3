"""Write the texts of MLLM-SRec: a summary of each item, then each user's preference paragraphs, window by window."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from accelerate.utils import tqdm

from hanorec.model.encoding import Encoding
from hanorec.run.files import UserError
from mllm_srec.preferences import UserTexts, window_ends
from mllm_srec.records import Record
from mllm_srec.texts import fill, item_prompt

ENOUGH = 64  # texts after which at least one must be usable


class Counts:
    """How many texts are usable, and how many are at fault for which reason.

    Args:
        kind: what they are, in the plural.
        lines: those that are written already.
    """

    def __init__(self, kind: str, lines: Iterable[dict]):
        self.kind, self.faults, self.first_reply = kind, Counter(), ""
        self.add(lines)

    def add(self, lines: Iterable[dict]) -> None:
        for line in lines:
            self.faults[line["fault"] or "usable"] += 1
            if line["fault"] and not self.first_reply:
                self.first_reply = line["reply"]

    def check(self, enough: int = ENOUGH) -> None:
        """UserError if there are so many texts and none of them is usable."""
        total = sum(self.faults.values())
        if total >= enough and not self.faults["usable"]:
            faults = ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))
            raise UserError(
                f"none of {total} {self.kind} is usable ({faults}); the first reply is {self.first_reply[:200]!r}; "
                "give a model that can write (teach the tiny backbone first: mllm_srec.teach), or other --prompts"
            )


def write_items(
    writer, texts: dict[str, str], sees: str, encoding: Encoding, record: Record, accelerator
) -> list[dict]:
    """Write items.jsonl: a line for each item. Items whose prompts have about one length are written together.

    Args:
        writer: called with prompts, it returns a Reply to each (see writers.py).
        sees: what a summary is made of, see `item_prompt`.
    """
    items, done = encoding.items, {line["item"] for line in record.done}
    left = [item for item, name in enumerate(items.ids) if name not in done]
    own = left[accelerator.process_index :: accelerator.num_processes]
    prompts = {item: item_prompt(texts, sees, encoding, item) for item in own}
    own.sort(key=lambda item: writer.length(prompts[item]))
    counts = Counts("summaries", record.done)
    with tqdm(total=len(own), desc="items", unit="item") as bar:
        for start in range(0, len(own), writer.batch_size):
            batch, lines = own[start : start + writer.batch_size], []
            for item, reply in zip(batch, writer([prompts[item] for item in batch]), strict=True):
                summary = reply.summary()
                lines.append(
                    {
                        "item": items.ids[item],
                        "summary": summary.line(),
                        "made_of": sees if encoding.tokens.length(item) else "text",
                        "fault": summary.fault,
                        "reply": reply.text,
                    }
                )
            record.add(lines)
            counts.add(lines)
            bar.update(len(batch))
            counts.check()
    lines = record.finish(lambda line: items.index_of[line["item"]])
    Counts("summaries", lines).check(enough=1)
    return lines


@dataclass
class Windows:
    """The windows of one user: where they end, how many are written, and the last usable paragraph.

    Args:
        timeline: everything that the user chose, oldest first.
        ends: number of items before the end of each window.
        read: the ends whose paragraph an example reads; those get a profile.
        size: items in a window; 0: everything before its end.
    """

    user: str
    timeline: list[int]
    ends: list[int]
    read: set[int]
    size: int
    written: int = 0
    paragraph: str | None = None

    def left(self) -> int:
        return len(self.ends) - self.written

    def take(self, paragraph: str | None) -> None:
        """Take what was written for the next window, None if it cannot be used."""
        self.written += 1
        self.paragraph = paragraph or self.paragraph

    def next_end(self) -> int:
        return self.ends[self.written]

    def next_items(self) -> list[int]:
        """The items of the next window."""
        end = self.next_end()
        return self.timeline[end - self.size if self.size else 0 : end]

    def prompt(self, user_texts: UserTexts) -> list[str | int]:
        """The prompt for the next window's paragraph."""
        return user_texts.preference_prompt(self.next_items(), self.paragraph if self.size else None)


def users_windows(examples, user_texts: UserTexts, options) -> list[Windows]:
    """The windows of every user that has examples."""
    cuts: dict[str, list[int]] = {}
    for example in examples:
        cuts.setdefault(example.user, []).append(user_texts.cut(example))
    found = []
    for user, own in cuts.items():
        ends = window_ends(own, options.window, options.step, options.before)
        last_ends = {max((end for end in ends if end <= cut), default=None) for cut in own}
        found.append(Windows(user, user_texts.timelines[user], ends, last_ends - {None}, options.window))
    return found


def write_preferences(writer, user_texts: UserTexts, users: list[Windows], record: Record, accelerator) -> list[dict]:
    """Write preferences.jsonl: a line for each window of each user.

    The windows of a user wait for each other. So a batch has one window each of many users, those with most windows
    left first.
    """
    by_user = {windows.user: windows for windows in users}
    for line in sorted(record.done, key=lambda line: line["end"]):
        by_user[line["user"]].take(line["paragraph"])
    own = users[accelerator.process_index :: accelerator.num_processes]
    counts = Counts("paragraphs", record.done)
    with tqdm(total=sum(windows.left() for windows in own), desc="preferences", unit="paragraph") as bar:
        while own := sorted((windows for windows in own if windows.left()), key=Windows.left, reverse=True):
            batch = own[: writer.batch_size]
            lines = write_windows(writer, user_texts, batch)
            record.add(lines)
            counts.add(lines)
            bar.update(len(batch))
            counts.check()
    order = {user: number for number, user in enumerate(by_user)}
    lines = record.finish(lambda line: (order[line["user"]], line["end"]))
    Counts("paragraphs", lines).check(enough=1)
    return lines


def write_windows(writer, user_texts: UserTexts, batch: list[Windows]) -> list[dict]:
    """Write the next paragraph of each of these users, and a profile from it if an example reads it."""
    lines = []
    for windows, reply in zip(batch, writer([windows.prompt(user_texts) for windows in batch]), strict=True):
        lines.append(
            {
                "user": windows.user,
                "end": windows.next_end(),
                "items": [user_texts.items.ids[item] for item in windows.next_items()],
                "paragraph": reply.line(),
                "fault": reply.fault,
                "profile": None,
                "profile_fault": None,
                "reply": reply.text if reply.fault else None,
            }
        )
        windows.take(reply.line())
    read = [n for n, windows in enumerate(batch) if windows.paragraph and lines[n]["end"] in windows.read]
    prompts = [fill(user_texts.texts["profile"], preference=batch[n].paragraph) for n in read]
    for n, reply in zip(read, writer(prompts) if prompts else [], strict=True):
        lines[n] |= {"profile": reply.line(), "profile_fault": reply.fault}
    return lines
