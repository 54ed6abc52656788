"""Memorization measures by hand, by definition and against published behaviour."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import log_softmax

from unlearn.errors import BadInput
from unlearn.evaluations.memorization import (
    closer_to_one,
    continuation_matches,
    exact_memorization,
    extractable,
    extraction_probability,
    extraction_strength,
    forget_quality,
    knowledge_memorization,
    memorization_scores,
    model_utility,
    privleak,
    probability_with_options,
    rouge_l,
    samples_needed,
    true_better,
    truth_ratio,
    truth_ratio_arithmetic,
    verbatim_memorization,
)
from unlearn.evaluations.porter import stem

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
LOSSES = arrays.arrays(
    float, st.tuples(st.integers(1, 6), st.integers(2, 5)), elements=st.floats(0, 20)
)  # column 0 is the correct answer


def made_up_answers():
    """A made-up model on two answers: log-probabilities (T, 7) and labels (T,) of each."""
    b, t, v = np.ogrid[:2, :6, :7]
    logits = 1.5 * np.sin(0.9 * v + 1.7 * t + 2.3 * b) + 0.5 * np.cos(0.31 * v * t + b)
    labels = np.array([[-100, -100, 4, 5, 3, 1], [-100, 6, 3, 0, -100, -100]])
    logprobs = log_softmax(logits, -1)[:, :-1]
    return [(p[y != -100], y[y != -100]) for p, y in zip(logprobs, labels[:, 1:], strict=True)]


def test_agreement_on_the_fixture():
    pairs = [(p.argmax(-1), y) for p, y in made_up_answers()]
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


@pytest.mark.parametrize(
    ("predicted", "matches"),
    [([5, 6, 7], True), ([5, 6, 7, 8], True), ([5, 6], False), ([5, 6, 8], False), ([], False)],
)
def test_a_continuation_matches_up_to_the_length_of_the_truth(predicted, matches):
    assert continuation_matches(predicted, [5, 6, 7]) is matches
    assert continuation_matches(torch.tensor(predicted, dtype=torch.long), np.array([5, 6, 7])) is (
        matches
    )


@given(TOKENS, TOKENS)
def test_extracted_means_full_extraction_strength(predicted, truth):
    predicted = (predicted + [9] * len(truth))[: len(truth)]
    assert continuation_matches(predicted, truth) == (extraction_strength(predicted, truth) == 1)


def test_everything_continues_with_nothing():
    with pytest.raises(BadInput, match="truth"):
        continuation_matches([1, 2], [])


def test_extraction_probability_on_the_fixture():
    probabilities = []
    for logprobs, labels in made_up_answers():
        chosen = logprobs[np.arange(len(labels)), labels]
        assert extraction_probability(torch.tensor(chosen)) == extraction_probability(chosen)
        probabilities.append(extraction_probability(chosen))
    expected = [math.exp(-7.070688354909099), math.exp(-5.402163607499431)]
    assert probabilities == pytest.approx(expected, rel=1e-12)
    per_token = [p ** (1 / n) for p, n in zip(probabilities, (4, 3), strict=True)]
    assert per_token == pytest.approx([0.17072997080034427, 0.1651797172285597], rel=1e-12)


def test_extraction_probability_at_the_ends():
    assert extraction_probability([0.0, 0.0]) == 1
    assert extraction_probability([1e-8]) == 1  # a certain token, rounded
    assert extraction_probability([-1.0, -math.inf]) == 0
    assert extraction_probability([-1000.0, -1000.0]) == 0


@pytest.mark.parametrize("logprobs", [[], [0.5], [math.nan], [[-1.0]]])
def test_losses_are_no_log_probabilities(logprobs):
    with pytest.raises(BadInput, match="token_logprobs"):
        extraction_probability(logprobs)


@pytest.mark.parametrize(
    ("p_z", "p", "n"),
    [
        (0.5, 0.5, 1),
        (0.5, 0.75, 2),
        (0.5, 0.76, 3),
        (0.1, 0.5, 7),  # 1 - .9^6 = .469, 1 - .9^7 = .522
        (0.1, 0.9, 22),  # 1 - .9^21 = .891, 1 - .9^22 = .902
        (1.0, 0.99, 1),
        (0.0, 0.5, math.inf),
        (5e-324, 0.5, math.inf),
    ],
)
def test_samples_by_hand(p_z, p, n):
    assert samples_needed(p_z, p) == n


@given(st.floats(1e-9, 1), st.floats(0.001, 0.999))
def test_samples_needed_is_the_smallest_sufficient_number(p_z, p):
    n = samples_needed(p_z, p)
    assert n == int(n)
    assert n >= 1
    assert extractable(p_z, n, p)
    assert n == 1 or not extractable(p_z, n - 1, p)


@given(st.floats(0.01, 0.99), st.integers(1, 40))
def test_extractable_is_its_definition(p_z, n):
    reached = 1 - (1 - p_z) ** n
    if 0.001 < reached < 0.999:
        assert extractable(p_z, n, reached - 1e-9)
        assert not extractable(p_z, n, reached + 1e-9)


@pytest.mark.parametrize(
    ("p_z", "n", "p"), [(-0.1, 1, 0.5), (1.1, 1, 0.5), (0.5, 0, 0.5), (0.5, 1, 0.0), (0.5, 1, 1.0)]
)
def test_impossible_extraction_settings_are_refused(p_z, n, p):
    with pytest.raises(BadInput, match="p_z"):
        extractable(p_z, n, p)


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


@given(st.text(st.characters(max_codepoint=0x24F)), st.booleans())
def test_words_of_latin_texts_are_those_of_rouge_score(text, stemmer):
    words = re.findall("[a-z0-9]+", text.lower())
    assert rouge_l(text, " ".join(words), stemmer) == ((1, 1, 1) if words else (0, 0, 0))
    if len(words) > 1:
        assert rouge_l(text, " ".join(words[1:]), stemmer).recall == (len(words) - 1) / len(words)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "recall"),
    [
        ("Σήμερα η Άντα ζει στο Όσλο.", "η Άντα μένει στο Όσλο;", 4 / 6),
        ("Ада родилась в 1931 году", "ада родилась в 1932 году", 4 / 5),
        ("艾达住在奥斯陆。", "艾达,奥斯陆", 5 / 7),  # a word each
        ("艾达住在 Oslo", "Oslo", 1 / 5),
        ("에이다는 오슬로에 산다", "에이다는 산다", 2 / 3),
        ("अदा ओस्लो में रहती है।", "अदा ओस्लो में", 3 / 5),  # vowel signs belong to their words
        ("تعيش آدا في أوسلو،", "تعيش في", 2 / 4),
        ("Ада", "Ana", 0),
    ],
)
def test_rouge_l_reads_other_scripts(reference, hypothesis, recall):
    for stemmer in (True, False):
        assert rouge_l(reference, hypothesis, stemmer).recall == pytest.approx(recall)
        assert rouge_l(reference, reference, stemmer) == (1, 1, 1)


def test_rouge_l_of_a_long_line():
    text = "word " * 5000
    assert rouge_l(text, text) == (1, 1, 1)


def decode(tokens):
    """A tokenizer whose token 0 is special and whose other tokens are one word each."""
    return " ".join(f"w{token}" for token in tokens if token != 0)


def test_verbatim_memorization_compares_what_could_be_generated():
    passage = [0, *range(1, 201)]
    said = decode(range(1, 128))  # the special token is one of the 128
    assert verbatim_memorization(passage, said, decode) == 1
    assert verbatim_memorization(torch.tensor(passage), decode(range(65, 192)), decode) == (
        pytest.approx(63 / 127, abs=1e-12)
    )
    assert verbatim_memorization(passage, "", decode) == 0


def test_muse_compares_words_not_stems():
    words = ["", "books"]
    assert verbatim_memorization([1], "book", lambda tokens: words[tokens[0]]) == 0
    assert knowledge_memorization("books", "book") == 0


@pytest.mark.parametrize(
    ("generated", "f1"),
    [
        ("in Oslo", 1),
        ("in Oslo\n\nBut in Rome", 1),
        ("in Oslo\nQuestion: Where?", 1),
        ("in Oslo Question: Where?", 1),
        ("in Oslo Question: Where?\n\nin Rome", 1),
        ("in Oslo\nor in Rome", 0.5714285714285714),  # 2 of 5 words, 2 of 2
        ("\n\nin Oslo", 0),
    ],
)
def test_a_short_answer_ends_where_the_next_question_begins(generated, f1):
    assert knowledge_memorization("in Oslo", generated) == pytest.approx(f1, abs=1e-12)


def test_truth_ratios_by_hand():
    correct, wrong = [1.0, 3.0], [[2.0, 4.0], [3.0, 1.0]]
    assert truth_ratio(correct, wrong) == pytest.approx([math.exp(-2), math.e], abs=1e-12)
    arithmetic = [(math.exp(-1) + math.exp(-3)) / 2, (1 + math.exp(2)) / 2]
    assert truth_ratio_arithmetic(correct, wrong) == pytest.approx(arithmetic, abs=1e-12)
    options = [1 / (1 + math.exp(-1) + math.exp(-3)), 1 / (1 + 1 + math.exp(2))]
    assert probability_with_options(correct, wrong) == pytest.approx(options, abs=1e-12)


def test_truth_ratio_of_the_fixture():
    """Two answers of a made-up model, of 4 and 3 tokens, as correct and wrong ones."""
    known = [7.070688354909099 / 4, 5.402163607499431 / 3]
    expected = 0.1651797172285597 / 0.17072997080034427
    assert truth_ratio(known[:1], [known[1:]]) == pytest.approx([expected], abs=1e-12)


@given(LOSSES)
def test_truth_ratios_are_means_of_probabilities(losses):
    correct, wrong = losses[:, 0], losses[:, 1:]
    p = np.exp(-losses)
    geometric = truth_ratio(correct, wrong)
    count = wrong.shape[1]
    assert geometric == pytest.approx(p[:, 1:].prod(axis=1) ** (1 / count) / p[:, 0], rel=1e-9)
    arithmetic = truth_ratio_arithmetic(correct, wrong)
    assert arithmetic == pytest.approx(p[:, 1:].mean(axis=1) / p[:, 0], rel=1e-9)
    assert (arithmetic >= geometric * (1 - 1e-12)).all()
    options = probability_with_options(correct, wrong)
    assert options == pytest.approx(1 / (1 + count * arithmetic), rel=1e-9)


@given(LOSSES, st.randoms(use_true_random=False))
def test_the_order_of_wrong_answers_does_not_matter(losses, random):
    correct, wrong = losses[:, 0], losses[:, 1:]
    order = random.sample(range(wrong.shape[1]), wrong.shape[1])
    for measure in (truth_ratio, truth_ratio_arithmetic, probability_with_options):
        assert measure(correct, wrong[:, order]) == pytest.approx(measure(correct, wrong), rel=1e-9)


def test_collapsed_models_keep_their_order():
    """In probability space these underflow: 0/0, or a tie at 0 once a constant is added."""
    correct, wrong = [2000.0, 2000.0, 3000.0], [[2001.0], [2002.0], [1000.0]]
    assert truth_ratio(correct, wrong)[:2] == pytest.approx([math.exp(-1), math.exp(-2)], rel=1e-12)
    assert truth_ratio_arithmetic(correct, wrong)[:2] == (
        pytest.approx([math.exp(-1), math.exp(-2)], rel=1e-12)
    )
    assert truth_ratio(correct, wrong)[2] == math.inf
    assert probability_with_options(correct, wrong)[2] == 0


def test_low_precision_tensors_count_in_float64():
    correct, wrong = torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([[2.0, 4.0]])
    ratio = truth_ratio(correct, wrong.requires_grad_())
    assert ratio.dtype == np.float64
    assert ratio == pytest.approx([math.exp(-1.5)], abs=1e-15)


@pytest.mark.parametrize(
    ("correct", "wrong"),
    [
        ([], []),
        ([1.0], [1.0]),
        ([1.0, 2.0], [[1.0, 2.0]]),
        ([math.nan], [[1.0]]),
        ([math.inf], [[math.inf]]),
        ([1.0], [[]]),
    ],
)
@pytest.mark.parametrize("measure", [truth_ratio, truth_ratio_arithmetic, probability_with_options])
def test_losses_that_give_no_ratio_are_refused(measure, correct, wrong):
    with pytest.raises(BadInput):
        measure(correct, wrong)


def test_truth_ratio_aggregates_by_hand():
    ratios = [0.0, 0.25, 1.0, 4.0, math.inf]
    assert closer_to_one(ratios).tolist() == [0, 0.25, 1, 0.25, 0]
    assert true_better(ratios).tolist() == [1, 0.75, 0, 0, 0]


@given(st.floats(1e-6, 1e6))
def test_only_the_distance_from_one_counts(ratio):
    assert closer_to_one([ratio]) == pytest.approx(closer_to_one([1 / ratio]), rel=1e-9)


@pytest.mark.parametrize("aggregate", [closer_to_one, true_better])
def test_negative_ratios_are_refused(aggregate):
    with pytest.raises(BadInput, match="negative"):
        aggregate([0.5, -0.1])


def shifted(n, k):
    """Two samples of n values whose distribution functions differ by k/n at most."""
    return np.arange(n, dtype=float), np.arange(n) + k - 0.5


@pytest.mark.parametrize(
    ("n", "k", "printed"),
    [  # complete separation, then values printed for TOFU models
        (40, 40, "1.86e-23"),
        (200, 200, "1.94e-119"),
        (300, 300, "1.48e-179"),
        (400, 400, "1.06e-239"),
        (40, 17, "1.27e-03"),
        (200, 78, "5.87e-14"),
        (400, 149, "4.35e-25"),
    ],
)
def test_forget_quality_is_exact(n, k, printed):
    a, b = shifted(n, k)
    p = forget_quality(a, b)
    assert f"{p:.2e}" == printed
    if n == k:
        assert p == pytest.approx(2 / math.comb(2 * n, n), rel=1e-9)


# hundredths: neighbouring floats can share a logarithm, which would make a tie of an order
RATIOS = st.lists(st.integers(1, 900).map(lambda n: n / 100), min_size=2, max_size=9)


@given(RATIOS, RATIOS)
def test_forget_quality_knows_no_direction(a, b):
    p = forget_quality(a, b)
    assert 0 < p <= 1
    assert forget_quality(b, a) == pytest.approx(p, abs=1e-12)
    assert forget_quality(a[::-1], b) == p
    assert forget_quality(-np.log(a), -np.log(b)) == pytest.approx(p, abs=1e-12)
    assert forget_quality(a, a) == 1


def test_model_utility_by_hand():
    assert model_utility([0.5, 1.0, 0.25]) == pytest.approx(3 / 7, abs=1e-15)
    assert model_utility([0.6]) == pytest.approx(0.6, abs=1e-15)
    assert model_utility([0.9] * 8 + [0.0]) == 0


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=9))
def test_model_utility_is_below_the_mean(values):
    utility = model_utility(values)
    assert min(values) * (1 - 1e-12) <= utility <= np.mean(values) * (1 + 1e-12)
    assert model_utility(values[::-1]) == pytest.approx(utility, rel=1e-12)


@pytest.mark.parametrize("values", [[], [0.5, -0.1], [0.5, math.nan], [0.5, math.inf], 0.5])
def test_useless_utility_is_refused(values):
    with pytest.raises(BadInput):
        model_utility(values)


@pytest.mark.parametrize(
    ("retrained", "highest"), [(1 - 0.4772, 109.56), (1 - 0.5393, 85.43)], ids=["news", "books"]
)
def test_privleak_has_the_range_muse_prints(retrained, highest):
    assert privleak(1.0, retrained) == pytest.approx(-100, abs=1e-9)
    assert privleak(retrained, retrained) == 0
    assert round(privleak(0.0, retrained), 2) == highest


@given(st.floats(0, 1), st.floats(0, 0.99))
def test_privleak_is_that_of_the_complements(auc, retrained):
    mine, theirs = 1 - auc, 1 - retrained
    assert privleak(auc, retrained) == pytest.approx((mine - theirs) / theirs * 100, abs=1e-9)
    if auc > retrained:
        assert privleak(auc, retrained) < 0


@pytest.mark.parametrize("aucs", [(0.5, 1.0), (1.1, 0.5), (-0.1, 0.5), (math.nan, 0.5)])
def test_privleak_without_a_usable_retrained_model_is_refused(aucs):
    with pytest.raises(BadInput, match="privleak"):
        privleak(*aucs)


def test_memorization_scores_by_hand():
    member = [[True, True, False], [True, False, True], [False, False, True], [False, True, True]]
    correct = [[1, 1, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]]
    expected = [1, 0.5, 2 / 3]
    assert memorization_scores(correct, member) == pytest.approx(expected, abs=1e-15)
    assert memorization_scores(torch.tensor(correct).bool(), torch.tensor(member)) == (
        pytest.approx(expected, abs=1e-15)
    )


@given(st.data(), st.integers(2, 6), st.integers(1, 5))
def test_memorization_scores_by_definition(data, s, n):
    correct = data.draw(arrays.arrays(float, (s, n), elements=st.floats(0, 1)))
    member = data.draw(arrays.arrays(bool, (s, n)))
    member[0], member[-1] = True, False
    scores = memorization_scores(correct, member)
    for i in range(n):
        inside, outside = correct[member[:, i], i], correct[~member[:, i], i]
        assert scores[i] == pytest.approx(inside.mean() - outside.mean(), abs=1e-12)
    assert memorization_scores(correct, ~member) == pytest.approx(-scores, abs=1e-12)
    assert memorization_scores(correct[::-1], member[::-1]) == pytest.approx(scores, abs=1e-12)


@pytest.mark.parametrize(
    ("correct", "member"),
    [
        ([[1.0], [0.0]], [[True], [True]]),
        ([[1.0], [0.0]], [[False], [False]]),
        ([[1.0], [0.0]], [[1], [0]]),
        ([[1.0, 0.0], [0.0, 1.0]], [[True], [False]]),
        ([[math.nan], [0.0]], [[True], [False]]),
        ([[math.inf], [0.0]], [[True], [False]]),
        ([1.0, 0.0], [True, False]),
    ],
)
def test_membership_that_cannot_be_compared_is_refused(correct, member):
    with pytest.raises(BadInput):
        memorization_scores(correct, member)


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
