"""Models of full size without memory or GPU: fake tensors, what a GPU's host would wait for, operations and memory.

A fake tensor has a shape, a dtype and a device, and no values. Its device may be `cuda` on a machine that has no GPU,
if this PyTorch is built for CUDA.
"""

import itertools
import sys
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import ours
import torch
import transformers
import workload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from hanorec.data.folder import Example, Items
from hanorec.model.load import load_tokenizer
from hanorec.model.lora import add_lora
from hanorec.model.packing import PackedMLLM
from hanorec.model.prompts import Prompts
from hanorec.model.template import ChatTemplate

# ---------------------------------------------------------------------------------------------------------------------
# The backbones at their published sizes


def qwen_text(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary=151936, **more) -> dict:
    text = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return text | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None} | more


def qwen3_text(*sizes) -> dict:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return qwen_text(*sizes, head_dim=128, rope_parameters=rope)


MISTRAL = {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
MISTRAL |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32064, "sliding_window": None}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}
QWEN3_VISION = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
QWEN3_VISION |= {"patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]}


@dataclass
class Backbone:
    """A backbone's config class and sizes, and what an image of 512 x 512 pixels is for it at --max-pixels 262144.

    Args:
        grid: the image's patches (time, height, width); zeros if the family needs none.
        deep: the number of layers that take features of the image.
        weights: the number of weights, in billions, as published.
    """

    family: str
    text: dict
    vision: dict
    tied: bool
    image_tokens: int
    grid: tuple[int, int, int]
    weights: float
    deep: int = 0


QWEN2_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
QWEN2_5_7B = qwen_text(3584, 18944, 28, 28, 4, 152064)
QWEN = (324, (1, 36, 36))
BACKBONES = {
    "Qwen2-VL-2B": Backbone(
        "Qwen2VL", qwen_text(1536, 8960, 28, 12, 2), QWEN2_VISION | {"hidden_size": 1536}, True, *QWEN, 2.21
    ),
    "Qwen2.5-VL-3B": Backbone("Qwen2_5_VL", qwen_text(2048, 11008, 36, 16, 2), workload.FULL_VISION, True, *QWEN, 3.75),
    "Qwen2.5-VL-7B": Backbone(
        "Qwen2_5_VL", QWEN2_5_7B, workload.FULL_VISION | {"out_hidden_size": 3584}, False, *QWEN, 8.29
    ),
    "LLaVA-NeXT-7B": Backbone("LlavaNext", MISTRAL, CLIP, False, 1176, (0, 0, 0), 7.57),
    "Qwen3-VL-4B": Backbone(
        "Qwen3VL",
        qwen3_text(2560, 9728, 36, 32, 8),
        QWEN3_VISION | {"out_hidden_size": 2560},
        True,
        256,
        (1, 32, 32),
        4.44,
        deep=3,
    ),
}


def config_of(backbone: Backbone, tokenizer):
    """The config of a backbone, with the ids of this tokenizer's control tokens."""
    ids = tokenizer.convert_tokens_to_ids
    tokens = {"image_token_id": ids("<|image_pad|>"), "tie_word_embeddings": backbone.tied}
    if backbone.family == "LlavaNext":
        tokens |= {"image_grid_pinpoints": [[336, 672], [672, 336]], "vision_feature_layer": -2}
        tokens["image_token_index"] = tokens.pop("image_token_id")
    else:
        tokens |= {"vision_start_token_id": ids("<|vision_start|>"), "vision_end_token_id": ids("<|vision_end|>")}
        tokens["video_token_id"] = ids("<|endoftext|>")
    make = getattr(transformers, f"{backbone.family}Config")
    return make(text_config=dict(backbone.text), vision_config=dict(backbone.vision), **tokens)


def shortened(backbone: Backbone, layers: int, windowed: int, full: int) -> Backbone:
    """The backbone with fewer layers: of the language model, and of the vision tower with each kind of attention.

    Towers without windows have full layers alone; Qwen3-VL's has three more, which give deep features.
    """
    vision = dict(backbone.vision)
    if "fullatt_block_indexes" in vision:
        vision |= {"depth": windowed + full, "fullatt_block_indexes": [*range(windowed, windowed + full)]}
    elif backbone.deep:
        vision |= {"depth": backbone.deep + full, "deepstack_visual_indexes": [*range(backbone.deep)]}
    else:
        vision["depth" if "depth" in vision else "num_hidden_layers"] = full
    return replace(backbone, text=backbone.text | {"num_hidden_layers": layers}, vision=vision)


def depths(backbone: Backbone) -> tuple[int, int, int]:
    """The arguments of `shortened` that give the whole backbone."""
    vision = backbone.vision
    full = vision.get("depth") or vision["num_hidden_layers"]
    windowed = full - len(vision["fullatt_block_indexes"]) if "fullatt_block_indexes" in vision else 0
    return backbone.text["num_hidden_layers"], windowed, full - windowed - backbone.deep


def meta_model(config, dtype=torch.bfloat16, attn: str = "sdpa"):
    """The model of a config, frozen, on the meta device."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attn)
    return model.requires_grad_(False).eval()


def to_fake(model, mode: FakeTensorMode, device: str):
    """Replace the parameters and buffers of a model on the meta device by fake tensors. Returns the model."""
    fakes = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if isinstance(weight, FakeTensor):
                    continue
                if id(weight) not in fakes:  # tied weights stay tied
                    fake = FakeTensor(mode, weight.detach(), device=torch.device(device))
                    fakes[id(weight)] = torch.nn.Parameter(fake, weight.requires_grad)
                module._parameters[name] = fakes[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer.to("meta"), device=torch.device(device))
    return model


def packed_model(
    config, mode: FakeTensorMode, device: str, checkpointing=False, dtype=torch.bfloat16, frozen=False
) -> PackedMLLM:
    """A model with LoRA of the paper's rank 8 and dropout .05, of fake tensors.

    Args:
        frozen: put SFT's frozen LoRA below the trained one, as dpo_hano.py does in half precision.
    """
    with torch.device("meta"):
        model = meta_model(config, dtype)
        if frozen:
            model = ours.with_sft_adapter(model)
        model = add_lora(model, ours.RANK, ours.ALPHA, 0.05, 0)
    packed = PackedMLLM(to_fake(model, mode, device))
    if checkpointing:
        packed.enable_checkpointing()
    return packed.train()


# ---------------------------------------------------------------------------------------------------------------------
# The data


class StoredTokens:
    """The image tokens of items that all have an image of 512 x 512 pixels: real tensors on the CPU, as in training."""

    live = None

    def __init__(self, backbone: Backbone, count: int, dtype=torch.bfloat16):
        width = backbone.text["hidden_size"] * (1 + backbone.deep)
        self.ids, self.lengths = [str(item) for item in range(count)], [backbone.image_tokens] * count
        self.grids = torch.tensor([backbone.grid] * count)
        self.image = torch.zeros(backbone.image_tokens, width, dtype=dtype)

    def of(self, item: int) -> torch.Tensor:
        return self.image


def make_data(folder: Path, backbone: Backbone, examples: int = 8, dtype=torch.bfloat16):
    """Examples of 5 history items with images and ten candidates. Returns (config, prompts, examples, tokens)."""
    titles = [f"The Lantern of {a} and the {b} Harbour ({year})" for a, b, year in TITLES]
    if not (folder / "config.json").exists():
        workload.build_backbone(folder, "demo", titles)
    tokenizer = load_tokenizer(folder)
    config = config_of(backbone, tokenizer)
    tokens = StoredTokens(backbone, len(titles), dtype)
    items = Items([{"item": str(i), "title": title} for i, title in enumerate(titles)])
    prompts = Prompts(ChatTemplate(tokenizer, config.image_token_id), items, tokens)
    drawn = []
    for number in range(examples):
        order = [(number + i) % len(titles) for i in range(15)]
        drawn.append(Example(f"user{number}", order[:5], order[5], order[5:], order[6]))
    return config, prompts, drawn, tokens


TITLES = [(f"Quarry{i}", f"Western{i}", 1950 + i) for i in range(24)]

# ---------------------------------------------------------------------------------------------------------------------
# What the host waits for

PACKAGES = Path(torch.__file__).parent.parent
IGNORED = (str(PACKAGES / "torch"), str(PACKAGES / "accelerate"), str(Path(__file__).resolve().parent))


def place() -> str:
    """The file, line and function that called PyTorch, without PyTorch, accelerate and this folder."""
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename.startswith((*IGNORED, "<")):
        frame = frame.f_back
    if frame is None:
        return "bench"
    path = Path(frame.f_code.co_filename)
    for root in (PACKAGES, workload.ROOT):
        if path.is_relative_to(root):
            return f"{path.relative_to(root)}:{frame.f_lineno} {frame.f_code.co_name}"
    return f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"


class Watch(TorchDispatchMode):
    """Counts what a GPU's host waits for, by (reason, place). `mixed` counts operations on tensors of two devices.

    `reads` counts copies to the host that do not wait. `steps`: optimizer steps so far; the caller counts them.

    A value that the host asks for is answered by 1, so that the run goes on. An index by a mask is answered as if the
    mask were true everywhere.

    Args:
        device: the type of the device that the host waits for.
        trues: the number of true values of a mask, by its number of elements.
    """

    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)

    def __init__(self, device: str, trues: dict[int, int] | None = None):
        super().__init__()
        self.device, self.trues = device, trues or {}
        self.waits, self.reads, self.mixed, self.steps = Counter(), Counter(), Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if args[0].device.type == self.device:
                self.waits["a value for the host", place()] += 1
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func in self.COPIES:
            self.copy(func, args, kwargs)
        if func in self.INDEXED and any(isinstance(tensor, FakeTensor) for tensor in (args[0], *args[1])):
            args = self.indexed(args)
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()}
        if len(devices) > 1 and func not in self.COPIES:
            self.mixed[str(func), place()] += 1
        return func(*args, **kwargs)

    def copy(self, func, args, kwargs) -> None:
        """Count a copy between the host and the GPU that the host waits for."""
        if func is torch.ops.aten.copy_.default:
            target, source = args[0].device.type, args[1]
            free = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            target, source = torch.device(kwargs.get("device") or args[0].device).type, args[0]
            free = kwargs.get("non_blocking", False)
        if {target, source.device.type} == {"cpu", "cuda"}:
            if free and target == "cpu":
                self.reads["copied for later reading", place()] += 1
            elif not free:
                self.waits["a copy to the GPU" if target == "cuda" else "a copy to the host", place()] += 1

    def indexed(self, args):
        """Count an index by a mask, which makes the host wait for the number of true values. Returns the arguments."""
        indices = []
        for index in args[1]:
            if index is not None and index.dtype == torch.bool:
                self.waits["an index by a mask", place()] += 1
                count = self.trues.get(index.numel(), index.numel())
                indices += [args[0].new_zeros(count, dtype=torch.long)] * index.dim()
            else:
                if index is not None and index.device.type != args[0].device.type:
                    self.waits["an index on the host", place()] += 1
                indices.append(index)
        return (args[0], indices, *args[2:])


def backward(loss: torch.Tensor) -> None:
    """Run the backward pass of a fake loss on a GPU, node by node. Autograd's own engine needs a real GPU."""
    waiting, todo, seen = Counter(), [loss.grad_fn], {loss.grad_fn}
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
    grads, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    known, torch._C._current_graph_task_id = torch._C._current_graph_task_id, lambda: 1  # checkpoints ask for it
    try:
        while ready:
            node = ready.pop()
            arrived = grads.pop(node, {})
            results = run_node(node, arrived)
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            if len(results) != len(node.next_functions):  # a Function of Python's: no edges for what is no tensor
                results = [grad for grad in results if grad is not None]
            else:
                results = [grad for grad, (to, _) in zip(results, node.next_functions, strict=True) if to is not None]
            for (following, number), grad in itertools.zip_longest(edges, results):
                if grad is not None:
                    like = following._input_metadata[number]  # the engine undoes broadcasts and casts
                    grad = grad.sum_to_size(like.shape).to(like.dtype)
                    into = grads.setdefault(following, {})
                    into[number] = into[number] + grad if number in into else grad
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)
    finally:
        torch._C._current_graph_task_id = known


