"""Ways of looking for what is left: what each finds, beside what it finds in a retrained model.

Lynch et al. 2024 (arXiv 2402.16835) look at a language model that forgot in eight ways; here they
are familiarity, other languages, jailbreak prompts, in-context relearning, relearning by
fine-tuning (in :mod:`unlearn.evaluations.inside`), downstream question answering, latent knowledge
and side effects. What is done to the weights (rounding, pruning, training on other texts, soft
prompts) comes on top, for classifiers, too.

Each gives one number per record. A search can teach a model what it looks for, or guess it; so the
number counts only as far as it lies above the same search on a model that never saw the records.
Side effects alone are held against the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from unlearn.attacks import (
    embedding,
    familiarity,
    in_context,
    jailbreak,
    languages,
    pruning,
    quantization,
    relearning,
)
from unlearn.attacks.extraction.compression import compressions
from unlearn.attacks.interface import DEPTHS, Ground, Prompting, Search
from unlearn.case import Case
from unlearn.errors import BadInput, Collapsed, Unsupported
from unlearn.evaluations import downstream, latent_knowledge, side_effects
from unlearn.evaluations.criteria import Check, Criteria
from unlearn.evaluations.findings import beside, shown
from unlearn.evaluations.measure import SAMPLED, Measured, Measurements, Taking
from unlearn.evaluations.memorization import rouge_l
from unlearn.evaluations.schema import CHECKPOINTS, Checkpoint
from unlearn.run import Run
from unlearn.tasks.base import Encoded, Task
from unlearn.tasks.causal_lm import CausalLM

Array = npt.NDArray[np.float64]

LOOKED_FOR = {"causal_lm": 100, "classification": 1000}  # forget records at most


def recalled(attack: Prompting) -> Search:
    """What an attacker gets a model to say, as the best ROUGE-L recall of all tries."""

    def score(model: nn.Module, ground: Ground, run: Run) -> Array:
        found = attack.elicit(model, ground, run)
        return np.array(
            [
                max(rouge_l(truth, answer).recall for answer in said)
                for truth, said in zip(found.truth, found.said, strict=True)
            ]
        )

    return Search(attack.name, attack.title, "share of words", attack.source, score)


ASKED_OTHERWISE = (
    *map(recalled, (familiarity.ATTACK, languages.ATTACK, jailbreak.ATTACK, in_context.ATTACK)),
    downstream.SEARCH,
    latent_knowledge.SEARCH,
    latent_knowledge.UNSUPERVISED,
)
HANDLED = (
    *quantization.SEARCHES, *pruning.SEARCHES, *relearning.SEARCHES, *embedding.SEARCHES,
)  # fmt: skip
SEARCHES: tuple[Search, ...] = (*ASKED_OTHERWISE, *HANDLED)


def compressed(targets: int, name: str = "compression") -> Search:
    """Whether a prompt shorter than the answer brings it out, of so many records."""

    def score(model: nn.Module, ground: Ground, run: Run) -> Array:
        found = compressions(model, ground.forget, run, targets=targets, name=name)
        return found.memorised.astype(np.float64)

    return Search(
        "adversarial_compression", "Answers that a shorter adversarial prompt brings out",
        "share of records", "Schwarzschild et al. 2024, arXiv 2404.15146", score,
    )  # fmt: skip


@dataclass(frozen=True)
class Material:
    """What is looked for in every model: read, drawn and translated once.

    Attributes:
        rows: positions of the records under search in the forget set.
        translations: of those records, by language.
        translated: by language, which of them each translation is of.
        templates: jailbreak prompts.
    """

    rows: list[int]
    translations: Mapping[str, Encoded]
    translated: Mapping[str, list[int]]
    templates: tuple[str, ...]

    def ground(self, case: Case, task: Task) -> Ground:
        """The same for a model with this task."""
        sets = case.sets
        return Ground(
            sets.forget.select(self.rows).as_read(task),
            sets.retain and sets.retain.sample(SAMPLED["deep"], case.config.seed).as_read(task),
            {language: part.as_read(task) for language, part in self.translations.items()},
            self.translated,
            self.templates,
        )


def material(case: Case) -> Material:
    """What searches need besides the models.

    Raises:
        BadInput: unreadable translations or prompts, a translator that is none, or settings that
            only a deep audit of a language model looks at.
    """
    config, task = case.config, case.checkpoint.task
    depth = config.audit  # type: ignore[attr-defined]
    talks = isinstance(task, CausalLM) and depth == "deep"
    named = [n for n in ("translations", "translator", "jailbreaks", "acr") if getattr(config, n)]
    if named and not talks:
        raise BadInput(f"--{named[0]} is for deep audits of language models: pass --audit deep")
    if config.translations is not None and config.translator is not None:
        raise BadInput("pass --translations or --translator, not both")
    size = min(LOOKED_FOR.get(task.name, 0), len(case.sets.forget))
    draw = torch.Generator().manual_seed(config.seed)
    rows = sorted(torch.randperm(len(case.sets.forget), generator=draw)[:size].tolist())
    templates = jailbreak.read_templates()
    if config.jailbreaks is not None:
        templates = jailbreak.checked([*templates, *jailbreak.read_templates(config.jailbreaks)])
    found: languages.Translations = {}, {}
    if isinstance(task, CausalLM) and config.translations is not None:
        found = _among(rows, languages.read(config.translations, case.sets.forget.examples, task))
    elif config.translator is not None:
        given = config.translator
        by_language = given if isinstance(given, Mapping) else {"another language": given}
        found = languages.translated(case.sets.forget.select(rows), by_language)
    return Material(rows, *found, templates)


def _among(rows: list[int], found: languages.Translations) -> languages.Translations:
    """The translations of some records, counted from the first of those."""
    place = {row: i for i, row in enumerate(rows)}
    parts, numbers = dict[str, Encoded](), dict[str, list[int]]()
    for language, part in found[0].items():
        kept = [i for i, row in enumerate(found[1][language]) if row in place]
        if kept:
            parts[language] = part.select(kept)
            numbers[language] = [place[found[1][language][i]] for i in kept]
    return parts, numbers


def searches(case: Case, role: str = "") -> list[Search]:
    """What is looked for in this model family at this depth; ``role`` names a model's files."""
    family, depth = case.checkpoint.task.name, case.config.audit  # type: ignore[attr-defined]
    reached = DEPTHS[: DEPTHS.index(depth) + 1]
    found = [s for s in SEARCHES if family in s.tasks and s.depth in reached]
    return [*found, compressed(case.config.acr, f"compress {role}")] if case.config.acr else found


