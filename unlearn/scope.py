r"""Which parameters may move.

``all``, ``head`` (the output layer), ``lora`` (low-rank adapters on every linear layer but the
output, merged into the weights at the end; Hu et al. 2021, arXiv 2106.09685), ``lora:PATTERN`` (on
the layers whose names match; ``lora:ffn``: on the feed-forward layers of every block),
``saliency:0.5`` (the half of all weights with the largest gradient on the forget set, one by one;
Fan et al. 2024, arXiv 2310.12508), or regular expressions searched in parameter names, with spaces
between them; ``experts`` is short for the routed experts of a mixture. One that ends in ``@3`` lets
only entry 3 along the first dimension move, such as one expert of a fused tensor:
``experts\.down_proj@3``. Everything else stays bit-identical.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from unlearn.errors import BadInput, Unsupported, did_you_mean
from unlearn.interface import Subject
from unlearn.tasks.base import Task
from unlearn.weights import fingerprint_tensors

WORDS = ("all", "head", "lora")
SALIENCY = "saliency:"
BETWEEN = "between"
ENTRY = re.compile(r"@\d+$")
EXPERTS = r"\.experts\."


@dataclass(frozen=True)
class Moving:
    """A model and those of its parameters that an optimiser may move, by name.

    An entry of a fused tensor is a parameter of its own here, called ``name@entry``, and so are the
    salient weights of a tensor, ``name@salient``: no momentum or weight decay reaches their
    neighbours. Who moves them calls :meth:`settle`, which writes them where the model reads.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    parts: tuple[_Part, ...] = ()

    def settle(self) -> None:
        """Make the model use the parts as they are now."""
        for part in self.parts:
            part.settle()


@contextmanager
def moving(
    subject: Subject,
    task: Task,
    scope: str,
    rank: int,
    alpha: float,
    seed: int,
    adapter: Path | None = None,
    salient: Mapping[str, Tensor] | None = None,
) -> Iterator[Moving]:
    """Restrict training to ``scope``; on leaving, adapters are merged and all is as it was.

    Args:
        subject: whose model is trained in place.
        task: knows the output layer.
        scope: all, head, lora, lora:PATTERN, saliency:SHARE, or patterns.
        rank: of the adapters, for lora.
        alpha: the adapters' scale is ``alpha / rank``, for lora.
        seed: of the adapters' initial values, for lora.
        adapter: directory to save the trained adapters in, for lora, as peft does; beside them
            stand the fingerprints of the weights without them and with them.
        salient: which weights move, by parameter name, as boolean masks, for saliency.

    Raises:
        BadInput: no parameter matches, or an entry does not exist.
        Unsupported: lora without peft or linear layers, or experts of a dense model.
    """
    model = subject.model
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    bare = fingerprint_tensors(model.state_dict()) if adapter else ""
    lora = is_lora(scope)
    adapted = _with_adapters(model, task, scope, rank, alpha, seed) if lora else model
    whole, entries = (
        _salient(model, salient)
        if scope.startswith(SALIENCY)
        else _chosen(adapted, task, "lora" if lora else scope)
    )
    kept = {id(p) for p in (*whole.values(), *(owner for owner, _ in entries.values()))}
    for parameter in adapted.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    parts = {name: _Part(owner, entry) for name, (owner, entry) in entries.items()}
    done = False
    try:
        moved = whole | {name: part.parameter for name, part in parts.items()}
        yield Moving(adapted, moved, tuple(parts.values()))
        done = True
    finally:
        for part in parts.values():
            part.handle.remove()
        if lora:
            if adapter and done:
                adapted.save_pretrained(adapter)  # type: ignore[operator]
            adapted.merge_and_unload()  # type: ignore[operator]
            if adapter and done:
                merged = fingerprint_tensors(model.state_dict())
                (adapter / BETWEEN).write_text(f"{bare} {merged}")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, True))


