"""Generate texts on an OpenAI-compatible server (vLLM, SGLang, `transformers serve`): many requests at once, with
retries."""

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

TIMEOUT = 600  # seconds for an answer: a busy server may let a request wait
LONGEST_PAUSE = 30  # seconds between two tries
PROMPT_REFUSED = (400, 413, 422)  # statuses that refuse this prompt, but perhaps not others


class Server:
    """A text generator on a server. Call it with prompts (lists of parts, see `texts.fill`) to get a Reply to each.

    Args:
        url: the server's address, up to /v1.
        model: the server's name for the model; None: the first one that the server lists.
        encoding: has the images, and the number of pixels that they are reduced to.
        options: parallel, retries, max_tokens, seed, batch_size.

    Raises:
        UserError: the server does not answer, or refuses requests for another reason than their prompts.
    """

    def __init__(self, url: str, model: str | None, encoding: Encoding, options):
        self.url, self.encoding, self.options = url.rstrip("/"), encoding, options
        self.batch_size = options.batch_size
        self.errors: list[str] = []  # of requests that failed; all requests report the first one
        self.stopped = threading.Event()  # set after the first error
        control = control_tokens(load_tokenizer(encoding.source, encoding.trust))
        self.control = sorted(control, key=len, reverse=True)
        try:
            self.model = model or self.answer("models")["data"][0]["id"]
        except (KeyError, IndexError, TypeError, UserError) as error:
            raise UserError(f"{self.url}/models names no model ({error}); give --server-model") from error

    def length(self, parts: list) -> int:
        """Return the number of characters of a prompt."""
        return sum(len(part) for part in parts if isinstance(part, str))

    def __call__(self, prompts: list[list]) -> list[Reply]:
        with ThreadPoolExecutor(self.options.parallel) as pool:
            return list(pool.map(self.reply, prompts))

    def reply(self, parts: list) -> Reply:
        content = []
        for part in parts:
            if isinstance(part, str):
                text = part
                for token in self.control:  # with a space inside, the server does not read it as that token
                    text = text.replace(token, f"{token[0]} {token[1:]}")
                content.append({"type": "text", "text": text})
            elif self.encoding.items.images[part]:
                content.append(self.image(part))
        answer = self.answer(
            "chat/completions",
            {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": self.options.max_tokens,
                "seed": self.options.seed,
            },
        )
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            ended = choice.get("finish_reason") in (None, "stop")  # else: the length, a filter, an error
            text.encode()  # UnicodeEncodeError: half a character
        except (AttributeError, KeyError, IndexError, TypeError, UnicodeEncodeError):
            return Reply(json.dumps(answer)[:200], "nonsense")
        return Reply.checked(text, ended, control=any(token in text for token in self.control))

    def image(self, item: int) -> dict:
        """Return an image part of a message: the item's image as a PNG of at most max_pixels pixels."""
        image = open_image(self.encoding.data.folder / self.encoding.items.images[item])
        scale = min(1.0, (self.encoding.manifest["max_pixels"] / (image.width * image.height)) ** 0.5)
        image.thumbnail((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    def answer(self, path: str, body: dict | None = None):
        """Send a request. Returns the server's answer read from JSON; None if it is not JSON.

        While the server is busy or does not respond, the request is sent again after longer and longer pauses.
        """
        headers = {"Content-Type": "application/json"}
        headers["Authorization"] = f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self.options.retries + 1):
            pause = min(2**attempt / 2, LONGEST_PAUSE) if attempt else 0
            if self.stopped.wait(pause):  # another request failed
                raise UserError(self.errors[0])
            try:
                request = urllib.request.Request(f"{self.url}/{path}", data, headers)
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {error.read()[:200].decode(errors='replace')}"
                if body is not None and error.code in PROMPT_REFUSED:
                    return {"error": reason}
                if error.code < 500 and error.code != 429:
                    raise self.stop(f"{self.url} refuses a request ({reason})") from error
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
                return None
            except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: the address is not valid
                reason = f"{type(error).__name__}: {error}"
        raise self.stop(f"{self.url} does not answer ({reason}); run the same command again, which continues")

    def stop(self, message: str) -> UserError:
        """Stop all requests after an error. Returns the first error of all requests, for the caller to raise."""
        self.errors.append(message)
        self.stopped.set()
        return UserError(self.errors[0])
