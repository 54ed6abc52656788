"""The report: records, reading, and pages that stay correct and harmless whatever they hold."""

import html.parser
import json
import math
import re

import matplotlib as mpl
import numpy as np
import pytest
from pydantic import ValidationError

from unlearn.errors import BadInput
from unlearn.evaluations import plots
from unlearn.evaluations.report import (
    Cost,
    Distribution,
    Example,
    Finding,
    Hyperparameter,
    Interval,
    RecordSet,
    Report,
    TrajectoryPoint,
    Value,
    read,
    render_html,
    render_markdown,
)

HOSTILE = "<script>alert('x')</script>\"'&|`]]><!-- \\"


def value(number, reach=None):
    interval = None if reach is None else Interval(low=number - reach, high=number + reach)
    return Value(value=number, interval=interval)


def finding(**changes):
    fields = {
        "name": "extraction_strength",
        "title": "Extraction strength",
        "subset": "forget",
        "unit": "share of tokens",
        "better": "closer_to_retrained",
        "n": 40,
        "original": value(0.71, 0.03),
        "unlearned": value(0.09, 0.02),
        "retrained": value(0.07, 0.01),
        "criterion": "at most 0.10 above the retrained model",
        "verdict": "pass",
    }
    return Finding(**(fields | changes))


def report(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "title": "Erase one author",
        "created": "2025-11-21T14:03:22+00:00",
        "verdict": "forgotten",
        "verdict_reason": "All required checks passed.",
        "request": {"target": "records", "records": "40 of 400"},
        "method": "npo",
        "hyperparameters": (
            Hyperparameter(name="beta", value="0.1", given=True),
            Hyperparameter(name="epochs", value="5"),
        ),
        "sets": (RecordSet(name="forget", n=40, fingerprint="sha256:9f2c"),),
        "findings": (
            finding(),
            finding(name="loss", title="Mean loss", subset="retain", unit="nats", verdict="info"),
            finding(
                name="relearning",
                title="Relearning",
                original=None,
                unlearned=None,
                retrained=None,
                verdict="not_run",
                reason="It needs 20 training steps.",
            ),
        ),
        "notes": ("alpha was set to 1.",),
        "limits": ("Only the listed attacks were tried.",),
        "cost": Cost(seconds={"unlearning": 312.0}, peak_memory_bytes=3 * 2**30, device="cpu"),
        "environment": {"torch": "2.13.0"},
        "distributions": (
            Distribution(
                subset="forget",
                original=rng.gamma(2, 0.1, 40),
                unlearned=rng.normal(3, 0.5, 40),
                retrained=rng.normal(2.9, 0.5, 40),
            ),
        ),
        "trajectory": tuple(
            TrajectoryPoint(step=i, terms={"forget_nll": i / 10, "total": 3.0 - i / 20})
            for i in range(12)
        ),
        "checkpoint_in": "sha256:5d0c",
        "checkpoint_out": "sha256:c17f",
    }
    return Report(**(fields | changes))


