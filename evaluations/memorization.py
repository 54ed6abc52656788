"""How much of its training data a model still carries: agreement, extraction, overlap, benchmarks.

*Exact memorization* (Tirumala et al., 2022, arXiv:2205.10770) is the share of tokens the model
predicts correctly under teacher forcing. *Extraction strength* (Carlini et al., 2021,
arXiv:2012.07805, in the form of Dorna et al., 2025, arXiv:2506.12618) is the share of the text that
follows the shortest prefix from which greedy decoding reproduces the rest; because every later
prefix is then the true one, one teacher-forced pass answers it. *ROUGE-L* (Lin, 2004) is the
longest common subsequence of words of two texts.

The aggregates of two benchmarks rest on these: TOFU (Maini et al., 2024, arXiv:2401.06121) compares
the losses of correct and wrong answers, MUSE (Shi et al., 2024, arXiv:2407.06460) compares
generations and attacks. Both are defined against a retrained model; alone they prove nothing.

Sequences hold the answer tokens only: whether the closing end-of-text token counts is the caller's
decision, and published numbers leave it out. Losses are mean negative log-likelihoods per token, in
nats. Arrays may be lists, numpy arrays or torch tensors; everything is computed in float64.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from unlearn.errors import BadInput
from unlearn.evaluations import porter
from unlearn.evaluations.statistics import ks_two_sample
from unlearn.scripts import unspaced

Array = npt.NDArray[np.float64]

MUSE_TOKENS = 128  # how much of a passage MUSE compares
WORD = re.compile("[a-z0-9]+|[^\\x00-\\x7f]+")
WRITTEN = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Nd"}  # letters, their marks, digits
MUSE_STOPS = re.compile("\n\n|\nQuestion|Question:")  # where its short answers end


class Rouge(NamedTuple):
    """Overlap of two texts: of the hypothesis, of the reference, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def extraction_strength(predicted: Any, labels: Any) -> float:
    """Share of the sequence that greedy decoding reproduces from its shortest sufficient prefix.

    1 - k/T, where k is the smallest start from which every prediction up to the end is right; 0
    when not even the last token is. (Some published code returns 1/T there, which makes a wrong
    answer of one token count as fully extracted.)

    Args:
        predicted: Most likely token at each position under teacher forcing, integers of shape (T,).
        labels: True tokens, integers of shape (T,).

    Returns:
        A share in [0, 1]; higher means more of the text comes out.

    Raises:
        BadInput: Empty sequences, different lengths, or not integers of one dimension.

    >>> extraction_strength([7, 2, 3, 4], [1, 2, 3, 4])
    0.75
    >>> extraction_strength([1, 2, 3, 9], [1, 2, 3, 4])
    0.0
    """
    hits = _hits(predicted, labels)
    wrong = np.flatnonzero(~hits)
    start = int(wrong[-1]) + 1 if wrong.size else 0
    return (hits.size - start) / hits.size


def exact_memorization(predicted: Any, labels: Any) -> float:
    """Share of tokens predicted correctly under teacher forcing.

    Args:
        predicted: Most likely token at each position, integers of shape (T,).
        labels: True tokens, integers of shape (T,).

    Returns:
        A share in [0, 1]; higher means more is remembered.

    Raises:
        BadInput: Empty sequences, different lengths, or not integers of one dimension.

    >>> exact_memorization([1, 2, 3, 9], [1, 2, 3, 4])
    0.75
    """
    return float(_hits(predicted, labels).mean())


def continuation_matches(predicted: Any, truth: Any) -> bool:
    """Whether greedy decoding reproduced a continuation, token for token.

    With the k tokens before ``truth`` as the prompt this is k-extractability (Carlini et al., 2023,
    arXiv:2202.07646, Definition 3.1), usually with 50 tokens of either.

    Args:
        predicted: Generated tokens, integers; those beyond the length of the truth do not count.
        truth: True continuation, integers of shape (T,).

    Raises:
        BadInput: An empty truth, or sequences that are not integers of one dimension.

    >>> continuation_matches([5, 6, 7, 8], [5, 6, 7])
    True
    """
    wanted = _tokens(truth, "truth")
    if len(predicted) == 0:
        return False
    return np.array_equal(_tokens(predicted, "predicted")[: wanted.size], wanted)


