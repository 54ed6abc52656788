"""What a pipeline draws, and how well it denoises: everything that needs it, once per model.

All models start from the same noise, picture by picture, so that they can be compared in pairs.
Pictures are whole numbers, as a file would hold them, and stay in the place of unfinished work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unlearn import distributed
from unlearn.attacks import concept_search, denoising
from unlearn.attacks.interface import Attack, Depth
from unlearn.attacks.signals import Signals
from unlearn.case import Case
from unlearn.data import record_hashes
from unlearn.errors import BadInput, Faults, did_you_mean
from unlearn.evaluations.clip import Clip
from unlearn.evaluations.judging import Judge, concepts, shown_by
from unlearn.interface import Classes, Concepts, Records, Target
from unlearn.pipeline import Pipeline
from unlearn.run import Run
from unlearn.tasks.base import Encoded, evaluating
from unlearn.tasks.diffusion import Diffusion, words
from unlearn.workplace import written_whole

Array = npt.NDArray[np.float64]
Wanted = str | int | None

IMAGES = {"quick": 24, "standard": 100}  # per condition
LEAST = {"quick": 64, "standard": 200}  # of what must be forgotten: fewer could not show 10 %
STEPS = {"quick": 20, "standard": 50}
CONDITIONS = {"quick": 12, "standard": 50}  # of either kind
GUIDANCE = 3.0  # of text-to-image
AT_ONCE = 64


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn.

    Attributes:
        images: per condition; None: by the depth of the audit.
        steps: network calls per picture.
        guidance: weight of the condition; 1: none.
    """

    images: int | None
    steps: int
    guidance: float


def sampling(case: Case) -> Sampling:
    """What a case says about it, or what its depth implies.

    Raises:
        BadInput: unknown settings, or values that make no sense.
    """
    given = dict(case.config.sampling)
    task: Any = case.checkpoint.task
    given.pop("null_class", None)
    guidance = GUIDANCE if getattr(task, "tokenizer", None) else 1.0
    found: dict[str, Any] = {
        "images": None, "steps": STEPS[_depth(case)], "guidance": guidance,
    }  # fmt: skip
    faults = Faults()
    for name, value in given.items():
        if name not in found:
            faults.add(f"--sampling {name}: {did_you_mean(name, [*found, 'null_class'])}")
            continue
        try:
            found[name] = float(value) if name == "guidance" else int(value)
            if found[name] < (0 if name == "guidance" else 1):
                raise ValueError
        except ValueError:
            kind = "a number of at least 0" if name == "guidance" else "a whole number above 0"
            faults.add(f"--sampling {name}={value}: it must be {kind}")
    if found["guidance"] != 1 and task.classes and task.null_class is None:
        faults.add(
            f"--sampling guidance={found['guidance']:g} needs a network that knows what no class "
            "is: pass --sampling null_class=INDEX, or leave guidance at 1"
        )
    if found["steps"] > task.times:
        faults.add(f"--sampling steps={found['steps']}: the schedule has {task.times} times")
    faults.check()
    return Sampling(**found)


def _depth(case: Case) -> str:
    return str(case.config.audit)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Condition:
    """Something pictures are drawn for.

    Attributes:
        wanted: prompt or class index; None: nothing.
        title: for people.
        subset: whether it must be gone or stay.
        count: pictures.
        shown: classes of the judge that a picture for it may show; None: it does not say.
    """

    wanted: Wanted
    title: str
    subset: Literal["forget", "retain"]
    count: int
    shown: frozenset[int] | None = None