class Outline(html.parser.HTMLParser):
    """Tags, ids, visible text and tag balance of a page."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "line", "circle", "use"})

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.open, self.text, self.attributes = [], [], [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [text for name, text in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if not self.open or self.open[-1] != "style" else ""


def test_records_survive_json(tmp_path):
    path = tmp_path / "report.json"
    for original in (report(), report(examples=(Example(subset="forget", prompt="p"),))):
        path.write_text(original.model_dump_json(), encoding="utf-8")
        assert read(path) == original
        json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_numbers_json_cannot_hold_become_none():
    kept = Distribution(subset="forget", unlearned=[math.nan, 1, math.inf, np.float32(0.5)])
    assert kept.unlearned == (None, 1.0, None, 0.5)
    assert TrajectoryPoint(step=0, terms={"total": math.nan}).terms == {"total": None}
    with pytest.raises(ValidationError):
        Value(value=math.nan)
    with pytest.raises(ValidationError):
        Interval(low=1, high=0)


def test_records_are_closed_and_immutable():
    with pytest.raises(ValidationError):
        report(surprise=1)
    with pytest.raises(ValidationError):
        finding(name="Not A Key")
    with pytest.raises(ValidationError):
        report(created="2025-11-21T14:03:22")
    with pytest.raises(ValidationError):
        report().title = "another"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not JSON"),
        ("[]", "no schema_version"),
        ("{}", "no schema_version"),
        ('{"schema_version": "2"}', "version '2', and this release reads version '1'"),
        ('{"schema_version": "1", "title": 3}', r"title: .*\(and \d+ more\)"),
    ],
)
def test_what_is_not_a_report_is_named_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_page_leads_with_the_verdict_and_holds_every_number():
    page = render_html(report())
    outline = Outline(page)
    assert not outline.open
    text = " ".join(outline.text.split())
    order = ["Forgotten", "What was asked", "Extraction strength", "Losses", "Only the listed"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    for part in (
        "0.710",
        "0.680 to 0.740",
        "0.090",
        "0.070",
        "95% confidence intervals",
        "at most 0.10 above the retrained model",
        "not run",
        "It needs 20 training steps.",
        "Checks: 1 passed, 0 failed, 0 inconclusive, 1 not run.",
        "5 min 12 s",
        "3.00 GiB",
        "sha256:c17f",
        "2025-11-21 14:03 UTC",
    ):
        assert part in text
    assert "Examples" not in text


def test_the_page_is_self_contained_and_accessible():
    page = render_html(report())
    outline = Outline(page)
    assert "script" not in outline.tags
    assert "link" not in outline.tags
    assert "default-src 'none'" in page
    for tag, name, text in outline.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert text.startswith("#"), (tag, text)
    assert not re.search(r"url\((?!#)|@import", page)
    assert len(outline.ids) == len(set(outline.ids))
    labels = [text for _, name, text in outline.attributes if name == "aria-label"]
    assert "Forget set: distribution of losses, original, unlearned, retrained" in labels
    assert page.count('role="img"') == page.count("<title>") - 1
    assert all(re.search(r'scope="(col|row|rowgroup)"', th) for th in re.findall("<th .*?>", page))


def test_colours_follow_the_page():
    page = render_html(report())
    figures = "".join(re.findall(r'<svg class="figure".*?</svg>', page, flags=re.DOTALL))
    assert "var(--unlearned)" in figures
    assert not re.search(r"#[0-9a-fA-F]{6}", figures)
    assert "prefers-color-scheme: dark" in page


def test_the_page_is_the_same_every_time_and_under_every_plot_style():
    page = render_html(report())
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "text.color": "red"}):
        assert render_html(report()) == page
    assert len(page) < 100_000


def test_hostile_text_stays_text():
    texts = dict.fromkeys(("prompt", "original", "unlearned", "retrained"), HOSTILE)
    bad = report(
        title=HOSTILE,
        verdict_reason=HOSTILE,
        request={HOSTILE: HOSTILE},
        method=HOSTILE,
        notes=(HOSTILE,),
        limits=(HOSTILE,),
        hyperparameters=(Hyperparameter(name=HOSTILE, value=HOSTILE),),
        sets=(RecordSet(name=HOSTILE, n=1, fingerprint=HOSTILE),),
        findings=(finding(title=HOSTILE, unit=HOSTILE, criterion=HOSTILE, reason=HOSTILE),),
        cost=Cost(seconds={HOSTILE: 1.0}, device=HOSTILE),
        environment={HOSTILE: HOSTILE},
        trajectory=(TrajectoryPoint(step=0, terms={HOSTILE: 1.0}),),
        examples=(Example(subset="forget", reference=HOSTILE, **texts),),
        checkpoint_in=HOSTILE,
        checkpoint_out=HOSTILE,
    )
    outline = Outline(render_html(bad))
    assert not outline.open
    assert "script" not in outline.tags
    assert outline.text.count(HOSTILE) >= 20
    section = render_markdown(bad)
    assert "<script>" not in section
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_a_line_of_ten_thousand_characters_is_kept_and_wrapped():
    page = render_html(report(notes=("y" * 10_000,)))
    assert "y" * 10_000 in page
    assert "overflow-wrap: anywhere" in page


def test_without_a_retrained_model_its_column_is_gone():
    lone = finding(retrained=None, criterion="")
    bare = report(findings=(lone,), distributions=())
    text = " ".join(Outline(render_html(bare)).text.split())
    assert "No retrained model was given" in text
    assert "Retrained" not in text
    assert "| Check | n | Original | Unlearned | Rule | Verdict |" in render_markdown(bare)


def test_a_report_with_nothing_but_the_essentials():
    bare = Report(
        title="t",
        created="2025-11-21T14:03:22Z",
        verdict="inconclusive",
        verdict_reason="Nothing was measured.",
        method="npo",
        checkpoint_in="a",
        checkpoint_out="b",
    )
    assert not Outline(render_html(bare)).open
    assert render_markdown(bare).startswith("## Unlearning audit\n")
    assert Outline(render_html(bare.model_copy(update={"examples": ()}))).text


def test_the_model_card_section():
    section = render_markdown(report())
    assert "**Verdict: forgotten.** All required checks passed." in section
    assert (
        "| Extraction strength (share of tokens), forget set | 40 | 0.710 (0.680 to 0.740) "
        "| 0.090 (0.070 to 0.110) | 0.070 (0.060 to 0.080) "
        "| at most 0.10 above the retrained model | pass |" in section
    )
    assert "- Only the listed attacks were tried." in section
    assert section.endswith("tried.\n")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("series", "note"),
    [
        ({"unlearned": [2.0]}, "Median 2.00 unlearned."),
        ({"original": [1.0] * 9, "unlearned": [1.0] * 9}, "Median 1.00 original, 1.00 unlearned."),
        ({"unlearned": [0.0, 0.0]}, "Median 0.00 unlearned."),
        ({"unlearned": [None, 1.0, 3.0]}, "Median 2.00 unlearned. 1 loss is not finite"),
        ({"unlearned": [1.0, 1.1, 1.2] * 9 + [1e9]}, "1 loss above 1.84 counted in the last bin."),
        ({"original": [1e-9, 2e-9], "unlearned": [40.0, 70.0]}, "Median 1.50e-09 original"),
    ],
)
def test_odd_losses_are_drawn(series, note):
    drawing = plots.loss_histogram(series, "losses")
    assert note in drawing.note
    assert Outline(drawing.svg).open == []
    assert "nan" not in drawing.svg.lower()


def test_losses_that_are_all_missing_are_said_to_be():
    assert plots.loss_histogram({"unlearned": [None]}, "x") == ("", "No finite loss to draw.")
    assert plots.trajectory([0], [None], "x") == ("", "No finite value to draw.")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values", [[1.0], [None, 1.0, None], [1e-3, 1e6], [-2.0, -2.0], list(np.arange(5000.0))]
)
def test_odd_trajectories_are_drawn(values):
    drawing = plots.trajectory(list(range(len(values))), values, "term")
    assert "nan" not in drawing.svg.lower()
    assert len(drawing.svg) < 20_000
    assert "at the last" in drawing.note


@pytest.mark.filterwarnings("error")
def test_a_long_curve_with_gaps_keeps_its_extremes():
    values = [None] * 400 + [1.0] * 400
    values[600] = 50.0
    drawing = plots.trajectory(list(range(800)), values, "term")
    assert "400 values are not finite and not drawn." in drawing.note
    assert ">40<" in drawing.svg  # the axis reaches the spike


def test_strips_share_a_scale():
    shares = plots.strip([plots.Mark("original", 0.25, 0.2, 0.3), plots.Mark("unlearned", 1.0)])
    assert 'cx="43.0"' in shares
    assert 'cx="154.0"' in shares
    assert plots.strip([]) == ""
    assert 'cx="80"' in plots.strip([plots.Mark("unlearned", 5.0)])