class _Part:
    """Some of a tensor as a parameter of its own, with its share of every gradient.

    Args:
        owner: the tensor.
        place: an entry along the first dimension, or a boolean mask of single weights.
    """

    def __init__(self, owner: nn.Parameter, place: int | Tensor) -> None:
        self.owner, self.place = owner, place
        owner.grad = None  # one that was left there would be taken for the first of ours
        self.parameter = nn.Parameter(owner.detach()[place])  # a view only where one entry moves
        self.handle = owner.register_post_accumulate_grad_hook(self.take)  # type: ignore[no-untyped-call]

    def take(self, owner: Tensor) -> None:
        """Add the part's gradient to what there is, and drop that of the others."""
        if owner.grad is not None:
            share = owner.grad[self.place]
            own = self.parameter.grad
            self.parameter.grad = share.clone() if own is None else own + share
            owner.grad = None

    def settle(self) -> None:
        """Write the part where the model reads it."""
        with torch.no_grad():
            self.owner[self.place] = self.parameter


Entries = dict[str, tuple[nn.Parameter, int | Tensor]]


def is_lora(scope: str | None) -> bool:
    """Whether this scope trains adapters."""
    return scope is not None and scope.split(":")[0] == "lora"


def share_of(scope: str) -> float:
    """The share of the weights that ``saliency:SHARE`` lets move.

    Raises:
        BadInput: not a number above 0 and at most 1.
    """
    text = scope.removeprefix(SALIENCY)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise BadInput(f"scope {scope!r}: the share must be above 0 and at most 1, as saliency:0.5")
    return share


def _salient(
    model: nn.Module, masks: Mapping[str, Tensor] | None
) -> tuple[dict[str, nn.Parameter], Entries]:
    if masks is None:
        raise Unsupported("this method has no gradients of a forget set to take saliency from")
    named = dict(model.named_parameters())
    # in the model's order, whatever that of a file: optimisers number their state
    chosen = {name: masks[name] for name in named if bool(masks[name].any())}
    whole = {name: named[name] for name, mask in chosen.items() if bool(mask.all())}
    rest = chosen.keys() - whole.keys()
    return whole, {f"{n}@salient": (named[n], m) for n, m in chosen.items() if n in rest}


def _chosen(model: nn.Module, task: Task, scope: str) -> tuple[dict[str, nn.Parameter], Entries]:
    """The parameters that move as a whole, and those of which one entry does."""
    named = dict(model.named_parameters())
    if scope == "all":
        return named, {}
    if scope == "lora":
        return {name: p for name, p in named.items() if "lora_" in name}, {}
    if scope == "head":
        head = {id(p) for p in task.output_layer(model).parameters()}
        return {name: p for name, p in named.items() if id(p) in head}, {}
    whole: dict[str, nn.Parameter] = {}
    entries: Entries = {}
    for name, entry in _selected(scope, named):
        if entry is None:
            whole[name] = named[name]
        elif not named[name].ndim or entry >= len(named[name]):
            shape = tuple(named[name].shape)
            raise BadInput(f"scope {scope!r}: {name} of shape {shape} has no entry {entry}")
        elif any(owner is named[name] for owner, _ in entries.values()):
            raise BadInput(f"scope {scope!r} selects two entries of {name}: select one or all")
        else:
            entries[f"{name}@{entry}"] = named[name], entry
    if both := [name for name in entries if name.rpartition("@")[0] in whole]:
        raise BadInput(f"scope {scope!r} selects {both[0]} and all of that tensor: drop one")
    return whole, entries


def in_scope(model: nn.Module, task: Task, scope: str) -> dict[str, nn.Parameter]:
    """The parameters a scope names, by name, each as a whole.

    Args:
        model: the network.
        task: knows the output layer.
        scope: all, head, experts or patterns.

    Raises:
        BadInput: no parameter matches.
        Unsupported: lora, saliency, or entries of tensors.
    """
    if is_lora(scope) or scope.startswith(SALIENCY) or any(map(ENTRY.search, scope.split())):
        raise Unsupported(
            f"scope {scope}: this method moves whole weights; use all, head, patterns"
        )
    whole, _ = _chosen(model, task, scope)
    return {name: p for name, p in model.named_parameters() if name in whole}


def matching(scope: str, names: Iterable[str]) -> list[str]:
    """The names a scope selects; every name for words that need the weights to tell.

    Raises:
        BadInput: not regular expressions, or one matches nothing.
        Unsupported: ``experts``, and there are none.
    """
    names = list(names)
    if scope.startswith(SALIENCY):
        share_of(scope)
    if scope in (*WORDS, "lora:ffn") or scope.startswith(SALIENCY):
        return names
    if is_lora(scope):
        scope = scope.removeprefix("lora:")
    found = {name for name, _ in _selected(scope, names)}
    return [name for name in names if name in found]


