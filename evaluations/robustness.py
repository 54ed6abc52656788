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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
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
from unlearn.attacks.interface import DEPTHS, Ground, Inapplicable, Prompting, Search
from unlearn.case import Case
from unlearn.errors import BadInput, Collapsed, Unsupported, sentence
from unlearn.evaluations import downstream, latent_knowledge, side_effects
from unlearn.evaluations.criteria import Check, Criteria, Outcome
from unlearn.evaluations.findings import beside, kept, shown
from unlearn.evaluations.measure import SAMPLED, Measured, Measurements, Taking
from unlearn.evaluations.memorization import rouge_l
from unlearn.evaluations.schema import CHECKPOINTS, Checkpoint
from unlearn.run import Run
from unlearn.tasks.base import Encoded, Task
from unlearn.tasks.causal_lm import CausalLM

Array = npt.NDArray[np.float64]

LOOKED_FOR = {"causal_lm": 100, "classification": 1000}  # forget records at most, as is usual


def recalled(attack: Prompting) -> Search:
    """What an attacker gets a model to say: of every record, the best ROUGE-L recall of all tries.

    A record that is tried after several truths (its answer in several languages) is one record.
    """

    def score(model: nn.Module, ground: Ground, run: Run) -> Array:
        found = attack.elicit(model, ground, run)
        best: dict[int, float] = {}
        for record, truth, said in zip(found.record, found.truth, found.said, strict=True):
            recall = max(rouge_l(truth, answer).recall for answer in said)
            best[record] = max(recall, best.get(record, 0.0))
        return np.array([best[record] for record in sorted(best)])

    return Search(
        attack.name, attack.title, "share of words", attack.source, score,
        needs=attack.needs, records=attack.records,
    )  # fmt: skip


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
        "share of records", "Schwarzschild et al. 2024, arXiv 2404.15146", score, needs=("--acr",),
        records=targets,
    )  # fmt: skip


@dataclass(frozen=True)
class Material:
    """What is looked for in every model: read, drawn and translated once.

    Attributes:
        rows: positions in the forget set of the records under search, as many as is usual.
        spoken: of those that are asked in other languages, at most as many.
        translations: of these, by language.
        translated: by language, which of them each translation is of.
        templates: jailbreak prompts.
    """

    rows: list[int]
    spoken: list[int]
    translations: Mapping[str, Encoded]
    translated: Mapping[str, list[int]]
    templates: tuple[str, ...]

    def grounds(self, case: Case, task: Task) -> Callable[[Search], Ground]:
        """What each search may use of it in a model with this task."""
        sets, seed = case.sets, case.config.seed
        forget = sets.forget.as_read(task)
        retain = sets.retain and sets.retain.sample(SAMPLED["deep"], seed).as_read(task)
        translations = {name: part.as_read(task) for name, part in self.translations.items()}

        def ground(search: Search) -> Ground:
            if search.name == languages.ATTACK.name:
                spoken = forget.select(self.spoken)
                return Ground(spoken, retain, translations, self.translated)
            drawn = search.records and forget.drawn(search.records, seed)
            return Ground(forget.select(drawn or self.rows), retain, templates=self.templates)

        return ground


def material(case: Case) -> Material:
    """What searches need besides the models.

    Raises:
        BadInput: unreadable translations or prompts, or a translator that is none.
    """
    config, task = case.config, case.checkpoint.task
    if config.translations is not None and config.translator is not None:
        raise BadInput("pass --translations or --translator, not both")
    forget, most = case.sets.forget, LOOKED_FOR.get(task.name, 0)
    rows = spoken = forget.drawn(most, config.seed)
    templates = jailbreak.read_templates()
    if config.jailbreaks is not None:
        theirs = jailbreak.read_templates(config.jailbreaks)
        templates = (*templates, *(t for t in theirs if t not in templates))
    found: languages.Translations = {}, {}
    if isinstance(task, CausalLM) and config.translations is not None:
        found = languages.read(config.translations, forget.examples, task)
        known = sorted({row for numbers in found[1].values() for row in numbers})
        spoken = [known[i] for i in forget.select(known).drawn(most, config.seed)]
        found = _among(spoken, found)
    elif config.translator is not None:
        given = config.translator
        several = isinstance(given, Mapping) and "model" not in given
        by_language = given if several else {"another language": given}
        found = languages.translated(forget.select(rows), by_language, case.device)
    return Material(rows, spoken, *found, templates)


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
    if taking.role == "original":
        _note(taking.run, case, brought)
    wanted = searches(case, taking.role)
    ground = brought.grounds(case, task)
    for search in wanted:
        _search(found, taking, search, ground(search), "forget")
    neighbours = case.sets.neighbours
    if neighbours is not None and task.name == "causal_lm":
        _search(found, taking, side_effects.SEARCH, Ground(neighbours.as_read(task)), "neighbours")


