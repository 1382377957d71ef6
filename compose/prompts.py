"""Prompts -> what the denoiser is told: text encoders of every family, words of adapters, emphasis, any
length.

A prompt longer than a CLIP window is cut into as many windows as it needs (at a comma, if one is near; at
BREAK), each encoded by itself, one after the other along the sequence, as web UIs do; the prompt and the
negative one get as many. T5 has one window of 256 (SD3) or 512 tokens (FLUX.1), and what does not fit is
told; FLUX.1's CLIP gives the pooled embedding alone, of the first tokens that fit. A token emphasised w times
is moved along the line from the empty prompt's embedding at its place, as in ComfyUI:  z = z_0 + w (z - z_0).
A prompt that fits and emphasises nothing gives what diffusers' own `encode_prompt` gives, to the bit.

Embeddings are cached by prompt, words, and what is applied to the text encoders.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compose.emphasis import BREAK, Segment, parse
from compose.errors import InvalidRequest
from compose.families import Family
from compose.words import Rows, Words

CACHE_BYTES = 64 << 20
TOKENS_LIMIT = 32 * 77
T5_WINDOW = {"sd3": 256, "sd35-medium": 256, "sd35-large": 256, "flux": 512}
_COMPONENT_TOKENIZERS = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
}

Unit = tuple[tuple[int, ...], float, bool]
"""Token ids that stay together, their weight, and whether a window may end after them."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a diffusers pipeline takes for one prompt and its negative, by the argument's name, and how many
    tokens were not read.
    """

    tensors: Mapping[str, Tensor]
    dropped: int


@dataclass(frozen=True, slots=True)
class _Encoder:
    """A text encoder with its tokenizer; `window` in tokens, for CLIP with both ends."""

    kind: str
    rows: Rows
    window: int

    def units(self, segments: Sequence[Segment], words: Words) -> list[Unit | None]:
        """The prompt's tokens; None is a BREAK."""
        found: list[Unit | None] = []
        for text, weight in segments:
            if (text, weight) == BREAK:
                found.append(None)
                continue
            taught = {word.text for word in words.taught}
            for piece in words.cut(text):
                ids = self.rows.ids(piece)
                if piece in taught:
                    found.append((tuple(ids), weight, False))
                    continue
                commas = set(self.rows.tokenizer.convert_tokens_to_ids([",</w>", ","])) - {
                    self.rows.tokenizer.unk_token_id
                }
                found += [((token,), weight, token in commas) for token in ids]
        return found