def conditions(case: Case, sampled: Sampling, judge: Judge | None) -> list[Condition]:
    """What pictures are drawn for: what must be gone, and (some of) what must stay.

    Raises:
        BadInput: the judge knows nothing that must be gone.
    """
    task, depth = case.checkpoint.task, _depth(case)
    assert isinstance(task, Diffusion)  # noqa: S101
    gone, kept = _prompts(case, task) if task.tokenizer else _classes(case, task)
    named, draw = _named(case.target), np.random.default_rng(case.config.seed)

    def some(wanted: list[Wanted]) -> list[Wanted]:
        """Those the request names, and a random choice of the rest."""
        first, rest = ([w for w in wanted if (w in named) is known] for known in (True, False))
        room = max(0, CONDITIONS[depth] - len(first))
        return [*first, *(rest[i] for i in sorted(draw.permutation(len(rest))[:room].tolist()))]

    gone, kept = some(gone), some(kept)
    images = sampled.images or IMAGES[depth]
    often = sampled.images or max(images, math.ceil(LEAST[depth] / max(1, len(gone))))
    alone = kept == [None]
    found = [Condition(w, _title(w, task), "forget", often, _shown(w, task, judge)) for w in gone]
    found += [
        Condition(w, _title(w, task), "retain", images * (8 if alone else 1),
                  _shown(w, task, judge))
        for w in kept
    ]  # fmt: skip
    if task.tokenizer:  # pictures of anything, to compare with
        found.append(Condition("", "no prompt", "retain", images))
    if judge and case.config.classifier is not None and not isinstance(case.target, Records):
        blind = [c.title for c in found if c.subset == "forget" and not c.shown]
        if len(blind) == len(gone):
            known = f"its classes are {', '.join(judge.names[:10])}" if judge.names else (
                f"it has {judge.task.classes} classes without names"
            )  # fmt: skip
            raise BadInput(f"the classifier has no class for {blind[0]}: {known}")
    return found


def _named(target: Target) -> set[Wanted]:
    if isinstance(target, Classes):
        return {*target.indices, *([] if target.anchor is None else [target.anchor])}
    return {*concepts(target)}


def _classes(case: Case, task: Diffusion) -> tuple[list[Wanted], list[Wanted]]:
    """Class indices that must be gone, and others; nothing where the network knows no classes."""
    if not task.classes:
        return [None], [None]
    if isinstance(case.target, Classes):
        gone = list(case.target.indices)
        return [*gone], [i for i in range(task.classes) if i not in gone]
    labels = {task.label_index(value) for value in case.sets.forget.examples.column("label")}
    return [*sorted(labels)], [*range(task.classes)]


def _prompts(case: Case, task: Diffusion) -> tuple[list[Wanted], list[Wanted]]:
    """Prompts that must be gone, and others: those named, then captions of the records."""
    target = case.target
    captions = {
        part.name: list(dict.fromkeys(map(str, part.examples.column("text"))))
        for part in (case.sets.forget, case.sets.retain)
        if part is not None and len(part)
    }
    if not isinstance(target, Concepts):
        gone = captions.get("forget", [])
        return [*gone], [c for c in captions.get("retain", []) if c not in set(gone)]
    meant = [words(prompt) for prompt in target.prompts]
    everything = list(dict.fromkeys(c for part in captions.values() for c in part))
    told = {*captions.get("forget", [])}
    naming = [c for c in everything if c in told or any(m <= words(c) for m in meant)]
    keep = list(dict.fromkeys(filter(None, [target.anchor, *target.keep])))
    others = [c for c in everything if c not in {*naming, *keep}]
    return [*dict.fromkeys([*target.prompts, *naming])], [*keep, *others]


def _title(wanted: Wanted, task: Diffusion) -> str:
    if wanted is None:
        return "no condition"
    if isinstance(wanted, int):
        return f"class {task.names[wanted] if wanted < len(task.names) else wanted}"
    return f"“{wanted}”"


def _shown(wanted: Wanted, task: Diffusion, judge: Judge | None) -> frozenset[int] | None:
    """The judge's classes that a picture for this condition may show."""
    if judge is None or wanted is None:
        return None
    if isinstance(wanted, str):
        return shown_by(wanted, judge.names) or None
    name = task.names[wanted] if wanted < len(task.names) else None
    if name in judge.names:
        return frozenset({judge.names.index(name)})
    if name is not None and judge.names:
        return None  # both have names, and they do not say the same
    return frozenset({wanted}) if wanted < judge.task.classes else None


