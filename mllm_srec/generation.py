"""Greedy generation on stored image tokens: a batch of prompts at once, over the KV cache.

What all prompts of a batch begin with (the instruction) is computed once for all of them; the rest is padded on the
left and computed together; then every step adds one token to each. Texts that have ended leave the batch once they are
half of it.
"""

import functools

import torch

from hanorec.model import backbones, mllm
from hanorec.model.prompts import Node, common_length


def stop_tokens(core, prompts) -> list[int]:
    """The tokens that end a text: the chat template's end of turn, and what the model itself stops at."""
    own = getattr(core, "generation_config", None) and core.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({prompts.end_of_turn, *(token for token in own if token is not None)})


@torch.no_grad()
def generate(
    core, prompts: list[Node], catalogue: mllm.Catalogue, stop: list[int], max_tokens: int
) -> list[tuple[list[int], bool]]:
    """The most likely continuation of each prompt, token by token: (its tokens without the one that ended it, whether
    one did before max_tokens). core: an image-text model of transformers, in evaluation mode."""
    steps = Steps(core, prompts, catalogue)
    logits = steps.prefill()
    texts: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    alive = list(range(len(prompts)))
    for _ in range(max_tokens):
        chosen = logits.argmax(-1)
        for row, token in zip(alive, chosen.tolist(), strict=True):
            if token in stop:
                ended[row] = True
            elif not ended[row]:
                texts[row].append(token)
        left = [place for place, row in enumerate(alive) if not ended[row]]
        if not left:
            break
        if 2 * len(left) <= len(alive):
            keep = torch.tensor(left, device=chosen.device)
            steps.select(keep)
            alive, chosen = [alive[place] for place in left], chosen[keep]
        logits = steps.step(chosen)
    return list(zip(texts, ended, strict=True))