def extraction_probability(token_logprobs: Any) -> float:
    """Probability p_z that one sample from the model is the true continuation.

    The product of its token probabilities *under the sampling scheme*: temperature, top-k and the
    like must be applied and renormalised first (Hayes et al., 2024, arXiv:2410.19482).

    Args:
        token_logprobs: Log-probability of each true token given those before, shape (T,), in nats;
            -inf where the scheme never samples it.

    Returns:
        A probability; 0 also where it is too small for a float64.

    Raises:
        BadInput: No tokens, a wrong shape, a NaN or a positive log-probability.
    """
    logprobs = _array(token_logprobs, "token_logprobs")
    if logprobs.max() > 1e-6:  # rounding may lift a certain token a little above 0
        raise BadInput(
            f"token_logprobs reaches {logprobs.max():g}: log-probabilities are never positive; "
            "pass the negative of losses."
        )
    return math.exp(min(0.0, float(logprobs.sum())))


def extractable(p_z: float, n: float, p: float) -> bool:
    """Whether n samples contain the continuation with probability p: 1 - (1 - p_z)^n >= p.

    (n, p)-discoverable extraction of Hayes et al. (2024, arXiv:2410.19482).

    Args:
        p_z: Probability that one sample is the continuation, in [0, 1].
        n: Number of independent samples, at least 1.
        p: Probability asked for, strictly between 0 and 1.

    Raises:
        BadInput: A value outside its range.
    """
    if not (0.0 <= p_z <= 1.0 and n >= 1 and 0.0 < p < 1.0):
        raise BadInput(
            f"extraction needs p_z in [0, 1], n of at least 1 and p strictly between 0 and 1; got "
            f"p_z = {p_z}, n = {n}, p = {p}."
        )
    if p_z in (0.0, 1.0):
        return p_z == 1.0
    return -math.expm1(n * math.log1p(-p_z)) >= p


def samples_needed(p_z: float, p: float = 0.5) -> float:
    """Smallest number of samples that contain the continuation with probability p.

    Args:
        p_z: Probability that one sample is the continuation, in [0, 1].
        p: Probability asked for, strictly between 0 and 1.

    Returns:
        A whole number, or inf if ``p_z`` is 0; lower means easier to extract.

    Raises:
        BadInput: A value outside its range.

    >>> samples_needed(0.1), samples_needed(0.1, p=0.9)
    (7.0, 22.0)
    """
    if extractable(p_z, 1, p):
        return 1.0
    if p_z == 0.0:
        return math.inf
    n = float(np.ceil(math.log1p(-p) / math.log1p(-p_z)))
    nearby = (max(1.0, n - 1.0), n, n + 1.0)  # the quotient is rounded
    return next((k for k in nearby if extractable(p_z, k, p)), n)


def rouge_l(reference: str, hypothesis: str, stemmer: bool = True) -> Rouge:
    """ROUGE-L of two texts, of Latin ones word for word as the rouge-score package computes it.

    Texts are lowercased, everything but a-z and 0-9 separates words, and with ``stemmer`` words
    longer than three letters are reduced to their Porter stem. Other Latin letters, such as é,
    separate words too. That package finds no word at all in other scripts; here they have words:
    runs of their letters, marks and digits, and single characters in scripts written without
    spaces, such as Chinese or Thai.

    Args:
        reference: The true text.
        hypothesis: The generated text.
        stemmer: Compare stems rather than words.

    Returns:
        Precision (share of the hypothesis), recall (share of the reference) and F1, all 0 when no
        word is shared.

    >>> rouge_l("The cat sat on the mat.", "the cats sat")
    Rouge(precision=1.0, recall=0.5, f1=0.6666666666666666)
    >>> rouge_l("Η Άντα ζει στο Όσλο.", "η Άντα ζει").recall
    0.6
    """
    target, words = _words(reference, stemmer), _words(hypothesis, stemmer)
    shared = _common_subsequence(target, words)
    if not shared:
        return Rouge(0.0, 0.0, 0.0)
    precision, recall = shared / len(words), shared / len(target)
    return Rouge(precision, recall, 2.0 * precision * recall / (precision + recall))


