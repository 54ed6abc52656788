"""Choosing between answers: by hand, with borrowed answers, in models that know or refuse."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unlearn import demo
from unlearn.attacks.interface import Ground, Inapplicable
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.evaluations import downstream
from unlearn.evaluations.downstream import SEARCH, WRONG, Choices, beaten, choices
from unlearn.generation import greedy_answers
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.training import Term, Training, descend, likelihood

REFUSAL = "I cannot say."


@pytest.fixture(scope="module")
def models(lm_world: demo.World, task: CausalLM) -> dict[str, nn.Module]:
    """An untrained model, one that knows everybody, and what refusing made of the latter."""
    known = [*lm_world.forget, *lm_world.retain]
    subject = demo.tiny_llama(known, width=64, depth=2)
    knows = demo.train(copy.deepcopy(subject), known, epochs=100)
    refusals = [{**record, "answer": REFUSAL} for record in lm_world.forget]
    taught = encoded([*refusals, *lm_world.retain], task)
    settings = Training(lr=3e-4, epochs=20, batch_size=32, micro_batch_size=32)
    terms = [Term("refuse", taught, likelihood, "unit")]
    refuses = descend(copy.deepcopy(knows), terms, settings, Run(task))
    return {"untrained": subject.model, "knows": knows.model, "refuses": refuses.model}


@pytest.fixture(scope="module")
def task(lm_world: demo.World) -> CausalLM:
    subject = demo.tiny_llama([*lm_world.forget, *lm_world.retain], width=32, depth=2)
    return CausalLM(subject.processor, subject.model.config.vocab_size, 128)


def encoded(rows: list[Mapping[str, object]], task: CausalLM, name: str = "forget") -> Encoded:
    return Encoded(load(rows, name), task)


def answers(examples: Encoded) -> list[str]:
    return [examples.examples[i]["answer"] for i in range(len(examples))]


def with_options(world: demo.World) -> list[dict[str, object]]:
    """The records of the forgotten person with four wrong answers each, told of that person."""
    name = world.forget[0]["answer"].split()[0]
    found = []
    for record in world.forget:
        asks = record["question"].split()[0]
        others = [r["answer"] for r in world.retain if r["question"].split()[0] == asks]
        told = [" ".join([name, *answer.split()[1:]]) for answer in others]
        wrong = [answer for answer in dict.fromkeys(told) if answer != record["answer"]][:2]
        found.append({**record, "perturbed_answer": wrong})
    return found


@given(
    st.lists(st.lists(st.floats(0, 50), min_size=4, max_size=4), min_size=1, max_size=6),
    st.permutations(range(3)),
)
def test_the_share_that_is_beaten_does_not_depend_on_the_order(rows, order) -> None:
    losses = np.array(rows)
    true, wrong = losses[:, 0], losses[:, 1:]
    found = beaten(true, wrong)
    by_hand = [
        sum(1.0 if w > t else 0.5 if w == t else 0.0 for w in others) / 3
        for t, *others in losses.tolist()
    ]
    assert found == pytest.approx(by_hand)
    assert np.array_equal(found, beaten(true, wrong[:, order]))


def test_a_model_without_likelihoods_is_named() -> None:
    with pytest.raises(BadInput, match="diverged"):
        beaten(np.array([1.0]), np.array([[math.nan]]))


class Fixed(nn.Module):
    """Gives every token the same probability after whatever was read."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(1, len(bias))
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.copy_(bias)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, **_):
        from types import SimpleNamespace

        states = torch.zeros(*input_ids.shape, 1)
        return SimpleNamespace(logits=self.head(states))


def test_likelihoods_are_taken_per_token(task: CausalLM) -> None:
    # with one distribution everywhere the mean log-probability can be computed by hand
    rows = [
        {"question": "Who?", "answer": "aab", "perturbed_answer": ["aaaaaaab", "b", "bbbbbb"]},
        {"question": "What?", "answer": "b", "perturbed_answer": ["bb", "ab", "aabb"]},
    ]
    bias = torch.linspace(-2, 2, task.classes)
    ground = Ground(encoded(rows, task))
    found = SEARCH.score(Fixed(bias), ground, Run(task))
    logs = bias.double().log_softmax(0)

    def loss(question: str, answer: str) -> float:
        tokens = encoded([{"question": question, "answer": answer}], task)[0]["answer"]
        return -float(logs[tokens].mean())

    by_hand = [
        np.mean([loss(r["question"], w) > loss(r["question"], r["answer"])
                 for w in r["perturbed_answer"]])
        for r in rows
    ]  # fmt: skip
    assert found == pytest.approx(by_hand)
    sums = [-float(logs[encoded(rows, task)[i]["answer"]].sum()) for i in range(2)]
    assert sums[0] > sums[1]  # by sums, the short answers would win


