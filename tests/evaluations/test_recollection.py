"""Recognition, recall and retention: by hand, and on a tiny model that knows some texts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from unlearn import demo
from unlearn.checkpoint import inspect
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.evaluations import recollection
from unlearn.evaluations.extractable import begun
from unlearn.evaluations.recollection import (
    EDITS,
    differing,
    minimal_edits,
    preferred,
    recalled,
    recognised,
    recollect,
    retained,
    steps_of,
    trial,
)
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.training import Training
from unlearn.weights import fingerprint_tensors

WORDS = [f"{a}{b}" for a in "bdfgk" for b in "aeiou"]


OTHER = {"prompt": torch.tensor([1]), "answer": torch.tensor([5, 6]), "units": 2, "length": 3}


def texts(size: int, seed: int) -> list[dict[str, str]]:
    draw = np.random.default_rng(seed)
    return [{"text": " ".join(draw.choice(WORDS, 14))} for _ in range(size)]


@pytest.fixture(scope="module")
def known():
    """A model that learned eight texts by heart, its task, and those texts."""
    seen = texts(8, seed=0)
    subject = demo.tiny_llama([{"question": " ".join(WORDS), "answer": ""}], width=64, depth=2)
    demo.train(subject, seen, epochs=60)
    task = inspect(subject).task
    return subject.model, task, Encoded(load(seen, "data"), task)


@pytest.fixture(scope="module")
def test(known):
    _, task, seen = known
    unseen = Encoded(load(texts(8, seed=1), "holdout"), task)
    return trial(seen, begun(seen), unseen, prefix=4, suffix=6, seed=0)


def test_choices_between_two_by_hand():
    assert preferred([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 4.0, 3.0]).value == 0.5  # a tie is a miss
    assert preferred([], []) is None
    # of six pairs, the first text wins three, the second one and a tie
    found = recognised([1.0, 3.0], [2.0, 3.0, 4.0])
    assert found.value == pytest.approx((3 + 1.5) / 6)
    assert (found.n, found.low < found.value < found.high) == (2, True)


def test_edits_are_minimal_and_of_other_words(known):
    _, task, _ = known
    rows = [
        {"question": "who  came", "answer": f"{' '.join(f'w{i}' for i in range(n))} \n"}
        for n in (1, 5, 8, 40)
    ]
    examples = Encoded(load(rows, "data"), task)
    edited = minimal_edits(examples, WORDS, seed=0)
    for n, before, after in zip((1, 5, 8, 40), rows, edited.examples.rows, strict=True):
        assert after["question"] == before["question"]
        pairs = list(zip(before["answer"].split(), after["answer"].split(), strict=True))
        changed = [new for old, new in pairs if new != old]
        assert len(changed) == {1: 1, 5: 1, 8: 2, 40: EDITS}[n]
        assert set(changed) <= set(WORDS)
        assert after["answer"].endswith(" \n")
    again = minimal_edits(examples, WORDS, seed=0)
    assert list(again.examples.rows) == list(edited.examples.rows)
    other = minimal_edits(examples, WORDS, seed=1)
    assert list(other.examples.rows) != list(edited.examples.rows)


def test_edits_of_scripts_without_spaces_are_of_single_signs(known):
    _, task, _ = known
    text = "\u6211\u4f4f\u5728\u5317\u4eac\u5e02 a b"
    edited = minimal_edits(Encoded(load([{"text": text}], "data"), task), ["\u4e0a"], seed=0)
    (after,) = (row["text"] for row in edited.examples.rows)
    assert len(after) == len(text)
    assert sum(old != new for old, new in zip(text, after, strict=True)) == 8 // 4


def test_the_only_word_cannot_be_exchanged(known):
    _, task, _ = known
    examples = Encoded(load([{"text": "a a a"}], "data"), task)
    with pytest.raises(BadInput, match="edited with other words"):
        trial(examples, begun(examples), None, prefix=4, suffix=6, seed=0)


@pytest.mark.parametrize("longest", [6, 8, 12, 40])
def test_edits_are_placed_before_the_cut(known, longest):
    model, task, _ = known
    short = CausalLM(task.tokenizer, task.classes, longest)
    rows = texts(8, seed=0)
    for fields in (rows, [{"prompt": "ba", "completion": row["text"]} for row in rows]):
        seen = Encoded(load(fields, "data"), short)
        edited = minimal_edits(seen, WORDS, seed=0)
        assert differing(seen, edited).all()
        assert all(e["length"] <= longest for e in map(edited.__getitem__, range(8)))
    seen = Encoded(load(rows, "data"), short)
    test = trial(seen, begun(seen), None, prefix=1, suffix=2, seed=0)
    found = recollect(model, test, Run(short))
    assert (found.edits.value, found.edits.n) == (1.0, 8)


def test_edits_that_do_not_show_are_no_pairs(known):
    model, task, _ = known
    short, long = CausalLM(task.tokenizer, task.classes, 4), "q" * 20  # words beyond the cut
    rows = [{"text": f"{long}x {long}y"}, {"text": f"{long}y {long}z"}]
    seen = Encoded(load(rows, "data"), short)
    test = trial(seen, begun(seen), None, prefix=1, suffix=1, seed=0)
    assert [r["text"] for r in test.edited.examples.rows] != [r["text"] for r in rows]
    assert not differing(test.seen, test.edited).any()
    assert recollect(model, test, Run(short)).edits is None
    alone = replace(test, seen=seen.select([0, 0]), edited=seen.replaced([seen[0], OTHER]))
    assert recollect(model, alone, Run(short)).edits.n == 1


def test_unseen_texts_may_be_fewer_after_retention(test):
    fewer = test.among([1, 5])
    assert list(fewer.unseen.examples.rows) == [test.unseen.examples[i] for i in (1, 5)]
    assert list(fewer.unseen_edited.examples.rows) == [
        test.unseen_edited.examples[i] for i in (1, 5)
    ]
    assert fewer.seen is test.seen
    assert test.among([]).unseen is None


def test_long_suffixes_are_recalled_to_their_end(known):
    _, task, _ = known
    long = CausalLM(task.tokenizer, task.classes, 1200)
    draw = np.random.default_rng(5)
    words = " ".join(draw.choice(WORDS, 320))
    seen = Encoded(load([{"text": words}], "data"), long)
    suffix = int(seen[0]["units"]) - 2
    assert suffix > 250
    asked = {}

    def answers(model, part, run, phase, **more):
        asked.update(more)
        return [task.tokenizer.decode(part[0]["answer"].tolist()[: more["longest"]])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recollection, "greedy_answers", answers)
        found = recalled(None, seen, [slice(1, 1 + suffix)], Run(long), seed=0)
    assert asked["longest"] >= suffix
    assert found.tolist() == [1.0]


def test_what_is_known_is_recognised_and_recalled(known, test):
    model, task, _ = known
    found = recollect(model, test, Run(task))
    assert found.exact.value == found.rouge.value == 1.0
    assert found.foils.value == found.edits.value == 1.0
    # nothing tells random words from random words but memory
    assert found.edits_unseen.low <= 0.5 <= found.edits_unseen.high
    assert found.edits.n == found.edits_unseen.n == found.exact.n == 8


def test_a_model_that_knows_nothing_guesses(known, test):
    _, task, _ = known
    fresh = demo.tiny_llama([{"question": " ".join(WORDS), "answer": ""}], 3, 64, 2).model
    found = recollect(fresh, test, Run(task))
    assert found.exact.value == 0.0
    assert found.rouge.value < 0.3
    assert found.foils.low <= 0.5 <= found.foils.high
    assert found.edits.low <= 0.5 <= found.edits.high


def test_recall_asks_only_where_there_is_something_to_recall(known):
    model, task, seen = known
    where = [slice(0, 0)] * 7 + [slice(3, 9)]
    assert recalled(model, seen, where, Run(task), seed=0).tolist() == [1.0]
    assert recalled(model, seen, [slice(0, 0)] * 8, Run(task), seed=0).size == 0


def test_without_unseen_texts_there_is_no_foil(known):
    model, task, seen = known
    alone = trial(seen, begun(seen), None, prefix=4, suffix=6, seed=0)
    found = recollect(model, alone, Run(task))
    assert (found.foils, found.edits_unseen) == (None, None)
    assert found.edits.value == 1.0
    few = alone.sample(3)
    assert (len(few.seen), len(few.edited), len(few.begun)) == (3, 3, 3)


def test_training_on_other_texts_fades_recall_before_recognition(known, test):
    model, task, _ = known
    other = Encoded(load(texts(16, seed=2), "further"), task)
    before, state = fingerprint_tensors(model.state_dict()), torch.get_rng_state()
    way = Training(lr=3e-3, weight_decay=0.0, max_loss=1e3)
    found = retained(model, test, other, Run(task), way, 12)
    assert [point.step for point in found] == [0, 1, 2, 4, 8, 12]
    assert found[0] == recollect(model, test, Run(task))
    assert found[-1].exact.value < 1.0
    assert found[-1].rouge.value < found[0].rouge.value
    assert found[-1].edits.value > found[-1].exact.value
    assert fingerprint_tensors(model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), state)
    again = retained(model, test, other, Run(task), way, 12)
    assert again == found


def test_steps_by_hand(known, test):
    assert steps_of(1) == (0, 1)
    assert steps_of(8) == (0, 1, 2, 4, 8)
    model, task, seen = known
    with pytest.raises(BadInput, match="at least 1"):
        retained(model, test, seen, Run(task), Training(), 0)
