"""Token agreement and ROUGE-L by hand, by definition and against published behaviour."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlearn.evaluations.memorization import exact_memorization, extraction_strength, rouge_l
from unlearn.evaluations.porter import stem

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def greedy_predictions():
    """Predictions of a made-up model on two answers, as (predicted, labels) pairs."""
    b, t, v = np.ogrid[:2, :6, :7]
    logits = 1.5 * np.sin(0.9 * v + 1.7 * t + 2.3 * b) + 0.5 * np.cos(0.31 * v * t + b)
    labels = np.array([[-100, -100, 4, 5, 3, 1], [-100, 6, 3, 0, -100, -100]])
    predicted = logits.argmax(-1)[:, :-1]
    return [(p[y != -100], y[y != -100]) for p, y in zip(predicted, labels[:, 1:], strict=True)]


def test_agreement_on_the_fixture():
    pairs = greedy_predictions()
    assert [exact_memorization(p, y) for p, y in pairs] == pytest.approx([0.75, 1 / 3])
    without_end = [(p[:-1], y[:-1]) for p, y in pairs]
    assert [exact_memorization(p, y) for p, y in without_end] == pytest.approx([2 / 3, 0.5])
    assert [extraction_strength(p, y) for p, y in without_end] == pytest.approx([2 / 3, 0.0])


@pytest.mark.parametrize(
    ("predicted", "strength", "exact"),
    [
        ([1, 2, 3, 4], 1.0, 1.0),
        ([9, 2, 3, 4], 0.75, 0.75),
        ([1, 2, 9, 4], 0.25, 0.75),
        ([1, 2, 3, 9], 0.0, 0.75),
        ([9, 9, 9, 9], 0.0, 0.0),
    ],
)
def test_agreement_by_hand(predicted, strength, exact):
    assert extraction_strength(predicted, [1, 2, 3, 4]) == strength
    assert exact_memorization(torch.tensor(predicted), torch.tensor([1, 2, 3, 4])) == exact


def test_a_wrong_answer_of_one_token_is_not_extracted():
    assert extraction_strength([1], [2]) == 0.0
    assert extraction_strength([2], [2]) == 1.0


@given(TOKENS, st.data())
def test_extraction_strength_is_the_shortest_sufficient_prefix(labels, data):
    size = len(labels)
    predicted = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    starts = [k for k in range(size + 1) if predicted[k:] == labels[k:]]
    strength = extraction_strength(predicted, labels)
    assert strength == pytest.approx(1 - min(starts) / size)
    assert strength <= exact_memorization(predicted, labels)


@pytest.mark.parametrize(
    ("predicted", "labels"),
    [([], []), ([1], [1, 2]), ([[1]], [[1]]), ([0.5], [0.5]), ([True], [True])],
)
@pytest.mark.parametrize("measure", [extraction_strength, exact_memorization])
def test_unusable_tokens_are_refused(measure, predicted, labels):
    with pytest.raises(ValueError):
        measure(predicted, labels)


def longest_common_subsequence(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = (
                table[i - 1, j - 1] + 1 if x == y else table[i - 1 : i + 1, j - 1 : j + 1].max()
            )
    return table[-1, -1]


@given(
    st.lists(st.sampled_from("abcd"), max_size=90), st.lists(st.sampled_from("abcd"), max_size=90)
)
def test_rouge_l_counts_the_longest_common_subsequence(a, b):
    shared = longest_common_subsequence(a, b)
    precision, recall, f1 = rouge_l(" ".join(a), " ".join(b), stemmer=False)
    assert precision == (shared / len(b) if shared else 0)
    assert recall == (shared / len(a) if shared else 0)
    assert f1 == pytest.approx(2 * shared / (len(a) + len(b)) if shared else 0)


# Values of rouge-score 0.1.2 with nltk 3.10: precision, recall, F1.
@pytest.mark.parametrize(
    ("reference", "hypothesis", "stemmer", "expected"),
    [
        (
            "The author's full name is Hsiao Yun-Hwa.",
            "The author's name is Chen Jing-Li.",
            True,
            (0.625, 0.5555555555555556, 0.5882352941176471),
        ),
        (
            "She has been writing books about leadership.",
            "She writes a book on leading.",
            True,
            (0.5, 0.42857142857142855, 0.4615384615384615),
        ),
        (
            "She has been writing books about leadership.",
            "She writes a book on leading.",
            False,
            (0.16666666666666666, 0.14285714285714285, 0.15384615384615383),
        ),
        (
            "São Paulo, Brazil: 10/01/1945",
            "born in Sao Paulo on January 10, 1945",
            True,
            (0.375, 0.42857142857142855, 0.39999999999999997),
        ),
        (
            "one two three four five",
            "five four three two one",
            True,
            (0.2, 0.2, 0.20000000000000004),
        ),
    ],
)
def test_rouge_l_agrees_with_rouge_score(reference, hypothesis, stemmer, expected):
    assert rouge_l(reference, hypothesis, stemmer) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("reference", "hypothesis"), [("", ""), ("", "a"), ("a", ""), ("...", "é")]
)
def test_rouge_l_without_words_is_zero(reference, hypothesis):
    assert rouge_l(reference, hypothesis) == (0, 0, 0)


def test_rouge_l_of_a_long_line():
    text = "word " * 5000
    assert rouge_l(text, text) == (1, 1, 1)


# Porter's examples and words of nltk's extensions, with the stems of nltk 3.10.
STEMS = """
    caresses:caress ponies:poni ties:tie caress:caress cats:cat feed:feed agreed:agre
    plastered:plaster bled:bled motoring:motor sing:sing conflated:conflat troubled:troubl
    sized:size hopping:hop tanned:tan falling:fall hissing:hiss fizzed:fizz failing:fail
    filing:file happy:happi sky:sky relational:relat conditional:condit rational:ration
    valenci:valenc hesitanci:hesit digitizer:digit conformabli:conform radicalli:radic
    differentli:differ vileli:vile analogousli:analog vietnamization:vietnam predication:predic
    operator:oper feudalism:feudal decisiveness:decis hopefulness:hope callousness:callous
    formaliti:formal sensitiviti:sensit sensibiliti:sensibl triplicate:triplic formative:form
    formalize:formal electriciti:electr electrical:electr hopeful:hope goodness:good
    revival:reviv allowance:allow inference:infer airliner:airlin gyroscopic:gyroscop
    adjustable:adjust defensible:defens irritant:irrit replacement:replac adjustment:adjust
    dependent:depend adoption:adopt homologou:homolog communism:commun activate:activ
    angulariti:angular homologous:homolog effective:effect bowdlerize:bowdler probate:probat
    rate:rate cease:ceas controll:control roll:roll dies:die died:die dying:die news:news
    innings:inning proceed:proceed enjoy:enjoy geology:geolog joyfulli:joy sadly:sadli say:say
    by:by as:as oed:o authorship:authorship generalizations:gener syzygy:syzygi yes:ye owed:owe
"""


@pytest.mark.parametrize("pair", STEMS.split())
def test_stems(pair):
    word, expected = pair.split(":")
    assert stem(word) == expected
