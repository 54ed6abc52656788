"""Compression: a memorised text is found by fewer tokens than it has, a random one is not."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unlearn import demo
from unlearn.attacks.extraction import compression
from unlearn.attacks.extraction.compression import Compression, compress, compressions
from unlearn.attacks.extraction.gcg import Frame, Goal
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification
from unlearn.training import Term, Training, descend, likelihood

QUICK = Compression(budget=80, topk=64, batch=24, seeds=2)
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def texts(count: int, words: int, seed: int) -> list[str]:
    """Random words, from the same distribution for every seed."""
    draw = random.Random(0)
    known = ["".join(draw.choices(SYLLABLES, k=2)) for _ in range(100)]
    draw = random.Random(seed)
    return [" " + " ".join(draw.choices(known, k=words)) for _ in range(count)]


@functools.cache
def world() -> tuple[nn.Module, CausalLM, list[str]]:
    """A model that says each of four texts after a cue, whatever stands before the cue."""
    told, cues, noise = texts(4, 8, 1), texts(4, 1, 2), texts(4, 4, 3)
    every = [{"question": text, "answer": ""} for text in (*told, *texts(20, 8, 5))]
    subject = demo.tiny_llama(every, width=48, depth=2)
    subject.processor.chat_template = None
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 64)
    records = [
        {"prompt": " ".join([*some.split()[:i], cue]), "completion": text}
        for i, some in enumerate(noise)
        for cue, text in zip(cues, told, strict=True)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        terms = [Term("train", Encoded(load(records, "retain"), task), likelihood, "unit")]
        settings = Training(lr=5e-3, epochs=40, batch_size=16, micro_batch_size=16)
        subject = descend(subject, terms, settings, Run(task))
    return subject.model.eval(), task, told


def records_of(some: list[str], task: CausalLM) -> Encoded:
    return Encoded(load([{"text": text} for text in some], "forget"), task)


def tokens_of(text: str, task: CausalLM) -> list[int]:
    return task.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_trained_text_is_memorised_and_a_random_one_is_not() -> None:
    model, task, told = world()
    found = compressions(model, records_of(told[:2], task), Run(task), QUICK)
    assert found.memorised.all()
    assert not found.censored.any()
    for one, text in zip(found.found, told, strict=False):
        assert one.target == tuple(tokens_of(text, task))  # without the end-of-sequence token
        assert one.ratio == len(one.target) / len(one.prompt) > 1
        prompt = Frame(task).asked(one.prompt)
        assert Goal(model, Frame(task), one.target, Run(task)).says(one.prompt)
        said = model.generate(torch.tensor([prompt]), max_new_tokens=len(one.target))
        assert tuple(said[0, len(prompt) :].tolist()) == one.target
    less = replace(QUICK, budget=16)
    fresh = compressions(model, records_of(texts(2, 8, 9), task), Run(task), less)
    assert fresh.censored.all()
    assert not fresh.memorised.any()
    for one in fresh.found:  # the longest prompts tried had one token more than the target
        assert one.prompt is None
        assert one.ratio == len(one.target) / (len(one.target) + 1) < 1
        assert one.steps <= less.budget


def test_the_same_model_is_searched_alike_under_every_name() -> None:
    model, task, _ = world()
    records = records_of(texts(2, 8, 9), task)
    few = replace(QUICK, budget=12)
    found = [compressions(model, records, Run(task), few, name=name).found for name in "ab"]
    assert found[0] == found[1]


@pytest.mark.parametrize("budget", [1, 2, 7])
def test_the_budget_is_kept_and_the_bound_is_of_lengths_that_were_tried(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task, _ = world()
    target = tokens_of(texts(1, 8, 9)[0], task)
    lengths: list[int] = []
    once = Goal.losses

    def counted(self: Goal, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lengths.append(free.shape[1])
        return once(self, free)

    attack = Compression(budget=budget, topk=8, batch=4, seeds=2)
    monkeypatch.setattr(Goal, "losses", counted)
    monkeypatch.setattr(Goal, "_read_first", lambda self: None)
    found = compress(model, target, Frame(task), Run(task), attack)
    assert budget - attack.seeds < found.steps == len(lengths) <= budget
    assert found.censored
    full = [n for n in set(lengths) if lengths.count(n) >= attack.seeds]
    assert found.ratio == len(target) / max([1, *full])


def test_the_records_own_prompt_is_tried_first() -> None:
    model, task, told = world()
    cue = texts(4, 1, 2)[0]
    mine = Encoded(load([{"prompt": cue, "completion": told[0]}], "forget"), task)
    one = compressions(model, mine, Run(task), Compression(1, 8, 8, 1)).found[0]
    assert not one.censored
    assert len(one.prompt) <= len(tokens_of(cue, task))


@pytest.mark.parametrize("obeys", [True, False])
def test_a_known_prompt_longer_than_the_target_is_only_where_a_search_begins(
    obeys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task, told = world()
    target = tokens_of(told[0], task)
    noise, cue = tokens_of(texts(1, 40, 3)[0], task), tokens_of(texts(4, 1, 2)[0], task)
    known = [*noise[: len(target) + 4], *cue]  # the model says it after the cue, whatever is before
    assert Goal(model, Frame(task), target, Run(task)).says(known)
    searched: list[int] = []
    losses = Goal.losses

    def watched(self: Goal, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        searched.append(free.shape[1])
        loss, reached = losses(self, free)
        return loss, reached & obeys  # else nothing but the known prompt works

    monkeypatch.setattr(Goal, "losses", watched)
    monkeypatch.setattr(Goal, "_read_first", lambda self: None)
    attack = Compression(budget=80, topk=8, batch=8, seeds=1)
    found = compress(model, target, Frame(task), Run(task), attack, known)
    assert searched[:3] == [len(known) - 1, len(known) - 2, len(known) - 3]
    if obeys:
        assert len(found.prompt) < len(target)
        assert found.ratio == len(target) / len(found.prompt)
    else:  # a prompt that is longer than the target compresses nothing
        assert (found.prompt, found.censored) == (None, True)
        assert found.ratio == len(target) / (len(target) + 1)  # no longer prompts were searched


@given(st.integers(1, 60), st.integers(0, 200))
def test_no_length_above_the_last_is_searched_and_none_twice(longest: int, known: int) -> None:
    attack = Compression(budget=1000, seeds=1)
    state = compression._State(longest, min(compression.FIRST, longest), (), 1)
    if known:
        state = replace(state, found=[0] * known).begin(attack)
    lengths = []
    while not state.over(attack):
        lengths.append(state.length)
        state = state.gave_up(attack)  # nothing works
    assert lengths == sorted(set(lengths))
    assert all(1 <= length <= longest for length in lengths)
    # what is left unsearched lies between two neighbouring lengths, or above the last
    assert state.failed == (longest if not known else min(longest, known - 1))


def test_text_around_the_prompt_stays_around_it() -> None:
    model, task, told = world()
    attack = Compression(24, 64, 24, 2, before="ka zu", after=texts(4, 1, 2)[1])
    one = compressions(model, records_of(told[1:2], task), Run(task), attack).found[0]
    assert not one.censored
    around = Frame(task, "ka zu", attack.after)
    assert Goal(model, around, one.target, Run(task)).says(one.prompt)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("fresh", [False, True])
def test_a_killed_search_goes_on_to_the_same_result(
    fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task, told = world()
    target = tokens_of(texts(1, 8, 9)[0] if fresh else told[2], task)
    attack = Compression(budget=12, topk=8, batch=8, seeds=2)
    frame = Frame(task)
    whole = compress(model, target, frame, Run(task, 3), attack)
    assert whole.steps > 3
    run = Run(task, 3, work=tmp_path, save_every=0)
    step, done = compression._step, []

    def killed(*args: object) -> object:
        if len(done) == 3:
            raise Killed
        done.append(1)
        return step(*args)

    monkeypatch.setattr(compression, "_step", killed)
    with pytest.raises(Killed):
        compress(model, target, frame, run, attack)
    (file,) = (tmp_path / "compression").iterdir()
    assert json.loads(file.read_text())["spent"] == 3
    monkeypatch.setattr(compression, "_step", step)
    assert compress(model, target, frame, run, attack) == whole
    monkeypatch.setattr(compression, "_step", killed)  # a finished target is not searched again
    monkeypatch.setattr(compression, "Goal", None)
    assert compress(model, target, frame, run, attack) == whole


def test_searches_of_other_models_and_settings_are_kept_apart(tmp_path: Path) -> None:
    model, task, told = world()
    target, run = tokens_of(told[0], task), Run(task, work=tmp_path)
    small = Compression(budget=2, topk=4, batch=2, seeds=1)
    for name, attack in (("a", small), ("b", small), ("a", Compression(3, 4, 2, 1))):
        compress(model, target, Frame(task), run, attack, name=name)
    assert len(list((tmp_path / "compression").iterdir())) == 3


def test_the_same_records_are_drawn_for_every_model() -> None:
    model, task, told = world()
    some = records_of([*told, *texts(4, 8, 9)], task)
    attack = Compression(1, 4, 2, 1)
    first, second = (compressions(model, some, Run(task, 1), attack, 3, name) for name in "ab")
    assert first.ids == second.ids
    assert len(first.ids) == 3
    assert first.ratio.shape == first.censored.shape == first.memorised.shape == (3,)
    ratios = [compressions(model, some, Run(task, 1), attack, 3).ratio for _ in range(2)]
    np.testing.assert_array_equal(*ratios)


def test_a_short_context_leaves_less_room() -> None:
    model, task, told = world()
    target = tokens_of(texts(1, 8, 9)[0], task)
    tight = CausalLM(task.tokenizer, task.classes, len(target) + 1 + 3)  # one for <s>
    attack = Compression(3, 4, 2, 1)
    found = compress(model, target, Frame(tight), Run(tight), attack)
    assert found.censored
    assert found.ratio == len(target) / 3  # a bound above 1 proves nothing
    full = CausalLM(task.tokenizer, task.classes, len(target) + 1)
    with pytest.raises(BadInput, match="no room"):
        compress(model, target, Frame(full), Run(full), attack)
    cut = compressions(model, records_of(told, task).as_read(full), Run(full), attack).found[0]
    assert list(cut.target) == tokens_of(told[0], task)[: (len(target) - 1) // 2]
    assert cut.ratio == len(cut.target) / (len(cut.target) + 1)
    none = CausalLM(task.tokenizer, task.classes, 2)
    with pytest.raises(BadInput, match=r"record 1 of the 4 drawn: .*no room"):
        compressions(model, records_of(told, task).as_read(none), Run(none), attack)


def test_bad_settings_are_refused() -> None:
    model, task, told = world()
    with pytest.raises(BadInput, match="at least 1"):
        Compression(budget=0)
    with pytest.raises(BadInput, match="at least one token"):
        compress(model, [], Frame(task), Run(task))
    with pytest.raises(BadInput, match="at least one target"):
        compressions(model, records_of(told, task), Run(task), targets=0)
    pictures = Classification(3)
    rows = [{"features": [0.0] * 5, "label": 0}]
    with pytest.raises(BadInput, match="language models"):
        compressions(model, Encoded(load(rows, "forget"), pictures), Run(pictures))
