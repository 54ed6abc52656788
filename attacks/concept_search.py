"""Bringing an erased concept back without touching a weight: what else can the model be told?

A model that was made to forget a class or a concept is asked in other ways: with the condition it
knew before (:func:`swap_attack`), with every other class and what lies between classes
(:func:`other_conditions`), with one more or another word (:func:`token_attack`), and with a
condition of real numbers found by gradient descent (:func:`embedding_attack`). A judge says how
often the concept is seen in pictures drawn so, and drawn as a user would ask.

Searches minimise the denoising loss on example pictures x_0 of the concept,

    L(c) = E_{t, noise} mean over pixels (e(x_t, t, c) - noise)^2,

for which no judge is needed (UnlearnDiffAtk: Zhang et al. 2024, arXiv 2310.11868; concept
inversion: Pham et al. 2024, arXiv 2308.01508; textual inversion: Gal et al. 2023, arXiv
2208.01618). Only the few best are drawn and judged, and the winner once more on fresh noise: its
count is not biased by having been chosen.

A condition of real numbers can make a model draw what it never learned. So the rate found by
descent means something only beside that of the same search on a model trained without the concept;
the other attacks search what a user can say, or what was said before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlearn.errors import BadInput, Unsupported
from unlearn.pipeline import Pipeline
from unlearn.run import Run
from unlearn.tasks.base import evaluating

Shows = Callable[[Tensor], Any]  # pictures in [0, 1], (n, c, h, w) -> n truth values
Wanted = str | int  # a prompt or the index of a class
Found = dict[str, Tensor]

NOISED = 8  # noisy pictures a candidate is measured on, the same for all
AT_ONCE = 128  # rows of one network call without gradients
DRAWN_AT_ONCE = 16
FINALISTS, SCREENED = 6, 8  # candidates that are drawn, and pictures of each


class Count(NamedTuple):
    """Pictures that show the concept, of how many."""

    hits: int
    trials: int

    @property
    def rate(self) -> float:
        """Their share."""
        return self.hits / self.trials


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn to be judged.

    Attributes:
        count: of pictures, with and without the attack.
        steps: network calls for each.
        guidance: weight of the condition; 1: none.
    """

    count: int = 40
    steps: int = 20
    guidance: float = 3.0


@dataclass(frozen=True)
class Revival:
    """What an attack found, and whether it brought the concept back.

    Attributes:
        told: what the model was told, for people.
        condition: the same as tensor, see :func:`condition_of`.
        before: pictures of the concept when asked plainly.
        after: when told that, from the same starting noise.
    """

    told: str
    condition: Tensor
    before: Count
    after: Count


def condition_of(model: Pipeline, wanted: Wanted) -> Tensor:
    """What a denoiser is fed for a prompt or a class, float32 in main memory.

    Returns:
        Text states (tokens, dim), or the rows of that class in the embedding tables of the
        denoiser (tables, dim): a UNet has one table, a transformer one in every block.

    Raises:
        BadInput: no such class, or a pipeline that is not conditioned on anything.
        Unsupported: classes that are not looked up in a table.
    """
    if model.text_encoder is not None:
        with torch.no_grad():
            states: Tensor = model.condition([str(wanted)])[0]  # type: ignore[index]
        return states.float().cpu()
    rows = torch.stack([table.weight.detach() for table in _tables(model)], 1)
    if not isinstance(wanted, int) or not 0 <= wanted < len(rows):
        raise BadInput(f"there is no class {wanted!r}: give an index from 0 to {len(rows) - 1}")
    return rows[wanted].float().cpu()