class Prompts:
    """The text side of a pipeline. Not thread-safe."""

    def __init__(self, pipeline: Any, family: Family) -> None:
        self._pipeline, self._family = pipeline, family
        self._encoders: dict[str, _Encoder] = {}
        for component in family.components:
            model = getattr(pipeline, component.name, None)
            if component.name not in _COMPONENT_TOKENIZERS or model is None:
                continue
            tokenizer = getattr(pipeline, _COMPONENT_TOKENIZERS[component.name])
            if component.kind == "t5":
                window = T5_WINDOW[family.name]
            else:  # a tokenizer that lost its configuration knows no end
                window = min(tokenizer.model_max_length, model.config.max_position_embeddings)
            self._encoders[component.name] = _Encoder(component.kind, Rows(tokenizer, model), window)
        self.words = Words({e.kind.removesuffix("_projecting"): e.rows for e in self._encoders.values()})
        self._cache: OrderedDict[object, Conditions] = OrderedDict()
        self._cached_bytes = 0

    @torch.no_grad()
    def encode(
        self, prompt: str, negative: str = "", *, literal: bool = False, key: object = None
    ) -> Conditions:
        """Both prompts, under the words that are taught now. `literal`: no emphasis, and what does not fit
        one window is dropped. `key` names what is applied to the text encoders; None: not to be cached.
        Raises InvalidRequest.
        """
        check_negative(self._family.name, negative)
        words = tuple((word.text, word.digest, word.weight) for word in self.words.taught)
        known = (prompt, negative, literal, words, key)
        if cached := self._cache.get(known):
            self._cache.move_to_end(known)
            return cached
        found = self._conditions(prompt, negative, literal)
        if key is not None and all(digest for _, digest, _ in words):
            self._cache[known] = found
            self._cached_bytes += _size(found)
            while self._cached_bytes > CACHE_BYTES:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= _size(oldest)
        return found

    def forget(self) -> None:
        """Encodes everything anew from now on, for whoever watches the text encoders."""
        self._cache.clear()
        self._cached_bytes = 0

    def _conditions(self, prompt: str, negative: str, literal: bool) -> Conditions:
        told = [[(text, 1.0)] if literal and text else parse(text) for text in (prompt, negative)]
        units = [
            {name: encoder.units(segments, self.words) for name, encoder in self._encoders.items()}
            for segments in told
        ]
        clips = [name for name, encoder in self._encoders.items() if encoder.kind != "t5"]
        literal = literal or self._family.name == "flux"  # its CLIP tells the pooled one, of one window
        windows = [
            {name: _windows(each[name], self._encoders[name].window - 2, literal) for name in clips}
            for each in units
        ]
        count = max((len(found) for each in windows for found in each.values()), default=1)
        most = min((TOKENS_LIMIT // self._encoders[name].window for name in clips), default=count)
        if count > most:
            raise InvalidRequest(
                f"the prompts take {count} windows of the text encoder, the limit is {most}; "
                "shorten them, or write BREAK less often",
                field="prompt",
            )
        positive, pooled, dropped = self._encode(windows[0], units[0], count)
        if self._family.name == "flux":
            return Conditions({"prompt_embeds": positive, "pooled_prompt_embeds": pooled}, dropped)
        if self._zeroed(negative):
            against, against_pooled = torch.zeros_like(positive), torch.zeros_like(pooled)
        else:
            against, against_pooled, _ = self._encode(windows[1], units[1], count)
        tensors = {"prompt_embeds": positive, "negative_prompt_embeds": against}
        if pooled.numel():
            tensors |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": against_pooled}
        return Conditions(tensors, dropped)

    def _zeroed(self, negative: str) -> bool:
        """SDXL's base takes nothing, not the empty prompt, where there is no negative one."""
        return not negative and bool(getattr(self._pipeline.config, "force_zeros_for_empty_prompt", False))

    def _encode(
        self,
        windows: Mapping[str, list[list[Unit]]],
        units: Mapping[str, list[Unit | None]],
        count: int,
    ) -> tuple[Tensor, Tensor, int]:
        """The embedding `[1, length, width]`, the pooled one `[1, width]` (empty where a family has none),
        and tokens that were not read.
        """
        if self._family.name in {"pocket", "sd1", "sd2"}:
            hidden, _, dropped = self._clip("text_encoder", windows, count, layer=None)
            return hidden, hidden.new_zeros(1, 0), dropped
        if self._family.name == "flux":
            _, pooled, _ = self._clip("text_encoder", windows, 1, layer=-2)
            hidden, dropped = self._t5("text_encoder_2", units)
            return hidden, pooled, dropped
        parts, pools, dropped = [], [], 0
        for name in ("text_encoder", "text_encoder_2"):
            if name in self._encoders:
                hidden, pool, dropped = self._clip(name, windows, count, layer=-2)
                parts.append(hidden)
                pools.append(pool)
        hidden = torch.cat(parts, -1)
        if self._family.name == "sdxl":
            return hidden, pools[-1], dropped
        pooled, width = torch.cat(pools, -1), self._pipeline.transformer.config.joint_attention_dim
        hidden = torch.nn.functional.pad(hidden, (0, width - hidden.shape[-1]))
        if "text_encoder_3" in self._encoders:
            long, dropped = self._t5("text_encoder_3", units)
        else:
            long = hidden.new_zeros(1, T5_WINDOW[self._family.name], width)
        return torch.cat([hidden, long], 1), pooled, dropped

    def _clip(
        self, name: str, windows: Mapping[str, list[list[Unit]]], count: int, *, layer: int | None
    ) -> tuple[Tensor, Tensor, int]:
        """Of all windows the last hidden states, or those of `layer`; of the first the pooled embedding."""
        encoder, told = self._encoders[name], windows[name]
        room, found, pools, dropped = encoder.window - 2, [], [], 0
        for index in range(count):
            units = told[index] if index < len(told) else []
            ids = [token for tokens, _, _ in units for token in tokens]
            weights = [weight for tokens, weight, _ in units for _ in tokens]
            dropped += max(0, len(ids) - room)
            hidden, pooled = _forward(encoder, ids[:room], layer)
            if any(weight != 1.0 for weight in weights[:room]):
                nothing, _ = _forward(encoder, [], layer)
                hidden = _emphasised(hidden, nothing, [1.0, *weights[:room]])
            found.append(hidden)
            pools.append(pooled)
        return found[0] if count == 1 else torch.cat(found, 1), pools[0], dropped

    def _t5(self, name: str, units: Mapping[str, list[Unit | None]]) -> tuple[Tensor, int]:
        encoder = self._encoders[name]
        told = [unit for unit in units[name] if unit is not None]
        ids = [token for tokens, _, _ in told for token in tokens]
        weights = [weight for tokens, weight, _ in told for _ in tokens]
        room, tokenizer = encoder.window - 1, encoder.rows.tokenizer

        def forward(ids: list[int]) -> Tensor:
            window = [*ids, tokenizer.eos_token_id]
            window += [tokenizer.pad_token_id] * (encoder.window - len(window))
            hidden: Tensor = encoder.rows.encoder(torch.tensor([window], device=encoder.rows.table.device))[0]
            return hidden

        hidden = forward(ids[:room])
        if any(weight != 1.0 for weight in weights[:room]):
            hidden = _emphasised(hidden, forward([]), weights[:room])
        return hidden, max(0, len(ids) - room)


def check_negative(family: str, negative: str) -> None:
    """Raises InvalidRequest for a negative prompt that the bases of a family do not take."""
    if negative and family == "flux":
        raise InvalidRequest(
            "FLUX.1 is distilled and takes no negative prompt; leave it out", field="negative_prompt"
        )


def _forward(encoder: _Encoder, ids: Sequence[int], layer: int | None) -> tuple[Tensor, Tensor]:
    """Hidden states `[1, window, width]` and the pooled embedding `[1, width]` of one CLIP window.

    The pooled one is read where the text ends. transformers looks for the largest id there, which is the row
    of a word that an adapter brought.
    """
    tokenizer = encoder.rows.tokenizer
    window = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    end = window.index(tokenizer.eos_token_id)  # a prompt may say <|endoftext|>
    window += [tokenizer.pad_token_id] * (encoder.window - len(window))
    tokens = torch.tensor([window], device=encoder.rows.table.device)
    output = encoder.rows.encoder(tokens, output_hidden_states=layer is not None)
    pooled = output.last_hidden_state[:, end]
    if hasattr(encoder.rows.encoder, "text_projection"):
        pooled = encoder.rows.encoder.text_projection(pooled)
    return output.last_hidden_state if layer is None else output.hidden_states[layer], pooled


def _windows(units: Sequence[Unit | None], room: int, literal: bool) -> list[list[Unit]]:
    """Units in windows of at most `room` tokens: cut at the last comma if it is within a quarter of the room,
    and never within a word, unless it alone is larger.
    """
    if literal:
        return [[unit for unit in units if unit is not None]]
    found: list[list[Unit]] = [[]]
    for unit in units:
        if unit is None:
            found.append([])
            continue
        if _length(found[-1]) + len(unit[0]) > room and found[-1]:
            found.append(_carried(found[-1], room // 4))
        ids, weight, comma = unit
        while len(ids) > room:
            found[-1].append((ids[:room], weight, False))
            found.append([])
            ids = ids[room:]
        found[-1].append((ids, weight, comma))
    return [window for window in found if window] or [[]]


def _carried(window: list[Unit], most: int) -> list[Unit]:
    """Takes what follows the last comma out of a window, if it is at most so many tokens."""
    last = next((i for i in range(len(window) - 1, -1, -1) if window[i][2]), None)
    if last is None or _length(window[last + 1 :]) > most:
        return []
    carried = window[last + 1 :]
    del window[last + 1 :]
    return carried


def _length(units: Sequence[Unit]) -> int:
    return sum(len(ids) for ids, _, _ in units)


def _emphasised(hidden: Tensor, nothing: Tensor, weights: Sequence[float]) -> Tensor:
    """z_0 + w (z - z_0) of the first tokens, as many as there are weights."""
    scale = hidden.new_ones(hidden.shape[1])
    scale[: len(weights)] = hidden.new_tensor(list(weights))
    moved = nothing + scale[None, :, None] * (hidden - nothing)
    return torch.where((scale == 1)[None, :, None], hidden, moved)


def _size(conditions: Conditions) -> int:
    return sum(tensor.nbytes for tensor in conditions.tensors.values())