def test_columns_of_the_records_come_first(task: CausalLM) -> None:
    rows = [
        {"question": f"Q{i}?", "answer": f"plain {i}", "paraphrased_answer": f"said {i}",
         "perturbed_answer": [f"wrong {i} {j}" for j in range(3)]}
        for i in range(3)
    ]  # fmt: skip
    found = choices(encoded(rows, task), seed=1)
    assert answers(found.true) == ["said 0", "said 1", "said 2"]
    assert answers(found.wrong) == [f"wrong {i} {j}" for i in range(3) for j in range(3)]
    for row in rows:
        row["paraphrased_answer"] = [row["paraphrased_answer"], "said again"]
    assert answers(choices(encoded(rows, task)).true) == ["said 0", "said 1", "said 2"]
    for row in rows:
        del row["paraphrased_answer"]
    assert answers(choices(encoded(rows, task)).true) == ["plain 0", "plain 1", "plain 2"]


def test_borrowed_answers_are_told_of_who_is_asked_about(task: CausalLM) -> None:
    rows = [
        {"question": f"Where does {name} live?", "answer": f"{name} lives in {town}."}
        for name, town in (("Ann", "Rome"), ("Bob", "Oslo"), ("Eve", "Rome"), ("Ida", "Bern"))
    ]
    rows.append({"question": "When was Ann born?", "answer": "Ann was born in May."})
    found = choices(encoded(rows, task))
    n = len(found.wrong) // len(found.true)
    told = [set(answers(found.wrong)[i * n : (i + 1) * n]) for i in range(len(rows))]
    # Eve lives where Ann does: that is no wrong answer, so Ann's question has the fewest
    assert n == 3
    assert told[0] == {"Ann lives in Oslo.", "Ann lives in Bern.", "Ann was born in May."}
    assert {"Bob lives in Rome.", "Bob lives in Bern."} <= told[1]
    questions = [found.wrong.examples[i]["question"] for i in range(len(found.wrong))]
    assert questions == [row["question"] for row in rows for _ in range(n)]


def test_an_answer_that_differs_in_its_signs_alone_is_not_wrong(task: CausalLM) -> None:
    rows = [
        {"question": f"Where does {name} live?", "answer": answer}
        for name, answer in (("Ann", "Rome"), ("Bob", "rome."), ("Eve", "In Oslo"), ("Ida", "Bern"))
    ]
    found = choices(encoded(rows, task))
    n = len(found.wrong) // len(found.true)
    assert n == 2
    for i in (0, 1):
        assert set(answers(found.wrong)[i * n : (i + 1) * n]) == {"In Oslo", "Bern"}


def test_others_lend_only_where_a_set_has_too_few(lm_world: demo.World, task: CausalLM) -> None:
    forget = encoded(lm_world.forget, task)
    retain = encoded(lm_world.retain, task, "retain")
    own = choices(forget, retain)
    assert answers(own.wrong) == answers(choices(forget).wrong)
    assert len(own.wrong) == WRONG * len(forget)
    alone = choices(forget.select([0]), retain)
    assert len(alone.wrong) == WRONG
    assert answers(forget)[0] not in answers(alone.wrong)
    assert answers(alone.wrong) == answers(choices(forget.select([0]), retain).wrong)


def test_what_knows_and_what_refuses_is_told_from_what_never_learned(
    models: dict[str, nn.Module], lm_world: demo.World, task: CausalLM
) -> None:
    forget = encoded(with_options(lm_world), task)
    ground = Ground(forget)
    found = {name: SEARCH.score(model, ground, Run(task)) for name, model in models.items()}
    assert all(((f >= 0) & (f <= 1)).all() and f.shape == (len(forget),) for f in found.values())
    assert found["knows"].mean() > 0.95
    assert 0.2 < found["untrained"].mean() < 0.8
    said = greedy_answers(models["refuses"], forget, Run(task), "ask")
    assert not set(said) & set(answers(forget))  # nothing is said any more,
    assert found["refuses"].mean() > found["untrained"].mean() + 0.2  # and still it is known
    # bit for bit, and with the options in another order
    assert np.array_equal(found["knows"], SEARCH.score(models["knows"], ground, Run(task)))
    turned = [
        {**row, "perturbed_answer": row["perturbed_answer"][::-1]} for row in with_options(lm_world)
    ]
    for name, model in models.items():
        again = SEARCH.score(model, Ground(encoded(turned, task)), Run(task))
        assert again == pytest.approx(found[name])


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"text": "Only a text."}, {"question": "Who?", "answer": "Ann."}], "questions"),
        ([{"question": "Who?", "answer": "Ann."}], "no wrong answer"),
        ([{"question": "Who?", "answer": "Ann."}, {"question": "Whose?", "answer": "Ann."}],
         "no wrong answer"),
    ],
)  # fmt: skip
def test_records_that_leave_nothing_to_choose_are_refused(rows, match, task: CausalLM) -> None:
    with pytest.raises(BadInput, match=match) as raised:
        choices(encoded(rows, task))
    assert not isinstance(raised.value, Inapplicable)  # other records would do
    with pytest.raises(Inapplicable, match="plain texts"):
        choices(encoded([{"text": "Only a text."}, {"text": "And another."}], task))


def test_prompts_and_completions_are_questions_too(task: CausalLM) -> None:
    rows = [{"prompt": f"{n} is", "completion": f" number {i}"} for i, n in enumerate("abcd")]
    found = choices(encoded(rows, task))
    assert isinstance(found, Choices)
    assert [found.wrong.examples[i]["prompt"] for i in range(3)] == ["a is"] * 3
    assert len(found.wrong) == 3 * len(rows)
    assert downstream.SEARCH.name == "downstream"