@dataclass(frozen=True)
class Drawn:
    """What one model drew.

    Attributes:
        pictures: by condition, bytes, shape (count, channels, height, width).
        probabilities: by condition, the judge's, shape (count, classes); empty without one.
        features: by condition, the judge's, shape (count, dim); empty without one.
        steps: network calls each picture took.
        numbers: what attacks found, by name.
        matched: by number of a condition that has a prompt, the CLIP score of every picture with
            it, shape (count,); empty without a CLIP model.
    """

    pictures: list[Tensor]
    probabilities: list[Array]
    features: list[Array]
    steps: int
    numbers: Mapping[str, Array]
    matched: Mapping[int, Array] = field(default_factory=dict)


Shows = Callable[[Tensor], Array]
SEARCHED = 16  # pictures an attack draws with what it found


@dataclass(frozen=True)
class Known:
    """What an attacker knows of a forgotten condition: what the original made of it.

    Attributes:
        pictures: that the original drew, in [0, 1], shape (n, c, h, w).
        told: what the original was told, as of :func:`concept_search.condition_of`.
    """

    pictures: Tensor
    told: Tensor


@dataclass(frozen=True)
class Search:
    """An attack that looks for another way to have the forgotten drawn.

    Attributes:
        name: stable key in snake_case; the finding is called ``revival_NAME``.
        title: for people.
        source: where it was published.
        revive: (model, condition, known, shows, generator, sampling) -> whether each picture
            drawn in the way that was found shows it, shape (n,). ``shows`` gives the judge's
            probability that each of some pictures in [0, 1] shows the condition, shape (n,).
        depth: the lightest audit that runs it.
        denoises: whether it asks the model to denoise at any time, which a pipeline that was made
            to draw in one step cannot.
    """

    name: str
    title: str
    source: str
    revive: Callable[[Pipeline, Condition, Known, Shows, torch.Generator, Sampling], Any]
    depth: Depth = "standard"
    denoises: bool = False


@dataclass(frozen=True)
class Score:
    """A membership attack on denoising.

    Attributes:
        attack: its name, title and source, and the depth from which on it runs.
        of: (model, records, run) -> one score per record, shape (n,), higher for members.
    """

    attack: Attack
    of: Callable[[Pipeline, Encoded, Run], Any]


# Attacks take part in an audit by standing here: on what must not be drawn, and on records.
def _swapped(
    model: Pipeline, c: Condition, known: Known, shows: Shows, draw: torch.Generator, how: Sampling
) -> Array:
    found = concept_search.swap_attack(
        model, _named_one(c), known.told, _truth(shows), draw, sampling=_few(how)
    )
    return _as_hits(found)


def _descended(
    model: Pipeline, c: Condition, known: Known, shows: Shows, draw: torch.Generator, how: Sampling
) -> Array:
    found = concept_search.embedding_attack(
        model, _named_one(c), _truth(shows), draw, pictures=known.pictures, sampling=_few(how)
    )
    return _as_hits(found)


def _reworded(
    model: Pipeline, c: Condition, known: Known, shows: Shows, draw: torch.Generator, how: Sampling
) -> Array:
    wanted = _named_one(c)
    given: dict[str, Any] = {"pictures": known.pictures, "sampling": _few(how)}
    if isinstance(wanted, str):
        found = concept_search.token_attack(model, wanted, _truth(shows), draw, 256, **given)
    else:
        found = concept_search.other_conditions(model, wanted, _truth(shows), draw, 64, **given)
    return _as_hits(found)


def _named_one(condition: Condition) -> str | int:
    if condition.wanted is None:
        raise BadInput("what nothing is asked for has no condition to search")
    return condition.wanted


