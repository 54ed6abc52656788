"""Findings from measurements, without any model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from tests.attacks.tables import classifier_signals, token_signals
from tests.evaluations.measurements import answers, case, pictures, text_case
from unlearn.attacks.membership import attacks
from unlearn.attacks.membership.loss import ATTACKS as LOSS
from unlearn.attacks.signals import Signals
from unlearn.case import Case
from unlearn.evaluations import divergence, exposure, findings, inside
from unlearn.evaluations.criteria import Check, Decision, decide, read
from unlearn.evaluations.examination import overall
from unlearn.evaluations.measure import Measured, Measurements

CRITERIA = read()
KNOWN, UNKNOWN = 6.0, 0.5  # margins of a classifier
LIKELY, UNLIKELY = 0.05, 2.0  # losses of a language model


def images(forget: float, seed: int, n: int = 300, retain: float = KNOWN) -> Measured:
    draw = np.random.default_rng(seed)
    return Measured({
        "forget": pictures(n, forget, draw),
        "retain": pictures(n, retain, np.random.default_rng(99)),
        "holdout": pictures(n, UNKNOWN, np.random.default_rng(98)),
    })  # fmt: skip


def texts(forget: float, seed: int, n: int = 150, retain: float = LIKELY) -> Measured:
    draw = np.random.default_rng(seed)
    same = np.random.default_rng(99)
    signals = {
        "forget": answers(n, forget, draw),
        "retain": answers(n, retain, same),
        "holdout": answers(n, UNLIKELY, same),
    }
    said = {name: np.exp(-s.loss()) for name, s in signals.items()}
    return Measured(signals, numbers={"rouge_l_recall": said})


def world(after: Measured, before: Measured, exact: Measured | None = None) -> Measurements:
    found = {"original": before, "unlearned": after}
    return found if exact is None else {**found, "retrained": exact}


IMAGES = world(images(UNKNOWN, 1), images(KNOWN, 2), images(UNKNOWN, 3))
TEXTS = world(texts(UNLIKELY, 1), texts(LIKELY, 2), texts(UNLIKELY, 3))


def without(measured: Measurements, *roles: str) -> Measurements:
    return {role: m for role, m in measured.items() if role not in roles}


def unmodified(measured: Measurements) -> Measurements:
    return {**measured, "unlearned": measured["original"]}


def judged(
    measured: Measurements, about: Case, rules: object = None
) -> dict[tuple[str, str], tuple[Check, Decision]]:
    criteria = read(rules)
    checks = findings.checks(measured, about, criteria)
    decisions = decide(checks, criteria)
    return {(c.name, c.subset): (c, d) for c, d in zip(checks, decisions, strict=True)}


def verdict(measured: Measurements, about: Case, name: str, subset: str = "forget") -> str:
    return judged(measured, about)[name, subset][1].verdict


def values(check: Check) -> list[float | None]:
    """Of the original, the unlearned and the retrained model."""
    roles = ("original", "unlearned", "retrained")
    return [None if check.fields.get(role) is None else check.fields[role].value for role in roles]


# what is left of the forget set


@pytest.mark.parametrize("references", [(), ("retrained",)], ids=["retrained", "holdout"])
@pytest.mark.parametrize(
    ("measured", "about", "name"),
    [(IMAGES, case(), "accuracy"), (TEXTS, text_case(), "extraction_strength")],
    ids=["images", "texts"],
)
def test_an_unmodified_model_fails_and_one_that_forgot_passes(
    measured: Measurements, about: Case, name: str, references: tuple[str, ...]
) -> None:
    measured = without(measured, *references)
    assert verdict(measured, about, name) == "pass"
    assert verdict(unmodified(measured), about, name) == "fail"


def test_the_criterion_names_the_reference() -> None:
    for measured, wanted in (
        (IMAGES, "at most 0.10 above the retrained model"),
        (without(IMAGES, "retrained"), "at most 0.10 above the holdout"),
    ):
        check, _ = judged(measured, case())["accuracy", "forget"]
        assert check.fields["criterion"] == wanted


def test_a_reference_that_knows_it_too_makes_a_check_powerless() -> None:
    easy = world(images(KNOWN, 1), images(KNOWN, 2), images(KNOWN, 3))
    _, decision = judged(easy, case())["accuracy", "forget"]
    assert (decision.verdict, decision.required, decision.powered) == ("inconclusive", False, False)


def test_records_without_any_reference_are_not_decided() -> None:
    measured = {
        role: Measured({"forget": m.signals["forget"]})
        for role, m in without(IMAGES, "retrained").items()
    }
    about = case(retain=None, holdout=None)
    check, decision = judged(measured, about)["accuracy", "forget"]
    assert (decision.verdict, decision.required) == ("not_run", True)
    assert "--retrained or --holdout" in decision.reason
    assert values(check) != [None] * 3  # what was measured is shown all the same


def classes(forget: float, seed: int) -> Measured:
    found = images(forget, seed)
    unseen = pictures(300, forget, np.random.default_rng(seed + 50))
    return Measured({**found.signals, "holdout_forget": unseen})


def test_forgotten_classes_need_no_reference() -> None:
    about = case("1")
    gone = world(classes(-8.0, 1), classes(KNOWN, 2))
    for subset in ("forget", "holdout_forget"):
        check, decision = judged(gone, about)["accuracy", subset]
        assert (decision.verdict, check.fields["criterion"]) == ("pass", "at most 0.10")
        assert verdict(unmodified(gone), about, "accuracy", subset) == "fail"
    half = world(classes(0.0, 1), classes(KNOWN, 2))  # as good as a guess is not gone
    assert verdict(half, about, "accuracy") == "fail"


def test_forgotten_classes_beside_a_retrained_model() -> None:
    exact = world(classes(0.0, 1), classes(KNOWN, 2), classes(0.0, 3))
    check, decision = judged(exact, case("1"))["accuracy", "holdout_forget"]
    assert decision.verdict == "pass"
    assert check.fields["criterion"] == "at most 0.10 above the retrained model"


def test_pairing_removes_what_both_models_share() -> None:
    paired = {role: Measured(m.signals) for role, m in IMAGES.items()}
    paired["unlearned"] = paired["retrained"]
    check, _ = judged(paired, case())["accuracy", "forget"]
    assert check.effect is not None
    assert check.effect.interval(0.9).high == pytest.approx(1 - 0.05 ** (1 / 300))


# what was lost besides


@pytest.mark.parametrize(
    ("measured", "lost", "about", "names"),
    [
        (IMAGES, images(UNKNOWN, 1, retain=1.5), case(), ["accuracy"]),
        (TEXTS, texts(UNLIKELY, 1, retain=0.8), text_case(),
         ["extraction_strength", "rouge_l_recall"]),
    ],
    ids=["images", "texts"],
)  # fmt: skip
def test_lost_utility_fails(
    measured: Measurements, lost: Measured, about: Case, names: list[str]
) -> None:
    for name in names:
        assert verdict(measured, about, name, "retain") == "pass"
    found = judged({**measured, "unlearned": lost}, about)
    failed = {key for key, (_, decision) in found.items() if decision.verdict == "fail"}
    assert failed == {(name, "retain") for name in names}


def test_utility_is_held_against_the_original_itself() -> None:
    check, decision = judged(IMAGES, case())["accuracy", "retain"]
    assert check.before is None
    assert check.fields["group"] == "utility"
    assert decision.powered is None
    check, _ = judged(TEXTS, text_case())["rouge_l_recall", "retain"]
    assert check.fields["criterion"] == "at least 90% of before"


def test_a_gain_of_utility_is_no_loss() -> None:
    better = {**IMAGES, "original": images(KNOWN, 2, retain=1.5)}
    assert verdict(better, case(), "accuracy", "retain") == "pass"


# damage


def damaged(measured: Measured, broken: float, rows: int = 7) -> Measured:
    """The same with the losses of the first records of every set broken."""
    signals = {}
    for name, s in measured.signals.items():
        units = s.units[:rows].sum()
        logprob = np.concatenate([np.full(units, -broken), s.logprob[units:]])
        signals[name] = Signals(**{**vars(s), "logprob": logprob})
    return Measured(signals, numbers=measured.numbers)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("measured", "about"), [(IMAGES, case()), (TEXTS, text_case())], ids=["images", "texts"]
)
def test_losses_that_are_not_finite_fail_and_are_counted(
    measured: Measurements, about: Case, broken: float
) -> None:
    hurt = {**measured, "unlearned": damaged(measured["unlearned"], broken)}
    found = judged(hurt, about)
    for subset in ("forget", "retain", "holdout"):
        check, decision = found["loss", subset]
        assert decision.verdict == "fail"
        n = len(hurt["unlearned"].signals[subset])
        assert decision.reason == f"It is not finite on 7 of {n} records: the model is damaged."
        assert values(check)[1] is None
    checks, decisions = zip(*found.values(), strict=True)
    assert overall(checks, decisions)[0] == "not forgotten"
    assert findings.distances(hurt, about, CRITERIA)


@pytest.mark.parametrize("role", ["original", "retrained"])
def test_a_damaged_model_to_compare_with_decides_nothing(role: str) -> None:
    told = {r: with_choices(m, LIKELY if r == "original" else 1.0) for r, m in TEXTS.items()}
    hurt = {**told, role: damaged(told[role], float("nan"))}
    rules = {"rules": {"truth_ratio": {"margin": 0.1, "required": True}}}
    _, decision = judged(hurt, text_case(), rules)["truth_ratio", "forget"]
    assert (decision.verdict, decision.required) == ("not_run", True)
    assert "that checkpoint is damaged" in decision.reason
    assert findings.distances(hurt, text_case(), read(rules))


# too little evidence


@pytest.mark.parametrize("references", [(), ("retrained",)], ids=["retrained", "holdout"])
@pytest.mark.parametrize("seed", range(10))
def test_ten_records_are_not_enough(seed: int, references: tuple[str, ...]) -> None:
    draw = 10 * seed
    few = without(
        world(images(UNKNOWN, draw + 1, 10), images(KNOWN, draw + 2, 10),
              images(UNKNOWN, draw + 3, 10)), *references)  # fmt: skip
    checks, decisions = zip(*judged(few, case()).values(), strict=True)
    assert overall(checks, decisions)[0] == "inconclusive"


def test_a_margin_of_nothing_does_not_crash() -> None:
    rules = {"rules": {"accuracy.forget": {"margin": 0.0}}}
    assert judged(IMAGES, case(), rules)["accuracy", "forget"][1].verdict == "inconclusive"
    assert findings.distances(IMAGES, case(), read(rules))


def test_a_single_record_does_not_crash() -> None:
    lone = world(images(UNKNOWN, 1, 1), images(KNOWN, 2, 1), images(UNKNOWN, 3, 1))
    assert verdict(lone, case(), "accuracy") == "inconclusive"
    assert findings.distances(lone, case(), CRITERIA)


def test_what_so_many_records_could_have_shown() -> None:
    def detectable(measured: Measurements) -> float | None:
        return judged(measured, case())["accuracy", "forget"][0].fields["detectable"]

    many, few = detectable(IMAGES), detectable(world(images(UNKNOWN, 1, 30), images(KNOWN, 2, 30)))
    assert many is not None
    assert few is not None
    assert 0 < many < few
    paired = {**IMAGES, "unlearned": IMAGES["retrained"]}
    assert detectable(paired) is None  # no spread was seen, so none can be promised
    apart = IMAGES["unlearned"].signals["forget"].hit * 1.0
    apart -= IMAGES["retrained"].signals["forget"].hit
    wanted = (stats.t.isf(0.05, 299) + stats.t.isf(0.2, 299)) * apart.std(ddof=1) / np.sqrt(300)
    assert many == pytest.approx(wanted, rel=0.01)


def test_two_models_that_never_saw_it_are_rarely_told_apart(monkeypatch) -> None:
    """In 200 audits whose unlearned model is as good as a retrained one."""
    chosen = [a for a in attacks("classification", "quick") if "entropy" in a.name] + list(LOSS)
    monkeypatch.setattr(exposure, "attacks", lambda *_: chosen)
    failed = 0
    about = case(audit="quick")
    for seed in range(200):
        draw = np.random.default_rng(seed)
        measured = {
            role: Measured({
                "forget": pictures(40, margin, draw),
                "retain": pictures(40, KNOWN, draw),
                "holdout": pictures(40, UNKNOWN, draw, "unseen"),
            })
            for role, margin in (("original", KNOWN), ("unlearned", UNKNOWN))
        }  # fmt: skip
        scores, missing = exposure.score(measured, about, None)
        checks = [
            *findings.checks(measured, about, CRITERIA),
            *exposure.checks(scores, about, CRITERIA, None),
            *missing,
        ]
        failed += any(d.verdict == "fail" for d in decide(checks, CRITERIA))
    assert failed <= 10


# single metrics


def test_extraction_follows_from_the_hits() -> None:
    hit, miss = -0.1, -3.0
    rows = [[hit] * 5, [miss, hit, hit, hit, hit], [hit, hit, miss, hit, miss], [miss] * 5]
    signals = token_signals(rows)
    measured = {role: Measured({"forget": signals}) for role in ("original", "unlearned")}
    about = text_case(retain=None, holdout=None)

    def of(name: str, found: Measurements = measured) -> float | None:
        return values(judged(found, about)[name, "forget"][0])[1]

    assert of("extraction_strength") == pytest.approx((1 + 0.8 + 0 + 0) / 4)
    assert of("exact_memorization") == pytest.approx((1 + 0.8 + 0.6 + 0) / 4)
    assert of("greedy_extraction") == pytest.approx(1 / 4)
    # p_z of the rows is e^-0.5, e^-3.4, e^-6.3 and e^-15; it takes e^-7.28 for even odds
    assert of("sampled_extraction") == pytest.approx(3 / 4)
    ended = Signals(**{**vars(signals), "ended": np.array([True] * 4)})  # the last unit is no word
    ends = {role: Measured({"forget": ended}) for role in measured}
    assert of("extraction_strength", ends) == pytest.approx((1 + 0.75 + 0.25 + 0) / 4)
    assert of("exact_memorization", ends) == pytest.approx((1 + 0.75 + 0.75 + 0) / 4)


def test_metrics_of_texts_and_of_classes_do_not_mix() -> None:
    names = {name for name, _ in judged(IMAGES, case())}
    assert names == {"accuracy", "loss"}
    names = {name for name, _ in judged(TEXTS, text_case())}
    assert names == {"extraction_strength", "exact_memorization", "greedy_extraction",
                     "sampled_extraction", "rouge_l_recall", "loss"}  # fmt: skip


SHARES = [m.name for m in findings.METRICS if m.bounds and m.name != "prefix_extraction"]


@pytest.mark.parametrize("name", SHARES)
def test_every_share_can_be_decided(name: str, monkeypatch) -> None:
    monkeypatch.setattr(findings, "PREFIX", 2)  # the answers have five to nine tokens
    measured, about = (IMAGES, case()) if name == "accuracy" else (TEXTS, text_case())
    told = {r: with_choices(m, LIKELY if r == "original" else 1.0) for r, m in measured.items()}
    numbers = {role: m.numbers | {name: {k: np.linspace(0.2, 0.9, len(m.signals[k]))
                                         for k in ("forget", "retain", "holdout")}}
               for role, m in told.items()}  # fmt: skip
    told = {role: Measured(m.signals, numbers=numbers[role]) for role, m in told.items()}
    found = judged(told, about, {"rules": {name: {"margin": 0.1}}})
    for subset in ("forget", "retain", "holdout"):
        check, decision = found[name, subset]
        nothing_to_lose = subset != "forget" and check.fields["original"].value == 0
        usual = ("info",) if nothing_to_lose else ("pass", "fail", "inconclusive")
        assert decision.verdict in usual


def constant(losses: list[float]) -> Signals:
    """One answer of two tokens per loss."""
    return token_signals([[-loss, -loss] for loss in losses])


def test_truth_ratios_come_from_the_wrong_answers_of_each_record() -> None:
    measured = Measured({
        "forget": constant([1.0, 2.0]),
        "forget/perturbed": constant([1.5, 2.5, 0.5, 1.5]),  # two for each record in turn
    })  # fmt: skip
    ratios = findings.truth_ratios(measured, "forget")
    assert ratios == pytest.approx(np.exp([1.0 - 2.0, 2.0 - 1.0]))
    paraphrased = Measured({**measured.signals, "forget/paraphrased": constant([3, 5, 2, 2])})
    ratios = findings.truth_ratios(paraphrased, "forget")  # two of these, too
    assert ratios == pytest.approx(np.exp([4.0 - 2.0, 2.0 - 1.0]))
    assert findings.truth_ratios(Measured({"forget": constant([1.0])}), "forget") is None


def test_truth_ratios_are_read_differently_on_what_is_kept() -> None:
    signals = {
        f"{name}{variant}": constant(losses)
        for name in ("forget", "retain")
        for variant, losses in (("", [1.0, 2.0]), ("/perturbed", [2.0, 1.0]))
    }
    measured = {role: Measured(signals) for role in ("original", "unlearned")}
    found = judged(measured, text_case(holdout=None))
    forget, retain = (found["truth_ratio", name][0] for name in ("forget", "retain"))
    assert values(forget)[1] == pytest.approx(np.exp(-1))  # min(R, 1 / R) of 1/e and e
    assert values(retain)[1] == pytest.approx((1 - np.exp(-1)) / 2)  # max(0, 1 - R)
    assert forget.fields["better"] == "closer_to_retrained"


# distances


def distance(measured: Measurements, about: Case, name: str, subset: str = "forget") -> Check:
    (found,) = [
        c
        for c in findings.distances(measured, about, CRITERIA)
        if (c.name, c.subset) == (name, subset)
    ]
    return found


def test_distances_need_a_retrained_model_and_decide_nothing() -> None:
    assert findings.distances(without(IMAGES, "retrained"), case(), CRITERIA) == []
    for measured, about in ((IMAGES, case()), (TEXTS, text_case())):
        found = findings.distances(measured, about, CRITERIA)
        assert {d.verdict for d in decide(found, CRITERIA)} == {"info"}
        assert {c.fields["group"] for c in found} == {"distance"}


def test_outputs_are_compared_record_by_record() -> None:
    same = {**IMAGES, "unlearned": IMAGES["retrained"]}
    for name in ("jensen_shannon", "activation_distance"):
        for subset in ("forget", "retain", "holdout"):
            assert values(distance(same, case(), name, subset))[1] == pytest.approx(0, abs=1e-9)
    one = {
        role: Measured({"forget": classifier_signals([logits], [0])})
        for role, logits in (
            ("original", [99.0, 0.0]), ("unlearned", [0.0, 0.0]), ("retrained", [0.0, 99.0])
        )
    }  # fmt: skip
    about = case(retain=None, holdout=None)
    assert values(distance(one, about, "jensen_shannon"))[0] == pytest.approx(np.log(2))
    found = values(distance(one, about, "activation_distance"))
    assert found[:2] == pytest.approx([np.sqrt(2), np.sqrt(0.5)])


def test_losses_of_texts_are_compared_record_by_record() -> None:
    measured = {
        role: Measured({"forget": constant(losses)})
        for role, losses in (("original", [0.0, 1.0]), ("unlearned", [3.0, 1.0]),
                             ("retrained", [2.0, 2.0]))
    }  # fmt: skip
    found = distance(measured, text_case(retain=None, holdout=None), "loss_distance")
    assert values(found)[:2] == pytest.approx([1.5, 1.0])


def with_choices(measured: Measured, loss: float) -> Measured:
    """The same, asked about three wrong answers to every question, too."""
    draw = np.random.default_rng(7)
    wrong = {f"{name}/perturbed": answers(3 * len(s), loss, draw)
             for name, s in measured.signals.items()}  # fmt: skip
    return Measured({**measured.signals, **wrong}, numbers=measured.numbers)


def test_forget_quality_is_the_p_value_of_a_test_on_truth_ratios() -> None:
    told = {role: with_choices(m, 1.0) for role, m in TEXTS.items()}
    ratios = {role: findings.truth_ratios(m, "forget") for role, m in told.items()}
    found = values(distance(told, text_case(), "forget_quality"))
    for value, role in zip(found, ("original", "unlearned"), strict=False):
        wanted = stats.ks_2samp(ratios[role], ratios["retrained"]).pvalue
        assert value == pytest.approx(wanted)
    assert found[0] < 1e-6 < 0.01 < found[1]
    hurt = {**told, "unlearned": damaged(told["unlearned"], float("nan"))}
    assert values(distance(hurt, text_case(), "forget_quality"))[1] is None


def test_zero_retrain_forgetting_is_likeness_to_an_untrained_model() -> None:
    blank = classifier_signals(np.zeros((300, 3)), np.zeros(300, int))
    original = IMAGES["original"]
    measured = {
        **IMAGES,
        "original": Measured({**original.signals, "forget/untrained": blank}),
    }
    found = values(distance(measured, case(), "zero_retrain_forgetting"))
    for value, role in zip(found, ("original", "unlearned", "retrained"), strict=True):
        p = IMAGES[role].signals["forget"].probabilities()
        assert value == pytest.approx(divergence.zrf(p, np.full((300, 3), 1 / 3)))
    assert found[0] < found[1]


def test_the_average_gap_is_over_all_sets() -> None:
    def right(*shares: float) -> Measured:
        sets = zip(("forget", "retain", "holdout"), shares, strict=True)
        return Measured({
            name: classifier_signals([[1.0, 0.0]] * 10, [0] * int(s * 10) + [1] * int(10 - s * 10))
            for name, s in sets
        })  # fmt: skip

    measured = world(right(0.3, 0.9, 0.5), right(1.0, 1.0, 0.5), right(0.5, 1.0, 0.5))
    found = values(distance(measured, case(), "average_gap"))
    assert found[:2] == pytest.approx([0.5 / 3, (0.2 + 0.1 + 0.0) / 3])


def test_a_prefix_that_is_continued_word_for_word() -> None:
    metric = next(m for m in findings.METRICS if m.name == "prefix_extraction")
    hits = [[True] * 120, [True] * 50 + [False] + [True] * 69, [True] * 30]
    sizes = np.array([len(h) for h in hits])
    flat = np.concatenate([np.array(h) for h in hits])
    nothing, none = np.zeros(len(flat)), np.zeros(3, int)
    signals = Signals(["a", "b", "c"], sizes, nothing, nothing, nothing, flat,
                      np.zeros(3, bool), none, none - 1)  # fmt: skip
    values = metric.values(Measured({"forget": signals}), "forget")
    assert values is not None
    assert values.tolist() == [1.0, 0.0]  # the third is too short to be asked
    short = Measured({"forget": signals.select([2])})
    assert metric.values(short, "forget") is None


def test_equivalence_is_shown_by_many_records_and_never_by_few() -> None:
    def p_value(n: int) -> float:
        measured: Measurements = {
            "original": images(KNOWN, 1, n),
            "unlearned": images(UNKNOWN, 2, n),
            "retrained": images(UNKNOWN, 3, n),
        }
        (found,) = [
            c for c in findings.distances(measured, case(), CRITERIA) if c.name == "equivalence"
        ]
        assert found.fields["original"].value > 0.5
        return float(found.fields["unlearned"].value)

    assert p_value(2000) < 0.01
    assert p_value(12) > 0.05


def test_what_could_not_be_measured_is_named() -> None:
    some, name = np.full(4, 0.5), "relearning"
    ways = [
        ({"original": some, "unlearned": some}, "pass --retrained"),
        ({"original": some, "unlearned": some, "retrained": None}, "on the retrained model"),
        ({"original": some, "unlearned": None, "retrained": some}, "on the unlearned model"),
    ]
    for values, why in ways:
        state, reason = findings.beside(name, values, {}, CRITERIA).state
        assert state == "not_run"
        assert why in reason


def test_relearning_that_destroys_the_original_decides_nothing() -> None:
    curve = {"hits": np.full((2, 3), 0.5), "steps": np.array([0, 4])}
    shown = texts(LIKELY, 0)
    relearned = replace(shown, curves={"relearning": curve})
    measured = {"original": shown, "unlearned": relearned, "retrained": relearned}
    found = inside.Inside(measured, text_case(audit="standard"))
    by_name = {check.name: check for check in found.checks(CRITERIA)}
    assert by_name["relearning"].state[0] == "not_run"
    assert "relearn_time" not in by_name
