"""Texts from an OpenAI-compatible server (vLLM, SGLang, `transformers serve`): many requests at once, with retries."""

import base64
import http.client
import io
import json
import os
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from hanorec.model.encoding import Encoding
from hanorec.model.images import open_image
from hanorec.model.load import load_tokenizer
from hanorec.run.files import UserError
from mllm_srec.writers import Reply, control_tokens

TIMEOUT = 600  # seconds for an answer: a busy server may hold a request back
LONGEST_PAUSE = 30  # seconds between two tries
OF_THIS_PROMPT = (400, 413, 422)  # statuses that refuse one prompt, perhaps not others


class Server:
    """Called with prompts (lists of parts, see `texts.fill`), it returns a Reply to each.

    Args:
        url: the server's address, up to /v1.
        model: its name for the model; None: the first that it lists.
        encoding: whose images are sent, no larger than they are encoded.
        options: parallel, retries, max_tokens, seed, batch_size.

    Raises:
        UserError: the server does not answer, or refuses requests for another reason than their prompts.
    """

    def __init__(self, url: str, model: str | None, encoding: Encoding, options):
        self.url, self.encoding, self.options = url.rstrip("/"), encoding, options
        self.batch_size = options.batch_size
        self.lost = threading.Event()  # set once the server is given up
        control = control_tokens(load_tokenizer(encoding.source, encoding.trust))
        self.control = sorted(control, key=len, reverse=True)
        self.model = model or self.first_model()

    def first_model(self) -> str:
        try:
            return self.answer("models")["data"][0]["id"]
        except (KeyError, IndexError, TypeError, UserError) as error:
            raise UserError(f"{self.url}/models names no model ({error}); give --server-model") from error

    def length(self, parts: list) -> int:
        return sum(len(part) for part in parts if isinstance(part, str))

    def __call__(self, prompts: list[list]) -> list[Reply]:
        with ThreadPoolExecutor(self.options.parallel) as pool:
            return list(pool.map(self.reply, prompts))

    def reply(self, parts: list) -> Reply:
        content = [self.text(part) if isinstance(part, str) else self.image(part) for part in parts]
        answer = self.answer(
            "chat/completions",
            {
                "model": self.model,
                "messages": [{"role": "user", "content": [part for part in content if part]}],
                "temperature": 0,
                "max_tokens": self.options.max_tokens,
                "seed": self.options.seed,
            },
        )
        try:
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"] or "", choice.get("finish_reason")
            text.encode()
        except (AttributeError, KeyError, IndexError, TypeError, UnicodeEncodeError):  # half a character
            return Reply(json.dumps(answer)[:200], "nonsense")
        fault = None
        if reason not in (None, "stop"):  # its length, a filter, an error
            fault = "limit"
        elif any(token in text for token in self.control):
            fault = "control"
        return Reply(text, fault).checked()

    def text(self, text: str) -> dict:
        """A text part. What spells a control token is split, since a server would read it as one."""
        for token in self.control:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return {"type": "text", "text": text}

    def image(self, item: int) -> dict | None:
        """An image part, as PNG within max_pixels; None for an item without an image."""
        path = self.encoding.items.images[item]
        if not path:
            return None
        image, most = open_image(self.encoding.data.folder / path), self.encoding.manifest["max_pixels"]
        scale = min(1.0, (most / (image.width * image.height)) ** 0.5)
        image.thumbnail((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    def answer(self, path: str, body: dict | None = None):
        """The server's answer, from JSON; None if it is no JSON. A busy or absent server is tried again, ever later."""
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}",
        }
        data, reason = None if body is None else json.dumps(body).encode(), ""
        for attempt in range(self.options.retries + 1):
            if self.lost.wait(min(2**attempt / 2, LONGEST_PAUSE) if attempt else 0):
                break
            try:
                request = urllib.request.Request(f"{self.url}/{path}", data, headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {error.read()[:200].decode(errors='replace')}"
                if body is not None and error.code in OF_THIS_PROMPT:
                    return {"error": reason}
                if error.code < 500 and error.code != 429:
                    self.lost.set()
                    raise UserError(f"{self.url} refuses a request ({reason})") from error
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
                return None
            except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no address at all
                reason = f"{type(error).__name__}: {error}"
        self.lost.set()  # the other requests stop too
        raise UserError(f"{self.url} does not answer ({reason}); what is written stays: run the same again to go on")