def _few(how: Sampling) -> concept_search.Sampling:
    return concept_search.Sampling(SEARCHED, how.steps, how.guidance)


def _truth(shows: Shows) -> Callable[[Tensor], Any]:
    return lambda pictures: shows(pictures) > 0.5


def _as_hits(found: concept_search.Revival) -> Array:
    hits, trials = found.after
    return np.repeat([1.0, 0.0], [hits, trials - hits])


SEARCHES: tuple[Search, ...] = (
    Search("swap", "what the original was told", "", _swapped),
    Search("embedding", "a condition found by descent",
           "Pham et al. 2024, arXiv 2308.01508", _descended, denoises=True),
    Search("words", "other words or classes", "Zhang et al. 2024, arXiv 2310.11868", _reworded,
           denoises=True),
)  # fmt: skip
SCORES: tuple[Score, ...] = tuple(
    Score(Attack(name, title, source, lambda *_: np.zeros(0), depth="standard"), of)
    for name, title, source, of in (
        ("secmi", "SecMI", "Duan et al. 2023, arXiv 2302.01316", denoising.secmi_scores),
        ("pia", "PIA", "Kong et al. 2023, arXiv 2305.18355", denoising.pia_scores),
        ("pian", "PIAN", "Kong et al. 2023, arXiv 2305.18355", denoising.pian_scores),
    )
)


def drawn(
    role: str, model: Pipeline, asked: list[Condition], sampled: Sampling, judge: Judge | None,
    run: Run, depth: Depth, known: dict[Any, Known] | None, clip: Clip | None = None,
) -> Drawn:  # fmt: skip
    """Draw for every condition, and let the judge look; what was drawn before is read back.

    Args:
        role: of the model.
        model: on ``run.device``.
        asked: the conditions.
        sampled: how to draw.
        judge: who says what pictures show; None: nobody.
        run: device, seed, progress, and the place of unfinished work.
        depth: of the audit.
        known: by condition, what attacks may start from that look for ways to what was forgotten,
            filled with what the original draws; None: none is run.
        clip: says how well pictures match their prompts; None: nobody.
    """
    # of forgotten records nothing that may show them is kept
    kept_apart = run.work if known is not None else None
    path = kept_apart / "pictures" / f"{role}.safetensors" if kept_apart else None
    if path is not None and distributed.on_main(path.exists):
        kept = distributed.on_main(lambda: load_file(path))
        pictures = [kept[str(i)] for i in range(len(asked))]
    else:
        with evaluating(model):
            pictures = _pictures(role, model, asked, sampled, run)
        if path is not None and distributed.is_main():
            with written_whole(path) as new:
                save_file({str(i): p.contiguous() for i, p in enumerate(pictures)}, new)
    seen = [judge.look(part, run.device) for part in pictures] if judge else []
    matched = _matched(role, asked, pictures, clip, run) if clip else {}
    numbers: dict[str, Array] = {}
    if judge and known is not None:
        if role == "original":
            for c, part in zip(asked, pictures, strict=True):
                if c.subset == "forget" and c.wanted is not None:
                    told = concept_search.condition_of(model, c.wanted)
                    known[c.wanted] = Known(part.float() / 255, told)
        for search in SEARCHES:
            if (depth == "quick" and search.depth != "quick") or (model.steps and search.denoises):
                continue
            with evaluating(model):
                found = [
                    np.asarray(search.revive(
                        model, c, known[c.wanted], _shows(judge, c.shown, run),
                        run.generator(f"{search.name}/{c.wanted}"), sampled,
                    ), np.float64)
                    for c in asked if c.subset == "forget" and c.shown and c.wanted in known
                ]  # fmt: skip
            if found:
                numbers[search.name] = np.concatenate(found)
    return Drawn(
        pictures, [s[0] for s in seen], [s[1] for s in seen], model.steps or sampled.steps,
        numbers, matched,
    )  # fmt: skip