def verbatim_memorization(
    reference_tokens: Any, generated: str, decode: Callable[[Sequence[int]], str]
) -> float:
    """VerbMem of MUSE for one passage: ROUGE-L F1, without stemming, of a greedy continuation.

    Args:
        reference_tokens: The true continuation, integers of shape (T,), as the tokenizer gives it;
            what comes after 128 tokens, special ones counted, is cut off.
        generated: The text of up to 128 greedily generated tokens.
        decode: Tokens to text, special tokens left out.

    Returns:
        A share in [0, 1]; higher means more is remembered. MUSE reports the mean, times 100.

    Raises:
        BadInput: No tokens, or tokens that are not integers of one dimension.
    """
    truth = decode(_tokens(reference_tokens, "reference_tokens")[:MUSE_TOKENS].tolist())
    return rouge_l(truth, generated, stemmer=False).f1


def knowledge_memorization(answer: str, generated: str) -> float:
    r"""KnowMem of MUSE for one question: ROUGE-L F1, without stemming, of a short answer.

    Args:
        answer: The true answer.
        generated: What the model said; it ends where an empty line or the next question begins.

    Returns:
        A share in [0, 1]; higher means more is known. MUSE reports the mean, times 100.

    >>> knowledge_memorization("in Oslo", "In Oslo\n\nQuestion: And then?")
    1.0
    """
    return rouge_l(answer, MUSE_STOPS.split(generated, maxsplit=1)[0], stemmer=False).f1


def truth_ratio(correct_loss: Any, wrong_losses: Any) -> Array:
    """How likely wrong answers are beside the correct one: exp(-mean_k wrong) / exp(-correct).

    The geometric mean over the wrong answers, as TOFU's aggregation script and open-unlearning
    compute it; the equation of the paper is ``truth_ratio_arithmetic``. No constant is added to the
    denominator: the ratio is the exponential of a difference, so collapsed models keep their order.

    Args:
        correct_loss: Loss of the (paraphrased) correct answer, shape (n,).
        wrong_losses: Losses of k wrong answers to the same question, shape (n, k).

    Returns:
        Ratios, shape (n,); near 0 for a model that knows the answer, around 1 for one that does
        not, inf beyond the range of a float64.

    Raises:
        BadInput: Nothing given, shapes that do not fit, or a loss that is not finite.

    >>> truth_ratio([1.0], [[2.0, 4.0]]).round(4).tolist()
    [0.1353]
    """
    correct, wrong = _losses(correct_loss, wrong_losses)
    return _exp(correct - wrong.mean(axis=1))


def truth_ratio_arithmetic(correct_loss: Any, wrong_losses: Any) -> Array:
    """The truth ratio of the TOFU paper: mean_k exp(-wrong) / exp(-correct).

    Never below ``truth_ratio``, and equal to it for a single wrong answer.

    Args:
        correct_loss: Loss of the (paraphrased) correct answer, shape (n,).
        wrong_losses: Losses of k wrong answers to the same question, shape (n, k).

    Returns:
        Ratios, shape (n,).

    Raises:
        BadInput: Nothing given, shapes that do not fit, or a loss that is not finite.
    """
    correct, wrong = _losses(correct_loss, wrong_losses)
    return _exp(correct + special.logsumexp(-wrong, axis=1) - math.log(wrong.shape[1]))


def closer_to_one(ratios: Any) -> Array:
    """min(R, 1/R) of truth ratios, shape (n,), in [0, 1]: TOFU's score on the forget set.

    Highest where wrong and correct answers are equally likely.

    Raises:
        BadInput: No ratios, a wrong shape, a NaN or a negative ratio.

    >>> closer_to_one([0.5, 1.0, 4.0]).tolist()
    [0.5, 1.0, 0.25]
    """
    ratio = _nonnegative(ratios, "ratios")
    with np.errstate(divide="ignore", over="ignore"):
        return np.minimum(ratio, 1.0 / ratio)


def true_better(ratios: Any) -> Array:
    """max(0, 1 - R) of truth ratios, shape (n,), in [0, 1]: TOFU's score on everything retained.

    Highest where the correct answer is much likelier than the wrong ones.

    Raises:
        BadInput: No ratios, a wrong shape, a NaN or a negative ratio.

    >>> true_better([0.25, 1.0, 4.0]).tolist()
    [0.75, 0.0, 0.0]
    """
    return np.maximum(0.0, 1.0 - _nonnegative(ratios, "ratios"))


