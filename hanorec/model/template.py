"""A backbone's chat template: the tokens around the user's text, around an image, and at the end of an answer."""

import re

from hanorec.model import families
from hanorec.model.load import load_config, load_tokenizer
from hanorec.run.files import UserError


class ChatTemplate:
    """A backbone's chat template, cut around the user's text.

    Args:
        image_token: the id that stands for one image token.
        image_text: (what the template writes for an image, what the model's processor puts in its place, with {} for
            the image tokens); None if the template writes the image token itself.

    Attributes:
        head, tail: tokens before the user's text, and between it and the answer.
        image_head, image_tail: tokens before and after an image's tokens.
        end_of_turn: the token that ends an answer.
        control: all tokens that are no text.
    """

    MARK = "\u2042"  # stands for the user's text; no template has it

    def __init__(self, tokenizer, image_token: int, image_text: tuple[str, str] | None = None):
        self.tokenizer, self.image_token = tokenizer, image_token
        added = tokenizer.added_tokens_decoder
        self.control = {image_token, *(number for number, token in added.items() if token.special)}
        question = self.render([{"type": "text", "text": self.MARK}])
        if question.count(self.MARK) != 1:
            raise UserError("the chat template does not place the user's text once")
        before, after = question.split(self.MARK)
        self.head, self.tail = self.encode(before), self.encode(after)
        begin = tokenizer.encode("")[:1]  # a beginning-of-sequence token, if the tokenizer adds one by itself
        if begin and begin == [tokenizer.bos_token_id] != self.head[:1]:
            self.head = begin + self.head
        self.image_head, self.image_tail = self.around_image(before, image_text)
        answered = self.render([{"type": "text", "text": "?"}], answer=self.MARK).split(self.MARK)[1]
        end = self.encode(answered)
        self.end_of_turn = end[0] if end else tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Tokens of a text of the template: control tokens are control tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def render(self, content: list[dict], answer: str | None = None) -> str:
        messages = [{"role": "user", "content": content}]
        if answer:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        if not self.tokenizer.chat_template:
            raise UserError(f"the tokenizer of '{self.tokenizer.name_or_path}' has no chat template")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
        except Exception as error:  # a template is a program
            raise UserError(f"the chat template of '{self.tokenizer.name_or_path}' fails: {error}") from error

    def around_image(self, before: str, image_text: tuple[str, str] | None) -> tuple[list[int], list[int]]:
        """The tokens that the template and the model's processor write before and after an image's tokens."""
        token = self.tokenizer.convert_ids_to_tokens(self.image_token)
        placeholder, text = image_text or (token, "{}")
        for word in re.findall("<[^<>]+>", text):
            if len(self.encode(word)) != 1:
                raise UserError(f"the tokenizer of '{self.tokenizer.name_or_path}' does not know {word}")
        mark, image = {"type": "text", "text": self.MARK}, {"type": "image"}
        between = self.render([mark, image, mark]).split(self.MARK)
        if len(between) == 3 and placeholder in between[1]:
            written = between[1]
        else:  # templates that write all images before the text
            written = self.render([image, mark]).split(self.MARK)[0][len(before) :]
        ids = self.encode(written.replace(placeholder, text.format(token)))
        if ids.count(self.image_token) != 1:
            raise UserError(f"the chat template does not place one image token ({self.image_token}) for an image")
        position = ids.index(self.image_token)
        return ids[:position], ids[position + 1 :]


def load_template(source, trust: bool = False) -> ChatTemplate:
    """The chat template of a backbone: a hub name or a folder."""
    config = load_config(source, trust)
    token = getattr(config, "image_token_id", None)
    if token is None:
        raise UserError(f"a {config.model_type} has no image_token_id: its prompts cannot be written")
    return ChatTemplate(load_tokenizer(source, trust), token, families.IMAGE_TEXTS.get(config.model_type))