class Steps:
    """A batch that is being continued: its cache, and of each cached token whether it is no padding (valid [B, L]) and
    how many tokens come before it (depth [B, L])."""

    def __init__(self, core, prompts: list[Node], catalogue: mllm.Catalogue):
        self.core, self.prompts, self.catalogue = core, prompts, catalogue

    def begin(self, rows: int) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache()  # without a config: windows are in the mask, and no layer forgets
        self.cache.layer_class_to_replicate = roomy_layer()
        self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=self.core.device)
        self.depth = self.valid.long()

    def each(self, change) -> None:
        """Apply `change` to what is kept of each row."""
        self.valid, self.depth = change(self.valid), change(self.depth)

    def prefill(self) -> torch.Tensor:
        """[B, V], the logits behind each prompt."""
        rows, ids = len(self.prompts), [prompt.ids for prompt in self.prompts]
        grids = [[self.catalogue.grid(item) for item in prompt.images] for prompt in self.prompts]
        positions = [backbones.positions(self.core, *one) for one in zip(ids, grids, strict=True)]  # [P, L] each
        self.next = torch.stack([one.max() + 1 for one in positions]).to(self.core.device)  # [B]
        shared = common_length(ids, self.core.config.image_token_id) if rows > 1 else 0
        self.begin(1 if shared else rows)
        if shared:
            first = torch.tensor([ids[0][:shared]])
            self.extend(first, torch.ones_like(first, dtype=torch.bool), positions[0][:, None, :shared])
            self.cache.batch_repeat_interleave(rows)
            self.each(lambda seen: seen.expand(rows, -1))
        length = max(map(len, ids)) - shared
        rest = torch.zeros(rows, length, dtype=torch.long)
        valid, places = rest.bool(), rest.repeat(len(positions[0]), 1, 1)
        for row, one in enumerate(ids):
            start = length - (len(one) - shared)
            rest[row, start:] = torch.tensor(one[shared:])
            valid[row, start:] = True
            places[:, row, start:] = positions[row][:, shared:]
        return self.extend(rest, valid, places, self.images())

    def images(self) -> torch.Tensor | None:
        """[all, d]: the image tokens of the prompts in order, stored or computed now."""
        items, device = [item for prompt in self.prompts for item in prompt.images], self.core.device
        if not items:
            return None
        if not self.catalogue.live:
            return torch.cat([self.catalogue.image_tokens(item) for item in items])
        pixels = self.catalogue.pixels(items).items()
        pixels = {name: value.to(device) if torch.is_tensor(value) else value for name, value in pixels}
        images = backbones.image_tokens(self.core, pixels)
        mllm.check_sizes(self.catalogue.sizes(items), images)
        return torch.cat(images)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, V], the logits behind each text and its new token; tokens: [B]."""
        places = self.next.expand(self.axes, -1)[..., None]
        self.next = self.next + 1
        return self.extend(tokens[:, None], torch.ones_like(tokens, dtype=torch.bool)[:, None], places)

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows of the batch alone."""
        self.cache.batch_select_indices(rows)
        self.each(lambda seen: seen[rows])
        self.next = self.next[rows]

    def extend(self, ids, valid, positions, images: torch.Tensor | None = None) -> torch.Tensor:
        """[B, V] behind the last of further tokens ids [B, Q], of which `valid` are no padding; positions [P, B, Q];
        images [all, d]: the image tokens among them."""
        core, device = self.core, self.core.device
        ids, valid, positions = ids.to(device), valid.to(device), positions.to(device)
        depth = self.valid.sum(1, keepdim=True) + valid.cumsum(1) - 1
        new = iter((valid, depth))
        self.each(lambda seen: torch.cat([seen, next(new)], dim=1))
        is_image = (ids == core.config.image_token_id) & valid & (images is not None)
        embeds, deep = core.get_input_embeddings()(ids.masked_fill(is_image, 0)), {}  # some ids are beyond the table
        if images is not None:
            images, width = images.to(device, embeds.dtype), embeds.shape[-1]
            embeds = embeds.masked_scatter(is_image[..., None], images[:, :width])
            deep = backbones.deep_features(images, width, is_image)
        self.axes = len(positions)
        hidden = core.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=self.masks(ids, is_image),
            position_ids=positions[0] if self.axes == 1 else positions,
            past_key_values=self.cache,
            use_cache=True,
            **deep,
        ).last_hidden_state
        return core.get_output_embeddings()(hidden[:, -1])

    def masks(self, ids: torch.Tensor, is_image: torch.Tensor):
        """[B, 1, Q, L], True where one of the last Q tokens attends; by kind of layer where the model has kinds."""
        config, (asking, length) = self.core.config, (ids.shape[1], self.valid.shape[1])
        places = torch.arange(length, device=ids.device)
        own = places[-asking:, None] == places  # padding too sees something, itself
        visible = self.valid[:, None].expand(-1, asking, -1).tril(length - asking) | own
        if is_image.any() and (image := backbones.image_numbers(config, ids.flatten())) is not None:
            image = image.view_as(ids) * is_image  # attended in both directions
            visible[:, :, -asking:] |= (image[:, :, None] == image[:, None]) & is_image[:, :, None]
        full, text = visible[:, None], config.get_text_config()
        kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
        if window is None or not getattr(text, "use_sliding_window", True):
            window = length
        near = full & (self.depth[:, None, -asking:, None] - self.depth[:, None, None] < window)
        return near if kinds is None else {"full_attention": full, "sliding_attention": near}


@functools.cache
def roomy_layer() -> type:
    """A layer of a DynamicCache that has room for more tokens than it holds, so that a step does not copy them all."""
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            held, room = (self.keys.shape[-2], self.room) if self.is_initialized else (0, 0)
            total = held + key_states.shape[-2]
            if total > room or self.keys.data_ptr() != self.whole[0].data_ptr():  # other rows were chosen
                self.room = total + 64
                whole = [new.new_empty(*new.shape[:2], self.room, new.shape[3]) for new in (key_states, value_states)]
                if held:
                    whole[0][:, :, :held], whole[1][:, :, :held] = self.keys, self.values
                self.whole, self.is_initialized = whole, True
                self.dtype, self.device = key_states.dtype, key_states.device
            self.whole[0][:, :, held:total], self.whole[1][:, :, held:total] = key_states, value_states
            self.keys, self.values = (whole[:, :, :total] for whole in self.whole)
            return self.keys, self.values

    return Roomy
