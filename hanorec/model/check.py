"""The check of a loaded model: it must score a short prompt as its own plain forward does."""

import tempfile
from pathlib import Path

import torch
from PIL import Image

from hanorec.data.folder import Example, Items
from hanorec.model import families
from hanorec.model.encoding import Encoding
from hanorec.model.images import ImageTokens, encode_items, open_image
from hanorec.model.load import load_image_processor
from hanorec.model.packing import PackedMLLM
from hanorec.model.prompts import Prompts
from hanorec.model.template import load_template
from hanorec.model.trees import Node, separate_paths
from hanorec.run.files import UserError

TITLE, ANSWERS = "A film", ("Another film", "Yes")
TOLERANCE = 1e-3  # of an answer's log-probability in float32: some hundred times what the order of sums makes
LOW_TOLERANCE = 5e-2  # in half precision, relative: a logit is kept to 1/256, and errors add up over tokens


def load_packed(model, encoding: Encoding, pack: bool, device) -> PackedMLLM:
    """`model` in a PackedMLLM on `device`, checked."""
    packed = PackedMLLM(model, pack).to(device)
    if encoding.tokens.live:
        _, processor = encoding.tokens.live
        families.match_tiles(packed.core, processor)
    check(packed, encoding.source, encoding.manifest["max_pixels"], encoding.backbone, encoding.trust)
    return packed


@torch.no_grad()  # not inference mode: what a model keeps from its first forward must serve training too
def check(packed: PackedMLLM, source: str | Path, max_pixels: int, name: str, trust: bool = False) -> None:
    """Score two answers behind a prompt with an image by `packed`, and by the model's own forward with the pixels.

    It takes a few dozen tokens and one image of 112 x 112 pixels. So short a prompt says nothing of a long sliding
    window, which the mask takes from the config. Both ways read the same text around the image, whatever the model's
    processor would write. In half precision small mistakes pass; float32 shows them.

    Args:
        source: the backbone's files. name: of the backbone, for the message.

    Raises:
        UserError: the two disagree.
    """
    training = packed.training
    packed.eval()
    try:
        found, expected = score_both_ways(packed, source, max_pixels, trust)
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(disagreement(packed, name, f"{type(error).__name__}: {error}")) from error
    finally:
        packed.train(training)
    allowed = TOLERANCE if packed.core.dtype == torch.float32 else LOW_TOLERANCE * expected.abs().clamp_min(1)
    worst = (found - expected).abs()
    if not (worst <= allowed).all():
        raise UserError(disagreement(packed, name, f"log-probabilities differ by {float(worst.max()):.2g}"))


def disagreement(packed: PackedMLLM, name: str, reason: str) -> str:
    if packed.pack:
        return f"packing does not hold for {name} ({reason}); --no-pack runs its own forward, which is slower"
    return f"{name} cannot be run on stored image tokens ({reason}); choose another backbone"


def score_both_ways(
    packed: PackedMLLM, source: str | Path, max_pixels: int, trust: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """[2] log-probabilities of two answers behind one prompt: by `packed`, and by the model's own forward."""
    core, processor, template = (
        packed.core,
        load_image_processor(source, max_pixels, trust),
        load_template(source, trust),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"  # a gradient: in one colour, tokens in a wrong order would not show
        Image.linear_gradient("L").resize((112, 112)).convert("RGB").save(path)
        encode_items(core, template.tokenizer, processor, [TITLE], [path], Path(folder))
        items = Items([{"item": TITLE, "title": TITLE}])
        tokens = ImageTokens(items, Path(folder))
        prompts = Prompts(template, items, tokens)
        tree = prompts.yesno_questions(Example("", [0], 0, [0], 0), [0])
        tree += [prompts.answer(text, 1) for text in ANSWERS]
        batch = packed.collate([tree], tokens).to(core.device)
        inputs = families.image_inputs(processor, [open_image(path)], core.device)
    expected = [own_logp(core, path, inputs) for (path,) in separate_paths(tree)]
    return packed(batch), torch.stack(expected)


def own_logp(core, path: Node, images: dict[str, torch.Tensor]) -> torch.Tensor:
    """The log-probability of a path's scored tokens by the model's own forward, from the pixels."""
    ids, scored = torch.tensor([path.ids], device=core.device), list(path.scored)
    logps = families.own_logits(core, ids, images)[0].float().log_softmax(-1)
    return logps[[offset - 1 for offset in scored], ids[0, scored]].sum()
