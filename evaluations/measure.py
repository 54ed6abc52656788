"""What one model shows on every set: measured once, kept on disk, read from there.

Everything that needs a model happens here, one model at a time. What it leaves are tables of
numbers per record; findings, criteria and verdicts come from these tables alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from unlearn import distributed, generation
from unlearn.attacks import relearning
from unlearn.attacks.membership import gradnorm, lowercase, neighbourhood
from unlearn.attacks.signals import Signals, collect
from unlearn.case import Case, SetName
from unlearn.data import load
from unlearn.errors import BadInput, Collapsed
from unlearn.evaluations import probes
from unlearn.evaluations.memorization import knowledge_memorization, rouge_l
from unlearn.interface import Classes
from unlearn.run import Role, Run
from unlearn.tasks.base import Encoded, Task
from unlearn.tasks.causal_lm import FIELDS
from unlearn.workplace import written_whole

Array = npt.NDArray[np.float64]

SAMPLED = {"quick": 1000, "standard": 2000, "deep": 5000}  # records of sets not to be forgotten
ASKED = 200  # questions a language model is asked, per set
COSTLY = 100  # records per set that get a gradient or neighbours of their own
NEIGHBOURS = 10  # per record
OF_A_CLASS = 4  # records that bring a class back, if it was only hidden
LAYERS = 6  # whose features are kept
PARAPHRASED, PERTURBED = "paraphrased_answer", "perturbed_answer"  # columns of a record, as in TOFU


@dataclass(frozen=True)
class Measured:
    """What one model showed.

    Attributes:
        signals: by set, and by "set/variant" for sets read differently.
        costly: the same for the few records that were measured at greater cost.
        numbers: per-record numbers by name and set; rows of ``costly`` for its numbers.
        curves: arrays with one row per layer or step, by name and part.
        answers: what a language model said about the forget records; not kept on disk.
        missing: why something could not be looked for, by its name.
        inapplicable: those of them that nothing could be given for: there is nothing to look at.
    """

    signals: dict[str, Signals]
    costly: dict[str, Signals] = field(default_factory=dict)
    numbers: dict[str, dict[str, Array]] = field(default_factory=dict)
    curves: dict[str, dict[str, Array]] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    inapplicable: set[str] = field(default_factory=set)


Measurements = Mapping[Role, Measured]
Decoder = nn.Module


def nonmembers(case: Case) -> SetName | None:
    """The set no model saw that is most like the forget set; None if there is none."""
    name: SetName = "holdout_forget" if isinstance(case.target, Classes) else "holdout"
    return name if name in case.sets.named() else None


def parts(case: Case, task: Task) -> dict[str, Encoded]:
    """The sets as they are measured: all of the forget set, a sample of the others."""
    size = SAMPLED[case.config.audit]  # type: ignore[attr-defined]
    found: dict[str, Encoded] = {}
    for name, examples in case.sets.named().items():
        part = examples if name == "forget" else examples.sample(size, case.config.seed)
        found[name] = part if part.task is task else Encoded(part.examples, task)
    return found


def measure(
    role: Role, model: nn.Module, case: Case, run: Run, directory: Path, decoder: Decoder | None
) -> Measured:
    """Measure one model on every set; what an interrupted audit measured is read back.

    Args:
        role: of the model.
        model: on ``run.device``.
        case: sets and settings.
        run: progress, seed, and the place of unfinished work.
        directory: where ``signals`` are kept.
        decoder: of the original language model, to read hidden states with.
    """
    closely = case.config.audit in ("standard", "deep")  # type: ignore[attr-defined]
    task = case.tasks()[role]
    taking = Taking(role, model, run, directory)
    found, sets, against = Measured({}), parts(case, task), nonmembers(case)
    texts = task.name == "causal_lm"
    layers = thinned(list(task.layers(model))) if closely and not texts else []
    for name, part in sets.items():
        found.signals[name] = taking.signals(part, name, layers=layers)
        if texts:
            _ask(found, taking, part, name)
    if closely:
        for name in ("forget", *([against] if against else [])):
            _at_greater_cost(found, taking, sets[name], name)
        _look_inside(found, taking, case, sets, decoder)
    return found


@dataclass(frozen=True)
class Taking:
    """Measures one model, or reads back what was measured."""

    role: str
    model: nn.Module
    run: Run
    directory: Path

    def signals(self, examples: Encoded, name: str, layers: Sequence[str] = ()) -> Signals:
        """Signals of a set, taken once."""
        path = self._path(name, "parquet")
        # hidden features say much about a record: they stay in the place of unfinished work
        whole = path
        if layers and self.run.work is not None:
            whole = self.run.work / "features" / path.name
        if not distributed.on_main(whole.exists):
            key = distributed.on_main((self.directory / "record.key").read_text)
            phase = f"measure {self.role} on {name}"
            found = collect(self.model, examples, self.run, bytes.fromhex(key), phase, layers)
            if distributed.is_main():
                replace(found, features={}).write(path)
                if layers:
                    found.write(whole)
        return distributed.on_main(lambda: Signals.read(whole))

    def arrays(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Array]:
        """Arrays of numbers, computed once; what is noted meanwhile is kept beside them."""
        path, notes = self._path(name, "safetensors"), self.run.notes
        if not distributed.on_main(path.exists):
            before = len(notes)
            made = {key: np.ascontiguousarray(v, np.float64) for key, v in compute().items()}
            if distributed.is_main():
                with written_whole(path) as new:
                    save_file(made, new, {"notes": json.dumps(notes[before:])})

        def kept() -> tuple[dict[str, Array], list[str]]:
            with safe_open(path, "np") as file:
                noted = json.loads((file.metadata() or {}).get("notes", "[]"))
                return {key: file.get_tensor(key) for key in file.keys()}, noted  # noqa: SIM118

        found, noted = distributed.on_main(kept)
        for sentence in noted:
            if sentence not in notes:  # of an interrupted audit
                self.run.note(sentence)
        return found

    def answers(self, examples: Encoded, name: str) -> list[str]:
        """Greedy answers; texts stay in the place of unfinished work."""
        work = self.run.work
        path = work / "answers" / f"{self.role}-{name}.json" if work else None
        if path is not None and distributed.on_main(path.exists):
            return list(json.loads(distributed.on_main(path.read_text)))
        phase = f"ask {self.role} about {name}"
        found = generation.greedy_answers(self.model, examples, self.run, phase)
        if path is not None and distributed.is_main():
            with written_whole(path) as new:
                new.write_text(json.dumps(found))
        return found

    def _path(self, name: str, suffix: str) -> Path:
        return self.directory / "signals" / f"{self.role}-{name.replace('/', '-')}.{suffix}"


def _fits(decoder: Decoder, model: nn.Module, task: Task) -> bool:
    """Whether the original's decoder reads this model's hidden states in its words."""
    ours = {p.shape for p in decoder.parameters() if p.ndim == 2}
    return {p.shape for p in task.output_layer(model).parameters() if p.ndim == 2} == ours


def thinned(names: list[str]) -> list[str]:
    """At most ``LAYERS`` of them, evenly spaced, the last one among them."""
    if len(names) <= LAYERS:
        return names
    return [names[i] for i in np.linspace(0, len(names) - 1, LAYERS).round().astype(int)]


def answers_given(examples: Encoded) -> dict[str, Encoded]:
    """The set with the paraphrased and the wrong answers its records bring, one after another.

    Wrong answers come record by record; every record must bring equally many.
    """
    found = {}
    rows = [examples.examples[i] for i in range(len(examples))]
    for variant, column in (("paraphrased", PARAPHRASED), ("perturbed", PERTURBED)):
        values = [row.get(column) for row in rows]
        texts = [v if isinstance(v, list) else [v] for v in values]
        same = {len(t) for t in texts}
        if any(v is None for v in values) or same == {0} or len(same) > 1:
            continue
        derived = [
            {**{name: row[name] for pair in FIELDS for name in pair if name in row},
             next((pair[1] for pair in FIELDS if pair[1] in row), "text"): text}
            for row, given in zip(rows, texts, strict=True)
            for text in given
        ]  # fmt: skip
        with suppress(BadInput):  # answers that are blank, or do not fit
            found[variant] = Encoded(load(derived, examples.name), examples.task)
    return found


def _ask(found: Measured, taking: Taking, part: Encoded, name: str) -> None:
    """What a language model says, and how likely it takes other answers to be."""
    for variant, derived in answers_given(part).items():
        found.signals[f"{name}/{variant}"] = taking.signals(derived, f"{name}/{variant}")
    asked = part.sample(ASKED, taking.run.seed)
    if all(len(asked[i]["prompt"]) <= 1 for i in range(len(asked))):
        return  # texts without a prompt: every question would be the same
    answers = taking.answers(asked, name)
    if name == "forget":
        found.answers.extend(answers)
    pairs = list(zip(generation.true_answers(asked), answers, strict=True))
    found.numbers.setdefault("rouge_l_recall", {})[name] = np.array(
        [rouge_l(truth, answer).recall for truth, answer in pairs]
    )
    found.numbers.setdefault("knowledge_memorization", {})[name] = np.array(
        [knowledge_memorization(truth, answer) for truth, answer in pairs]
    )


def _at_greater_cost(found: Measured, taking: Taking, part: Encoded, name: str) -> None:
    """Gradient norms and, of texts, lower case and neighbours: for a sample of a set."""
    draw = taking.run.generator(f"costly/{name}")
    rows = sorted(torch.randperm(len(part), generator=draw)[:COSTLY].tolist())
    few = part.select(rows)
    found.costly[name] = found.signals[name].select(rows)
    norms = taking.arrays(
        f"{name}/gradients",
        lambda: {"grad_norm": gradnorm.grad_norms(taking.model, few, taking.run)},
    )
    found.numbers.setdefault("grad_norm", {})[name] = norms["grad_norm"]
    if part.task.name == "causal_lm":
        near = neighbourhood.neighbours(few, NEIGHBOURS, draw)
        derived = {"neighbours": near}
        with suppress(BadInput):  # lower case may take more tokens than fit
            derived["lowercase"] = lowercase.lowercased(few)
        for variant, examples in derived.items():
            key = f"{name}/{variant}"
            found.costly[key] = taking.signals(examples, key)


def _look_inside(
    found: Measured, taking: Taking, case: Case, sets: dict[str, Encoded], decoder: Decoder | None
) -> None:
    """The logit lens of a language model, an untrained classifier, and relearning."""
    run, forget = taking.run, sets["forget"]
    if decoder is not None and _fits(decoder, taking.model, forget.task):
        few = forget.sample(ASKED, run.seed)

        def read() -> dict[str, Any]:
            seen = probes.lens(taking.model, few, run, decoder)
            return dict(zip(seen.layers, seen.logprob, strict=True))

        lens = taking.arrays("forget/lens", read)
        order = list(forget.task.layers(taking.model))
        found.curves["lens"] = {name: lens[name] for name in order if name in lens}
    if (
        forget.task.name == "classification"
        and taking.role == "original"
        and (case.checkpoint.fresh is not None)
    ):
        with torch.random.fork_rng():
            torch.manual_seed(run.seed_of("untrained"))
            untrained = case.checkpoint.fresh().to(run.device)
        blank = replace(taking, model=untrained, role="untrained")
        found.signals["forget/untrained"] = blank.signals(forget, "forget")
    if len(forget) >= 2:
        count = OF_A_CLASS if isinstance(case.target, Classes) else relearning.SHOWN
        shown, held = relearning.split(len(forget), run.seed, count)

        def relearn() -> dict[str, Any]:
            curve = relearning.relearn(
                taking.model, forget.select(shown), forget.select(held),
                sets.get("retain"), run,
            )  # fmt: skip
            return {"steps": curve.steps, "hits": curve.hits, "loss": curve.loss}

        try:
            found.curves["relearning"] = taking.arrays("forget/relearning", relearn)
        except Collapsed as error:
            run.note(f"Relearning the {taking.role} model was not possible: {error}")
