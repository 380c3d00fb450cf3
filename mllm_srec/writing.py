"""Write the texts of MLLM-SRec: a summary of each item, then each user's preference paragraphs, window by window."""

from collections import Counter
from dataclasses import dataclass

from hanorec.model.encoding import Encoding
from hanorec.run.files import UserError
from hanorec.run.progress import progress
from hanorec.run.records import Record
from mllm_srec.preferences import UserTexts, window_ends
from mllm_srec.texts import fill, item_prompt

FIRST_CHECK = 64  # texts: if all of so many are unusable, the run stops


def check_usable(kind: str, lines: list[dict], first_check: int = FIRST_CHECK) -> None:
    """Raise UserError if there are at least `first_check` texts and none of them is usable.

    Args:
        kind: what the texts are, in the plural.
        lines: the lines with the texts.
    """
    if len(lines) < first_check or any(line["fault"] is None for line in lines):
        return
    counts = Counter(line["fault"] for line in lines)
    faults = ", ".join(f"{count} {fault}" for fault, count in sorted(counts.items()))
    replies = [line["reply"] for line in lines if line["reply"]]
    first_reply = replies[0][:200] if replies else ""
    raise UserError(
        f"none of {len(lines)} {kind} is usable ({faults}); the first reply is {first_reply!r}; give a model that can "
        "write (teach the tiny backbone first: python -m mllm_srec.teach), or other --prompts"
    )


def write_items(writer, texts: dict, sees: str, encoding: Encoding, record: Record, accelerator) -> list[dict]:
    """Write items.jsonl, a line for each item. Items whose prompts are about equally long share a batch.

    Args:
        writer: a text generator, a Local or a Server.
        texts: the prompts by name.
        sees: what a summary is written from, see `item_prompt`.

    Returns:
        The lines.
    """
    items, done = encoding.items, {line["item"] for line in record.done}
    missing = [item for item, name in enumerate(items.ids) if name not in done]
    share = missing[accelerator.process_index :: accelerator.num_processes]
    prompts = {item: item_prompt(texts, sees, encoding, item) for item in share}
    share.sort(key=lambda item: writer.length(prompts[item]))
    with progress(total=len(share), desc="items", unit="item") as bar:
        for start in range(0, len(share), writer.batch_size):
            batch, lines = share[start : start + writer.batch_size], []
            for item, reply in zip(batch, writer([prompts[item] for item in batch]), strict=True):
                summary = reply.summary()
                lines.append(
                    {
                        "item": items.ids[item],
                        "summary": summary.line(),
                        "made_of": sees if encoding.tokens.lengths[item] else "text",
                        "fault": summary.fault,
                        "reply": reply.text,
                    }
                )
            record.add(lines)
            bar.update(len(batch))
            check_usable("summaries", record.done)
    lines = record.finish(lambda line: items.index_of[line["item"]])
    check_usable("summaries", lines, first_check=1)
    return lines


@dataclass
class Windows:
    """The windows of one user, and how far their texts are written.

    Args:
        timeline: the items that the user chose, oldest first.
        ends: where each window ends, as a number of timeline items.
        read: the ends whose texts an example reads. Only these windows get a profile.
        size: items in a window; 0: everything before its end.

    Attributes:
        written: the number of windows whose paragraph is written.
        paragraph: the last usable paragraph; None if there is none yet.
    """

    user: str
    timeline: list[int]
    ends: list[int]
    read: set[int]
    size: int
    written: int = 0
    paragraph: str | None = None

    def remaining(self) -> int:
        return len(self.ends) - self.written

    def add(self, paragraph: str | None) -> None:
        """Count the next window as written. Its paragraph is None if it is unusable."""
        self.written += 1
        if paragraph is not None:
            self.paragraph = paragraph


def users_windows(examples, user_texts: UserTexts, options) -> list[Windows]:
    """Return the windows of each user that has examples."""
    cuts: dict[str, list[int]] = {}
    for example in examples:
        cuts.setdefault(example.user, []).append(user_texts.cut(example))
    users = []
    for user, user_cuts in cuts.items():
        ends, read = window_ends(user_cuts, options.window, options.step, options.before), set()
        for cut in user_cuts:
            ends_before = [end for end in ends if end <= cut]
            if ends_before:
                read.add(ends_before[-1])
        users.append(Windows(user, user_texts.timelines[user], ends, read, options.window))
    return users


def write_preferences(writer, user_texts: UserTexts, users: list[Windows], record: Record, accelerator) -> list[dict]:
    """Write preferences.jsonl, a line for each window of each user.

    A window's prompt has the user's last usable paragraph (not with --window 0). So a batch has only one window of a
    user. Users with the most remaining windows come first.

    Returns:
        The lines.
    """
    by_user = {windows.user: windows for windows in users}
    for line in sorted(record.done, key=lambda line: line["end"]):
        by_user[line["user"]].add(line["paragraph"])
    share = users[accelerator.process_index :: accelerator.num_processes]
    with progress(total=sum(map(Windows.remaining, share)), desc="preferences", unit="paragraph") as bar:
        while True:
            share = sorted(filter(Windows.remaining, share), key=Windows.remaining, reverse=True)
            if not share:
                break
            lines = write_windows(writer, user_texts, share[: writer.batch_size])
            record.add(lines)
            bar.update(len(lines))
            check_usable("paragraphs", record.done)
    order = {user: number for number, user in enumerate(by_user)}
    lines = record.finish(lambda line: (order[line["user"]], line["end"]))
    check_usable("paragraphs", lines, first_check=1)
    return lines


def write_windows(writer, user_texts: UserTexts, batch: list[Windows]) -> list[dict]:
    """Write the next paragraph of each of these users and, if an example reads it, a profile. Returns the lines.

    A profile is written from the user's last usable paragraph: the new one, or an earlier one if the new one is
    unusable.
    """
    items_of, prompts = [], []  # of each user's next window
    for windows in batch:
        end = windows.ends[windows.written]
        items = windows.timeline[end - windows.size if windows.size else 0 : end]
        items_of.append(items)
        prompts.append(user_texts.preference_prompt(items, windows.paragraph if windows.size else None))
    lines, with_profile, profile_prompts = [], [], []
    for windows, items, reply in zip(batch, items_of, writer(prompts), strict=True):
        end = windows.ends[windows.written]
        line = {
            "user": windows.user,
            "end": end,
            "items": [user_texts.items.ids[item] for item in items],
            "paragraph": reply.line(),
            "fault": reply.fault,
            "profile": None,
            "profile_fault": None,
            "reply": reply.text if reply.fault else None,
        }
        lines.append(line)
        windows.add(reply.line())
        if windows.paragraph is not None and end in windows.read:
            with_profile.append(line)
            profile_prompts.append(fill(user_texts.texts["profile"], preference=windows.paragraph))
    replies = writer(profile_prompts) if profile_prompts else []
    for line, reply in zip(with_profile, replies, strict=True):
        line["profile"], line["profile_fault"] = reply.line(), reply.fault
    return lines