@contextmanager
def fed(model: Pipeline, label: int, vectors: Tensor) -> Iterator[None]:
    """While this lasts, a class is embedded as these vectors; the weights stay as they are.

    Args:
        model: class-conditional.
        label: the class; all others are embedded as ever.
        vectors: shape (tables, dim), or (rows, tables, dim) for another one in every row.
    """

    def put(place: int) -> Callable[..., Tensor]:
        def replaced(_: nn.Module, told: tuple[Tensor], found: Tensor) -> Tensor:
            return torch.where((told[0] == label)[:, None], vectors[..., place, :].to(found), found)

        return replaced

    hooks = [t.register_forward_hook(put(i)) for i, t in enumerate(_tables(model))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def concept_loss(model: Pipeline, wanted: Wanted, conditions: Tensor, x_0: Tensor) -> Tensor:
    """How badly example pictures are denoised under every condition.

    All conditions meet the same ``NOISED`` noisy pictures, at evenly spread times.

    Args:
        model: to attack.
        wanted: the concept whose place the conditions take.
        conditions: as of :func:`condition_of`, shape (candidates, ..., dim).
        x_0: examples as they are denoised, shape (n, c, h, w).

    Returns:
        Mean squared error per pixel, float64, shape (candidates,).
    """
    draw = torch.Generator().manual_seed(0)
    x, t, noise = _noised(model, x_0, NOISED, draw)
    found = []
    with evaluating(model):
        for some in torch.split(conditions, AT_ONCE // NOISED):
            many = [part.repeat(len(some), *[1] * (part.ndim - 1)) for part in (x, t, noise)]
            each = some.repeat_interleave(NOISED, 0)
            error = _errors(model, wanted, each, *many).view(len(some), NOISED)
            found.append(error.double().mean(1).cpu())
    return torch.cat(found)


def swap_attack(
    model: Pipeline,
    wanted: Wanted,
    condition: Tensor,
    shows: Shows,
    generator: torch.Generator,
    *,
    sampling: Sampling = Sampling(),
    told: str = "the condition of the original model",
    run: Run | None = None,
    name: str = "swap_attack",
) -> Revival:
    """Feed a condition of another model, such as the original one's for the forgotten concept.

    It undoes whatever changed only how the concept is looked up: a row of the class embedding, or
    the text encoder.

    Args:
        model: to attack; left as it was.
        wanted: the forgotten prompt or class.
        condition: from :func:`condition_of` on the other model.
        shows: the judge.
        generator: one number is drawn, from which everything random follows.
        sampling: of the pictures that are judged.
        told: a name for ``condition``.
        run: keeps the result, so that it is not computed twice.
        name: under which ``run`` keeps it.

    Raises:
        BadInput: the condition has another shape than those of this model.
    """
    own = condition_of(model, wanted)
    if condition.shape != own.shape:
        raise BadInput(
            f"a condition of this model has the shape {tuple(own.shape)}, not "
            f"{tuple(condition.shape)}"
        )

    def compute(seed: int) -> Found:
        return _measured(model, wanted, condition, shows, sampling, seed)

    return _revival(told, _once(run, name, generator, compute))


def embedding_attack(
    model: Pipeline,
    wanted: Wanted,
    shows: Shows,
    generator: torch.Generator,
    steps: int = 60,
    *,
    pictures: Tensor,
    rows: int = 16,
    lr: float = 0.1,
    sampling: Sampling = Sampling(),
    run: Run | None = None,
    name: str = "embedding_attack",
) -> Revival:
    """Search for a condition by gradient descent on the denoising loss.

    Adam starts at the condition of ``wanted``; the rate falls linearly to 0. All text states are
    free, or the class's vector in every table.

    Cost: ``3 * steps * rows`` network calls of one picture.

    Args:
        model: to attack; weights and gradients are left as they were.
        wanted: the forgotten prompt or class.
        shows: the judge.
        generator: one number is drawn, from which everything random follows.
        steps: of descent.
        pictures: of the concept, in [0, 1], shape (n, c, h, w): forget records, or generated by
            the original model.
        rows: noisy pictures of one step.
        lr: learning rate at the start.
        sampling: of the pictures that are judged.
        run: keeps the result, so that it is not computed twice.
        name: under which ``run`` keeps it.

    Raises:
        BadInput: no such class, or no pictures.
    """
    start = condition_of(model, wanted)

    def compute(seed: int) -> Found:
        draw, x_0 = torch.Generator().manual_seed(seed), _encoded(model, pictures)
        found = start.to(model.device).requires_grad_()
        optimizer = torch.optim.Adam([found], lr, betas=(0.9, 0.99))
        with evaluating(model), torch.enable_grad():
            for step in range(steps):
                x, t, noise = _noised(model, x_0, rows, draw)
                told = found.expand(rows, *found.shape)
                loss = _errors(model, wanted, told, x, t, noise).mean()
                (found.grad,) = torch.autograd.grad(loss, [found])
                optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
                optimizer.step()
                if run is not None:
                    run.progress.advance(name, step + 1, steps, {"loss": float(loss.detach())})
        return _measured(model, wanted, found.detach().cpu(), shows, sampling, seed)

    return _revival("a condition found by descent", _once(run, name, generator, compute))


def other_conditions(
    model: Pipeline,
    wanted: int,
    shows: Shows,
    generator: torch.Generator,
    budget: int = 512,
    *,
    pictures: Tensor,
    sampling: Sampling = Sampling(),
    run: Run | None = None,
    name: str = "other_conditions",
) -> Revival:
    """Ask for every other class (none among them, where there is such a row) and halfway points.

    Halfway points between the forgotten class and another come first, then those of other pairs.

    Cost: ``NOISED`` network calls of one picture for every candidate, and the pictures.

    Args:
        model: class-conditional; left as it was.
        wanted: the forgotten class.
        shows: the judge.
        generator: one number is drawn, from which everything random follows.
        budget: candidates at most.
        pictures: of the concept, in [0, 1], shape (n, c, h, w).
        sampling: of the pictures that are judged.
        run: keeps the result, so that it is not computed twice.
        name: under which ``run`` keeps it.

    Raises:
        BadInput: no such class, no pictures, or a model without classes.
    """
    if model.text_encoder is not None:
        raise BadInput("this pipeline reads prompts: use token_attack to search among them")
    condition_of(model, wanted)  # refuses classes there are not
    others = [i for i in range(_tables(model)[0].num_embeddings) if i != wanted]
    pairs = [(i, i) for i in others] + [(wanted, i) for i in others]
    pairs = (pairs + list(combinations(others, 2)))[:budget]

    def compute(seed: int) -> Found:
        vectors = {i: condition_of(model, i) for i in [wanted, *others]}
        made = torch.stack([(vectors[i] + vectors[j]) / 2 for i, j in pairs])
        losses = concept_loss(model, wanted, made, _encoded(model, pictures))
        order = losses.argsort(stable=True)[:FINALISTS]
        best = int(order[_best(model, wanted, made[order], shows, sampling, seed)])
        found = _measured(model, wanted, made[best], shows, sampling, seed)
        return {**found, "told": torch.tensor(pairs[best])}

    found = _once(run, name, generator, compute)
    first, second = (int(i) for i in found["told"])
    told = f"class {first}" if first == second else f"halfway from class {first} to {second}"
    return _revival(told, found)


def token_attack(
    model: Pipeline,
    prompt: str,
    shows: Shows,
    generator: torch.Generator,
    budget: int = 4096,
    *,
    pictures: Tensor,
    sampling: Sampling = Sampling(),
    run: Run | None = None,
    name: str = "token_attack",
) -> Revival:
    """Put any token of the vocabulary before or after a prompt, or in the place of one of its own.

    Exhaustive where that is at most ``budget`` prompts. Else those come in that the gradient at
    the token's place promises most: loss + gradient . (token - what stands there) (HotFlip,
    Ebrahimi et al. 2018, arXiv 1712.06751). Tokens are fed as such: some sequences of them no text
    is cut into, and ``told`` is then only what they spell.

    Cost: ``NOISED`` network calls of one picture for every candidate, and the pictures.

    Args:
        model: text-to-image; left as it was.
        prompt: the forgotten concept.
        shows: the judge.
        generator: one number is drawn, from which everything random follows.
        budget: prompts whose loss is computed, at most.
        pictures: of the concept, in [0, 1], shape (n, c, h, w).
        sampling: of the pictures that are judged.
        run: keeps the result, so that it is not computed twice.
        name: under which ``run`` keeps it.

    Raises:
        BadInput: no pictures, or a pipeline that reads no prompts.
    """
    if model.text_encoder is None:
        raise BadInput("this pipeline reads no prompts: use other_conditions to search its classes")

    whole, words = model.token_ids([prompt])[0].tolist(), _words(model, prompt)
    templates, places = _slots(whole, words)
    tokens = torch.arange(len(model.tokenizer))
    tokens = tokens[~torch.isin(tokens, torch.tensor(model.tokenizer.all_special_ids))]

    def compute(seed: int) -> Found:
        x_0, chosen = _encoded(model, pictures), torch.arange(len(templates) * len(tokens))
        if len(chosen) > budget:
            slots = zip(templates, places.tolist(), strict=True)
            promised = [_promised(model, prompt, *slot, x_0)[tokens] for slot in slots]
            chosen = torch.cat(promised).argsort(stable=True)[:budget]
        slot = chosen // len(tokens)
        ids = templates[slot]
        ids[torch.arange(len(ids)), places[slot]] = tokens[chosen % len(tokens)]
        ids = ids[(ids != torch.tensor(whole)).any(1)]
        losses: list[Tensor] = []
        for some in torch.split(ids, AT_ONCE):
            losses.append(concept_loss(model, prompt, _states(model, some), x_0))
            if run is not None:
                run.progress.advance(name, sum(map(len, losses)), len(ids), {})
        order = torch.cat(losses).argsort(stable=True)[:FINALISTS]
        states = _states(model, ids[order])
        best = _best(model, prompt, states, shows, sampling, seed)
        found = _measured(model, prompt, states[best], shows, sampling, seed)
        return {**found, "told": ids[order[best]]}

    found = _once(run, name, generator, compute)
    text = model.tokenizer.decode(found["told"].tolist(), skip_special_tokens=True)
    return _revival(str(text).strip(), found)


def _words(model: Pipeline, prompt: str) -> list[int]:
    found: list[int] = model.tokenizer(prompt, add_special_tokens=False).input_ids
    if not found:
        raise BadInput("an empty prompt names no concept: give one that does")
    return found


def _slots(whole: list[int], words: list[int]) -> tuple[Tensor, Tensor]:
    """Prompts in which one place is to be filled, (slots, tokens), and that place, (slots,).

    In front and behind a neighbour stands in, and the padding becomes shorter; where there is none
    left, only words are replaced.
    """
    begin = next(i for i, token in enumerate(whole) if token == words[0])
    words = words[: len(whole) - begin - 1]  # a prompt that is too long was cut
    end = begin + len(words)
    found = [(whole, place) for place in range(begin, end)]
    if len(whole) - end > 1:
        found.append(([*whole[:begin], words[0], *whole[begin:-1]], begin))
        found.append(([*whole[:end], words[-1], *whole[end:-1]], end))
    templates, places = zip(*found, strict=True)
    return torch.tensor(templates), torch.tensor(places)


def _promised(model: Pipeline, prompt: str, template: Tensor, place: int, x_0: Tensor) -> Tensor:
    """The loss that the gradient foresees for every token of the vocabulary in this place."""
    table = model.text_encoder.get_input_embeddings()
    shift = torch.zeros_like(table.weight[template], requires_grad=True)
    hook = table.register_forward_hook(lambda _module, _told, found: found + shift)
    try:
        with evaluating(model), torch.enable_grad():
            states = model.text_states(template[None].to(model.device))
            x, t, noise = _noised(model, x_0, NOISED, torch.Generator().manual_seed(0))
            told = states.expand(NOISED, -1, -1)
            loss = _errors(model, prompt, told, x, t, noise).mean()
            (gradient,) = torch.autograd.grad(loss, [shift])
    finally:
        hook.remove()
    weight = table.weight.detach()
    found: Tensor = loss.detach() + (weight - weight[template[place]]) @ gradient[place]
    return found.cpu()


def _states(model: Pipeline, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.text_states(ids.to(model.device)).float().cpu()


def _tables(model: Pipeline) -> list[nn.Embedding]:
    if model.classes is None:
        raise BadInput("this pipeline is not conditioned on anything: there is nothing to search")
    found = [module for module in model.denoiser.modules() if isinstance(module, nn.Embedding)]
    if not found:
        raise Unsupported(f"{type(model.denoiser).__name__} looks classes up in no table")
    return found


def _encoded(model: Pipeline, pictures: Tensor) -> Tensor:
    """Examples as they are denoised."""
    if not len(pictures):
        raise BadInput("a search needs example pictures of the concept, and there are none")
    with torch.no_grad():
        parts = torch.split(pictures.to(model.device, model.dtype), DRAWN_AT_ONCE)
        return torch.cat([model.encode(part) for part in parts])


def _noised(
    model: Pipeline, x_0: Tensor, rows: int, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and noise of ``rows`` examples, one in every ``rows``-th of the times."""
    turns = -(-rows // len(x_0))
    chosen = torch.cat([torch.randperm(len(x_0), generator=draw) for _ in range(turns)])[:rows]
    place = (torch.arange(rows) + torch.rand(rows, generator=draw)) / rows
    t = (place * len(model.abars)).long().to(model.device)
    noise = torch.randn((rows, *x_0.shape[1:]), generator=draw).to(x_0)
    return model.noised(x_0[chosen.to(x_0.device)], noise, t), t, noise


def _errors(
    model: Pipeline, wanted: Wanted, told: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Squared error per pixel of every row under its own condition, float32, shape (rows,)."""
    told = told.to(model.device, model.dtype)
    if model.text_encoder is not None:
        eps = model.eps(x_t, t, told)
    else:
        with fed(model, int(wanted), told):
            eps = model.eps(x_t, t, torch.full_like(t, int(wanted)))
    return (eps.float() - noise.float()).square().flatten(1).mean(1)


def _judged(
    model: Pipeline, wanted: Wanted, condition: Tensor, shows: Shows, sampling: Sampling, seed: int
) -> Count:
    """Draw pictures under a condition in the place of ``wanted``, and have them judged."""
    draw, hits = torch.Generator().manual_seed(seed), 0
    told = condition.to(model.device, model.dtype)
    settings = (draw, sampling.steps, sampling.guidance)
    with evaluating(model):
        for start in range(0, sampling.count, DRAWN_AT_ONCE):
            rows = min(DRAWN_AT_ONCE, sampling.count - start)
            if model.text_encoder is not None:
                pictures = model.sample(told.expand(rows, -1, -1), *settings)
            else:
                with fed(model, int(wanted), told):
                    pictures = model.sample([int(wanted)] * rows, *settings)
            seen = torch.as_tensor(shows(pictures)).bool()
            if seen.shape != (rows,):
                raise BadInput(
                    f"a judge says yes or no of each of {rows} pictures: got the shape "
                    f"{tuple(seen.shape)}"
                )
            hits += int(seen.sum())
    return Count(hits, sampling.count)


def _best(
    model: Pipeline, wanted: Wanted, candidates: Tensor, shows: Shows, sampling: Sampling, seed: int
) -> int:
    """Which of a few conditions shows the concept most often; the first of equals."""
    screen = replace(sampling, count=SCREENED)
    hits = [_judged(model, wanted, c, shows, screen, seed + 1).hits for c in candidates]
    return hits.index(max(hits))


def _measured(
    model: Pipeline, wanted: Wanted, condition: Tensor, shows: Shows, sampling: Sampling, seed: int
) -> Found:
    """Counts with and without a condition, from the same starting noise."""
    before = _judged(model, wanted, condition_of(model, wanted), shows, sampling, seed)
    after = _judged(model, wanted, condition, shows, sampling, seed)
    return {
        "condition": condition.float().cpu(),
        "before": torch.tensor(before),
        "after": torch.tensor(after),
    }


def _once(
    run: Run | None, name: str, generator: torch.Generator, compute: Callable[[int], Found]
) -> Found:
    """What was found, now or by an interrupted run; the generator moves on equally in both."""
    seed = int(torch.randint(2**48, (1,), generator=generator))
    found = compute(seed) if run is None else run.once(name, lambda: compute(seed))
    return {key: value.cpu() for key, value in found.items()}


def _revival(told: str, found: Found) -> Revival:
    before, after = (Count(*found[key].tolist()) for key in ("before", "after"))
    return Revival(told, found["condition"], before, after)
