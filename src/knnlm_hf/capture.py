"""Where a decoder's hidden states are read: h_ds in the equation.

`find` names the place, `capturing` listens there during a forward, `states` runs a model only as
far as that place. The hooks stay on the modules and sleep: one only keeps a tensor while a
`capturing` block is open *in the same thread or context*, so the model behaves as before everywhere
else, several threads do not see each other, and a forward repeated by gradient checkpointing after
the block has no effect.

Shape suffixes: B batch, T position, D hidden dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor, nn

from knnlm_hf.errors import CaptureError

LAYERS = ("att", "ffn", "final")

_FEED_FORWARD = (
    "mlp",
    "feed_forward",
    "ffn",
    "mlp_block",
    "block_sparse_moe",
    "moe",
    "fc1",
    "intermediate",
)
"""Names of the feed-forward sublayer, or of its first module, inside a decoder layer."""

_DEPTHS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
_NO_PLAIN_LAYERS = {
    "cpmant": "puts a prompt before the text",
    "prophetnet": "predicts several tokens at each position",
    "xlm": "keeps attention and feed-forward in separate lists",
    "xlnet": "lays its states out as (position, batch, dimension)",
}
"""Model types whose last layer does not give one state per token, and why."""


@dataclass(frozen=True)
class CapturePoint:
    """A place in a model: what enters, or what leaves, one of its modules."""

    layer: str
    """As asked for: `att`, `ffn`, `final`, a module path, or a module path with `:input`."""
    path: str
    """Dotted path of the module, from the model that `find` was given."""
    side: Literal["input", "output"]
    """Which side of the module is read."""


class Collector:
    """What has passed at `point` so far; `then` is called with it before the model goes on."""

    def __init__(
        self,
        point: CapturePoint,
        stop: bool = False,
        then: Callable[[Collector], None] | None = None,
    ) -> None:
        self.point = point
        self.stop = stop
        self.then = then
        self.raw: Tensor | None = None
        """The last tensor that passed, as the module saw it; None if the layer was not reached."""

    def states(self, batch_size: int) -> Tensor | None:
        """Return the captured states as (B, T, D), also where the module saw (B·T, D)."""
        if self.raw is None or self.raw.dim() == 3:
            return self.raw
        if self.raw.dim() == 2 and batch_size and self.raw.shape[0] % batch_size == 0:
            return self.raw.reshape(batch_size, -1, self.raw.shape[-1])
        raise CaptureError(
            f"layer {self.point.layer!r} gives a tensor of shape {tuple(self.raw.shape)}, expected "
            f"(batch, position, dimension): choose one of {', '.join(LAYERS)}, or another module"
        )


_active: ContextVar[tuple[Collector, ...]] = ContextVar("knnlm_hf_collectors", default=())

# subtle: torch.compile cannot look into a ContextVar, but can into this. While no thread listens,
# a hooked model compiles whole.
_anyone_listens = False
_blocks = 0
_lock = Lock()


def _count(change: int) -> None:
    global _anyone_listens, _blocks
    with _lock:
        _blocks += change
        _anyone_listens = _blocks > 0


class _Stop(Exception):  # noqa: N818 - it is a signal, not an error
    """The layer was reached: compute nothing more."""


class _Hook:
    """A sleeping hook. It holds only plain data, so a hooked model can be copied and pickled."""

    def __init__(self, path: str, side: str) -> None:
        self.path, self.side = path, side

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hook) and (self.path, self.side) == (other.path, other.side)

    def __hash__(self) -> int:
        return hash((self.path, self.side))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hear(self, values: Any) -> None:
        """Hand the first tensor of `values` to the open collectors of this place."""
        place = (self.path, self.side)
        here = [c for c in _active.get() if (c.point.path, c.point.side) == place]
        for collector in here:
            collector.raw = _first_tensor(values, collector.point)
            if collector.then is not None:
                collector.then(collector)
        if any(collector.stop for collector in here):
            raise _Stop

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if _anyone_listens and _active.get():
            self.hear((*args, *kwargs.values()) if self.side == "input" else output)


def is_listening() -> bool:
    """Whether a `capturing` block is open in this thread or context."""
    return bool(_active.get())


def _first_tensor(values: Any, point: CapturePoint) -> Tensor:
    if isinstance(values, Tensor):
        return values
    candidates = values.values() if isinstance(values, dict) else values
    for value in candidates if isinstance(candidates, Iterable) else ():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise CaptureError(
        f"the {point.side} of module {point.path!r} (layer {point.layer!r}) holds no tensor of "
        f"floating-point states, found {type(values).__name__}: choose another module"
    )


def find(model: nn.Module, layer: str) -> CapturePoint:
    """Return the place that `layer` means in `model`, and put a sleeping hook there.

    Args:
        model: a causal language model of transformers.
        layer: `att` (input of the last layer's feed-forward sublayer, after the norm before it),
            `ffn` (output of the last layer), `final` (input of the output embedding), a dotted
            module path (what leaves that module) or a module path with `:input` (what enters it).

    Raises:
        CaptureError: the model has no such layer; the message names what it has.
    """
    point = locate(model, layer)
    arm(model, point)
    return point


def locate(model: nn.Module, layer: str) -> CapturePoint:
    """As `find`, without a hook."""
    return CapturePoint(layer, *_locate(model, layer))


def arm(model: nn.Module, point: CapturePoint) -> None:
    """Put the sleeping hook of `point` into `model`, unless it is there.

    `find` does it; again it is needed where the module was exchanged since, as resized embeddings
    and adapters do.
    """
    module, hook = _at(model, point.path), _Hook(point.path, point.side)
    if point.side == "input" and hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)
    elif point.side == "output" and hook not in module._forward_hooks.values():
        module.register_forward_hook(hook, with_kwargs=True)


def _at(model: nn.Module, path: str) -> nn.Module:
    """`model.get_submodule(path)`, several times faster: it is looked up at every step."""
    module: nn.Module | None = model
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return model.get_submodule(path) if module is None else module


def _locate(model: nn.Module, layer: str) -> tuple[str, Literal["input", "output"]]:
    if not isinstance(layer, str):
        raise CaptureError(f"layer is {layer!r}, expected one of {', '.join(LAYERS)}, or a path")
    if layer == "final":
        return _final(model), "input"
    if layer == "ffn":
        return _last_layer(model), "output"
    if layer == "att":
        return _feed_forward(model), "input"
    path, colon, side = layer.partition(":")
    if path and side in (("input", "output") if colon else ("",)):
        modules = dict(model.named_modules())
        if path in modules:
            return path, "input" if side == "input" else "output"
        near = get_close_matches(path, modules, n=3)
        hint = f" (near it: {', '.join(near)})" if near else ""
    else:
        hint = ""
    raise CaptureError(
        f"{_name(model)} has no layer {layer!r}{hint}: choose one of {', '.join(_offered(model))}, "
        "or the dotted path of a module, with ':input' for what enters it"
    )


def _offered(model: nn.Module) -> list[str]:
    offered = []
    for name, locate in (("att", _feed_forward), ("ffn", _last_layer), ("final", _final)):
        try:
            locate(model)
        except CaptureError:
            continue
        offered.append(name)
    return offered


def _final(model: nn.Module) -> str:
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    for path, module in model.named_modules():
        if head is not None and module is head:
            return str(path)
    raise CaptureError(f"{_name(model)} has no output embedding, so no layer 'final'")


def _last_layer(model: nn.Module) -> str:
    """Path of the last decoder layer: the end of the largest list as long as the model is deep."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise CaptureError(f"{_name(model)} has no config: expected a model of transformers")
    config = config.get_text_config(decoder=True)
    if config.model_type in _NO_PLAIN_LAYERS:
        raise CaptureError(
            f"{_name(model)} {_NO_PLAIN_LAYERS[config.model_type]}, so it has no layers 'att' and "
            "'ffn': choose 'final' or a module path"
        )
    # The decoder half of an encoder-decoder has a depth of its own.
    depth: int = next((getattr(config, n) for n in _DEPTHS if hasattr(config, n)), 0)
    lists = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth > 0
    }
    if not lists:
        raise CaptureError(f"{_name(model)} has no list of {depth} layers: name a module instead")
    # Where an encoder is as large as the decoder, the decoder comes later.
    path = max(reversed(lists), key=lambda path: lists[path])
    return f"{path}.{depth - 1}"


