"""Runs side by side: what is best, what cannot be told apart, what must not be compared."""

import html.parser
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from unlearn.cli.main import cli
from unlearn.errors import BadInput, MissingNeed
from unlearn.evaluations import objectives
from unlearn.evaluations.comparison import badness, compare, unique_names
from unlearn.evaluations.comparison_page import render_html
from unlearn.evaluations.schema import (
    Distribution,
    Finding,
    Interval,
    RecordSet,
    Report,
    Value,
)

HOSTILE = "<script>alert('x')</script>\"'&]]><!--"


def value(number: float, reach: float | None = None) -> Value:
    interval = None if reach is None else Interval(low=number - reach, high=number + reach)
    return Value(value=number, interval=interval)


def finding(name: str, unlearned: Value | None, **changes: Any) -> Finding:
    fields: dict[str, Any] = {
        "name": name, "title": name, "subset": "forget", "better": "lower", "n": 40,
        "unlearned": unlearned, "verdict": "pass", "group": "extraction", "required": True,
        "criterion": "at most 0.10 above the retrained model",
    }  # fmt: skip
    return Finding(**(fields | changes))


def kept(unlearned: Value | None, original: Value | None = None, **changes: Any) -> Finding:
    fields: dict[str, Any] = {
        "subset": "retain", "better": "higher", "group": "utility",
        "criterion": "at most 0.03 below before", "original": original or value(0.8, 0.05),
    }  # fmt: skip
    return finding("accuracy", unlearned, **(fields | changes))


def member(unlearned: Value | None, **changes: Any) -> Finding:
    fields: dict[str, Any] = {
        "group": "membership", "better": "closer_to_retrained",
        "criterion": "within 0.10 of one half, on either side",
    }  # fmt: skip
    return finding("membership_loss", unlearned, **(fields | changes))


def report(*findings: Finding, **changes: Any) -> Report:
    fields: dict[str, Any] = {
        "title": "Erase", "created": "2025-11-21T14:03:22+00:00", "verdict": "forgotten",
        "verdict_reason": "All passed.", "method": "npo", "findings": findings,
        "request": {"to be forgotten": "40 records"}, "checkpoint_in": "aa" * 32,
        "checkpoint_out": "bb" * 32,
        "sets": (RecordSet(name="forget", n=40, fingerprint="k1"),),
    }  # fmt: skip
    return Report(**(fields | changes))


def folders(tmp_path: Path, *reports: Report) -> list[Path]:
    places = []
    for i, each in enumerate(reports):
        places.append(tmp_path / f"run-{i + 1}")
        places[-1].mkdir()
        (places[-1] / "report.json").write_text(each.model_dump_json())
    return places


# ------------------------------------------------------------------------------- two numbers


def forgetting(*findings: Finding) -> float:
    return objectives.objectives([*findings, kept(value(0.8))]).forgetting


def test_forgetting_is_the_mean_distance_of_what_decides() -> None:
    found = [
        finding("extraction_strength", value(0.30), retrained=value(0.10)),
        member(value(0.30), retrained=value(0.45)),
        finding("logit_lens", value(0.20), retrained=value(0.40), group="probe",
                better="closer_to_retrained"),
        finding("relearning", value(0.9), retrained=value(0.5), group="durability",
                required=False),
        member(value(0.0), verdict="invalid", subset="holdout_forget"),
        finding("accuracy", value(0.9), verdict="not_run", criterion=""),
    ]  # fmt: skip
    # above by 0.20; too well forgotten by 0.15; less than the retrained model is no harm
    assert objectives.distances(found) == pytest.approx({
        ("extraction_strength", "forget"): 0.2, ("membership_loss", "forget"): 0.15,
        ("logit_lens", "forget"): 0.0,
    })  # fmt: skip
    assert forgetting(*found) == pytest.approx(0.35 / 3)
    assert objectives.distances(found[3:]) == pytest.approx({("relearning", "forget"): 0.4})


