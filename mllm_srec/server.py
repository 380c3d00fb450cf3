"""Texts written by an OpenAI-compatible server (vLLM, SGLang, `transformers serve`): many requests at once, each tried
again where the server is busy or away."""

import base64
import http.client
import io
import json
import os
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from hanorec.model import mllm
from hanorec.run import runs
from hanorec.run.runs import UserError
from mllm_srec.writers import Reply, control_tokens

TIMEOUT = 600  # seconds for an answer: a server may hold a request back while it is busy
LONGEST_WAIT = 30  # seconds between two tries


class Server:
    """Called with prompts (lists of parts, see `srec.fill`), it gives a Reply to each. UserError where the server stays
    away, or refuses requests for another reason than what they hold.

    url: up to /v1. data: the evaluate.Data whose images are sent, at most as large as they are encoded.
    """

    def __init__(self, url: str, model: str | None, data, options):
        self.url, self.data, self.options = url.rstrip("/"), data, options
        self.batch_size = options.batch_size
        self.lost = threading.Event()  # the server, for good
        self.paths = [line["image"] for line in data.lines("items", runs.ITEM)]
        self.control = sorted(control_tokens(mllm.load_tokenizer(data.source, data.trust)), key=len, reverse=True)
        self.model = model or self.first_model()

    def first_model(self) -> str:
        try:
            return self.answer("models")["data"][0]["id"]
        except (KeyError, IndexError, TypeError, UserError) as error:
            raise UserError(f"{self.url}/models names no model ({error}); give --server-model") from error

    def length(self, parts: list) -> int:
        return sum(len(part) for part in parts if isinstance(part, str))

    def __call__(self, many: list[list]) -> list[Reply]:
        with ThreadPoolExecutor(self.options.parallel) as pool:
            return list(pool.map(self.reply, many))

    def reply(self, parts: list) -> Reply:
        content = [self.text(part) if isinstance(part, str) else self.image(part) for part in parts]
        body = {"model": self.model, "messages": [{"role": "user", "content": [part for part in content if part]}]}
        body |= {"temperature": 0, "max_tokens": self.options.max_tokens, "seed": self.options.seed}
        found = self.answer("chat/completions", body)
        try:
            choice = found["choices"][0]
            text, reason = choice["message"]["content"] or "", choice.get("finish_reason")
            text.encode()
        except (AttributeError, KeyError, IndexError, TypeError, UnicodeEncodeError):  # half a character
            return Reply(json.dumps(found)[:200], "nonsense")
        control = any(token in text for token in self.control)
        whole = reason in (None, "stop")  # others: its length, a filter, an error
        return Reply(text, "limit" if not whole else "control" if control else None).checked()

    def text(self, text: str) -> dict:
        """A text part; what spells a control token is split, since a server reads it as one."""
        for token in self.control:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return {"type": "text", "text": text}

    def image(self, row: int) -> dict | None:
        if not self.paths[row]:
            return None
        image, most = mllm.open_image(self.data.folder / self.paths[row]), self.data.encoding["max_pixels"]
        scale = min(1.0, (most / (image.width * image.height)) ** 0.5)
        image.thumbnail((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    def answer(self, path: str, body: dict | None = None):
        """The server's answer in JSON, None where it is none; a busy or absent server is tried again, ever later."""
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}",
        }
        data, reason = None if body is None else json.dumps(body).encode(), ""
        for number in range(self.options.retries + 1):
            if self.lost.wait(min(2**number / 2, LONGEST_WAIT) if number else 0):
                break
            try:
                request = urllib.request.Request(f"{self.url}/{path}", data, headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {error.read()[:200].decode(errors='replace')}"
                if body is not None and error.code in (400, 413, 422):  # of this prompt, perhaps not of others
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
