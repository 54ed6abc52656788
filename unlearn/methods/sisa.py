"""SISA: sharded, isolated, sliced, aggregated training (Bourtoule et al. 2021, arXiv 1912.03817).

    shard(z) = h(z) mod S,  slice(z) = h'(z) mod R              h, h': a keyed hash of record z
    theta_k,0 drawn;  theta_k,r+1 = train(theta_k,r on slices 0 ... r of shard k)
    p(y | x) = 1/S sum_k p(y | x; theta_k,R)

The first request replaces the model by an ensemble of S networks trained on the retain set alone;
the forget set is never trained on. Every theta_k,r is kept as state: S R copies of the weights. A
later request finds the shards and slices whose records change, and trains only those shards again,
from the weights before the first such slice. Training a slice is a function of seed, shard, slice
and records alone, so the result is what training on the rest from scratch gives: on a CPU bit for
bit (each network is trained by one thread), on a GPU as far as its kernels are deterministic.

``epochs`` counts passes over a shard, all its slices together, so each slice is trained for
2 epochs / (R + 1) passes over the slices up to it, and the whole costs what `retrain` costs.
Forgetting one record costs (2R + 1) / (3R S) of that on average.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from threading import Event, Thread
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from unlearn import data, distributed
from unlearn.ensemble import Ensemble, shapes, single
from unlearn.errors import BadInput, UnlearnError, Unsupported
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Encoded, evaluating
from unlearn.training import Term, Training, descend, likelihood

SEED, SETTINGS, PARTS = "sisa.seed", "sisa.settings", "sisa.parts"
FREE = {"workers"}  # settings that do not change the weights
Weights = dict[str, Tensor]


class Part(NamedTuple):
    """One slice of one shard: positions of its records, ordered by hash, and a hash of the set."""

    records: list[int]
    fingerprint: str


def divide(hashes: Sequence[bytes], shards: int, slices: int) -> list[list[Part]]:
    r"""The parts ``[shard][slice]`` of a set; the order of its records does not matter.

    Args:
        hashes: 16 bytes per record.
        shards: S.
        slices: R.

    >>> [[part.records for part in shard] for shard in divide([bytes(16), b"\1" * 16], 2, 1)]
    [[[0]], [[1]]]
    """
    found: list[list[list[int]]] = [[[] for _ in range(slices)] for _ in range(shards)]
    for i in sorted(range(len(hashes)), key=hashes.__getitem__):
        shard, number = (int.from_bytes(half) for half in (hashes[i][:8], hashes[i][8:]))
        found[shard % shards][number % slices].append(i)
    return [
        [Part(some, data.fingerprint(hashes[i] for i in some)) for some in shard] for shard in found
    ]


@dataclass(frozen=True, kw_only=True)
class SISA(Training):
    """Train a network per shard of the data, and again only those that saw what must go."""

    shards: Annotated[
        int, Field(ge=1, description="S: networks, each with its part of the data"), Range(2, 10)
    ] = 5
    slices: Annotated[
        int, Field(ge=1, description="R: steps in which a shard grows, each of them kept")
    ] = 3
    workers: Annotated[
        int,
        Field(
            ge=1,
            description="processes that train shards at the same time, of one thread each; the "
            "weights do not depend on it",
        ),
    ] = 1
    init: Annotated[
        str | None, Field(description="checkpoint every network starts from; none: random weights")
    ] = None
    lr: Annotated[
        float,
        Field(gt=0, description="peak learning rate, in every slice"),
        Range(1e-4, 0.1, log=True),
    ] = 1e-3
    epochs: Annotated[
        float,
        Field(gt=0, description="passes over a shard, all its slices together"),
        Range(5.0, 60.0, log=True),
    ] = 20

    needs: ClassVar[Needs] = Needs(
        forget=Need.OPTIONAL,
        retain=Need.REQUIRED,
        state=Need.OPTIONAL,
        tasks=("classification",),
    )

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Train every shard, or at a later request those whose records change."""
        if self.workers > 1 and distributed.world() > 1:
            raise Unsupported("workers are processes of their own: launch sisa as a single one")
        later, retain = SEED in subject.note, request.retain_set()
        seed = int(subject.note[SEED]) if later else run.seed_of("sisa")
        inner = replace(run, seed=seed, adapter=None, resumable=False)
        parts = self._parts(retain, seed)
        if later:
            members = _members(subject)
            state = {name: value.cpu() for name, value in subject.state.items()}
            first = self._affected(subject.note, parts, self._parts(request.forget, seed))
        else:
            seeds = [inner.seed_of(f"initial weights {shard}") for shard in range(self.shards)]
            members = [self._initial(subject, one, run) for one in seeds]
            state = {
                f"sisa.{shard}.0.{name}": value
                for shard, member in enumerate(members)
                for name, value in _copied(member).items()
            }
            first = dict.fromkeys(range(self.shards), 0)
        for shard in first:
            _check_size(shard, parts[shard])
        for shard, found in self._all_trained(members, state, first, parts, retain, inner):
            members[shard].load_state_dict(_of(found, self.slices))
            state |= {
                f"sisa.{shard}.{name}": value.cpu()
                for name, value in found.items()
                if not name.startswith(f"{self.slices}.")
            }
        ensemble = Ensemble(members).to(run.device).eval()
        if later:
            run.note(self._told(first, parts))
        else:
            before, after = (_accuracy(m, retain, run) for m in (subject.model, ensemble))
            run.note(
                f"{self.shards} networks were trained on {len(retain):,} records, {self.slices} "
                f"copies of each are kept. Accuracy on the retain set: the original {before:.1%}, "
                f"the ensemble {after:.1%}."
            )
        note = {
            SEED: str(seed),
            SETTINGS: json.dumps(self._settings()),
            PARTS: json.dumps([[[len(p.records), p.fingerprint] for p in some] for some in parts]),
        }
        return replace(subject, model=ensemble).with_state(state, note)

    def trained(self, forget: int, retain: int) -> int:
        """A first request's, with shards of equal size; a later one trains a part of it."""
        settings = self._of_a_slice()
        sizes = [
            max(1, retain * (r + 1) // (self.shards * self.slices)) for r in range(self.slices)
        ]
        return self.shards * sum(settings.steps(n) * min(self.batch_size, n) for n in sizes)

    def _of_a_slice(self) -> SISA:
        return replace(self, epochs=2 * self.epochs / (self.slices + 1))

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in FREE}

    def _parts(self, examples: Encoded | None, seed: int) -> list[list[Part]]:
        hashes = []
        if examples is not None:
            content = examples.task.content
            hashes = data.record_hashes(examples.examples, content, f"sisa/{seed}".encode())
        return divide(hashes, self.shards, self.slices)

    def _initial(self, subject: Subject, seed: int, run: Run) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            start = single(run.initial_model(self.init))
        if shapes(start) != shapes(single(subject.model)):
            raise BadInput(
                "init is a checkpoint of another architecture: pass one of the same shape"
            )
        return start

    def _affected(
        self, note: Mapping[str, str], parts: list[list[Part]], leaving: list[list[Part]]
    ) -> dict[int, int]:
        """The first slice of every shard whose records are not those it was trained on.

        Raises:
            BadInput: other settings, or a retain set that lacks or adds more than the forget set.
        """
        own, kept = self._settings(), json.loads(note[SETTINGS])
        if other := [f"{k}={v}" for k, v in kept.items() if own.get(k) != v]:
            raise BadInput(
                "a later request trains as the first one did: this ensemble was trained with "
                f"{', '.join(other)}; pass the same"
            )
        first: dict[int, int] = {}
        for shard, known in enumerate(json.loads(note[PARTS])):
            for number, (count, fingerprint) in enumerate(known):
                part, gone = parts[shard][number], leaving[shard][number]
                if part.fingerprint == fingerprint:
                    continue
                if not 0 < count - len(part.records) <= len(gone.records):
                    raise BadInput(
                        "the retain set is not what this ensemble was trained on, less the forget "
                        f"set: slice {number} of shard {shard} has seen {count} records, of which "
                        f"{len(gone.records)} at most are to go, and the retain set has "
                        f"{len(part.records)} there; pass all that the last request retained, "
                        "without the records to forget"
                    )
                first.setdefault(shard, number)
        return first

    def _told(self, first: Mapping[int, int], parts: list[list[Part]]) -> str:
        """Which shards were trained again, and at what share of the cost of training them all."""
        if not first:
            return "No shard was ever trained on a record of the forget set: nothing changed."
        seen = [_ends(shard) for shard in parts]
        share = sum(sum(seen[k][r:]) for k, r in first.items()) / sum(map(sum, seen))
        expected = (2 * self.slices + 1) / (3 * self.slices * self.shards)
        again = ", ".join(f"{k} from slice {r}" for k, r in first.items())
        return (
            f"{len(first)} of {self.shards} shards were trained again ({again}), for {share:.0%} "
            f"of the cost of training all; for one record {expected:.0%} are to be expected."
        )

    def _all_trained(
        self,
        members: Sequence[nn.Module],
        state: Mapping[str, Tensor],
        first: Mapping[int, int],
        parts: list[list[Part]],
        retain: Encoded,
        run: Run,
    ) -> Iterator[tuple[int, Weights]]:
        """Every shard in ``first``, as it is finished; an interrupted run's are read back."""

        def one(shard: int, train: Callable[..., Weights]) -> tuple[int, Weights]:
            records = retain.select([i for part in parts[shard] for i in part.records])
            start = first[shard]
            members[shard].load_state_dict(_of(state, f"sisa.{shard}.{start}"))
            work = partial(
                train, self, members[shard], shard, start, records, _ends(parts[shard]), run
            )
            return shard, run.once(f"sisa-{shard}", work)

        if self.workers == 1:
            finished = (one(shard, _train) for shard in first)
            for done, found in enumerate(finished, 1):
                yield found
                run.progress.advance("train shards", done, len(first), {})
            return
        with _processes(self.workers) as (threads, elsewhere):
            futures = [threads.submit(one, shard, elsewhere) for shard in first]
            for done, future in enumerate(as_completed(futures), 1):
                yield future.result()
                run.progress.advance("train shards", done, len(first), {})