@pytest.mark.parametrize(
    ("measured", "distance"),
    [
        (member(value(0.2)), 0.3),  # one half
        (finding("accuracy", value(0.9), criterion="at most 0.10"), 0.9),  # a class: nothing
        (finding("accuracy", value(0.9), criterion="at most 0.10 above the holdout"), 0.2),
        (finding("accuracy", None, verdict="fail"), 1.0),  # a damaged model
        (finding("unlearning_accuracy", value(0.7), better="higher"), 0.3),
    ],
)
def test_what_a_finding_is_held_against(measured: Finding, distance: float) -> None:
    unseen = kept(value(0.5), value(0.7), subset="holdout")
    assert forgetting(measured, unseen) == pytest.approx(distance)


def test_pictures_of_noise_are_not_forgetting() -> None:
    drawn = finding("unlearning_accuracy", value(1.0), better="higher")

    def quality(now: float, *references: float) -> Finding:
        roles = dict(zip(("original", "retrained"), map(value, references), strict=False))
        return finding("picture_quality", value(now), better="higher", group="guard",
                       criterion="at most 0.50 below the original's own", **roles)  # fmt: skip

    assert forgetting(drawn, quality(0.1, 0.9)) == pytest.approx(0.4)
    assert forgetting(drawn, quality(0.1, 0.9, 0.5)) == pytest.approx(0.2)  # no better than either
    assert forgetting(drawn, quality(0.1, 0.5, 0.9)) == pytest.approx(0.2)
    with pytest.raises(MissingNeed, match="how a model that forgot would look"):
        forgetting(quality(0.1, 0.9))  # alone it says nothing about forgetting


def test_utility_is_the_mean_share_that_is_kept() -> None:
    def utility(*findings: Finding) -> float:
        return objectives.objectives([*findings, member(value(0.5))]).utility

    found = (
        kept(value(0.6)),
        kept(value(0.9), subset="holdout"),  # a gain hides no loss
        kept(value(0.0), better="lower", subset="holdout_forget"),
        finding("rouge", value(0.1), group="utility", subset="retain", better="higher",
                original=value(1.0), required=False),
    )  # fmt: skip
    assert utility(*found) == pytest.approx((0.75 + 1.0) / 2)
    assert utility(kept(None, verdict="fail")) == 0.0
    informal = kept(value(0.4), required=False, criterion="", verdict="info")
    assert utility(informal) == pytest.approx(0.5)
    with pytest.raises(MissingNeed, match="what must stay"):
        utility()


def test_the_numbers_say_what_they_are_means_of() -> None:
    found = objectives.objectives([member(value(0.2)), kept(value(0.6))])
    assert found.parts == pytest.approx({"membership_loss.forget": 0.3, "accuracy.retain": 0.75})
    assert found.point == pytest.approx((0.3, 0.75))


def test_the_best_forgets_most_among_those_that_kept_enough() -> None:
    assert objectives.best([(0.6, 1.0), (0.4, 0.95), (0.1, 0.94)]) == 1
    assert objectives.best([(0.4, 0.96), (0.4, 0.99), (0.5, 1.0)]) == 1  # 0 is beaten by 1


def test_where_none_kept_enough_the_best_is_the_knee() -> None:
    # scaled over the front: (1, 0), (0.25, 0.25), (0, 1) from the corner; the last is beaten
    assert objectives.best([(0.8, 0.9), (0.2, 0.7), (0.0, 0.1), (0.9, 0.9)]) == 1
    assert objectives.best([(0.3, 0.2)]) == 0


pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


@given(pairs)
def test_the_front_beats_all_others_and_nobody_on_it(points: list[tuple[int, int]]) -> None:
    best = objectives.pareto(points)
    front = [p for p, b in zip(points, best, strict=True) if b]
    assert front
    assert not any(a[0] < b[0] and a[1] >= b[1] for a in front for b in front)
    for (f, u), chosen in zip(points, best, strict=True):
        beaten = any(x <= f and y >= u and (x, y) != (f, u) for x, y in front)
        assert beaten is not chosen