def _selected(scope: str, names: Iterable[str]) -> Iterator[tuple[str, int | None]]:
    """Parameter names, each with the entry that moves; None: all of it."""
    names = list(names)
    for word in scope.split() or [scope]:
        text, _, entry = word.rpartition("@") if ENTRY.search(word) else (word, "", "")
        try:
            pattern = re.compile(EXPERTS if text == "experts" else text)
        except re.error as error:
            raise BadInput(f"scope {text!r} is not a regular expression: {error}") from error
        chosen = [name for name in names if pattern.search(name)]
        if not chosen and text == "experts":
            raise Unsupported("this model is not a mixture of experts: use another method or scope")
        if not chosen:
            raise BadInput(
                f"scope {text!r} matches no parameter: use all, head, lora, saliency:SHARE, "
                "experts or a pattern; "
                f"{did_you_mean(text, names[:8])}"
            )
        yield from ((name, int(entry) if entry else None) for name in chosen)


def feed_forward(model: nn.Module, task: Task) -> dict[str, list[str]]:
    """The feed-forward linear layers of every block, by block name: those with its widest side.

    Raises:
        Unsupported: no block has any.
    """
    found: dict[str, list[str]] = {}
    for block, module in task.layers(model).items():
        sides = {n: tuple(m.weight.shape) for n, m in module.named_modules() if _is_linear(m)}
        uneven = {n: shape for n, shape in sides.items() if len(set(shape)) > 1}
        widest = max((max(shape) for shape in uneven.values()), default=0)
        if names := [f"{block}.{n}" for n, shape in uneven.items() if widest in shape]:
            found[block] = names
    if not found:
        raise Unsupported(f"{type(model).__name__} has no blocks with feed-forward layers")
    return found


def last_blocks(model: nn.Module, task: Task, count: int) -> list[str]:
    """Names of the parameters and buffers of the last ``count`` blocks and of all behind them.

    Blocks without parameters do not count. Behind them is everything that the model lists later,
    and its output layer; weights that the output layer shares with the input are in front.

    Raises:
        Unsupported: the model has no blocks.
        BadInput: it has fewer.
    """
    layers = task.layers(model).items()
    blocks = [name for name, block in layers if next(block.parameters(), None) is not None]
    if not blocks:
        raise Unsupported(f"{type(model).__name__} has no blocks to tell first from last")
    if count > len(blocks):
        raise BadInput(f"k = {count}, and the model has {len(blocks)} blocks: choose no more")
    modules = dict(model.named_modules())
    names = list(modules)
    behind = [modules[name] for name in names[names.index(blocks[-count]) :]]
    chosen = {id(module) for module in (*behind, *task.output_layer(model).modules())}
    tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return [n for n in tensors if id(model.get_submodule(n.rpartition(".")[0])) in chosen]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _adaptable(model: nn.Module, task: Task, scope: str) -> list[str]:
    """Names of the layers that get adapters."""
    if scope == "lora:ffn":
        return [name for names in feed_forward(model, task).values() for name in names]
    head, patterns = task.output_layer(model), scope.removeprefix("lora").removeprefix(":").split()
    return [
        name
        for name, module in model.named_modules()
        if module is not head
        and (_is_linear(module) or isinstance(module, nn.Conv2d))
        and getattr(module, "groups", 1) == 1
        and (not patterns or any(re.search(text, f"{name}.weight") for text in patterns))
    ]


def _with_adapters(
    model: nn.Module, task: Task, scope: str, rank: int, alpha: float, seed: int
) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise Unsupported("scope lora needs peft: pip install 'unlearn-toolkit[lora]'") from error
    targets = _adaptable(model, task, scope)
    if not targets:
        raise Unsupported(f"{type(model).__name__} has no layers for adapters: use scope all")
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="|".join(map(re.escape, targets)), lora_dropout=0.0
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses names transformers will drop
        torch.manual_seed(seed)
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted
