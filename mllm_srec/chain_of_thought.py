"""The chain-of-thought prompts of MLLM-SRec, and the choice between them and the plain prompts."""

import zlib
from dataclasses import replace

from hanorec.data.folder import DataFolder, Example
from hanorec.model.encoding import Encoding
from hanorec.model.prompts import Prompts, fit_to_length
from hanorec.model.template import ChatTemplate, load_template
from hanorec.model.trees import Node
from mllm_srec.preferences import UserTexts, load_user_texts, summaries_folder, summaries_hash, timelines
from mllm_srec.texts import fill


class ThoughtPrompts(Prompts):
    """The user as root; then for each candidate the question, the steps of thought, the answer.

    Args:
        steps_share: the share of the examples whose steps are trained. The answers of all are. Steps have many more
            tokens than answers, and the loss is over tokens.
    """

    def __init__(self, user_texts: UserTexts, template: ChatTemplate, items, tokens, steps_share: float = 1.0):
        super().__init__(template, items, tokens)
        self.user_texts, self.texts, self.steps_share = user_texts, user_texts.texts, steps_share
        self.yes, self.no = self.texts["yes"], self.texts["no"]

    def yesno_questions(self, example: Example, candidates) -> list[Node]:
        values = self.user_texts.at(example)
        tree = [self.add_parts(self.root(), fill(self.texts["user"] + "\n", **values))]
        for candidate in candidates:
            title = self.items.titles[candidate]
            node = self.add_parts(Node(0, []), fill(self.texts["candidate"], title=title, image=candidate))
            node.ids += [*self.template.tail, *self.text(self.user_texts.steps(values, candidate))]
            tree.append(node)
        return tree

    def sft_tree(self, example: Example, task: str) -> list[Node]:
        """The tree of the plain prompts; for a share of the examples, the steps are scored too."""
        tree = super().sft_tree(example, task)
        if zlib.crc32(f"{example.user} {example.target}".encode()) >= self.steps_share * 2**32:
            return tree
        values = self.user_texts.at(example)
        for question, candidate in ((1, example.target), (2, example.rejected)):
            count = len(self.text(self.user_texts.steps(values, candidate)))
            length = len(tree[question].ids)
            tree[question].scored = range(length - count, length)
        return tree

    def check_fit(self, builds, examples: list[Example], max_length: int) -> None:
        """UserError if an example's tree, with one history item, is longer than max_length tokens: as it stands, and
        with the item of the longest line as its rejected item."""
        lengths = [len(self.text(self.user_texts.line(item))) for item in range(len(self.items))]
        longest = lengths.index(max(lengths))
        for example in examples:
            short = replace(example, history=example.history[-1:])
            for build in builds:
                fit_to_length(build, short, max_length)
                fit_to_length(build, replace(short, rejected=longest), max_length)


def load_prompts(
    data: DataFolder,
    encoding: Encoding,
    candidate_images: bool = False,
    summaries: str | None = None,
    steps_share: float = 1.0,
) -> Prompts:
    """The prompts of a data folder: of the chain of thought if `summaries` is a name of summaries, else plain."""
    template = load_template(encoding.source, encoding.trust)
    if summaries is None:
        return Prompts(template, encoding.items, encoding.tokens, candidate_images)
    user_texts = load_user_texts(summaries_folder(data, encoding, summaries), encoding, timelines(data))
    return ThoughtPrompts(user_texts, template, encoding.items, encoding.tokens, steps_share)


def training_hash(data: DataFolder, encoding: Encoding, summaries: str | None = None) -> str:
    """SHA-256 of everything that training reads: data, encoding and, if prompts use them, summaries."""
    if summaries is None:
        return encoding.hash()
    return encoding.hash(summaries_hash(summaries_folder(data, encoding, summaries)))