# ----------------------------------------------------------------------------- rows and marks


def marks(tmp_path: Path, *findings: Finding) -> list[str]:
    (row,) = compare(folders(tmp_path, *map(report, findings))).rows
    return [cell.mark if cell else "none" for cell in row.cells]


def test_only_a_clear_lead_is_marked(tmp_path: Path) -> None:
    # half-widths 0.06 and 0.08: of the difference 0.1
    found = marks(tmp_path, kept(value(0.5, 0.06)), kept(value(0.59, 0.08)), kept(value(0.2, 0.06)))
    assert found == ["level", "level", "behind"]


def test_the_best_is_clearly_above_all(tmp_path: Path) -> None:
    assert marks(tmp_path, kept(value(0.5, 0.06)), kept(value(0.61, 0.08))) == ["behind", "best"]


def test_without_intervals_nothing_is_claimed(tmp_path: Path) -> None:
    assert marks(tmp_path, kept(value(0.5)), kept(value(0.9, 0.01)), kept(value(0.1))) == [""] * 3


def test_a_number_not_to_be_relied_on_competes_with_none(tmp_path: Path) -> None:
    found = marks(
        tmp_path,
        member(value(0.5, 0.01), verdict="invalid"),
        member(value(0.1, 0.01)),
        member(value(0.8, 0.01)),
    )
    assert found == ["", "behind", "best"]  # 0.4 and 0.3 away from one half


@given(st.floats(0, 1), st.floats(0.01, 0.2), st.floats(0, 1))
def test_closeness_counts_alike_on_both_sides(at: float, reach: float, exact: float) -> None:
    one = member(value(at, reach), retrained=value(exact))
    other = member(value(2 * exact - at, reach), retrained=value(exact))
    (distance, bounds), (same, likewise) = badness(one), badness(other)  # type: ignore[misc]
    assert distance == pytest.approx(same) == pytest.approx(abs(at - exact))
    assert tuple(bounds) == pytest.approx(tuple(likewise))
    assert math.isclose(bounds.high - bounds.low, 2 * reach, rel_tol=1e-9)


def test_names_are_told_apart() -> None:
    assert unique_names([Path("/x/a/run"), Path("/x/b/run"), Path("/x/c/other")]) == [
        "a/run", "b/run", "other",
    ]  # fmt: skip
    assert unique_names([Path("/run"), Path("/a/run")]) == ["/run", "a/run"]


def test_what_all_share_stands_once(tmp_path: Path) -> None:
    one = finding("loss", value(1.0, 0.1), original=value(0.1), retrained=value(2.0))
    other = finding("loss", value(1.5, 0.1), original=value(0.1), retrained=value(2.5))
    places = folders(tmp_path, report(one), report(other))
    (row,) = compare(places).rows
    assert row.original == value(0.1)
    assert row.retrained is None  # their references disagree
    for place, fingerprint in zip(places, "ab", strict=True):
        (place / "run.json").write_text(json.dumps({"retrained": fingerprint}))
    assert "They were held against different retrained models." in compare(places).warnings


def test_a_retrained_model_that_only_some_have_is_no_common_reference(tmp_path: Path) -> None:
    # the first is 0.4 from one half, the second 0.1 from its retrained model
    alone, beside = member(value(0.9, 0.01)), member(value(0.9, 0.01), retrained=value(0.8))
    gone = [
        finding("loss", value(v, 0.01), retrained=r) for v, r in ((0.9, None), (0.2, value(0.1)))
    ]
    both = [report(alone, gone[0], kept(value(0.8))), report(beside, gone[1], kept(value(0.4)))]
    places = folders(tmp_path, *both)
    for directories in (places, places[::-1]):
        found = compare(directories)
        marked = {row.name: sorted(cell.mark for cell in row.cells if cell) for row in found.rows}
        assert marked["membership_loss"] == ["", ""]
        assert marked["loss"] == ["behind", "best"]  # lower is lower, whatever the reference
        assert found.forgetting_of == ()
        assert found.utility_of == (("accuracy", "retain"),)
        assert {run.forgetting for run in found.runs} == {None}
        assert all(row.retrained is None for row in found.rows)
        assert [w for w in found.warnings if "run-1 had no retrained model" in w]
        assert "held against a reference of one kind" in render_html(found)


