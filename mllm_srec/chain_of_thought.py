"""Build the chain-of-thought prompts of MLLM-SRec, and choose between them and the plain prompts."""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tokenizers.normalizers import NFC

from hanorec.data.folder import DataFolder, Example
from hanorec.model.encoding import Encoding
from hanorec.model.finished import check_prompts
from hanorec.model.prompts import Prompts, fit_to_length, plain_prompts
from hanorec.model.template import ChatTemplate, load_template
from hanorec.model.trees import Node, tree_length
from hanorec.run.files import read_json, value_hash
from mllm_srec.preferences import MANIFEST, UserTexts, load_user_texts, summaries_folder, summarize_command, timelines
from mllm_srec.texts import fill


class ThoughtPrompts(Prompts):
    """Builds prompt trees with a chain of thought.

    The root is the user. Then each candidate has a node with the question and the steps of thought, and after it the
    answers.

    Args:
        steps_share: the share of the training examples whose steps are scored. The answers of all examples are scored.
            Steps have many more tokens than answers, and the loss is a mean over tokens.
    """

    def __init__(self, user_texts: UserTexts, template: ChatTemplate, items, tokens, steps_share: float = 1.0):
        super().__init__(template, items, tokens)
        self.user_texts, self.texts, self.steps_share = user_texts, user_texts.texts, steps_share
        self.yes, self.no = self.texts["yes"], self.texts["no"]
        self.byte_level = is_byte_level(self.tokenizer)

    def yesno_questions(self, example: Example, candidates, score_steps: bool = False) -> list[Node]:
        """Return the user, then the question and the steps about each candidate: nodes 1, 2, ... of the tree."""
        values = self.user_texts.prompt_values(example)
        root = Node(None, list(self.template.head))
        tree = [self.add_parts(root, fill(self.texts["user"] + "\n", **values))]
        for candidate in candidates:
            title = self.items.titles[candidate]
            node = self.add_parts(Node(0, []), fill(self.texts["candidate"], title=title, image=candidate))
            node.ids += self.template.tail
            start = len(node.ids)
            node.ids += self.text(self.user_texts.steps(values, candidate))
            if score_steps:
                node.scored = range(start, len(node.ids))
            tree.append(node)
        return tree

    def sft_tree(self, example: Example, task: str) -> list[Node]:
        """Return Yes about the target and No about the rejected item. In a share of the examples the steps are scored.

        Args:
            task: `yesno`; there is no chain of thought for the ranking question.
        """
        number = zlib.crc32(f"{example.user} {example.target}".encode())  # uniform below 2**32
        score_steps = number < self.steps_share * 2**32
        questions = self.yesno_questions(example, [example.target, example.rejected], score_steps)
        return [*questions, self.answer(self.yes, 1), self.answer(self.no, 2)]

    def check_fit(self, builds, examples: list[Example], max_length: int) -> None:
        """Raise UserError if an example is longer than max_length tokens when its history is cut to one item.

        Each example is also tried with the item of the longest title and summary as its rejected item, because
        evaluation may have any item as a candidate. In evaluation this bounds the candidates' titles and summaries for
        the users of `examples`. It does not bound images, words in common, and the texts of other users.

        Args:
            builds: functions from an example to a prompt tree.
        """
        lengths = [len(self.text(self.user_texts.item_lines([item]))) for item in range(len(self.items))]
        longest = lengths.index(max(lengths))
        for example in examples:
            short = replace(example, history=example.history[-1:])
            for build in builds:
                for tried in (short, replace(short, rejected=longest)):
                    if self.most_tokens(build, tried) > max_length:
                        fit_to_length(build, tried, max_length)

    def most_tokens(self, build, example: Example) -> float:
        """Return an upper bound of the length of an example's tree, without its tokens.

        A byte-level tokenizer makes at most one token of each byte. For other tokenizers the bound is infinite.
        """
        if not self.byte_level:
            return math.inf
        normalizer = self.tokenizer.backend_tokenizer.normalizer

        def bytes_of(text: str) -> range:
            if normalizer and not text.isascii():
                text = normalizer.normalize_str(text)
            return range(len(text.encode()))

        tokens_of, self.text = self.text, bytes_of
        try:
            return tree_length(build(example))
        finally:
            self.text = tokens_of


def is_byte_level(tokenizer) -> bool:
    """Whether a tokenizer works on the bytes of a text, in Unicode's form NFC at most, and adds no spaces to it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None or type(backend.normalizer) not in (type(None), NFC):
        return False
    state = json.loads(backend.pre_tokenizer.__getstate__())
    parts = state.get("pretokenizers", [state])
    return [part.get("add_prefix_space") for part in parts if part["type"] == "ByteLevel"] == [False] and all(
        part["type"] in ("ByteLevel", "Split", "Digits", "Punctuation") for part in parts
    )


def load_prompts(
    data: DataFolder,
    encoding: Encoding,
    *,
    candidate_images: bool = False,
    history_first: bool = False,
    summaries: str | None = None,
    steps_share: float = 1.0,
) -> Prompts:
    """Load the prompts for a data folder.

    Args:
        candidate_images, history_first: of plain prompts, see Prompts.
        summaries: name of the summaries folder for chain-of-thought prompts; None: plain prompts.
        steps_share: see ThoughtPrompts.
    """
    if summaries is None:
        return plain_prompts(encoding, candidate_images, history_first)
    template = load_template(encoding.source, encoding.trust)
    user_texts = load_user_texts(summaries_folder(data, encoding, summaries), encoding, timelines(data))
    return ThoughtPrompts(user_texts, template, encoding.items, encoding.tokens, steps_share)


def load_texts(data: DataFolder, model: str, summaries: str | None, trust: bool = False) -> Callable | None:
    """Return a function from an example to the texts about it, by their names; None if `summaries` is None.

    Args:
        model: the backbone. summaries: name of the summaries folder.
    """
    if summaries is None:
        return None
    encoding = Encoding(data, model, trust=trust)
    return load_user_texts(summaries_folder(data, encoding, summaries), encoding, timelines(data)).about


def load_run_prompts(run: Path, config: dict, data: DataFolder, encoding: Encoding) -> Prompts:
    """Load the prompts of a finished run. If its config.json has no hash of them, print that they are not checked.

    Raises:
        UserError: the texts of the prompts are not those that the run was trained on.
    """
    options = config["options"]
    layout = {name: options[name] for name in ("candidate_images", "history_first")}
    prompts = load_prompts(data, encoding, summaries=options.get("summaries"), **layout)
    check_prompts(run, config, prompts)
    return prompts


def training_hash(data: DataFolder, encoding: Encoding, summaries: str | None = None) -> str:
    """Return the SHA-256 of what training reads: data, encoding and, if `summaries` names a folder, its texts.

    It covers the texts in the summaries folder and the prompts, but not the model that wrote the texts.
    """
    if summaries is None:
        return encoding.hash()
    folder = summaries_folder(data, encoding, summaries)
    manifest = read_json(folder / "manifest.json", MANIFEST, summarize_command(folder))
    hashes = [manifest.get(name, {}).get("hash") for name in ("items", "preferences")]
    return encoding.hash(value_hash([manifest["data"], manifest["prompts"], *hashes]))
