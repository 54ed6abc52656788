"""Rules decide from confidence bounds: too little evidence neither passes nor fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from unlearn.errors import BadInput
from unlearn.evaluations import criteria
from unlearn.evaluations.criteria import CERTAIN, Check, Decision, Effect, decide, read
from unlearn.evaluations.examination import overall
from unlearn.evaluations.statistics import Bounds, holm, mean_interval

RULES = {
    "rules": {"accuracy.forget": {"margin": 0.1, "required": True}, "knn_probe": {"margin": 0}}
}
SHIPPED = yaml.safe_load(read().text)


def normal(mean: float, error: float, low: float = -0.1, high: float = 0.1) -> Effect:
    """A distance with a normal estimate."""

    def interval(level: float) -> Bounds:
        reach = stats.norm.isf((1 - level) / 2) * error
        return Bounds(mean - reach, mean + reach)

    return Effect(interval, low, high, f"between {low} and {high}")


INSIDE, OUTSIDE, ACROSS = normal(0.0, 0.02), normal(0.5, 0.02), normal(0.1, 0.02)


def check(effect: Effect | None = None, before: Effect | None = OUTSIDE, **settings) -> Check:
    fields = {"title": "Accuracy", "group": "extraction"}
    return Check("accuracy", "forget", effect, before, **{"fields": fields, **settings})


def one(found: Check, rules: object = RULES) -> Decision:
    (decision,) = decide([found], read(rules))
    return decision


# one check


def test_an_interval_inside_passes_outside_fails_across_is_undecided() -> None:
    assert one(check(INSIDE)).verdict == "pass"
    assert one(check(OUTSIDE)).verdict == "fail"
    assert one(check(normal(-0.5, 0.02))).verdict == "fail"  # overshooting is as bad
    assert one(check(ACROSS)) == Decision("inconclusive", criteria.UNSURE, True, True, 1.0)


def test_the_same_mean_passes_with_many_records_and_not_with_few() -> None:
    def effect(values: np.ndarray) -> Effect:
        return Effect(lambda level: mean_interval(values, level, (0.0, 1.0)), -np.inf, 0.1, "")

    many = np.tile([0.0, 0.12, 0.03], 100)
    assert one(check(effect(many))).verdict == "pass"
    assert one(check(effect(many[:3]))).verdict == "inconclusive"


def test_the_level_is_that_of_each_bound() -> None:
    edge = 0.1 - stats.norm.isf(0.05) * 0.02  # where the upper 95 % bound touches the limit
    assert one(check(normal(edge - 1e-6, 0.02))).verdict == "pass"
    assert one(check(normal(edge + 1e-6, 0.02))).verdict == "inconclusive"
    beyond = 0.1 + stats.norm.isf(0.05) * 0.02
    assert one(check(normal(beyond + 1e-3, 0.02))).verdict == "fail"
    assert one(check(normal(beyond - 1e-3, 0.02))).verdict == "inconclusive"
    stricter = {**RULES, "level": 0.99}
    assert one(check(normal(edge - 1e-6, 0.02)), stricter).verdict == "inconclusive"
    assert one(check(normal(beyond + 1e-3, 0.02)), stricter).verdict == "inconclusive"


def test_a_check_that_the_original_passes_too_has_no_power() -> None:
    assert one(check(INSIDE, INSIDE)) == Decision(
        "inconclusive", criteria.POWERLESS, False, False, 1.0
    )
    failed = one(check(OUTSIDE, INSIDE))  # what forgetting made conspicuous is a leak all the same
    assert (failed.verdict, failed.required) == ("fail", True)


def test_too_few_records_to_see_the_original_do_not_excuse_a_check() -> None:
    seems = normal(0.15, 0.1)
    assert not seems.beyond(0.05)
    assert one(check(INSIDE, seems)) == Decision("inconclusive", criteria.TOO_FEW, True, False, 1.0)


def test_a_check_held_against_the_original_itself_needs_no_power() -> None:
    assert one(check(INSIDE, None)) == Decision("pass", "", True, None, 1.0)


def test_without_an_effect_or_a_rule_it_is_information() -> None:
    assert one(check()) == Decision("info")
    assert one(check(OUTSIDE), {"rules": {}}) == Decision("info")


@pytest.mark.parametrize("verdict", ["not_run", "invalid", "fail", "info"])
def test_a_settled_verdict_stands(verdict: criteria.Outcome) -> None:
    found = one(check(INSIDE, state=(verdict, "Because.")))
    assert found == Decision(verdict, "Because.", verdict != "info")


def test_failing_counts_the_other_checks_and_passing_does_not() -> None:
    weak = check(normal(0.1 + 2 * 0.02, 0.02))  # p = 0.023
    alone = one(weak)
    assert (alone.verdict, alone.p_value) == ("fail", pytest.approx(stats.norm.sf(2), rel=0.01))
    among = decide([weak, *[check(INSIDE)] * 9], read(RULES))
    assert among[0].verdict == "inconclusive"
    assert among[0].reason == criteria.ALONE
    assert among[0].p_value == pytest.approx(10 * stats.norm.sf(2), rel=0.01)
    assert {d.verdict for d in among[1:]} == {"pass"}
    uncounted = [check(), check(OUTSIDE, state=("invalid", "")), Check("loss", "forget", OUTSIDE)]
    assert decide([weak, *uncounted], read(RULES))[0] == alone


def test_adjusted_p_values_are_holms() -> None:
    effects = [normal(0.1 + z * 0.02, 0.02) for z in (3, 2.5, 1, 4)]
    found = [d.p_value for d in decide([check(e) for e in effects], read(RULES))]
    assert found == pytest.approx(list(holm(stats.norm.sf([3, 2.5, 1, 4]))), rel=0.01)


# p-values by inversion


@pytest.mark.parametrize("z", [0.01, 0.5, 1.0, 2.0, 3.0, 5.0])
def test_p_values_are_those_of_the_z_test(z: float) -> None:
    for effect in (normal(0.1 + z, 1.0), normal(-0.1 - z, 1.0)):
        assert effect.p_beyond() == pytest.approx(stats.norm.sf(z), rel=0.01)
        assert effect.p_beyond() >= stats.norm.sf(z)


def test_p_values_are_those_of_the_t_test() -> None:
    values = np.array([-0.4, -0.1, 0.2, 0.5, 0.8])  # no skewness: the plain t interval
    for limit in (-0.5, -0.2, 0.1):
        effect = Effect(lambda level: mean_interval(values, level), -np.inf, limit, "")
        wanted = stats.ttest_1samp(values, limit, alternative="greater").pvalue
        assert effect.p_beyond() == pytest.approx(wanted, rel=0.01)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.01, 1))
def test_p_values_fall_with_the_distance(first: float, second: float, error: float) -> None:
    near, far = sorted((first, second), key=abs)
    assert normal(near, error).p_beyond() >= normal(far, error).p_beyond()


@given(st.floats(-3, 3), st.floats(0.01, 1), st.floats(1e-8, 0.49))
def test_p_values_agree_with_the_intervals(mean: float, error: float, tail: float) -> None:
    effect = normal(mean, error)
    if not math.isclose(effect.p_beyond(), tail, rel_tol=0.01):
        assert effect.beyond(tail) == (effect.p_beyond() < tail)
    assert not (effect.within(tail) and effect.beyond(tail))


def test_inside_the_limits_p_is_one_and_far_beyond_it_is_tiny() -> None:
    for mean in (-0.1, 0.0, 0.1):
        assert normal(mean, 1.0).p_beyond() == 1.0
    assert normal(9.0, 0.01).p_beyond() == CERTAIN


# over all checks


def verdict(*checks: Check) -> str:
    found = list(checks)
    return overall(found, decide(found, read(RULES)))[0]


PASSED, FAILED, OPEN = check(INSIDE), check(OUTSIDE), check(ACROSS)
POWERLESS = check(INSIDE, INSIDE)
UTILITY = check(INSIDE, None, fields={"title": "Accuracy", "group": "utility"})
NOT_REQUIRED = Check("knn_probe", "forget", OUTSIDE, OUTSIDE, fields={"title": "k-NN"})
OPEN_BUT_NOT_REQUIRED = Check("knn_probe", "forget", ACROSS, OUTSIDE, fields={"title": "k-NN"})


def test_every_required_check_must_pass() -> None:
    assert verdict(PASSED, UTILITY, check()) == "forgotten"
    assert verdict(PASSED, OPEN) == "inconclusive"
    assert verdict(PASSED, check(state=("not_run", ""))) == "inconclusive"
    assert verdict(PASSED, check(INSIDE, state=("invalid", ""))) == "inconclusive"
    assert verdict(PASSED, OPEN_BUT_NOT_REQUIRED) == "forgotten"


def test_any_failure_means_not_forgotten() -> None:
    assert verdict(PASSED, OPEN, FAILED) == "not forgotten"
    assert verdict(PASSED, NOT_REQUIRED) == "not forgotten"
    assert verdict(PASSED, check(state=("fail", "Damaged."))) == "not forgotten"


def test_without_evidence_that_can_tell_nothing_is_forgotten() -> None:
    assert verdict() == "inconclusive"
    assert verdict(check()) == "inconclusive"
    assert verdict(POWERLESS, UTILITY) == "inconclusive"
    assert verdict(UTILITY) == "inconclusive"
    assert verdict(POWERLESS, PASSED) == "forgotten"


def test_the_reason_names_what_decided() -> None:
    checks = [PASSED, FAILED]
    assert overall(checks, decide(checks, read(RULES)))[1] == "Failed: Accuracy on the forget set."


# the file


def test_the_shipped_rules_load() -> None:
    shipped = read()
    assert shipped.level == 0.95
    assert shipped.rule("accuracy", "forget") == criteria.Rule(margin=0.10, required=True)
    assert shipped.rule("accuracy", "retain") == criteria.Rule(margin=0.03, required=True)
    assert shipped.rule("loss", "forget") is None
    assert shipped.looser_than_shipped() == []
    assert read(SHIPPED).rules == shipped.rules  # every name in it would be accepted from a user


def test_the_most_specific_rule_counts() -> None:
    found = read({"rules": {
        "membership": {"margin": 0.1}, "membership_loss": {"margin": 0.2},
        "membership_loss.forget": {"margin": 0.3}, "accuracy": {"margin": 0.4},
    }})  # fmt: skip
    asked = (
        ("membership_loss", "forget"),
        ("membership_loss", "retain"),
        ("membership_zlib", "forget"),
        ("accuracy", "holdout"),
        ("linear_probe", "forget"),
    )
    margins = [None if (rule := found.rule(*key)) is None else rule.margin for key in asked]
    assert margins == [0.3, 0.2, 0.1, 0.4, None]


def test_margins_of_a_file_replace_the_shipped_ones(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("level: 0.9\nrules:\n  accuracy.forget: {margin: 0.5}\n")
    found = read(path)
    assert (found.level, found.rules) == (0.9, {"accuracy.forget": criteria.Rule(margin=0.5)})
    assert found.text == path.read_text()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("acuracy.forget", "did you mean accuracy?"),
        ("accuracy.forgot", "did you mean forget?"),
        ("accuracy.", "known are: forget, holdout, holdout_forget, neighbours, retain"),
        ("membership_los", "did you mean membership_loss?"),
        ("loss", "known are: accuracy"),  # in nats: no share to give a margin
    ],
)
def test_rules_for_nothing_are_refused_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(BadInput) as caught:
        read({"rules": {name: {"margin": 0.1}}})
    assert f"the criteria have a rule for {name!r}" in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("name", ["exact_memorization.forget", "truth_ratio", "membership_zlib"])
def test_whatever_is_a_share_can_have_a_rule(name: str) -> None:
    assert read({"rules": {name: {"margin": 0.1}}}).rules[name].margin == 0.1


@pytest.mark.parametrize(
    "rules",
    [
        {"accuracy": {"margin": -0.1}},
        {"accuracy": {"margin": 1.1}},
        {"accuracy": {"margin": float("nan")}},
        {"accuracy": {"margin": "wide"}},
        {"accuracy": {}},
        {"accuracy": {"margin": 0.1, "needed": True}},
        {"accuracy": 0.1},
    ],
)
def test_bad_margins_are_refused(rules: dict) -> None:
    with pytest.raises(BadInput, match=r"rules\.accuracy"):
        read({"rules": rules})


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(BadInput) as caught:
        read({"level": 2, "rules": {"accuracy": {"margin": 7}}})
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(BadInput) as caught:
        read({"rules": {"acuracy": {"margin": 0}, "knn": {"margin": 0}}})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["", "- a\n- b", "rules: [", "no rules", "42", "\x00"])
def test_files_that_hold_no_rules(tmp_path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"bad\.yaml hold no rules"):
        read(path)


def test_files_that_cannot_be_read(tmp_path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.yaml", "missing.yaml", "."):
        with pytest.raises(BadInput, match="cannot be read"):
            read(tmp_path / name)


def altered(**rules: object) -> dict:
    """The shipped criteria with some rules replaced, or left out where None."""
    merged = {**SHIPPED["rules"], **rules}
    return {**SHIPPED, "rules": {name: rule for name, rule in merged.items() if rule is not None}}


@pytest.mark.parametrize(
    ("changes", "looser"),
    [
        ({}, []),
        ({"membership_loss": {"margin": 0.05, "required": True}}, []),
        ({"knn_probe": {"margin": 0.1, "required": True}}, []),
        ({"knn_probe": {"margin": 0.2}}, ["knn_probe"]),
        ({"knn_probe": None}, ["knn_probe"]),
        ({"accuracy.forget": {"margin": 0.1}}, ["accuracy.forget"]),
        ({"membership_loss": None}, ["membership_loss"]),  # the family's rule is not required
        ({"membership_zlib": {"margin": 1.0}}, ["membership_zlib"]),  # an exception from it
        ({"knn_probe.forget": {"margin": 0.5}}, ["knn_probe.forget"]),
        ({"accuracy.forget": None, "accuracy": {"margin": 0.1, "required": True}}, []),
        ({"exact_memorization": {"margin": 0.9}}, []),  # the shipped rules demand nothing of it
    ],
)
def test_what_is_looser_than_shipped_is_listed(changes: dict, looser: list[str]) -> None:
    assert read(altered(**changes)).looser_than_shipped() == looser


def test_a_lower_level_is_looser() -> None:
    assert read({**SHIPPED, "level": 0.9}).looser_than_shipped() == ["level"]
    assert read({**SHIPPED, "level": 0.99}).looser_than_shipped() == []


def test_the_digest_is_of_the_text(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(read().text)
    assert read(path).digest() == read().digest()
    path.write_text(read().text + "# a remark\n")
    assert read(path).digest() != read().digest()
    assert read(RULES).digest() != read({**RULES, "level": 0.9}).digest()