def _feed_forward(model: nn.Module) -> str:
    path = _last_layer(model)
    children = dict(model.get_submodule(path).named_children())
    for name in _FEED_FORWARD:
        if name in children:
            return f"{path}.{name}"
    raise CaptureError(
        f"{_name(model)} has no feed-forward sublayer in its last layer {path!r} (it has "
        f"{', '.join(children)}), so no layer 'att': choose 'ffn', 'final' or a module path"
    )


def _name(model: nn.Module) -> str:
    return type(model).__name__


class Listening:
    """Let all `collectors` hear while the block is open, in this thread or context only."""

    def __init__(self, collectors: Iterable[Collector]) -> None:
        self._collectors = collectors

    def __enter__(self) -> None:
        self._token = _active.set((*_active.get(), *self._collectors))
        _count(+1)

    def __exit__(self, *_: object) -> None:
        _count(-1)
        _active.reset(self._token)


@contextmanager
def capturing(point: CapturePoint, *, _stop: bool = False) -> Iterator[Collector]:
    """Collect what passes at `point` (from `find`) while the block is open; see `Listening`.

    Blocks nest: each hears its own point.
    """
    collector = Collector(point, _stop)
    with Listening([collector]):
        yield collector


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it every module is in the mode it was in.

    Submodules count one by one, for a frozen part may be in evaluation inside a model in training.
    With a wrapper go its memories that are modules: they follow it without being submodules.
    """
    memories = [getattr(module, "memories", None) for module in modules]
    followers = [one for found in memories if isinstance(found, tuple) for one in found]
    parts = [part for part in (*modules, *followers) if isinstance(part, nn.Module)]
    inner = [module for part in parts for module in part.modules()]
    training = [module.training for module in inner]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(inner, training, strict=True):
            module.training = mode


def has_other_hooks(model: nn.Module) -> bool:
    """Whether somebody else too has hooks in `model`, or accelerate moves its weights.

    transformers' own for `output_hidden_states`, which keep nothing in the model, do not count.
    """
    for module in model.modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        others = (hook for hook in hooks if not isinstance(hook, _Hook))
        if hasattr(module, "_hf_hook") or not all(map(_is_transformers, others)):
            return True
    return False


def _is_transformers(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


@torch.no_grad()
def states(model: nn.Module, point: CapturePoint, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """Return the states (B, T, D) at `point`, computing nothing after it.

    Args:
        model: the model that `find` was given; it should be in evaluation mode.
        point: from `find`.
        input_ids: (B, T) on the model's device.
        kwargs: more arguments of the model's forward, such as `attention_mask`.

    Raises:
        CaptureError: the forward ended without reaching the layer.
    """
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs.setdefault("use_cache", False)
    with capturing(point, _stop=True) as collector, suppress(_Stop):
        model(input_ids=input_ids, **kwargs)
    found_BTD = collector.states(input_ids.shape[0])
    if found_BTD is None:
        raise CaptureError(
            f"the forward of {_name(model)} never reached layer {point.layer!r} ({point.path!r})"
        )
    return found_BTD