def _note(run: Run, case: Case, brought: Material) -> None:
    """What decides how much is found: the prompts, the languages, and what rounds weights."""
    looked, words = {search.name for search in searches(case)}, []
    if jailbreak.ATTACK.name in looked:
        version = jailbreak.digest(brought.templates)
        words.append(f"{len(brought.templates)} jailbreak prompts (version {version})")
    if languages.ATTACK.name in looked and brought.translations:
        words.append(
            f"translations of {len(brought.spoken)} records into {', '.join(brought.translations)}"
        )
    if {search.name for search in quantization.SEARCHES} & looked:
        words.append(f"weights rounded by {quantization.backend(run.device)}")
    if words:
        run.note(f"What is left was looked for with {', '.join(words)}.")


def _search(found: Measured, taking: Taking, search: Search, ground: Ground, subset: str) -> None:
    """One search, or why it was not possible."""

    def compute() -> dict[str, Any]:
        taking.run.progress.say(f"Looking for what is left: {search.title}.")
        return {"score": search.score(taking.model, ground, taking.run)}

    try:
        values = taking.arrays(f"{subset}/{search.name}", compute)["score"]
    except (BadInput, Collapsed, Unsupported) as error:
        found.missing[search.name] = sentence(error)
        if isinstance(error, Inapplicable):
            found.inapplicable.add(search.name)
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
    values = _scores(search, measured, "forget")
    about = {"title": search.title, "unit": search.unit, "group": group, "source": search.source,
             "better": "closer_to_retrained"}  # fmt: skip
    if state := _unable(search, values, measured):
        return Check(search.name, "forget", state=state, fields={"n": 0, **about})
    return beside(search.name, values, shown(bounds=(0.0, 1.0), values=values, **about), criteria)


def _scores(search: Search, measured: Measurements, subset: str) -> dict[Checkpoint, Array | None]:
    """What a search found in each model; None where it was not possible."""
    return {
        role: measured[role].numbers.get(search.name, {}).get(subset)
        for role in CHECKPOINTS
        if role in measured
    }


def _unable(
    search: Search, values: Mapping[Checkpoint, Array | None], measured: Measurements
) -> tuple[Outcome, str] | None:
    """Why models cannot be held against each other; for information where nothing would help."""
    why = [m.missing[search.name] for m in measured.values() if search.name in m.missing]
    if why:
        never = all(search.name in m.inapplicable for m in measured.values())
        return "info" if never else "not_run", why[0]
    found = {role: score for role, score in values.items() if score is not None}
    if not {"original", "unlearned"} <= found.keys() or not all(map(len, found.values())):
        return "not_run", "There are no values of every model."
    if damaged := [role for role, score in found.items() if not np.isfinite(score).all()]:
        return "not_run", f"The {damaged[0]} model gives values that are not finite."
    if len({score.shape for score in found.values()}) > 1:
        sizes = ", ".join(f"{len(score)} with the {role}" for role, score in found.items())
        why_not = f"The models do not read the same records: {sizes} model."
        return "not_run", f"{why_not} Their tokenizers or lengths differ; pass --max-length."
    return None


def _lost(measured: Measurements, criteria: Criteria) -> Check:
    search = side_effects.SEARCH
    name = search.name
    about = {"title": search.title, "unit": search.unit, "group": "utility",
             "source": search.source, "better": "higher"}  # fmt: skip
    values = _scores(search, measured, "neighbours")
    state = _unable(search, values, measured)
    after, before = values.get("unlearned"), values.get("original")
    if state or after is None or before is None:
        return Check(name, "neighbours", state=state, fields={"n": 0, **about})
    fields = shown(bounds=(0.0, 1.0), values=values, **about)
    rule = criteria.rule(name, "neighbours")
    if rule is None:
        return Check(name, "neighbours", fields=fields)
    if not before.any():
        why = "There was nothing to lose: it is 0 on the original, too."
        return Check(name, "neighbours", state=("info", why), fields=fields)
    effect = kept(after, before, rule.margin)
    return Check(name, "neighbours", effect, fields=fields | {"criterion": effect.criterion})