def probability_with_options(correct_loss: Any, wrong_losses: Any) -> Array:
    """Probability of the correct answer among the options given: P / (P + sum_k P_k).

    Each P is the per-token probability exp(-loss); TOFU uses it for real authors and world facts.

    Args:
        correct_loss: Loss of the correct answer, shape (n,).
        wrong_losses: Losses of the k other options, shape (n, k).

    Returns:
        Probabilities, shape (n,).

    Raises:
        BadInput: Nothing given, shapes that do not fit, or a loss that is not finite.

    >>> probability_with_options([1.0], [[1.0, 1.0, 1.0]]).tolist()
    [0.25]
    """
    options = -np.column_stack(_losses(correct_loss, wrong_losses))
    shares: Array = special.softmax(options, axis=1)[:, 0]
    return shares


def forget_quality(truth_ratio_a: Any, truth_ratio_b: Any) -> float:
    """p-value that the truth ratios of two models come from one distribution (TOFU).

    The exact two-sided Kolmogorov-Smirnov test. A high p-value is *not* evidence of forgetting:
    with few examples it is high for any two models. For n examples of each model its smallest
    value is 2 / C(2n, n), whatever the models do, so it only compares at equal n.

    Args:
        truth_ratio_a: Of the unlearned model on the forget set, shape (n,).
        truth_ratio_b: Of the model retrained without it, shape (m,).

    Returns:
        The p-value; it is the same in both orders and for inverted ratios.

    Raises:
        BadInput: An empty sample, a wrong shape or a NaN.
    """
    return float(ks_two_sample(truth_ratio_a, truth_ratio_b).p)


def model_utility(values: Any) -> float:
    """Harmonic mean of utility scores, 0 if any is 0.

    In TOFU nine of them: probability, ROUGE-L recall and ``true_better`` on the retain set,
    real authors and world facts.

    Args:
        values: Scores, each higher for a better model, shape (n,).

    Returns:
        A number between the smallest value and their mean.

    Raises:
        BadInput: No values, a wrong shape, or a value that is negative or not finite.

    >>> round(model_utility([0.5, 1.0, 0.25]), 4)
    0.4286
    """
    scores = _nonnegative(values, "values")
    if np.isinf(scores).any():
        raise BadInput("values holds infinite numbers; utility scores are finite.")
    return float(stats.hmean(scores))


def privleak(auc: float, auc_retrained: float) -> float:
    """PrivLeak of MUSE: how far an attack's AUC is from where retraining puts it, in percent.

    100 ((1 - A) - (1 - A_r)) / (1 - A_r). MUSE's A is that of scores which rise for nonmembers,
    hence the complements.

    Args:
        auc: AUC of membership scores (higher = more likely a member), forget set against holdout
            set, on the unlearned model.
        auc_retrained: The same attack on the retrained model; 0.5 is no substitute for it.

    Returns:
        0 where the models agree; negative if the forget set still looks like members, down to -100;
        positive if it looks less like members than after retraining, which gives it away too.

    Raises:
        BadInput: An AUC outside [0, 1], or a retrained one of exactly 1.

    >>> round(privleak(0.9, 0.5), 9), round(privleak(0.4, 0.5), 9)
    (-80.0, 20.0)
    """
    if not (0.0 <= auc <= 1.0 and 0.0 <= auc_retrained < 1.0):
        raise BadInput(
            f"privleak needs AUCs between 0 and 1, and a retrained one below 1; got {auc} and "
            f"{auc_retrained}. (A retrained AUC of 1 means that forget and holdout set differ "
            "by more than membership: choose another holdout set.)"
        )
    return 100.0 * (auc_retrained - auc) / (1.0 - auc_retrained)


def memorization_scores(correct: Any, member: Any) -> Array:
    """How much being trained on raises the chance of being right, for each example.

    Mean correctness over the models that had the example minus that over the models that had not
    (Feldman and Zhang, 2020, arXiv:2008.03703).

    Args:
        correct: Correctness (or any score in its place) of each of s models, shape (s, n).
        member: Whether each model was trained on each example, booleans of shape (s, n).

    Returns:
        Scores, shape (n,), in [-1, 1]; near 1 for an example that can only be memorized.

    Raises:
        BadInput: Shapes that do not fit, values that are not finite or not booleans, or an example
            that all models had or none had.

    >>> memorization_scores([[1, 1], [0, 1]], [[True, False], [False, True]]).tolist()
    [1.0, 0.0]
    """
    right = _array(correct, "correct", 2)
    inside = np.asarray(member.detach().cpu() if hasattr(member, "detach") else member)
    if inside.dtype != np.bool_ or inside.shape != right.shape:
        raise BadInput(
            f"member must hold booleans of shape {right.shape}, as correct does; got {inside.dtype}"
            f" of shape {inside.shape}."
        )
    if not np.isfinite(right).all():
        raise BadInput("correct holds infinite numbers; their mean says nothing.")
    had = inside.sum(axis=0)
    lopsided = np.flatnonzero((had == 0) | (had == len(inside)))
    if lopsided.size:
        raise BadInput(
            f"{lopsided.size} of {had.size} examples (the first is {lopsided[0]}) were in all "
            "models or in none: train more models, or leave these examples out."
        )
    with_it: Array = np.where(inside, right, 0.0).sum(axis=0) / had
    without: Array = np.where(inside, 0.0, right).sum(axis=0) / (len(inside) - had)
    return with_it - without