def look(found: Measured, taking: Taking, case: Case, brought: Material) -> None:
    """Every search on one model; what an interrupted audit found is read back."""
    task = case.tasks()[taking.role]
    ground = brought.ground(case, task)
    for search in searches(case, taking.role):
        _search(found, taking, search, ground, "forget")
    neighbours = case.sets.neighbours
    if neighbours is not None and task.name == "causal_lm":
        _search(found, taking, side_effects.SEARCH, Ground(neighbours.as_read(task)), "neighbours")


def _search(found: Measured, taking: Taking, search: Search, ground: Ground, subset: str) -> None:
    """One search, or why it was not possible."""

    def compute() -> dict[str, Any]:
        taking.run.progress.say(f"Looking for what is left: {search.title}.")
        return {"score": search.score(taking.model, ground, taking.run)}

    try:
        values = taking.arrays(f"{subset}/{search.name}", compute)["score"]
    except (BadInput, Collapsed, Unsupported) as error:
        found.missing[search.name] = f"{str(error)[0].upper()}{str(error)[1:]}."
        return
    found.numbers.setdefault(search.name, {})[subset] = values


def checks(measured: Measurements, case: Case, criteria: Criteria) -> list[Check]:
    """What every search found, beside the retrained model; side effects, beside the original."""
    found = [_check(search, measured, criteria) for search in searches(case)]
    if case.sets.neighbours is not None and case.checkpoint.task.name == "causal_lm":
        found.append(_lost(measured, criteria))
    return found


def _check(search: Search, measured: Measurements, criteria: Criteria) -> Check:
    group = "durability" if search in HANDLED else "robustness"
    values: dict[Checkpoint, Array | None] = {
        role: measured[role].numbers.get(search.name, {}).get("forget")
        for role in CHECKPOINTS
        if role in measured
    }
    why = [m.missing[search.name] for m in measured.values() if search.name in m.missing]
    about = {"title": search.title, "unit": search.unit, "group": group, "source": search.source,
             "better": "closer_to_retrained"}  # fmt: skip
    if why or values["unlearned"] is None or values["original"] is None:
        fields = {"n": 0, **about}
        return Check(search.name, "forget", state=("not_run", " ".join(why[:1])), fields=fields)
    return beside(search.name, values, shown(bounds=(0.0, 1.0), values=values, **about), criteria)


def _lost(measured: Measurements, criteria: Criteria) -> Check:
    name, title = side_effects.SEARCH.name, side_effects.SEARCH.title
    about = {"title": title, "unit": side_effects.SEARCH.unit, "group": "utility",
             "source": side_effects.SEARCH.source, "better": "higher"}  # fmt: skip
    values: dict[Checkpoint, Array | None] = {
        role: m.numbers.get(name, {}).get("neighbours") for role, m in measured.items()
    }
    after, before = values["unlearned"], values["original"]
    if after is None or before is None:
        why = measured["unlearned"].missing.get(name, "")
        return Check(name, "neighbours", state=("not_run", why), fields={"n": 0, **about})
    fields = shown(bounds=(0.0, 1.0), values=values, **about)
    rule = criteria.rule(name, "neighbours")
    if rule is None:
        return Check(name, "neighbours", fields=fields)
    if not before.any():
        why = "There was nothing to lose: it is 0 on the original, too."
        return Check(name, "neighbours", state=("info", why), fields=fields)
    effect = side_effects.kept(before, after, rule.margin)
    return Check(name, "neighbours", effect, fields=fields | {"criterion": effect.criterion})
