"""The encoding of a data folder for one backbone: the backbone, its files, and the image tokens of the items."""

from pathlib import Path

from transformers.utils import cached_file

from hanorec.data.folder import DataFolder
from hanorec.model.images import ImageTokens
from hanorec.model.load import load_image_processor
from hanorec.run.files import UserError, value_hash
from hanorec.run.runs import TINY


class Encoding:
    """Opens a data folder's encoding for one backbone.

    Args:
        model: the backbone: a hub name, a folder, or `tiny`. None if the data folder has only one encoding.
        blank_images: replace every image by one neutral image.
        images: `stored`: read image tokens from the folder. `live`: compute them from the image files in each batch.
            None: `stored` if the folder holds image tokens, else `live`.
        trust: run the Python code that comes with the backbone.

    Attributes:
        backbone: the name of the backbone. source: the hub name or the folder of its files.
        items: the Items of the data folder. tokens: their ImageTokens.
        manifest: encoded/<backbone>/manifest.json.
    """

    def __init__(
        self,
        data: DataFolder,
        model: str | None = None,
        blank_images: bool = False,
        images: str | None = None,
        trust: bool = False,
    ):
        encodings = data.encodings()
        names = ", ".join(encodings) or "no backbone"
        if model is None and len(encodings) > 1:
            raise UserError(f"{data.folder} is encoded for {names}; choose one with --model")
        model = model or next(iter(encodings), TINY)
        remedy = f"run prepare_data.py --out {data.folder} --encode-only --model {model}"
        if model not in encodings:
            raise UserError(f"{data.folder} is encoded for {names}, not for {model}; {remedy}")
        self.folder, self.manifest = encodings[model]
        if self.manifest["items"] != data.manifest["files"]["items.jsonl"]:
            pixels = self.manifest["max_pixels"]
            raise UserError(f"{self.folder} was made from another items.jsonl; {remedy} --max-pixels {pixels}")
        if images == "stored" and self.manifest["tokens"] is None:
            raise UserError(f"{self.folder} holds no image tokens; leave out --images, or {remedy}")
        self.data, self.items, self.trust = data, data.items, trust
        self.backbone, self.tiny = model, model == TINY
        self.source = data.folder / "tiny" if self.tiny else model
        live = None
        if (images == "live" or self.manifest["tokens"] is None) and not blank_images:
            live = (data.folder, load_image_processor(self.source, self.manifest["max_pixels"], trust))
        self.tokens = ImageTokens(self.items, self.folder, blank_images, live)

    def hash(self, *further: str) -> str:
        """Return the SHA-256 of what training reads: items, training and validation, encoding and stored image tokens.

        It covers neither the test files, so that tests with other candidates can be added later, nor the image files of
        an encoding without stored tokens. further: hashes of other texts in the prompts.
        """
        files = self.data.manifest["files"]
        read = {name: files.get(f"{name}.jsonl") for name in ("items", "train", "val", "sequences")}
        return value_hash([read, self.manifest, *further])


def backbone_weights(source: str | Path) -> list[tuple]:
    """Return what identifies the weight files of a backbone: names, sizes and times, or for a hub name their hashes."""
    if Path(source).is_dir():
        files = Path(source).glob("*.safetensors")
        return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    snapshot = Path(cached_file(source, "config.json", local_files_only=True)).parent
    files = snapshot.glob("*.safetensors")  # links to files that are named by their hashes
    return sorted((path.name, path.resolve().name) for path in files)