def _losses(correct_loss: Any, wrong_losses: Any) -> tuple[Array, Array]:
    """Finite losses of matching shapes, (n,) and (n, k)."""
    correct, wrong = _array(correct_loss, "correct_loss"), _array(wrong_losses, "wrong_losses", 2)
    if correct.size != len(wrong):
        raise BadInput(f"correct_loss has {correct.size} examples but wrong_losses {len(wrong)}.")
    if not (np.isfinite(correct).all() and np.isfinite(wrong).all()):
        raise BadInput("a loss is infinite: the model has collapsed and its ratios mean nothing.")
    return correct, wrong


def _nonnegative(values: Any, name: str) -> Array:
    """Values of shape (n,), none below 0."""
    array = _array(values, name)
    if array.min() < 0.0:
        raise BadInput(f"{name} must not be negative, got {array.min()}.")
    return array


def _array(values: Any, name: str, dimensions: int = 1) -> Array:
    """Values as a nonempty float64 array of that many dimensions, without NaN."""
    if hasattr(values, "detach"):  # a tensor, perhaps on a device or in a dtype numpy lacks
        values = values.detach().cpu().double().numpy()
    array: Array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or array.size == 0:
        raise BadInput(f"{name} must be nonempty and {dimensions}-d, got shape {array.shape}.")
    if np.isnan(array).any():
        raise BadInput(f"{name} holds NaN: a model that scores NaN has diverged.")
    return array


def _exp(x: Array) -> Array:
    """Exponential, inf where it overflows."""
    with np.errstate(over="ignore"):
        return np.exp(x)


def _tokens(values: Any, name: str) -> npt.NDArray[np.integer[Any]]:
    """Token ids, integers of shape (T,)."""
    array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.ndim != 1 or array.size == 0:
        raise BadInput(f"{name} must be one nonempty sequence of tokens, got shape {array.shape}.")
    if not np.issubdtype(array.dtype, np.integer):
        raise BadInput(f"{name} must hold integer token ids, got {array.dtype}.")
    return array


def _hits(predicted: Any, labels: Any) -> npt.NDArray[np.bool_]:
    """Where the prediction is right, shape (T,)."""
    first, second = _tokens(predicted, "predicted"), _tokens(labels, "labels")
    if first.shape != second.shape:
        raise BadInput(f"predicted has {first.size} tokens but labels has {second.size}.")
    hits: npt.NDArray[np.bool_] = first == second
    return hits


def _words(text: str, stemmer: bool) -> list[str]:
    """Words of a text as ROUGE counts them."""
    lowered = text.lower()
    if not lowered.isascii():
        lowered = "".join(map(_apart, lowered))
    words: list[str] = WORD.findall(lowered)
    return [porter.stem(word) if len(word) > 3 else word for word in words] if stemmer else words


@lru_cache(maxsize=1 << 16)
def _apart(character: str) -> str:
    """The character, with blanks around it if it is a word, or a blank if it separates words."""
    if character.isascii():
        return character
    name = unicodedata.name(character, "")
    beyond = character > "\u036f" and "LATIN" not in name  # accents are below
    if not beyond or unicodedata.category(character) not in WRITTEN:
        return " "
    return f" {character} " if unspaced(character) else character


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel (Hyyrö, 2004): a zero bit marks a word of ``first`` at which the best length grows,
    so one pass over ``second`` with integers of len(first) bits does all rows of the usual table.
    """
    places: dict[str, int] = {}
    for position, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << position
    full = (1 << len(first)) - 1
    open_ = full
    for word in second:
        match = open_ & places.get(word, 0)
        open_ = ((open_ + match) | (open_ - match)) & full
    return len(first) - open_.bit_count()
