"""Several processes at one run: what they tell each other, and how they end together.

Every process of a launch (``accelerate launch``, ``torchrun``) goes through the same program. Work
is split where a function below says so and repeated elsewhere; files belong to the main process.
With one process every function here is what its name says of a single one, at no cost.

What processes exchange carries failures along: where one has failed, all others learn of it at
their next exchange, instead of waiting for it.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from unlearn.errors import BadInput, UnlearnError

T = TypeVar("T")
S = TypeVar("S")

PATIENCE = timedelta(days=7)  # others wait while the main process works alone, as long as it takes
HEARD = 60.0  # seconds a failed process waits for the others to listen
BUCKET = 1 << 26  # numbers summed in one message

_alone = False  # the others are not there: this process works for all of them
_talk: dist.ProcessGroup | None = None  # what is told travels apart from weights and gradients
_SAID = "unlearn/said"


class Lost(UnlearnError, RuntimeError):
    """Another process ended for a reason of its own; what is finished is kept."""


@dataclass(frozen=True)
class _Failure:
    error: UnlearnError


# ------------------------------------------------------------------------------ who is there


def world() -> int:
    """Number of processes at this work."""
    return dist.get_world_size() if not _alone and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if not _alone and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether files and the user are this process's business."""
    return rank() == 0


def connect() -> bool:
    """Meet the other processes of this launch; False when there are none.

    Every process takes the GPU of its local number, where there are any.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    global _talk
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # every process reads all weights: transformers may otherwise leave that to one of them
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend)
    if _talk is None:
        _talk = dist.new_group(backend="gloo", timeout=PATIENCE)
    return True


# ------------------------------------------------------------------------------ what is told


def _everyone(value: Any) -> list[Any]:
    """What every process brought, by rank; raises the failure that one brought instead."""
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=_talk)
    for brought in found:
        if isinstance(brought, _Failure):
            brought.error.add_note(_TOLD)
            raise brought.error
    return found


_TOLD = "All processes know."


def on_main(work: Callable[[], T]) -> T:
    """``work()``, done by the main process alone while the others wait; all get the result."""
    global _alone
    if world() == 1:
        return work()
    found: list[Any] = [None]
    if is_main():
        _alone = True
        try:
            found = [work()]
        finally:
            _alone = False
    _everyone(None)
    dist.broadcast_object_list(found, 0, group=_talk)
    result: T = found[0]
    return result


def spread(work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """``work(item)`` of every item, in order, each done by one process and known to all.

    What ``work`` returns must be in CPU memory.

    Raises:
        UnlearnError: what ``work`` raised in one process, in all of them.
    """
    if world() == 1:
        yield from map(work, items)
        return
    left = iter(items)
    while some := list(islice(left, world())):
        mine: Any = None
        try:
            mine = work(some[rank()]) if rank() < len(some) else None
        except UnlearnError as error:  # the others may go on without this, and not alone
            mine = _Failure(error)
        yield from _everyone(mine)[: len(some)]


def summed(numbers: Sequence[float]) -> list[float]:
    """Each number summed over the processes."""
    if world() == 1:
        return list(numbers)
    return [math.fsum(column) for column in zip(*_everyone(list(numbers)), strict=True)]


def tensors_of_main(path: Path) -> dict[str, Tensor]:
    """The tensors of the main process's safetensors file, one message each."""
    names: list[str] = on_main(lambda: _read(path, lambda file: list(file.keys())))
    return {
        name: on_main(lambda name=name: _read(path, lambda file: file.get_tensor(name)))  # type: ignore[misc]
        for name in names
    }


def _read(path: Path, what: Callable[[Any], T]) -> T:
    with safe_open(path, "pt") as file:
        return what(file)


# ------------------------------------------------------------------------------ data parallel


def dealt(indices: Sequence[int], size: int, *, equally_often: bool) -> list[list[int]]:
    """This process's share of a step, in micro-batches of at most ``size``.

    Shares differ by at most one example; neighbours go to different processes, so that examples
    sorted by length make equal work. A share may be empty.

    Args:
        indices: of the whole step.
        size: of a micro-batch.
        equally_often: every process gets equally many micro-batches, the last perhaps empty.
    """
    share = list(indices[rank() :: world()])
    pieces = math.ceil(len(share) / size)
    found = [p.tolist() for p in torch.tensor(share).chunk(pieces)] if share else []
    most = math.ceil(math.ceil(len(indices) / world()) / size)
    return found + [[]] * (most - len(found) if equally_often else 0)


def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Every gradient becomes its sum over the processes.

    A parameter that no process has a gradient for has none afterwards.
    """
    if world() == 1:
        return
    here = [p.grad is not None for p in parameters]
    anywhere = [any(column) for column in zip(*_everyone(here), strict=True)]
    found = [p for p, some in zip(parameters, anywhere, strict=True) if some]
    for p in found:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    _flat([p.grad for p in found if p.grad is not None], dist.all_reduce)


def same(tensors: Iterable[Tensor]) -> None:
    """Every tensor becomes the main process's, in place."""
    if world() > 1:
        _flat([t.detach() for t in tensors], lambda flat: dist.broadcast(flat, 0))


def added(tensors: Iterable[Tensor]) -> None:
    """Every tensor becomes its sum over the processes, in place."""
    if world() > 1:
        _flat(list(tensors), dist.all_reduce)


