"""What can be extracted: by hand, and against real greedy decoding."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlearn import demo
from unlearn.attacks.signals import Signals, collect
from unlearn.checkpoint import inspect
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.evaluations.extractable import (
    begun,
    continued,
    distinct,
    doublings,
    measured,
    proportion,
    slope,
    spans,
    usable,
)
from unlearn.evaluations.privacy import Bounds, clopper_pearson
from unlearn.evaluations.statistics import difference_interval
from unlearn.run import Run
from unlearn.tasks.base import Encoded


def said(hits: list[list[int]], logprob: float = -0.1) -> Signals:
    """Signals of texts whose tokens are predicted right as told."""
    units = np.array([len(row) for row in hits])
    flat = np.array([h for row in hits for h in row], dtype=bool)
    zeros = np.zeros(len(hits), dtype=np.int64)
    probability = np.full(len(flat), logprob)
    return Signals(
        [str(i) for i in range(len(hits))], units, probability, probability, probability, flat,
        zeros.astype(bool), zeros, zeros - 1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def task(tiny_lm):
    return inspect(tiny_lm).task


def test_copies_are_equal_but_for_white_space(task):
    texts = ["one two", " one\n two ", "one  two", "onetwo", "two one"]
    examples = Encoded(load([{"text": t} for t in texts], "data"), task)
    first, copies = distinct(examples)
    assert first == [0, 3, 4]
    assert copies.tolist() == [3, 1, 1]


def test_copies_have_the_same_prompt_too(task):
    rows = [{"question": q, "answer": a} for q, a in (("a", "b c"), ("a b", "c"), ("a ", "b  c"))]
    first, copies = distinct(Encoded(load(rows, "data"), task))
    assert (first, copies.tolist()) == ([0, 1], [2, 1])


def test_spans_are_after_the_prefix_and_count_what_stands_before():
    # without a token that begins a text, one true token is read before the first unit
    assert spans([6, 6, 3], [0, 1, 0], prefix=2, suffix=3) == [
        slice(2, 5), slice(1, 4), slice(0, 0),
    ]  # fmt: skip
    assert spans([6], [1], prefix=0, suffix=2) == [slice(0, 0)]


def test_without_a_token_that_begins_a_text_the_first_one_is_only_read(tiny_lm):
    task = inspect(tiny_lm).task
    rows = [{"text": "one two"}, {"text": "three four"}]
    asked = [{"question": "one?", "answer": "two"}]
    assert begun(Encoded(load(rows, "data"), task)).tolist() == [0, 0]
    task.tokenizer.bos_token = None
    assert begun(Encoded(load(rows, "data"), task)).tolist() == [1, 1]
    assert begun(Encoded(load(asked, "data"), task)).tolist() == [0]


def test_shares_by_hand():
    hits = [
        [0, 1, 1, 1, 1, 1],  # right from the second token on
        [1, 1, 1, 0, 1, 1],
        [0, 0, 1, 1, 1],  # too short for a prefix of 4
        [1, 1],  # too short for any
    ]
    found = measured(said(hits), [4, 1, 2, 1], [0, 0, 0, 0], [2, 4], suffix=2)
    two, four = found.by_prefix
    assert (two.prefix, two.share.n, two.share.value) == (2, 3, 2 / 3)
    assert (two.share.low, two.share.high) == clopper_pearson(2, 3)
    assert (four.prefix, four.share.n, four.share.value) == (4, 2, 1.0)
    groups = {(r.prefix, r.least, r.most): r.share and r.share.value for r in found.by_copies}
    assert groups == {
        (2, 1, 1): 0.0, (2, 2, 2): 1.0, (2, 3, 4): 1.0,
        (4, 1, 1): 1.0, (4, 2, 2): None, (4, 3, 4): 1.0,
    }  # fmt: skip
    assert found.prefix == 4  # half of the texts allow it
    assert found.strength.value == pytest.approx((5 / 6 + 2 / 6 + 3 / 5 + 1) / 4)


def test_sampling_by_hand():
    # two tokens of probability 1/2: p_z = 1/4; 1 - (3/4)^n passes 0.5 at 3 and 0.9 at 9
    found = measured(said([[0, 0, 0]], math.log(0.5)), [1], [0], [1], suffix=2)
    shares = {(d.samples, d.chance): d.share.value for d in found.discoverable}
    assert shares[1, 0.5] == 0.0
    assert shares[10, 0.5] == shares[10, 0.9] == 1.0


def test_a_slope_over_two_groups_is_the_difference_of_their_shares():
    copies, extracted = [1] * 5 + [2] * 8, [1, 0, 0, 0, 0] + [1] * 8
    found = slope(copies, extracted)
    wanted = difference_interval(1.0, clopper_pearson(8, 8), 0.2, clopper_pearson(1, 5))
    assert found.value == pytest.approx(0.8)
    assert Bounds(found.low, found.high) == pytest.approx(wanted)


@given(st.lists(st.tuples(st.integers(1, 64), st.booleans()), min_size=2, max_size=40))
def test_the_slope_is_least_squares(texts):
    copies, extracted = zip(*texts, strict=True)
    found = slope(copies, extracted)
    if len(set(copies)) == 1:
        assert found is None
        return
    wanted = np.polyfit(np.log2(copies), np.array(extracted, float), 1)[0]
    assert found.value == pytest.approx(wanted, abs=1e-9)
    assert found.low <= found.value <= found.high


def test_a_slope_covers_the_truth():
    draw = np.random.default_rng(0)
    copies = np.repeat([1, 2, 4, 8], 15)
    chance = np.repeat([0.02, 0.32, 0.62, 0.92], 15)  # 0.3 per doubling
    found = [slope(copies, draw.random(60) < chance) for _ in range(300)]
    assert sum(f.low <= 0.3 <= f.high for f in found) >= 0.95 * 300


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30))
def test_every_number_of_copies_has_one_group(copies):
    groups = doublings(np.array(copies))
    assert all(sum(a <= m <= b for a, b in groups) == 1 for m in copies)
    assert all(any(a <= m <= b for m in copies) for a, b in groups)


def test_nothing_has_no_share():
    assert proportion([]) is None


def test_texts_too_short_for_what_is_asked():
    assert usable([60, 20], [0, 0], [8, 16, 50], suffix=10) == (8, 16, 50)
    assert usable([20], [0], [8, 16, 50], suffix=10) == (8,)
    with pytest.raises(BadInput, match=r"the longest has 12.*--suffix 6 --prefixes 3,6"):
        usable([12, 12], [0, 0], [8, 16], suffix=50)


def test_teacher_forcing_agrees_with_greedy_decoding(tmp_path):
    """What one pass says for every prefix is what the model really generates."""
    texts = [{"text": " ".join(f"w{(i * j) % 7}" for j in range(12))} for i in range(6)]
    subject = demo.tiny_llama(
        [{"question": t["text"], "answer": ""} for t in texts], width=32, depth=2
    )
    demo.train(subject, texts[:3] * 4, epochs=60)
    task = inspect(subject).task
    examples = Encoded(load(texts, "data"), task)
    found = collect(subject.model, examples, Run(task), b"", "measure")
    assert begun(examples).tolist() == [0] * 6
    agreed = []
    for k in range(8):
        where = spans([len(h) for h in found.hits()], begun(examples).tolist(), k, 4)
        out = continued(found.hits(), where)
        for i in np.flatnonzero(~np.isnan(out)):
            answer, prompt = examples[i]["answer"], examples[i]["prompt"]
            ids = torch.cat((prompt, answer[:k]))[None]
            new = subject.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
                do_sample=False, pad_token_id=task.pad,
            )[0, ids.shape[1] :]  # fmt: skip
            right = new.tolist() == answer[k : k + 4].tolist()
            assert right == bool(out[i]), (k, i)
            agreed.append(right)
    assert any(agreed)
    assert not all(agreed)
