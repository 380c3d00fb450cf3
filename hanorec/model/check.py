"""Check a loaded model: it must score a short prompt as its own forward does."""

import contextlib
import tempfile
from collections.abc import Iterator
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
TOLERANCE = 1e-3  # of an answer's log-probability in float32; another order of summation changes about 1e-5
FLASH_TOLERANCE = 5e-2  # relative, in half precision; the logits are rounded by up to 1/256, and errors add up


def load_packed(model, encoding: Encoding, pack: bool, device) -> PackedMLLM:
    """Put `model` into a PackedMLLM on `device` and check it. Returns the PackedMLLM.

    The check scores two answers to one prompt twice, packed and by the model's own forward, and compares. It also gives
    the model the image processor's tilings (see `families.match_tiles`). A model in half precision is compared in
    float32: a bfloat16 logit of 25 is rounded by up to 0.06, which can be more than a mistake changes. Flash attention
    takes half precision only, so with it small mistakes do not show.

    The prompt has a few dozen tokens and one image of 112 x 112 pixels. So the check does not test a sliding window of
    many tokens. Both forwards read the same tokens; the check does not test the text around the image.

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
    allowed = FLASH_TOLERANCE * expected.abs().clamp_min(1) if has_flash(packed.core) else TOLERANCE
    difference = (logps - expected).abs()
    if not (difference <= allowed).all():  # a NaN fails too
        raise UserError(f"{problem} (log-probabilities differ by {float(difference.max()):.2g}); {remedy}")
    return packed


def has_flash(core) -> bool:
    """Return whether the model computes attention by a flash kernel."""
    return "flash" in str(core.config._attn_implementation)


@torch.no_grad()  # not inference mode: training uses tensors that the language model caches in its first forward
def score_both_ways(packed: PackedMLLM, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities [2] of two answers to one prompt, by `packed` and by the model's own forward.

    Both are computed in float32, from image tokens in the model's dtype; with flash attention in the model's dtype.
    """
    core, flash = packed.core, has_flash(packed.core)
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
    if core.dtype != torch.float32 and not flash:
        packed(batch)  # it must run in its own dtype too
    expected = []
    with contextlib.nullcontext() if flash else in_float32(core):
        logps = packed(batch)
        for (answer_path,) in separate_paths(tree):
            ids = torch.tensor(answer_path.ids, device=core.device)
            own = families.own_logits(core, ids[None], inputs)[0].float().log_softmax(-1)
            scored = torch.tensor(answer_path.scored, device=core.device)
            expected.append(own[scored - 1, ids[scored]].sum())
    return logps, torch.stack(expected)


@contextlib.contextmanager
def in_float32(core) -> Iterator[None]:
    """Let the language model compute in float32 inside the `with` block, without gradients.

    Each layer's weights become float32 when its forward begins, and are the old tensors again when it ends. So the
    memory for one more layer is enough. Weights in four bits stay as they are, and are multiplied in float32.
    """
    before, hooks = {}, []  # before: the values of each layer's weights, and the dtypes of its quantized products

    def widen(layer, _):
        weights = [weight for weight in layer.parameters() if weight.is_floating_point()]
        quantized = [part for part in layer.modules() if hasattr(part, "compute_dtype")]
        before[layer] = [(weight, "data", weight.data) for weight in weights]
        before[layer] += [(part, "compute_dtype", part.compute_dtype) for part in quantized]
        for weight in weights:
            weight.data = weight.data.float()
        for part in quantized:
            part.compute_dtype = torch.float32

    def widen_inputs(_, args, kwargs):  # not in the embedding: some families put image tokens into its output
        return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"].float()}

    def restore(layer, *_):
        for owner, name, value in before.pop(layer, []):
            setattr(owner, name, value)

    decoder, layers = core.get_decoder(), [core.get_output_embeddings()]
    for child in decoder.children():
        layers += child if isinstance(child, torch.nn.ModuleList) else [child]
    hooks.append(decoder.register_forward_pre_hook(widen_inputs, with_kwargs=True))
    for layer in layers:
        if layer is core.get_input_embeddings():
            continue
        hooks.append(layer.register_forward_pre_hook(widen))
        hooks.append(layer.register_forward_hook(restore, always_call=True))  # also after an error
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
