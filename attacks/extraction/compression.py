"""Adversarial compression ratio: is a text memorised, in that a shorter prompt brings it out?

Schwarzschild et al. 2024 (arXiv 2404.15146, Definitions 3 and 4): with |.| counting tokens,

    ACR(y) = |y| / min {|x| : the model greedily continues x with y},

and y is memorised if ACR(y) > 1. Prompts are found by greedy coordinate gradient (``gcg.py``), so
what is found bounds the ratio from below. What is not found is *censored*: the ratio is then the
bound |y| / n of the longest prompt that was tried, and no value.

What differs from the authors' search over lengths (start at 5 tokens, up by 5 or down by 1, random
tokens each time, the same number of steps at each length): lengths double from ``FIRST`` until a
prompt is found, the last being |y| + 1, the first that leaves a text not memorised; then the
lengths between the longest given up and the shortest found are bisected. A length goes on from what
is there: from the last prompt of the length before, grown by random tokens, or from the shortest
prompt found, less one token at a time, that which its loss misses least; only further starts are
random. Each length gets a quarter of the steps that are left, the last all of them. The record's
own prompt is tried before; where it works and has more than |y| + 1 tokens, tokens are taken away
as of any prompt found, but no length above |y| + 1 is searched.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from unlearn.attacks.extraction.gcg import Frame, Goal, allowed_tokens
from unlearn.distributed import spread
from unlearn.errors import BadInput
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.workplace import written_whole

FIRST = 4  # tokens of the first prompts


@dataclass(frozen=True)
class Compression:
    """How hard prompts are searched for.

    Attributes:
        budget: steps for one target at most, over all lengths and starts.
        topk: tokens the gradient recommends for each place.
        batch: prompts evaluated in a step.
        seeds: starts at each length.
        tokens: of a target at most; what a longer answer has behind them is not asked for, nor what
            leaves no room for a prompt as long.
        before: text in front of the free tokens.
        after: text behind them. With neither, a record with a question is asked through the chat
            template, if the tokenizer has one; others with the free tokens alone.
    """

    budget: int = 500
    topk: int = 256
    batch: int = 128
    seeds: int = 3
    tokens: int = 64
    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        if min(self.budget, self.topk, self.batch, self.seeds, self.tokens) < 1:
            raise BadInput("budget, topk, batch, seeds and tokens of a compression are at least 1")

    def share(self, left: int, last: bool = False) -> int:
        """Steps of one start, where so many are left for this length and all others."""
        return max(1, left // (1 if last else 4) // self.seeds)


@dataclass(frozen=True)
class Compressed:
    """How short a prompt was found for one target.

    Attributes:
        ratio: |y| / |x| of the shortest prompt found, a lower bound of ACR(y); with ``censored``,
            |y| / n of the longest prompts tried in vain, which is taken for an upper bound.
        censored: no prompt was found that is at most a token longer than the target.
        prompt: free tokens of the shortest prompt found.
        target: tokens of the target.
        steps: spent.
    """

    ratio: float
    censored: bool
    prompt: tuple[int, ...] | None
    target: tuple[int, ...]
    steps: int


@dataclass(frozen=True)
class Compressions:
    """The same of several records.

    Attributes:
        ids: of the records, in the order of the set.
        found: by record.
    """

    ids: tuple[str, ...]
    found: tuple[Compressed, ...]

    @property
    def ratio(self) -> npt.NDArray[np.float64]:
        """See :class:`Compressed`, shape (n,)."""
        return np.array([one.ratio for one in self.found])

    @property
    def censored(self) -> npt.NDArray[np.bool_]:
        """Where no prompt was found and the ratio is only an upper bound, shape (n,)."""
        return np.array([one.censored for one in self.found], dtype=np.bool_)

    @property
    def memorised(self) -> npt.NDArray[np.bool_]:
        """Whether a prompt was found that is shorter than the target, shape (n,)."""
        return ~self.censored & (self.ratio > 1)


def compressions(
    model: nn.Module,
    examples: Encoded,
    run: Run,
    attack: Compression = Compression(),
    targets: int = 20,
    name: str = "compression",
) -> Compressions:
    """Compress the answers of some records.

    The same records are drawn for every model. Several processes share them.

    Args:
        model: on ``run.device``; left as it is.
        examples: whose answers are the targets; a closing end-of-sequence token is no part of them.
        run: seed, device, progress; ``run.work`` keeps unfinished and finished searches.
        attack: how hard to search.
        targets: records at most.
        name: of progress and files; another for every model.

    Raises:
        BadInput: not a language model, or a record that leaves no room for a prompt.
        Unsupported: no tokens survive on the way to text and back.
    """
    task = examples.task
    if not isinstance(task, CausalLM):
        raise BadInput("only answers of language models are compressed")
    if targets < 1:
        raise BadInput(f"at least one target is compressed, not {targets}")
    some = examples.sample(targets, run.seed_of("compression"))
    goals = [_target(some, i, task, attack) for i in range(len(some))]
    for number, (frame, target, _) in enumerate(goals, start=1):
        try:
            _longest(frame, target)
        except BadInput as error:  # no id, no path: this may end up in a report
            raise BadInput(f"record {number} of the {len(goals)} drawn: {error}") from error
    allowed = allowed_tokens(model, task)

    def search(index: int) -> Compressed:
        frame, target, known = goals[index]
        return compress(model, target, frame, run, attack, known, name, allowed)

    found = []
    for one in spread(search, range(len(goals))):
        found.append(one)
        run.progress.advance(name, len(found), len(goals), {"ratio": one.ratio})
    return Compressions(tuple(some.examples.ids), tuple(found))


def compress(
    model: nn.Module,
    target: Sequence[int],
    frame: Frame,
    run: Run,
    attack: Compression = Compression(),
    known: Sequence[int] = (),
    name: str = "compression",
    allowed: Tensor | None = None,
) -> Compressed:
    """Search for the shortest prompt that a model greedily answers with a target.

    A step is one of greedy coordinate gradient, or one evaluation of all prompts with one token
    less. Everything random follows from the run's seed, the arguments and the number of the step,
    so a search that was killed goes on to the same result.

    Args:
        model: on ``run.device``; left as it is.
        target: tokens.
        frame: what stands around the free tokens.
        run: seed and device; ``run.work`` keeps the search.
        attack: how hard to search.
        known: free tokens to try before anything is searched.
        name: under which the search is kept; another for every model.
        allowed: from :func:`~unlearn.attacks.extraction.gcg.allowed_tokens`.

    Raises:
        BadInput: an empty target, or no room for a prompt.
        Unsupported: no tokens survive on the way to text and back.
    """
    longest = _longest(frame, target)
    told = [run.seed, list(target), frame.first, frame.last, list(known), asdict(attack)]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]  # the same for every model
    file = run.work / "compression" / f"{name}-{key}.json" if run.work is not None else None
    share = attack.share(attack.budget, longest <= FIRST)
    state = _State(longest, min(FIRST, longest), (), share)
    if file is not None and file.exists():
        state = _State(**json.loads(file.read_text()))
    if not state.over(attack):
        goal = Goal(model, frame, target, run, allowed)
        if known and not state.spent and goal.says(known):
            state = replace(state, found=known).begin(attack)
        saved = time.monotonic()
        while not state.over(attack):
            state = _step(state, goal, attack, run.generator(f"{key}/{state.spent}"))
            if file is not None and time.monotonic() - saved >= run.save_every:
                _save(state, file)
                saved = time.monotonic()
        if file is not None:
            _save(state, file)
    found = tuple(state.found) if 0 < len(state.found) <= longest else None
    ratio = len(target) / (len(found) if found else max(1, state.failed))
    return Compressed(ratio, found is None, found, tuple(target), state.spent)


@dataclass(frozen=True)
class _State:
    """Where a search stands.

    Attributes:
        longest: the last length to search.
        length: that is searched now.
        free: where it stands: longer than ``length`` while tokens are taken away, shorter where
            random ones are to be added.
        share: steps of one attempt at this length.
        attempt: which it is.
        used: its steps so far.
        failed: the longest length searched in vain.
        found: the shortest prompt that reaches the target; a known one may be longer than any
            length to search.
        spent: steps of all.
    """

    longest: int
    length: int
    free: Sequence[int]
    share: int
    attempt: int = 0
    used: int = 0
    failed: int = 0
    found: Sequence[int] = ()
    spent: int = 0

    def over(self, attack: Compression) -> bool:
        """Nothing is left to spend, or to search."""
        limit = min(len(self.found) or self.longest + 1, self.longest + 1)
        return self.spent >= attack.budget or limit - self.failed <= 1

    def begin(self, attack: Compression) -> _State:
        """The next length: halfway to the shortest prompt found, or twice the one given up."""
        halfway = (self.failed + len(self.found)) // 2
        length = min(halfway if self.found else 2 * self.length, self.longest)
        last = length == self.longest  # what is found within the limit halves to less
        share = attack.share(attack.budget - self.spent, last)
        free = self.found or self.free
        return replace(self, length=length, free=free, share=share, attempt=0, used=0)

    def gave_up(self, attack: Compression) -> _State:
        """An attempt used its share."""
        if self.attempt + 1 < attack.seeds:
            return replace(self, free=(), attempt=self.attempt + 1, used=0)
        return replace(self, failed=self.length).begin(attack)


def _step(state: _State, goal: Goal, attack: Compression, draw: torch.Generator) -> _State:
    """One step of a search."""
    state = replace(state, used=state.used + 1, spent=state.spent + 1)
    free = torch.tensor(list(state.free), dtype=torch.long)
    if len(free) > state.length:
        tried = goal.cuts(free)
    else:
        free = goal.start(state.length, draw, free)
        tried = goal.swaps(free, attack.topk, attack.batch, draw)
    if not len(tried):  # after every change the tokens around it become others
        return state.gave_up(attack)
    loss, reached = goal.losses(tried)
    order = loss.argsort(stable=True)
    for row in order[reached[order]].tolist():
        found = tried[row].tolist()
        if goal.says(found):
            state = replace(state, found=found, free=found)
            return state if len(found) > state.length else state.begin(attack)
    state = replace(state, free=tried[order[0]].tolist())
    return state.gave_up(attack) if state.used >= state.share else state


def _target(
    examples: Encoded, index: int, task: CausalLM, attack: Compression
) -> tuple[Frame, list[int], list[int]]:
    """What is around the free tokens, the target, and free tokens that are the record's own."""
    encoding = examples[index]
    target, special = encoding["answer"].tolist(), set(task.tokenizer.all_special_ids)
    while target and target[-1] in special:
        target.pop()
    plain = attack.before or attack.after or not task.chat
    asks = "question" in examples.examples[index]
    frame = Frame.template(task) if asks and not plain else Frame(task, attack.before, attack.after)
    room = task.max_length - len(frame.first) - len(frame.last)
    target = target[: max(1, min(attack.tokens, (room - 1) // 2))]  # |x| may be |y| + 1
    return frame, target, frame.inside(encoding["prompt"].tolist())


def _longest(frame: Frame, target: Sequence[int]) -> int:
    """The last length to search: more tokens than the target has, where there is room."""
    if not target:
        raise BadInput("a search needs a target of at least one token")
    room = frame.task.max_length - len(frame.first) - len(frame.last) - len(target)
    if room < 1:
        raise BadInput(
            f"there is no room for a prompt: the target has {len(target)} tokens, what stands "
            f"around the free tokens {len(frame.first) + len(frame.last)}, and max_length is "
            f"{frame.task.max_length}"
        )
    return min(len(target) + 1, room)


def _save(state: _State, file: Path) -> None:
    with written_whole(file) as new:
        new.write_text(json.dumps(asdict(state)))
