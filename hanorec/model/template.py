"""Split a backbone's chat template: the tokens around the user's text, around an image, and after an answer."""

import functools
import re

from hanorec.model import families
from hanorec.model.load import load_config, load_tokenizer
from hanorec.run.files import UserError


class ChatTemplate:
    """A backbone's chat template, split around the user's text.

    Args:
        image_token: the id of an image token's placeholder.
        image_text: (what the template writes for an image, the text that the model's processor puts in its place, with
            {} for the placeholders). None if the template writes one placeholder.

    Attributes:
        head: the tokens before the user's text.
        tail: the tokens between the user's text and the answer.
        image_head, image_tail: the tokens before and after an image's placeholders.
        end_of_turn: the token that ends an answer.
        control: the ids that the text of a prompt must not have: the placeholder and all added tokens that the
            tokenizer marks as special.
    """

    MARK = "\u2042"  # rendered in place of the user's text; no template contains this character

    def __init__(self, tokenizer, image_token: int, image_text: tuple[str, str] | None = None):
        self.tokenizer, self.image_token = tokenizer, image_token
        self.encode = functools.partial(tokenizer.encode, add_special_tokens=False)  # control tokens are recognised
        self.control = {image_token} | {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        question = self.render([{"type": "text", "text": self.MARK}])
        if question.count(self.MARK) != 1:
            raise UserError("the chat template does not write the user's text exactly once")
        before, after = question.split(self.MARK)
        self.head, self.tail = self.encode(before), self.encode(after)
        begin = [tokenizer.bos_token_id]
        if tokenizer.encode("")[:1] == begin and self.head[:1] != begin:  # the tokenizer adds it, the template does not
            self.head = begin + self.head

        # What the template and the model's processor write around an image's placeholders
        token = tokenizer.convert_ids_to_tokens(image_token)
        placeholder, replacement = image_text or (token, "{}")
        for word in re.findall("<[^<>]+>", replacement):
            if len(self.encode(word)) != 1:
                raise UserError(f"the tokenizer of '{tokenizer.name_or_path}' has no token {word}")
        mark, image = {"type": "text", "text": self.MARK}, {"type": "image"}
        parts = self.render([mark, image, mark]).split(self.MARK)
        if len(parts) == 3 and placeholder in parts[1]:
            text = parts[1]
        else:  # the template writes all images before the text
            text = self.render([image, mark]).split(self.MARK)[0][len(before) :]
        ids = self.encode(text.replace(placeholder, replacement.format(token)))
        if ids.count(image_token) != 1:
            raise UserError(f"the chat template does not write one image token ({image_token}) for an image")
        position = ids.index(image_token)
        self.image_head, self.image_tail = ids[:position], ids[position + 1 :]

        after_answer = self.render([{"type": "text", "text": "?"}], answer=self.MARK).split(self.MARK)[1]
        end = self.encode(after_answer)
        self.end_of_turn = end[0] if end else tokenizer.eos_token_id

    def render(self, content: list[dict], answer: str | None = None) -> str:
        """Return the template's text for a user's message and, if given, an answer."""
        messages = [{"role": "user", "content": content}]
        if answer:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        if not self.tokenizer.chat_template:
            raise UserError(f"the tokenizer of '{self.tokenizer.name_or_path}' has no chat template")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
        except Exception as error:  # a template is a program, which may raise any exception
            raise UserError(f"the chat template of '{self.tokenizer.name_or_path}' fails: {error}") from error


def load_template(source, trust: bool = False) -> ChatTemplate:
    """Load the chat template of a backbone. source: a hub name or a folder."""
    config = load_config(source, trust)
    token = getattr(config, "image_token_id", None)
    if token is None:
        raise UserError(f"a {config.model_type} has no image_token_id: its prompts cannot be written")
    return ChatTemplate(load_tokenizer(source, trust), token, families.IMAGE_TEXTS.get(config.model_type))