def _members(subject: Subject) -> list[nn.Module]:
    if not isinstance(subject.model, Ensemble):
        raise BadInput("the state of a sisa run is with a model that is none of its: pass that run")
    return list(subject.model.members)


def _train(
    settings: SISA,
    network: nn.Module,
    shard: int,
    first: int,
    records: Encoded,
    ends: Sequence[int],
    run: Run,
) -> Weights:
    """The weights after each slice from ``first`` on, as "slice.name"; after the last as "R.name".

    Args:
        settings: of the method.
        network: with the weights before that slice; trained in place.
        shard: its number.
        first: slice to begin with.
        records: of the shard, slice after slice.
        ends: how many of them each slice has come to.
        run: its seed is the one everything here follows from.
    """
    found: Weights = {}
    with _one_thread():
        for number in range(first, settings.slices):
            if ends[number] > 1:  # batch statistics need two
                term = Term("retain", records.select(range(ends[number])), likelihood, "unit")
                phase = f"shard{shard}slice{number}"
                once = settings._of_a_slice()
                descend(Subject(network), [term], once, run, phase=phase, dropout=True)
            found |= {f"{number + 1}.{name}": v for name, v in _copied(network).items()}
    return found


def _check_size(shard: int, parts: Sequence[Part]) -> None:
    if (size := _ends(parts)[-1]) < 2:
        raise BadInput(
            f"shard {shard} would be trained on {size} record{'s' * (size != 1)}: train an "
            "ensemble of fewer shards from the original model"
        )


