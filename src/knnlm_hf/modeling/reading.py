"""The text of one forward, and of those before it: what a memory reads that learns from the text.

With a KV cache a forward is given only the new tokens. The states of those before are kept in the
cache itself, as one layer more: whatever is done to a cache (beams reorder it, rejected drafts are
cropped, rows are repeated or selected) is then done to them too, and nothing is left behind when
it goes.

Shape suffixes: B text, T new position, S position, D hidden dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from knnlm_hf.capture import CapturePoint
from knnlm_hf.memory.text import Text

_PADDING, _UNKNOWN = -2, -1  # in place of tokens: not to be found, and not to be predicted


class StatesLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The text that a KV cache has read: `keys` (B, 1, S, D) and `values` (B, 1, S, 3).

    The keys are states; the values are columns: the token after each state, the number of its part,
    and its position, of padding that of the last token before. What stands last has no token after
    it yet.
    """

    keys: Any
    values: Any

    def __init__(self, point: CapturePoint, first: Any = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.point = point
        self.first = first
        """The cache's first layer, which offloading would bring back in this one's place."""

    def prefetch(self) -> None:
        """Bring this one back, and the first layer, to whose turn transformers wraps round."""
        super().prefetch()  # type: ignore[no-untyped-call]
        if self.first is not None:
            self.first.prefetch()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, both in their own dtype."""
        if self.is_initialized:
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = key_states, value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        return self.keys, self.values

    def fit(self, length: int, states_BTD: Tensor) -> None:
        """Hold `length` positions before `states_BTD` come: drop what is behind, or leave a gap."""
        if self.is_initialized and self.keys.shape[0] != states_BTD.shape[0]:
            self.reset()
        gap = length - self.get_seq_length()
        if gap < 0:
            self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]
        elif gap > 0:  # read by somebody else, the model alone for instance
            rows, _, width = states_BTD.shape
            unknown_BS3 = self.last(states_BTD)[:, None].repeat(1, gap, 1)
            unknown_BS3[..., 0] = _PADDING
            unknown_BS3[..., 2] += torch.arange(1, gap + 1, device=states_BTD.device)
            self.update(states_BTD.new_zeros(rows, 1, gap, width), unknown_BS3[:, None])

    def last(self, states_BTD: Tensor) -> Tensor:
        """(B, 3) values of what stands last; of an empty text such as would stand before it."""
        if self.get_seq_length():
            last_B3: Tensor = self.values[:, 0, -1]
            return last_B3
        rows, device = len(states_BTD), states_BTD.device
        return torch.tensor([_PADDING, 0, -1], device=device).expand(rows, 3)

    @property
    def text(self) -> Text:
        """All of it."""
        values_BS, parts_BS, _ = self.values[:, 0].unbind(-1)
        return Text(self.keys[:, 0], values_BS, parts_BS)


def length_before(arguments: dict[str, Any]) -> int | None:
    """How many tokens the forward's KV cache holds; None where it cannot tell."""
    cache = _cache(arguments)
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except (ValueError, NotImplementedError):  # states that count no positions
        return None


def read(
    point: CapturePoint,
    states_BTD: Tensor,
    arguments: dict[str, Any],
    output: Any,
    before: int | None,
) -> Text:
    """The text that ends with this forward, its states at `point` being those of the new tokens.

    Args:
        point: where they were captured.
        states_BTD: all of them, whatever `logits_to_keep` says.
        arguments: of the forward.
        output: its output, in which a KV cache may have been made.
        before: from `length_before`, before the forward.
    """
    states_BTD = states_BTD.detach()
    given = _cache(arguments)
    layer = _layer_in(_cache(output) if given is None else given, point)
    if before is not None:
        layer.fit(before, states_BTD)
    seen = layer.get_seq_length()
    if seen and states_BTD.shape[:2] == (1, 1) and layer.values.device.type == "cpu":
        newest_3 = layer.last(states_BTD)[0].tolist()
        marks_23 = _after_one_token(newest_3, *_token_and_position(arguments, seen))
        layer.values = layer.values[:, :, :-1]
        layer.update(states_BTD[:, None], torch.tensor([[marks_23]], device=layer.values.device))
        return layer.text
    tokens_BT, positions_BT = _tokens_and_positions(states_BTD, arguments, seen)
    last_B3 = layer.last(states_BTD)
    is_padding_BT = tokens_BT == _PADDING
    positions_BU = _carried(last_B3[:, 2:], positions_BT, is_padding_BT)
    # A part ends where positions do not go on: packed rows hold several texts.
    begins_BT = (positions_BU[:, 1:] != positions_BU[:, :-1] + 1) & ~is_padding_BT
    parts_BT = last_B3[:, 1:2] + begins_BT.cumsum(dim=1)
    # The token after what stood last is known now.
    after_BT = tokens_BT.masked_fill(begins_BT, _UNKNOWN)
    values_BU = torch.cat([after_BT, after_BT.new_full((len(after_BT), 1), _UNKNOWN)], dim=1)
    was_padding_B1 = last_B3[:, :1] == _PADDING
    values_BU.masked_fill_(torch.cat([was_padding_B1, is_padding_BT], dim=1), _PADDING)
    if seen:
        newest_B3 = torch.cat([values_BU[:, :1], last_B3[:, 1:]], dim=1)
        layer.values = torch.cat([layer.values[:, :, :-1], newest_B3[:, None, None]], dim=2)
    marks_BT3 = torch.stack([values_BU[:, 1:], parts_BT, positions_BU[:, 1:]], dim=-1)
    layer.update(states_BTD[:, None], marks_BT3[:, None])
    return layer.text


def _after_one_token(newest: list[int], token: int, position: int) -> list[list[int]]:
    """What `read` makes of one token more of one text: values of what stood last, and of the token.

    While a text is generated every token comes so, and two dozen operations on tensors of one
    number would take longer than the search.
    """
    value, part, last = newest
    if token == _PADDING:
        position = last
    begins = token != _PADDING and position != last + 1
    after = _UNKNOWN if begins else token
    known = _PADDING if value == _PADDING else after
    mark = _PADDING if token == _PADDING else _UNKNOWN
    return [[known, part, last], [mark, part + begins, position]]


def _token_and_position(arguments: dict[str, Any], begin: int) -> tuple[int, int]:
    """`_tokens_and_positions` of one token of one text."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    positions = arguments.get("position_ids")
    token = int(ids) if isinstance(ids, Tensor) and ids.shape == (1, 1) else _UNKNOWN
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] and mask[0, -1].item() == 0:
        token = _PADDING
    if isinstance(positions, Tensor) and positions.shape in ((1,), (1, 1)):
        return token, int(positions)
    return token, begin


def _carried(before_B1: Tensor, positions_BT: Tensor, is_padding_BT: Tensor) -> Tensor:
    """(B, 1 + T) positions, those of padding replaced by the last before it."""
    positions_BU = torch.cat([before_B1, positions_BT], dim=1)
    places_BT = torch.arange(1, positions_BU.shape[1], device=positions_BU.device)
    places_BT = places_BT.masked_fill(is_padding_BT, 0).cummax(dim=1).values
    return torch.cat([before_B1, positions_BU.gather(1, places_BT)], dim=1)


def _tokens_and_positions(
    states_BTD: Tensor, arguments: dict[str, Any], begin: int
) -> tuple[Tensor, Tensor]:
    """(B, T) tokens of the new positions, and the positions themselves."""
    rows, length = states_BTD.shape[:2]
    device = states_BTD.device
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    positions = arguments.get("position_ids")
    tokens_BT = torch.full((rows, length), _UNKNOWN, device=device)
    if isinstance(ids, Tensor) and ids.shape == tokens_BT.shape:
        tokens_BT = ids.to(device, torch.int64)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
        is_padding_BT = mask[:, mask.shape[1] - length :].to(device) == 0
        tokens_BT = tokens_BT.masked_fill(is_padding_BT, _PADDING)
    positions_BT = torch.arange(begin, begin + length, device=device)[None]
    if isinstance(positions, Tensor) and positions.dim() == 1:
        positions = positions[None]
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == length:
        positions_BT = positions.to(device, torch.int64)
    return tokens_BT, positions_BT.expand(rows, length)


def _cache(holder: Any) -> Cache | None:
    """The KV cache among a forward's arguments, or in its output."""
    for name in ("past_key_values", "cache_params"):
        found = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
        if isinstance(found, EncoderDecoderCache):
            found = found.self_attention_cache
        if isinstance(found, Cache):
            return found
    return None


def _layer_in(cache: Cache | None, point: CapturePoint) -> StatesLayer:
    """Our layer of this cache, new where it has none; without a cache one that is not kept."""
    layers = [] if cache is None else cache.layers
    for layer in layers:
        if isinstance(layer, StatesLayer) and layer.point == point:
            return layer
    new = StatesLayer(point, first=next(iter(layers), None))
    layers.append(new)
    return new