def test_intervals_of_different_levels_are_not_compared(tmp_path: Path) -> None:
    wide = Value(value=0.9, interval=Interval(low=0.8, high=0.95, level=0.99))
    assert marks(tmp_path, kept(value(0.1, 0.01)), kept(wide)) == ["", ""]


def test_axes_are_what_all_runs_share(tmp_path: Path) -> None:
    deep = finding("relearning", value(0.9), retrained=value(0.1), group="durability")
    quick = report(member(value(0.6)), kept(value(0.4)))
    thorough = report(member(value(0.7)), kept(value(0.8)), deep, depth="standard")
    found = compare(folders(tmp_path, quick, thorough))
    assert found.forgetting_of == (("membership_loss", "forget"),)
    assert [run.forgetting for run in found.runs] == pytest.approx([0.1, 0.2])
    assert [run.utility for run in found.runs] == pytest.approx([0.5, 1.0])
    assert [run.efficient for run in found.runs] == [True, True]
    (row,) = [row for row in found.rows if row.name == "relearning"]
    assert row.cells[0] is None
    assert "<svg" in render_html(found)
    assert "audits of different depth (quick: run-1; standard: run-2)" in found.warnings[0]


# ------------------------------------------------------------------- what cannot be compared


def losses(*numbers: float) -> tuple[Distribution, ...]:
    return (Distribution(subset="forget", original=numbers),)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"checkpoint_in": "cc" * 32}, "different checkpoints"),
        ({"criteria_digest": "dd" * 32}, "different criteria"),
        ({"request": {"to be forgotten": "class 3"}}, "run-2 had other records"),
        ({"sets": (RecordSet(name="forget", n=41, fingerprint="k1"),)}, "run-2 had other records"),
        ({"sets": (RecordSet(name="forget", n=40, fingerprint="k2"),)}, "cannot be told"),
        ({"sets": (RecordSet(name="forget", n=40, fingerprint="k2"),),
          "distributions": losses(1.0, 2.5)}, "run-2 had other records"),
        ({"sets": (RecordSet(name="forget", n=40, fingerprint="k1"),
                   RecordSet(name="retain", n=7, fingerprint="k"))}, "The retain sets differ"),
    ],
)  # fmt: skip
def test_other_kinds_are_warned_of(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    own = member(value(0.5, 0.1))
    plain = report(own, distributions=losses(1.0, 2.0))
    other = report(own, **({"distributions": losses(1.0, 2.0)} if "k2" not in str(changes) or
                           "distributions" in changes else {}) | changes)  # fmt: skip
    found = compare(folders(tmp_path, plain, other))
    assert len(found.warnings) == 1
    assert sentence in found.warnings[0]
    assert found.warnings[0] in html.unescape(render_html(found))


def test_the_same_losses_mean_the_same_records(tmp_path: Path) -> None:
    other_key = (RecordSet(name="forget", n=40, fingerprint="k2"),)
    one = report(member(value(0.5)), distributions=losses(1.0, 2.0))
    other = report(member(value(0.5)), distributions=losses(2.0, 1.0), sets=other_key)
    assert compare(folders(tmp_path, one, other)).warnings == ()


def test_two_distributions_of_one_report_are_not_two_reports(tmp_path: Path) -> None:
    twice = losses(1.0, 2.0) * 2
    one = report(member(value(0.5)), distributions=twice)
    other = report(member(value(0.5)), sets=(RecordSet(name="forget", n=40, fingerprint="k2"),))
    assert "cannot be told" in compare(folders(tmp_path, one, other)).warnings[0]


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    places = folders(tmp_path, report(member(value(0.5))), report(kept(value(0.5))))
    with pytest.raises(BadInput, match="no measured finding in common"):
        compare(places)


def test_wrong_directories_are_named(tmp_path: Path) -> None:
    (place,) = folders(tmp_path, report(member(value(0.5))))
    for others, message in (
        ([tmp_path], "has no report.json"), ([tmp_path / "nowhere"], "is no directory"),
        ([place], "named twice"), ([], "at least two"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            compare([place, *others])


# ----------------------------------------------------------------------- page and command


class Page(html.parser.HTMLParser):
    """The tags of a page, and what hangs open."""

    EMPTY = ("meta", "img", "br", "path", "line", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_harmless(tmp_path: Path) -> None:
    own = member(value(0.5, 0.1), title=HOSTILE, criterion=HOSTILE)
    other = report(own, kept(value(0.5)), method=HOSTILE, request={"to be forgotten": HOSTILE})
    text = render_html(compare(folders(tmp_path, report(own, kept(value(0.8))), other)))
    page = Page(text)
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(
        name.startswith("on") or name in ("src", "srcset") or (name == "href" and v and v[0] != "#")
        for _, attributes in page.tags
        for name, v in attributes.items()
    )
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert text == render_html(compare(sorted(tmp_path.iterdir())))


def test_the_command_writes_and_prints(tmp_path: Path) -> None:
    places = folders(tmp_path, report(kept(value(0.5, 0.01))), report(kept(value(0.9, 0.01))))
    page = tmp_path / "page.html"
    arguments = ["compare", *map(str, places)]
    done = CliRunner().invoke(cli, [*arguments, "--out", str(page), "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert [cell["mark"] for cell in printed["rows"][0]["cells"]] == ["behind", "best"]
    assert page.read_text().count("run-2")
    missing = CliRunner().invoke(cli, [*arguments, str(tmp_path / "none"), "--json"])
    assert missing.exit_code == 2
    assert "none is no directory" in missing.stderr
    nowhere = CliRunner().invoke(cli, arguments)
    assert nowhere.exit_code == 2
    assert "--out" in nowhere.stderr
    nothing = CliRunner().invoke(cli, ["compare", "nothing"])
    assert "nothing is no directory" in nothing.stderr


def test_the_page_replaces_pages_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = folders(tmp_path, report(kept(value(0.5))), report(kept(value(0.9))))
    (tmp_path / "notes.html").write_text("mine")
    (tmp_path / "link").symlink_to(places[0])
    page = tmp_path / "page.html"

    def said(out: Path) -> str:
        result = CliRunner().invoke(cli, ["compare", *map(str, places), "--out", str(out)])
        assert result.exit_code == (2 if result.stderr else 0), result.output
        return result.stderr

    assert said(page) == ""
    assert said(page) == ""  # it is one of these
    with monkeypatch.context() as patch:  # nothing is compared before
        patch.setattr("unlearn.evaluations.comparison.compare", None)
        assert "lies within" in said(places[1] / "report.json")
        assert "lies within" in said(tmp_path / "link" / "new.html")
        assert "no page of a comparison" in said(tmp_path / "notes.html")
        assert "no page of a comparison" in said(tmp_path)
        assert "does not exist" in said(tmp_path / "none" / "page.html")
    assert (tmp_path / "notes.html").read_text() == "mine"


def test_memorization_is_no_erasure(tmp_path: Path) -> None:
    (place,) = folders(tmp_path, report(kept(value(0.5))))
    other = tmp_path / "memory"
    other.mkdir()
    (other / "report.json").write_text('{"schema_version": "1", "kind": "memorization"}')
    for arguments in (["compare", str(place), str(other), "--json"], ["report", str(other)]):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 2
        assert "is of a memorization audit" in result.stderr
