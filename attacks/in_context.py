"""In-context relearning: other forget records before the question, to bring the answer to mind.

One of the eight methods of Lynch et al. (2024, arXiv 2402.16835): nothing is trained, knowledge of
the same kind is put into the prompt. The forget set is split as for relearning; one part is shown,
the other is asked for. Before every question stand the shown records that are most like it,
question and answer, the most alike last: one, two or five of them, each a try, for small models
lose their thread in long contexts.

The answer must not stand there to be read. A shown record is never put before a question whose
answer it gives: if it holds every word that the true answer adds to its question. What several
shown records give away together is not looked for; a model that never knew any of it reads the
same context, and what it makes of it is the value to reach.

Cost: up to three greedy answers, to long prompts, per record asked for.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from unlearn import scripts
from unlearn.attacks import relearning
from unlearn.attacks.interface import Elicited, Ground, Inapplicable, Prompting
from unlearn.attacks.prompting import Try, asked, elicited
from unlearn.errors import BadInput
from unlearn.generation import true_answers
from unlearn.run import Run
from unlearn.tasks.base import Encoded, Encoding
from unlearn.tasks.causal_lm import FIELDS, fields

SHOWN = (1, 2, 5)  # records before a question, each number a try


def words(text: str) -> set[str]:
    """The different words of a text in lower case; letters and digits of any script.

    A character of a script without spaces is a word.
    """
    return set(re.findall(r"\w+", " ".join(scripts.words(text.lower()))))


def gives_away(shown: str, question: str, truth: str) -> bool:
    """Whether a text holds every word that the truth adds to its question.

    Every word of the truth, if it adds none.

    >>> gives_away("Who? Ada, a vet from Oslo.", "What is Ada's work?", "Ada is a vet.")
    True
    >>> gives_away("Where is Ada from? From Oslo.", "What is Ada's work?", "Ada is a vet.")
    False
    """
    return (words(truth) - words(question) or words(truth)) <= words(shown)


def most_alike(question: str, texts: Mapping[int, str], weight: Mapping[str, float]) -> list[int]:
    """Keys of ``texts``, those that share most with the question first.

    Args:
        question: what is asked.
        texts: what could be shown.
        weight: of every word; what is shared is the sum over the words both have.
    """
    own = words(question)
    shared = {i: math.fsum(weight[w] for w in own & words(text)) for i, text in texts.items()}
    return sorted(texts, key=lambda i: (-shared[i], i))


def with_context(
    forget: Encoded, record: int, texts: Mapping[int, str], ranked: Sequence[int]
) -> list[Encoding]:
    """A record asked after the first of the ranked texts, so many as in ``SHOWN``.

    A text that does not fit any more is passed over. Where fewer fit than were wanted, all that do
    are shown in the last try; the list is empty where none does.
    """
    row = forget.examples[record]
    ask, _ = fields(row) or FIELDS[0]
    context = ""
    fitting: list[Encoding] = []
    for shown in ranked:
        if len(fitting) == max(SHOWN):
            break
        longer = f"{texts[shown]}\n\n{context}"  # most alike last
        encoding = asked(forget, record, f"{longer}{row[ask]}")
        if encoding is not None:
            context = longer
            fitting.append(encoding)
    return [fitting[k - 1] for k in sorted({min(k, len(fitting)) for k in SHOWN}) if k]


def elicit(model: nn.Module, ground: Ground, run: Run) -> Elicited:
    """What the model answers with other records before its eyes; ``run.seed`` decides which.

    Raises:
        BadInput: one record with a question, or no context that fits.
        Inapplicable: no record with a question.
    """
    rows = [ground.forget.examples[i] for i in range(len(ground.forget))]
    pairs = [fields(row) for row in rows]
    forget = ground.forget.select([i for i, pair in enumerate(pairs) if pair is not None])
    if not len(forget):
        raise Inapplicable(
            "in-context relearning asks questions, and the forget records are plain texts"
        )
    if len(forget) < 2:
        raise BadInput(
            "in-context relearning shows some forget records and asks for others: it needs at "
            f"least two records with a question, and there are {len(forget)}"
        )
    asks = [(row[pair[0]], row[pair[1]]) for row, pair in zip(rows, pairs, strict=True) if pair]
    whole = [f"{question}\n{answer}" for question, answer in asks]
    counts = Counter(word for text in whole for word in words(text))
    weight = {word: math.log(len(whole) / count) for word, count in counts.items()}
    shown, held = relearning.split(len(forget), run.seed)
    truths = true_answers(forget)
    tries = []
    for record in held:
        question = asks[record][0]
        texts = {i: whole[i] for i in shown if not gives_away(whole[i], question, truths[record])}
        ranked = most_alike(question, texts, weight)
        found = with_context(forget, record, texts, ranked)
        tries += [Try(record, encoding) for encoding in found] or [Try(record, None)]
    return elicited(model, forget, tries, run, "in-context relearning")


ATTACK = Prompting(
    "in_context",
    "In-context relearning from other forget records",
    "Lynch et al. 2024, arXiv 2402.16835",
    elicit,
    records=200,  # of which the shown ones are not asked
)