def _pictures(
    role: str, model: Pipeline, asked: list[Condition], sampled: Sampling, run: Run
) -> list[Tensor]:
    total, done, found = sum(c.count for c in asked), 0, []
    for condition in asked:
        # the same noise for every model
        draw = run.generator(f"pictures/{condition.subset}/{condition.wanted}")
        parts = []
        for start in range(0, condition.count, AT_ONCE):
            rows = min(AT_ONCE, condition.count - start)
            wanted: Any = None if condition.wanted is None else [condition.wanted] * rows
            made = model.sample(wanted, draw, sampled.steps, sampled.guidance, rows)
            parts.append((made.nan_to_num(0.0) * 255).round().to("cpu", torch.uint8))
            done += rows
            run.progress.advance(f"draw with {role}", done, total, {})
        found.append(torch.cat(parts))
    return found


def _matched(
    role: str, asked: list[Condition], pictures: list[Tensor], clip: Clip, run: Run
) -> dict[int, Array]:
    """The CLIP scores of all conditions that have a prompt; known ones are read back."""
    prompts = {i: c.wanted for i, c in enumerate(asked) if isinstance(c.wanted, str) and c.wanted}

    def compute() -> dict[str, Tensor]:
        drawn, phase = [pictures[i] for i in prompts], f"match pictures of {role} with prompts"
        found = clip.scores(list(prompts.values()), drawn, run, phase)
        return {str(i): torch.from_numpy(s) for i, s in zip(prompts, found, strict=True)}

    kept = run.once(f"clip_{role}", compute)
    return {i: kept[str(i)].cpu().numpy() for i in prompts}


def _shows(judge: Judge, classes: frozenset[int] | None, run: Run) -> Shows:
    def shows(pictures: Tensor) -> Array:
        raw = (pictures.detach() * 255).round().to("cpu", torch.uint8)
        said, _ = judge.look(raw, run.device)
        return np.asarray(said[:, sorted(classes or ())].sum(1))

    return shows


def losses(
    role: str, model: Pipeline, part: Encoded, run: Run, directory: Path, name: str
) -> Signals:
    """The denoising loss of every record of a set, as a table that names them by keyed hashes.

    A record is one unit whose ``logprob`` is the negated mean squared error per pixel, at times
    and noise that are the record's own and the same for every model.
    """
    path = directory / "signals" / f"{role}-{name}.parquet"
    if not distributed.on_main(path.exists):
        key = bytes.fromhex(distributed.on_main((directory / "record.key").read_text))
        n, none = len(part), np.zeros(len(part))
        phase = f"denoise the {name} set with {role}"
        score = denoising.loss_scores(model, part, run, phase=phase)
        whole = np.zeros(n, np.int64)
        record = [h.hex() for h in record_hashes(part.examples, part.task.content, key)]
        no = np.zeros(n, np.bool_)
        table = Signals(record, whole + 1, score, none, none, no, no, whole, whole - 1)
        if distributed.is_main():
            table.write(path)
    return distributed.on_main(lambda: Signals.read(path))


def scores(
    role: str, model: Pipeline, part: Encoded, run: Run, directory: Path, name: str, depth: Depth
) -> dict[str, Array]:
    """What each attack of ``SCORES`` says about every record of a set, by its name."""
    found: dict[str, Array] = {}
    for score in SCORES:
        if depth == "quick" and score.attack.depth != "quick":
            continue
        path = directory / "signals" / f"{role}-{name}-{score.attack.name}.safetensors"
        if not distributed.on_main(path.exists):
            with evaluating(model):
                values = torch.as_tensor(np.asarray(score.of(model, part, run), np.float64))
            if distributed.is_main():
                with written_whole(path) as new:
                    save_file({"score": values}, new)
        kept = distributed.on_main(lambda path=path: load_file(path))  # type: ignore[misc]
        found[score.attack.name] = kept["score"].numpy()
    return found
