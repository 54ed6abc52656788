"""What is kept on neighbouring topics: by hand, and where a model forgot more than it should."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlearn import demo
from unlearn.attacks.interface import Ground, Inapplicable
from unlearn.attacks.signals import collect
from unlearn.data import load
from unlearn.evaluations import side_effects
from unlearn.evaluations.findings import kept
from unlearn.evaluations.side_effects import SEARCH
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM


@pytest.fixture(scope="module")
def world(lm_world: demo.World) -> tuple[torch.nn.Module, Encoded, Run]:
    subject = demo.tiny_llama(lm_world.retain, width=32, depth=2)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    return subject.model, Encoded(load(lm_world.retain[:4], "neighbours"), task), Run(task)


def test_what_is_said_and_how_likely_it_is_weigh_the_same(world, monkeypatch) -> None:
    model, near, run = world
    truth = [near.examples[i]["answer"] for i in range(len(near))]
    said = [truth[0], "", " ".join(truth[2].split()[:2]), "I cannot say."]
    monkeypatch.setattr(side_effects, "greedy_answers", lambda *_: said)
    found = SEARCH.score(model, Ground(near), run)
    likely = [math.exp(-loss) for loss in collect(model, near, run, b"", "x").loss()]
    words = len(truth[2].rstrip(".").replace("'", " ").replace(",", "").split())
    assert found == pytest.approx(
        [(1 + likely[0]) / 2, likely[1] / 2, (2 / words + likely[2]) / 2, likely[3] / 2]
    )


def test_a_model_that_was_taught_more_keeps_more(world, lm_world: demo.World) -> None:
    model, near, run = world
    before = SEARCH.score(model, Ground(near), run)
    taught = demo.tiny_llama(lm_world.retain, width=32, depth=2)
    demo.train(taught, lm_world.retain[:4], epochs=60)
    after = SEARCH.score(taught.model, Ground(near), run)
    assert ((before >= 0) & (before < 0.3)).all()
    assert after.mean() > 0.7
    assert kept(after, after, 0.1).within(0.05)
    assert kept(before, after, 0.1).beyond(0.05)


@given(st.lists(st.floats(0.1, 1), min_size=2, max_size=20), st.floats(0, 1))
def test_a_share_of_what_the_original_answered_may_be_lost(values, share) -> None:
    before = np.array(values)
    effect = kept(share * before, before, 0.25)
    low, high = effect.interval(0.9)
    middle = float((share - 0.75) * before.mean())
    assert low - 1e-9 <= middle <= high + 1e-9
    assert (effect.low, effect.high) == (0.0, np.inf)


def test_texts_without_a_question_are_refused(world) -> None:
    model, near, run = world
    texts = Encoded(load([{"text": "Only a text."}], "neighbours"), near.task)
    with pytest.raises(Inapplicable, match="without a question"):
        SEARCH.score(model, Ground(texts), run)