def averaged(tensors: Iterable[Tensor]) -> None:
    """Every tensor becomes its mean over the processes, in place."""
    values = list(tensors)
    added(values)
    if world() > 1:
        for value in values:
            value /= world()


def _flat(tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> None:
    """Run ``collective`` on the tensors of each precision end to end, not too many at a time."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        bucket: list[Tensor] = []
        queue = [t for t in tensors if t.dtype is dtype]
        for place, tensor in enumerate(queue):
            bucket.append(tensor)
            if place + 1 == len(queue) or sum(t.numel() for t in bucket) >= BUCKET:
                flat = torch.cat([t.reshape(-1) for t in bucket])
                collective(flat)
                parts = torch.split(flat, [t.numel() for t in bucket])
                for one, part in zip(bucket, parts, strict=True):
                    one.copy_(part.view_as(one))
                bucket = []


# ------------------------------------------------------------------------------ sharded


def shards() -> bool:
    """Whether the launch asks for FSDP.

    Raises:
        BadInput: in its first version.
    """
    if world() == 1 or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return False
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise BadInput("FSDP is supported in its second version: set fsdp_version to 2")
    return True


class _Root(nn.Module):
    """A model with whatever is computed from it as one forward pass.

    The output layer runs inside the loss, and hidden-layer objectives end the model's own forward
    pass early; here both happen while the root's parameters are whole.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.model)


@contextmanager
def sharded(
    model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, *, bf16: bool
) -> Iterator[Callable[..., Any]]:
    """Every process keeps its part of each parameter (FSDP2) while the block lasts.

    Inside, the parameters of ``model`` are DTensors, and the model runs through the yielded
    function. Gradients are means over the processes. Afterwards the same parameter objects are
    whole again on every process; after an error they have shapes, but no values.

    Args:
        model: the same on every process.
        blocks: gathered one at a time; what is outside them is gathered for the whole pass.
        device: of the model.
        bf16: compute in bfloat16; gradients are still reduced in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    mesh = init_device_mesh(device.type, (world(),))
    share = partial(fully_shard, mesh=mesh, mp_policy=half if bf16 else MixedPrecisionPolicy())
    before = [(module, type(module), _copied(module)) for module in model.modules()]
    whole = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in whole.items()}
    root = _Root(model)
    for block in blocks:
        if next(block.parameters(), None) is not None:
            share(block)
    share(root)
    for p in whole.values():
        p.data = p.data.new_empty(0)
    parts: dict[str, Any] = dict(model.named_parameters())
    finished = False
    try:
        yield root
        finished = True
    finally:
        for name, p in whole.items():
            p.data = parts[name].detach().full_tensor() if finished else p.new_empty(shapes[name])
        for module, kind, fields in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(fields)


def _copied(module: nn.Module) -> Mapping[str, Any]:
    """What makes a module: hooks, parameters, members."""
    return {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()}


# ------------------------------------------------------------------------------ ending


@contextmanager
def together() -> Iterator[None]:
    """The processes of a launch work on one thing: an error of one is an error of all.

    Raises:
        Lost: another process failed unexpectedly.
        UnlearnError: what one of them raised on purpose.
    """
    if _alone or not connect():
        yield
        return
    try:
        _everyone(None)  # nobody failed before
        yield
        _everyone(None)
    except BaseException as error:
        if _TOLD in getattr(error, "__notes__", ()):
            raise
        board = dist.distributed_c10d._get_default_store()
        if board.check([_SAID]):  # so this is a broken connection, and needs no words
            raise SystemExit(1) from error
        _tell(error, board)
        if is_main() or isinstance(error, UnlearnError):
            raise
        raise _lost(error) from error


def _lost(error: BaseException) -> UnlearnError:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return Lost(
        f"process {rank()} of {world()} failed ({what}). What was finished is kept: the same "
        "command goes on from there"
    )


def _tell(error: BaseException, board: Any) -> None:
    """Bring a failure to the others, who may never come: they may wait inside a forward pass."""
    told = error if isinstance(error, UnlearnError) else _lost(error)

    def bring() -> None:
        with suppress(UnlearnError, RuntimeError):  # ours comes back; or they are gone
            _everyone(_Failure(told))

    thread = Thread(target=bring, daemon=True)
    thread.start()
    thread.join(HEARD)
    if thread.is_alive() and not is_main():
        board.set(_SAID, "")
        print(f"Error: {told}", file=sys.__stderr__, flush=True)
        os._exit(1)  # the launcher ends all


@contextmanager
def launched() -> Iterator[None]:
    """The whole program of one process of a launch: only the main process is heard.

    The others end with it and never by a code of their own, so that a launcher which stops
    everything at the first failure does not cut off its last word. With several processes nothing
    after this block is run.
    """
    if not connect():
        yield
        return
    heard, code = io.StringIO(), 0
    out, err = (sys.stdout, sys.stderr) if is_main() else (io.StringIO(), heard)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        except SystemExit as error:
            code = int(error.code or 0) if is_main() else 0
    done = " ".join(heard.getvalue().strip().splitlines()[-1:])
    with suppress(UnlearnError, RuntimeError):  # who is still at work learns that this one is not
        _everyone(_Failure(Lost(f"process {rank()} of {world()} ended before the others: {done}")))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the threads of connections do not always survive an orderly end