def run_node(node, arrived: dict[int, torch.Tensor]) -> tuple:
    """The gradients that a node of the graph passes on, from those that have arrived, by number of the output."""
    if not arrived:
        return (None,) * len(node.next_functions)
    if hasattr(node, "variable"):  # AccumulateGrad
        weight, grad = node.variable, arrived[0]
        weight.grad = grad.detach() if weight.grad is None else weight.grad + grad
        return ()
    inputs = [arrived.get(number) for number in range(len(node._input_metadata))]
    with torch.no_grad():
        results = node.apply(*inputs) if hasattr(node, "apply") else node(*inputs)
    return results if isinstance(results, tuple) else (results,)


# ---------------------------------------------------------------------------------------------------------------------
# Operations and memory


def attention_flops(query, key, value, *args, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def attention_backward_flops(grad, query, key, value, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


class Counting(TorchDispatchMode):
    """Counts floating-point operations as PyTorch's FlopCounterMode does, and the memory of all tensors.

    Attributes:
        flops: the number of operations.
        live, peak: bytes of the tensors that operations have read or made, now and at most.
    """

    BLOCK = 512  # CUDA's allocator gives memory in blocks
    FORMULAS = flop_registry | {  # with the attention that PyTorch uses for tensors of the CPU
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }

    def __init__(self, block: int = BLOCK):
        super().__init__()
        self.block, self.flops, self.live, self.peak, self.known = block, 0, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in self.FORMULAS:
            self.flops += self.FORMULAS[func._overloadpacket](*args, **kwargs, out_val=result)
        self.hold((args, kwargs, result))
        return result

    def hold(self, tensors) -> None:
        """Count tensors that were there before, in any nesting of lists and dicts."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """Count the memory of a tensor, unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            size = -(-storage.nbytes() // self.block) * self.block
            self.known[storage._cdata] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, storage._cdata)

    def release(self, key: int) -> None:
        self.live -= self.known.pop(key)
