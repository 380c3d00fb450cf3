"""Check a loaded model: it must score a short prompt as its own forward does."""

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
from hanorec.model.trees import separate_paths
from hanorec.run.files import UserError

TITLE, ANSWERS = "A film", ("Another film", "Yes")
TOLERANCE = 1e-3  # float32: of an answer's log-probability; another order of summation changes about 1e-5
LOW_TOLERANCE = 5e-2  # half precision: relative; one bfloat16 logit is rounded by up to 1/256, and errors add up


def load_packed(model, encoding: Encoding, pack: bool, device) -> PackedMLLM:
    """Put `model` into a PackedMLLM on `device` and check it. Returns the PackedMLLM.

    The check scores two answers to one prompt twice, packed and by the model's own forward, and compares. It also gives
    the model the image processor's tilings (see `families.match_tiles`).

    The prompt has a few dozen tokens and one image of 112 x 112 pixels. So the check does not test a sliding window of
    many tokens. Both forwards read the same tokens; the check does not test the text around the image. Small mistakes
    show in float32 only.

    Raises:
        UserError: the two log-probabilities differ, or one of the forwards fails.
    """
    packed, name = PackedMLLM(model, pack).to(device), encoding.backbone
    problem, remedy = f"packed prompts do not work with {name}", "give --no-pack, which is slower"
    if not pack:
        problem, remedy = f"{name} cannot be run on stored image tokens", "choose another backbone"
    training = packed.training
    packed.eval()
    try:
        logps, expected = score_both_ways(packed, encoding)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{problem} ({type(error).__name__}: {error}); {remedy}") from error
    finally:
        packed.train(training)
    allowed = TOLERANCE if packed.core.dtype == torch.float32 else LOW_TOLERANCE * expected.abs().clamp_min(1)
    difference = (logps - expected).abs()
    if not (difference <= allowed).all():  # a NaN fails too
        raise UserError(f"{problem} (log-probabilities differ by {float(difference.max()):.2g}); {remedy}")
    return packed


@torch.no_grad()  # not inference mode: training uses tensors that the language model caches in its first forward
def score_both_ways(packed: PackedMLLM, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities [2] of two answers to one prompt, by `packed` and by the model's own forward."""
    core = packed.core
    processor = load_image_processor(encoding.source, encoding.manifest["max_pixels"], encoding.trust)
    template = load_template(encoding.source, encoding.trust)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"  # a gradient: in an image of one colour, a wrong order of tokens is not seen
        Image.linear_gradient("L").resize((112, 112)).convert("RGB").save(path)
        encode_items(core, template.tokenizer, processor, [TITLE], [path], Path(folder))
        items = Items([{"item": TITLE, "title": TITLE}])
        tokens = ImageTokens(items, Path(folder))
        prompts = Prompts(template, items, tokens)
        tree = prompts.yesno_questions(Example("", [0], 0, [0], 0), [0])
        tree += [prompts.answer(text, 1) for text in ANSWERS]
        batch = packed.collate([tree], tokens).to(core.device)
        inputs = families.image_inputs(processor, [open_image(path)], core.device)
    expected = []
    for (answer_path,) in separate_paths(tree):
        ids = torch.tensor(answer_path.ids, device=core.device)
        logps = families.own_logits(core, ids[None], inputs)[0].float().log_softmax(-1)
        scored = torch.tensor(answer_path.scored, device=core.device)
        expected.append(logps[scored - 1, ids[scored]].sum())
    return packed(batch), torch.stack(expected)
