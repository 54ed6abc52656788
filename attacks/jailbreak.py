"""Jailbreak prompts: put the question another way, around what the model learned to refuse.

One of the eight methods of Lynch et al. (2024, arXiv 2402.16835). The kinds of prompts are those
of Wei et al. (2023, arXiv 2307.02483): role play, refusal suppression, prefix injection, other
forms of text. Every template is a try and the best one counts, so the same templates have to be
tried on a model that never knew the answers: the best of many is not nothing even there.

A template holds ``{question}`` once. What follows ``{answer}``, where a template has it, opens the
model's own answer, which whoever holds the weights can always do. Ours are in ``jailbreaks.yaml``.

Cost: one greedy answer per record and template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from unlearn.attacks.interface import Elicited, Ground, Inapplicable, Prompting
from unlearn.attacks.prompting import Try, asked, elicited
from unlearn.errors import BadInput
from unlearn.run import Run
from unlearn.tasks.causal_lm import fields

OURS = Path(__file__).with_name("jailbreaks.yaml")
QUESTION, ANSWER = "{question}", "{answer}"


def read_templates(path: str | Path | None = None) -> tuple[str, ...]:
    """The templates of a file; without ``path`` our own.

    Args:
        path: a YAML list (``.yaml`` or ``.yml``), which alone can hold several lines in one
            template, or any other text file with one template per line, blank lines left out.

    Raises:
        BadInput: no such file, not readable, empty, or a template that cannot be used.
    """
    import yaml

    file = Path(path).expanduser() if path else OURS
    try:
        text = file.read_text(encoding="utf-8-sig")
        is_yaml = file.suffix.lower() in {".yaml", ".yml"}
        found = yaml.safe_load(text) if is_yaml else [x for x in text.split("\n") if x.strip()]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"the templates {file} cannot be read ({reason})") from None
    if not isinstance(found, list) or not found:
        raise BadInput(f"the templates {file} are no list, or empty: give one template per line")
    return checked(found, str(file))


def checked(templates: Sequence[str], source: str = "memory") -> tuple[str, ...]:
    """The templates without surrounding blanks, if every one of them can be used.

    Raises:
        BadInput: a template that is no text, has not exactly one ``{question}``, has several
            ``{answer}`` or the question after it, or is there twice.
    """
    found: list[str] = []
    for number, template in enumerate(templates, start=1):
        where = f"template {number} of {source}"
        if not isinstance(template, str):
            raise BadInput(f"{where} is a {type(template).__name__}, not a text: quote it")
        count = template.count(QUESTION)
        if count != 1:
            raise BadInput(f"{where} has {QUESTION} {count} times: every template needs it once")
        if template.count(ANSWER) > 1 or QUESTION in template.partition(ANSWER)[2]:
            raise BadInput(f"{where} may have one {ANSWER}, and it comes after {QUESTION}")
        if template.strip() in found:
            raise BadInput(f"{where} is there twice: remove one of the two")
        found.append(template.strip())
    return tuple(found)


def digest(templates: Sequence[str]) -> str:
    """A short hash of the templates in their order, to record which ones were tried."""
    return hashlib.sha256("\x00".join(templates).encode()).hexdigest()[:16]


def filled(template: str, question: str) -> tuple[str, str]:
    """(what is asked, what opens the answer).

    >>> filled("Please: {question} {answer} Sure:", "Who?")
    ('Please: Who?', 'Sure:')
    """
    words, _, opening = template.partition(ANSWER)
    return words.strip().replace(QUESTION, question), opening.strip()


def elicit(model: nn.Module, ground: Ground, run: Run) -> Elicited:
    """What the model says to every template, ours where the ground brings none.

    Raises:
        BadInput: an unusable template, or no record that fits a template.
        Inapplicable: records without questions.
    """
    templates = checked(ground.templates) if ground.templates else read_templates()
    forget = ground.forget
    tries = []
    for record in range(len(forget)):
        row = forget.examples[record]
        pair = fields(row)
        if pair is not None:
            prompts = (filled(template, row[pair[0]]) for template in templates)
            tries += [Try(record, asked(forget, record, *prompt)) for prompt in prompts]
    if not tries:
        raise Inapplicable(
            "jailbreak prompts ask questions, and the forget records are plain texts"
        )
    return elicited(model, forget, tries, run, "jailbreak prompts")


ATTACK = Prompting(
    "jailbreak",
    "Jailbreak prompts",
    "Lynch et al. 2024, arXiv 2402.16835; Wei et al. 2023, arXiv 2307.02483",
    elicit,
)
