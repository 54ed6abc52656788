"""Ridge regression that learns rows and forgets them, exactly and at a fixed cost.

    W = argmin |Y - X W|^2 + gamma |W|^2 = (G + gamma I)^-1 C,    G = X'X,  C = X'Y

G and C are sums over rows: learning adds a row's terms, forgetting subtracts them, in any order.
Whatever came and went, W is that of ridge regression on the rows that are left, up to rounding.
Memory and time do not depend on how many rows were ever seen.

Only W is needed after a request, so the Cholesky factor L of A = G + gamma I is reused. With the
rows P that came (sign +1) or went (-1) since A was factored, S the diagonal matrix of their signs,
and W0 the solution then (Woodbury):

    V = A^-1 P',   M = S + P V,   W = W0 + V M^-1 (Y_P - P W0)

A request of b rows costs 2 d^2 b for its columns of V. With more than d/8 rows pending, A is
factored anew: d^3 / 3. Rows X_f can be forgotten only if I - H is positive definite, H = X_f A^-1
X_f': their leverages must be below 1. Where its smallest eigenvalue is below 1e-6, subtracting and
factoring anew is more accurate, and done.

The recursion for A^-1 itself, which analytic continual learning is usually written with, starts
from I / gamma and loses half of the digits there. Sums and factors keep them: the relative error is
about 1e-16 times the condition number of A, in which the largest rows ever learned count, too.
Everything is float64, on the CPU or a CUDA device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unlearn.errors import BadInput

PENDING = 8  # rows that may wait for a new factorisation: 1/8 of the width
CLEARANCE = 1e-6  # smallest eigenvalue of I - H that Woodbury's identity is trusted with
TABLES, SLOTS = 4, 1 << 20

Naming = Callable[[int], str]
Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


@dataclass
class Ridge:
    """Ridge regression onto one-hot labels, as sums over the rows learned and not forgotten.

    All columns are penalised alike; an intercept is a column of ones like any other.

    Attributes:
        gram: X'X, (width, width), float64.
        cross: X'Y, (width, classes), float64.
        counts: rows of every class, (classes,), int64.
        gamma: the penalty, above 0.
    """

    gram: Tensor
    cross: Tensor
    counts: Tensor
    gamma: float
    _base: _Factored | None = field(default=None, repr=False, compare=False)

    @classmethod
    def empty(
        cls, width: int, classes: int, gamma: float, device: torch.device | str = "cpu"
    ) -> Ridge:
        """A regression that has seen no row."""
        return cls(
            torch.zeros(width, width, dtype=torch.float64, device=device),
            torch.zeros(width, classes, dtype=torch.float64, device=device),
            torch.zeros(classes, dtype=torch.long, device=device),
            gamma,
        )

    def __getstate__(self) -> dict[str, Any]:
        # an old factor and pending rows still show what was forgotten: they are never written
        return {**self.__dict__, "_base": None}

    @property
    def rows(self) -> int:
        """How many rows are learned and not forgotten."""
        return int(self.counts.sum())

    def learn(self, rows: Tensor, labels: Tensor) -> None:
        """Add rows.

        Args:
            rows: (n, width), float64.
            labels: columns of the targets, (n,), int64.

        Raises:
            BadInput: a value is not finite; nothing was learned.
        """
        if not bool(torch.isfinite(rows.square().sum())):
            raise BadInput(
                "the rows to learn hold values that are not finite, or too large to be squared: "
                "leave them out"
            )
        if self._base is not None and self._base.has_room(len(rows)):
            self._base.append(self._base.beside(rows), self._one_hot(labels), 1.0)
        else:
            self._base = None
        self._add(rows, labels, 1)

    def forget(self, rows: Tensor, labels: Tensor, name: Naming = "row {}".format) -> None:
        """Take rows back; what remains is as if they had never been there.

        Args:
            rows: (n, width), float64, as they were learned.
            labels: (n,), int64.
            name: what messages call row i.

        Raises:
            BadInput: the rows cannot have been learned: more of a class than there are, or a
                leverage of 1 or more. Nothing was forgotten.
        """
        self._check_counts(self._per_class(labels))
        if self._forget_through_factor(rows, labels):
            return
        gone = Ridge.empty(len(self.gram), len(self.counts), self.gamma, self.gram.device)
        gone.learn(rows, labels)
        try:
            self.subtract(gone)
        except BadInput as error:
            base = self._factored()
            over = (base.hat(base.beside(rows)).diagonal() >= 1).nonzero()[:, 0].tolist()
            first = f"; the first with a leverage of 1 or more is {name(over[0])}" if over else ""
            raise BadInput(f"{error}{first}") from error

    def subtract(self, gone: Ridge) -> None:
        """Take back all rows that another regression of the same shape has learned.

        Raises:
            BadInput: they cannot all have been learned here. Nothing was forgotten.
        """
        self._check_counts(gone.counts)
        gram, cross = self.gram - gone.gram, self.cross - gone.cross
        base = _factored(gram, self.gamma, cross)
        if base is None:
            raise BadInput(
                "some of the rows to forget were never learned, or are forgotten already: they "
                "reach further than all that was learned; pass rows as they were learned"
            )
        self.gram, self.cross, self._base = gram, cross, base
        self.counts = self.counts - gone.counts
        self._clear()

    def weights(self) -> Tensor:
        """W, (width, classes); exactly 0 for a class without rows.

        Raises:
            BadInput: gamma is too small for G in float64.
        """
        return self._factored().solution() * (self.counts > 0)

    def grow(self, classes: int) -> None:
        """Append classes that have no rows yet."""
        self.counts = torch.nn.functional.pad(self.counts, (0, classes))
        self.cross = torch.nn.functional.pad(self.cross, (0, classes))
        self._base = None

    def drop_empty(self) -> Tensor:
        """Give up the columns of classes without rows; return the indices of those that stay."""
        kept = self.counts.nonzero()[:, 0]
        if len(kept) < len(self.counts):
            self.cross, self.counts, self._base = self.cross[:, kept], self.counts[kept], None
        return kept

    def _forget_through_factor(self, rows: Tensor, labels: Tensor) -> bool:
        """Whether Woodbury's identity could serve the request, accurately."""
        if len(rows) > _room(self.gram):
            return False
        base = self._factored()
        if not base.has_room(len(rows)):
            self._base = None
            base = self._factored()
        more = base.beside(rows)
        clearance = torch.eye(len(rows)).to(rows) - base.hat(more)
        if not bool((torch.linalg.eigvalsh(clearance) >= CLEARANCE).all()):
            return False
        base.append(more, self._one_hot(labels), -1.0)
        self._add(rows, labels, -1)
        self._clear()
        return True

    def _add(self, rows: Tensor, labels: Tensor, sign: int) -> None:
        self.gram.addmm_(rows.T, rows, alpha=sign)
        self.cross.T.index_add_(0, labels, rows, alpha=sign)  # far faster than over columns
        self.counts += sign * self._per_class(labels)

    def _clear(self) -> None:
        """What is zero but for rounding becomes zero."""
        self.cross[:, self.counts == 0] = 0.0
        if self.rows == 0:
            self.gram.zero_()
            self._base = None

    def _factored(self) -> _Factored:
        if self._base is None:
            self._base = _factored(self.gram, self.gamma, self.cross)
        if self._base is None:
            raise BadInput(
                f"gamma {self.gamma:g} is too small beside the features: X'X + gamma I is singular "
                "in float64; use a larger gamma"
            )
        return self._base

    def _one_hot(self, labels: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(labels, len(self.counts)).to(self.cross)

    def _per_class(self, labels: Tensor) -> Tensor:
        return torch.bincount(labels, minlength=len(self.counts))

    def _check_counts(self, going: Tensor) -> None:
        for k in (going > self.counts).nonzero()[:, 0].tolist():
            raise BadInput(
                f"{int(going[k])} rows of class number {k} are to be forgotten and "
                f"{int(self.counts[k])} are there: some were never learned, or are forgotten "
                "already; pass rows as they were learned"
            )


@dataclass
class _Factored:
    """The solution at the last factorisation, and the rows that came and went since.

    Attributes:
        factor: L with L L' = A, (d, d), lower.
        start: W0, (d, c).
        rows: P, (p, d).
        targets: Y_P, (p, c).
        reach: V = A^-1 P', (d, p).
        inner: M = S + P V, (p, p).
    """

    factor: Tensor
    start: Tensor
    rows: Tensor
    targets: Tensor
    reach: Tensor
    inner: Tensor

    def has_room(self, rows: int) -> bool:
        """Whether so many more rows may wait."""
        return len(self.rows) + rows <= _room(self.factor)

    def beside(self, rows: Tensor) -> _Beside:
        """What more rows have to do with A, as factored, and with the rows that wait."""
        reach = _solved(self.factor, rows.T)
        return _Beside(rows, reach, self.rows @ reach, rows @ reach)

    def hat(self, more: _Beside) -> Tensor:
        """H = X_f A^-1 X_f' with A as it is now, (n, n); its diagonal holds the leverages."""
        known: Tensor = torch.linalg.solve(self.inner, more.across)
        return more.own - more.across.T @ known

    def append(self, more: _Beside, targets: Tensor, sign: float) -> None:
        """Rows that came (sign 1) or went (-1)."""
        own = more.own + sign * torch.eye(len(more.own)).to(more.own)
        above = torch.cat((self.inner, more.across), 1)
        self.inner = torch.cat((above, torch.cat((more.across.T, own), 1)))
        self.rows = torch.cat((self.rows, more.rows))
        self.targets = torch.cat((self.targets, targets))
        self.reach = torch.cat((self.reach, more.reach), 1)

    def solution(self) -> Tensor:
        """W = W0 + V M^-1 (Y_P - P W0)."""
        if len(self.rows) == 0:
            return self.start
        surprise: Tensor = torch.linalg.solve(self.inner, self.targets - self.rows @ self.start)
        return self.start + self.reach @ surprise


class _Beside(NamedTuple):
    """More rows, (n, d); their columns of V, (d, n); P V, (p, n); and X_f V, (n, n)."""

    rows: Tensor
    reach: Tensor
    across: Tensor
    own: Tensor


def _factored(gram: Tensor, gamma: float, cross: Tensor) -> _Factored | None:
    """Factor A = G + gamma I; None where it is not positive definite."""
    matrix = gram.clone()
    matrix.diagonal().add_(gamma)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    start = _solved(factor, cross)
    d, c = cross.shape
    none = cross.new_zeros
    return _Factored(factor, start, none(0, d), none(0, c), none(d, 0), none(0, 0))


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    """A^-1 right; torch.cholesky_solve would copy the factor first, which costs more."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    whole: Tensor = torch.linalg.solve_triangular(factor.T, half, upper=True)
    return whole


def _room(matrix: Tensor) -> int:
    return max(1, len(matrix) // PENDING)


@dataclass
class Sketch:
    """How often each record was learned and not forgotten: a counting Bloom filter of fixed size.

    A record marks one counter in each of t tables of m slots, at places a keyed hash of its content
    gives (Bloom 1970; Fan, Cao, Almeida and Broder 2000). A record that is there is
    never taken for a stranger. A stranger is taken for a known record with probability
    (1 - (1 - 1/m)^n)^t, n records being there: with 4 tables of 2^20 slots 5e-6 at 50,000 records,
    7e-5 at 100,000, 0.14 at a million (:meth:`false_acceptance`). Removing a stranger that was
    accepted takes the marks of others.

    Whoever has counters and salt can ask of a record whether it is there: keep them as private as
    the data.

    Attributes:
        counters: (tables, slots), int32, on the CPU.
        salt: key of the hash, at most 64 bytes; sketches with different salts cannot be compared.
    """

    counters: Tensor
    salt: bytes

    @classmethod
    def empty(cls, salt: bytes) -> Sketch:
        """A sketch of nothing."""
        return cls(torch.zeros(TABLES, SLOTS, dtype=torch.int32), salt)

    def add(self, contents: Iterable[bytes]) -> None:
        """Mark records as learned."""
        self._mark(self._places(contents), 1)

    def remove(self, contents: Iterable[bytes], name: Naming = "row {}".format) -> None:
        """Take the marks of records back.

        Raises:
            BadInput: from :meth:`check`. Nothing was removed.
        """
        places = self._places(contents)
        self._check(places, name)
        self._mark(places, -1)

    def check(self, contents: Iterable[bytes], name: Naming = "row {}".format) -> None:
        """Refuse records that are not there, or not as often as they are named.

        Args:
            contents: what :meth:`add` was given.
            name: what messages call record i.

        Raises:
            BadInput: how many were never learned or are forgotten already, and the first of them.
        """
        self._check(self._places(contents), name)

    def false_acceptance(self, records: int) -> float:
        """Probability that a stranger passes for known when so many records are there."""
        tables, slots = self.counters.shape
        return float((1 - (1 - 1 / slots) ** records) ** tables)

    def _places(self, contents: Iterable[bytes]) -> Places:
        """Slots in every table, (n, tables)."""
        tables, slots = self.counters.shape
        hashes = (
            hashlib.blake2b(content, digest_size=8 * tables, key=self.salt).digest()
            for content in contents
        )
        words = np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, tables)
        return (words % np.uint64(slots)).astype(np.int64)

    def _mark(self, places: Places, by: int) -> None:
        np.add.at(self.counters.numpy(), (np.arange(places.shape[1]), places), by)

    def _check(self, places: Places, name: Naming) -> None:
        flat = places + np.arange(places.shape[1]) * self.counters.shape[1]
        slots, which = np.unique(flat, return_inverse=True)
        left = self.counters.numpy().reshape(-1)[slots]
        strangers = []
        for i, own in enumerate(which.reshape(flat.shape)):
            if left[own].min() > 0:
                left[own] -= 1  # a record named twice must be there twice
            else:
                strangers.append(i)
        if strangers:
            raise BadInput(
                f"{len(strangers)} of the {len(places)} records to forget were never learned, or "
                f"are forgotten already; the first is {name(strangers[0])}: nothing was forgotten, "
                "pass records exactly as they were learned, with their labels"
            )