def _ends(parts: Sequence[Part]) -> list[int]:
    """How many records a shard has after each slice."""
    sizes = [len(part.records) for part in parts]
    return [sum(sizes[: number + 1]) for number in range(len(sizes))]


def _of(tensors: Mapping[str, Tensor], prefix: object) -> Weights:
    start = f"{prefix}."
    return {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}


def _copied(model: nn.Module) -> Weights:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _accuracy(model: nn.Module, examples: Encoded, run: Run) -> float:
    hits = 0
    with evaluating(model):
        for indices in run.batches(examples, "accuracy"):
            batch = examples.batch(indices, run.device)
            hits += int(examples.task.predictions(model, batch).hits().sum())
    return hits / len(examples)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------- one process per shard


@contextmanager
def _processes(
    workers: int,
) -> Iterator[tuple[ThreadPoolExecutor, Callable[..., Weights]]]:
    """Threads, and :func:`_train` in a new process that the calling thread waits for.

    Whatever ends the block ends the processes.
    """
    spawn, stop = multiprocessing.get_context("spawn"), Event()
    running: list[Any] = []

    def elsewhere(
        settings: SISA, network: nn.Module, shard: int, first: int, records: Encoded,
        ends: Sequence[int], run: Run,
    ) -> Weights:  # fmt: skip
        rows = [dict(records.examples[i]) for i in range(len(records))]
        lean = replace(records.examples, rows=rows)
        work = settings, network, shard, first, lean, records.task, ends, run.seed, run.device
        try:  # whole tensors: handles to shared memory run out, and would be shared state
            packed = pickle.dumps(work)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise BadInput(
                f"the model or its processor cannot be sent to another process ({error}): pass "
                "workers=1"
            ) from error
        here, there = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_child, args=(there, packed), daemon=True)
        process.start()
        running.append(process)
        there.close()
        if stop.is_set():
            process.terminate()
        try:
            outcome = pickle.loads(here.recv_bytes())  # noqa: S301 - our own child's
        except EOFError as error:
            raise UnlearnError(
                f"the process that trained shard {shard} was killed, perhaps for lack of memory: "
                "use fewer workers"
            ) from error
        process.join()
        if isinstance(outcome, BaseException):
            raise outcome
        found: Weights = outcome
        return found

    threads = ThreadPoolExecutor(workers)
    try:
        yield threads, elsewhere
    finally:
        stop.set()
        threads.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()
        threads.shutdown()


def _child(there: Connection, packed: bytes) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    outcome: Weights | BaseException
    try:
        settings, network, shard, first, rows, task, ends, seed, device = pickle.loads(packed)  # noqa: S301 - our own parent's
        records, run = Encoded(rows, task), Run(task, seed, device)
        outcome = _train(settings, network, shard, first, records, ends, run)
    except Exception as error:
        error.add_note(f"In the process that trained a shard:\n{traceback.format_exc()}")
        outcome = error
    there.send_bytes(pickle.dumps(outcome))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
