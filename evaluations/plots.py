"""Figures of the report: small inline SVG without fonts, scripts or fixed colours.

Colours are written as CSS variables of the surrounding page (``--original``, ``--unlearned``,
``--retrained``, ``--control``, ``--muted``, ``--line``), so one drawing serves light and dark
screens and paper. The checkpoints also differ in line style, for readers who do not see the
colours. The same numbers always give the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

# matplotlib knows no CSS variables: it draws in these colours, and they are exchanged afterwards.
INK = {
    "original": "#0a0a01",
    "unlearned": "#0a0a02",
    "retrained": "#0a0a03",
    "control": "#0a0a04",
    "muted": "#0a0a05",
    "line": "#0a0a06",
}
STYLES = {
    "original": {"linestyle": (0, (4, 2)), "linewidth": 1.1},
    "unlearned": {"linestyle": "solid", "linewidth": 1.5},
    "retrained": {"linestyle": (0, (1, 1.2)), "linewidth": 1.5},
    "control": {"linestyle": (0, (5, 1.5, 1, 1.5)), "linewidth": 1.0},
}
WIDTH = (
    4.2  # inches; with text of 9.5 points, labels stay legible at a third of a page and on a phone
)
TEXT = 9.5
CURVES = ("unlearned", "original", "retrained", "control")  # inks of shares(), in order
NAMED = 12  # runs of a trade-off; the names of more would write over each other
LONGEST = 240  # points of a drawn curve; more cannot be told apart at this width
RAREST = 1e-3  # smallest rate on the axes of a ROC


class Drawing(NamedTuple):
    """An SVG element and one or more sentences on what it shows."""

    svg: str
    note: str


class Mark(NamedTuple):
    """A value on a scale, with its interval if there is one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def loss_histogram(series: Mapping[str, Sequence[float | None]], label: str) -> Drawing:
    """Histograms of per-example losses on shared bins, one outline per checkpoint.

    The drawn range covers three interquartile ranges around the middle half of every series; values
    beyond it are counted in the first or last bin, and the note says how many. Where positive
    losses span more than a factor of 100, the axis is logarithmic.

    Args:
        series: Mean losses per example in nats, by checkpoint: original, unlearned, retrained. None
            stands for a loss that was not finite.
        label: What the figure shows, for readers who do not see it.

    Returns:
        The figure and its note; without any finite loss an empty figure and a note that says so.
    """
    finite = {name: _finite(values) for name, values in series.items()}
    missing = sum(len(values) - finite[name].size for name, values in series.items())
    notes = [_medians(finite)]
    if missing:
        notes.append(f"{_count(missing, 'loss is', 'losses are')} not finite and not drawn.")
    drawn = {name: values for name, values in finite.items() if values.size}
    if not drawn:
        return Drawing("", "No finite loss to draw.")

    low, high = _range(drawn)
    logarithmic = low > 0 and high / low > 100
    edges = _edges(low, high, max(values.size for values in drawn.values()), logarithmic)
    notes += _beyond(drawn.values(), edges)

    with _style():
        figure, axes = _axes(2.3)
        for name, values in sorted(drawn.items(), key=lambda pair: pair[0] != "unlearned"):
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
            share = counts / values.size
            if name == "unlearned":
                axes.stairs(share, edges, fill=True, color=INK[name], alpha=0.16, linewidth=0)
            axes.stairs(share, edges, color=INK[name], clip_on=False, **STYLES[name])
        if logarithmic:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        axes.set_xlabel("mean loss, nats" + (" (log scale)" if logarithmic else ""))
        axes.set_ylabel("share of records")
        return Drawing(_svg(figure, label), " ".join(note for note in notes if note))


def trajectory(steps: Sequence[int], values: Sequence[float | None], label: str) -> Drawing:
    """Course of one training term.

    A curve of more than 240 points is drawn as the mean of equal stretches within the band from
    their smallest to their largest value. Where positive values span more than a factor of 1000,
    the axis is logarithmic. Values that are not finite leave a gap, and the note counts them.

    Args:
        steps: Training steps, increasing.
        values: The term at each step; None where it was not finite.
        label: What the figure shows, for readers who do not see it.

    Returns:
        The figure and its note; without any finite value an empty figure and a note that says so.
    """
    x = np.asarray(steps, dtype=np.float64)
    y = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    known = y[np.isfinite(y)]
    if not known.size:
        return Drawing("", "No finite value to draw.")
    note = f"{known[0]:.3g} at the first step, {known[-1]:.3g} at the last."
    if known.size < y.size:
        missing = _count(y.size - known.size, "value is", "values are")
        note += f" {missing} not finite and not drawn."

    with _style():
        figure, axes = _axes(1.9)
        if y.size > LONGEST:
            x, y, smallest, largest = _thin(x, y)
            axes.fill_between(x, smallest, largest, color=INK["unlearned"], alpha=0.16, linewidth=0)
        # a point between two gaps has no line to show it
        lonely = y.size <= 30 or known.size < y.size
        axes.plot(
            x,
            y,
            color=INK["unlearned"],
            linewidth=1.4,
            marker="o" if lonely else "",
            markersize=2.4,
            markeredgewidth=0,
            clip_on=False,
            solid_joinstyle="round",
        )
        if known.min() > 0 and known.max() / known.min() > 1000:
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        if x[0] == x[-1]:
            axes.set_xlim(x[0] - 1, x[0] + 1)
        else:
            axes.set_xlim(x[0], x[-1])
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("step")
        return Drawing(_svg(figure, label), note)


def roc(series: Mapping[str, Sequence[tuple[float, float]]], finest: float, label: str) -> Drawing:
    """ROC curves on two logarithmic axes, with the diagonal of mere guessing.

    The axes begin at half the finest false positive rate, but never below 0.001. Rates below, zero
    among them, are drawn at the edge. Nothing is interpolated: between two points a curve keeps the
    lower true positive rate.

    Args:
        series: (FPR, TPR) points by checkpoint: original, unlearned, retrained.
        finest: Smallest false positive rate above zero that the records can show, which is one over
            the number of nonmembers.
        label: What the figure shows, for readers who do not see it.

    Returns:
        The figure and a note with the true positive rates at 1 % false positives, or at none where
        there are too few nonmembers to tell; without any point an empty figure and a note.
    """
    curves = {name: np.array(sorted(points)) for name, points in series.items() if points}
    if not curves:
        return Drawing("", "No curve to draw.")
    edge = max(RAREST, finest / 2)
    rate = 0.01 if finest <= 0.01 else 0.0
    where = "at 1% false positives" if rate else "without a false positive"
    found = (f"{100 * _reached(p, rate):.1f}% {name}" for name, p in curves.items())

    with _style():
        figure, axes = _axes(3.4)
        axes.plot([edge, 1], [edge, 1], color=INK["muted"], linewidth=0.8, linestyle=(0, (1, 3)))
        for name, points in sorted(curves.items(), key=lambda pair: pair[0] == "unlearned"):
            inside = np.unique(points[points[:, 0] > edge, 0])
            if inside.size > LONGEST:
                inside = np.geomspace(edge, 1, LONGEST)
            x = np.concatenate([[edge], inside, [1.0]])
            y = np.maximum(_reached(points, x), edge)
            axes.plot(x, y, drawstyle="steps-post", color=INK[name], clip_on=False, **STYLES[name])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(edge, 1)
        axes.set_ylim(edge, 1)
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        axes.set_xlabel("false positive rate (log scale)")
        axes.set_ylabel("true positive rate (log scale)")
        return Drawing(_svg(figure, label), f"Members found {where}: {', '.join(found)}.")


def by_layer(series: Mapping[str, Sequence[float | None]], unit: str, label: str) -> Drawing:
    """What a probe reads from each layer, from input to output.

    Values between 0 and 1 are drawn on the scale from 0 to 1. A value that is not finite leaves a
    gap.

    Args:
        series: One value per layer: original, unlearned, retrained, control.
        unit: Of the values.
        label: What the figure shows, for readers who do not see it.

    Returns:
        The figure and a note with the highest value of each series; without any finite value an
        empty figure and a note that says so.
    """
    known = {name: _finite(values) for name, values in series.items()}
    ends = [end for values in known.values() if values.size for end in (values.min(), values.max())]
    if not ends:
        return Drawing("", "No finite value to draw.")
    peaks = (f"{values.max():#.3g} {name}" for name, values in known.items() if values.size)

    with _style():
        figure, axes = _axes(2.3)
        for name, values in sorted(series.items(), key=lambda pair: pair[0] == "unlearned"):
            y = np.array([math.nan if value is None else value for value in values])
            axes.plot(
                np.arange(1, y.size + 1),
                y,
                color=INK[name],
                marker="o" if y.size <= 30 else "",
                markersize=2.8,
                markeredgewidth=0,
                clip_on=False,
                **STYLES[name],
            )
        if min(ends) >= 0 and max(ends) <= 1:
            axes.set_ylim(0, 1)
        last = max(len(values) for values in series.values())
        axes.set_xlim((1, last) if last > 1 else (0, 2))
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("layer, from input to output")
        axes.set_ylabel(unit)
        return Drawing(_svg(figure, label), f"Highest value: {', '.join(peaks)}.")


def over_time(
    retained: Sequence[float | None],
    forgotten: Sequence[Sequence[float]],
    unit: str,
    label: str,
    *,
    at: Sequence[int] | None = None,
    unseen: Sequence[float | None] = (),
    axis: str = "requests carried out",
) -> Drawing:
    """What stays and what is gone, moment by moment.

    Args:
        retained: One value for each moment, the first of which is before anything was forgotten;
            None where not measured.
        forgotten: For each of the same moments, a value of everything forgotten by then. Their mean
            is drawn within the band from the smallest to the largest.
        unit: Of the values, which lie between 0 and 1.
        label: What the figure shows, for readers who do not see it.
        at: Where the moments lie, ascending; None: 0, 1, 2 and so on.
        unseen: The same as ``retained``, on records that were never seen.
        axis: What is counted from left to right.

    Returns:
        The figure and a note on where both ended.
    """
    where = np.arange(len(retained)) if at is None else np.asarray(at)
    kept, never = (
        np.array([math.nan if value is None else value for value in values])
        for values in (retained, unseen)
    )
    later = [(where[i], np.asarray(values)) for i, values in enumerate(forgotten) if len(values)]
    parts = []
    if later:
        parts.append(f"{later[-1][1].mean():.3g} on what was forgotten at the end")
    if _finite(retained).size:
        parts.append(f"{kept[-1]:.3g} on what is retained ({kept[0]:.3g} at first)")

    with _style():
        figure, axes = _axes(2.3)
        marks: dict[str, Any] = {"markersize": 2.8, "markeredgewidth": 0, "clip_on": False}
        marks["marker"] = "o" if where.size <= 30 else ""
        x = [i for i, _ in later]
        low, high = ([float(f(v)) for _, v in later] for f in (np.min, np.max))
        axes.fill_between(x, low, high, color=INK["unlearned"], alpha=0.16, linewidth=0)
        mean = [float(v.mean()) for _, v in later]
        axes.plot(x, mean, color=INK["unlearned"], **marks, **STYLES["unlearned"])
        axes.plot(where, kept, color=INK["original"], **marks, **STYLES["original"])
        if _finite(unseen).size:
            axes.plot(where, never, color=INK["control"], **marks, **STYLES["control"])
        axes.set_ylim(0, 1)
        axes.set_xlim(0, max(1, int(where[-1])))
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(axis)
        axes.set_ylabel(textwrap.fill(unit, 20))
        return Drawing(_svg(figure, label), f"{', '.join(parts)}." if parts else "")


def trade_off(
    points: Sequence[tuple[float, float]],
    efficient: Sequence[bool],
    label: str,
    words: tuple[str, str] = ("distance from having forgotten", "share of utility kept"),
    names: Sequence[str] = (),
) -> Drawing:
    """Forgetting against utility, a point per run; the upper left corner is best.

    Of more than ``NAMED`` runs those on the front have names.

    Args:
        points: (distance from having forgotten, share of utility kept) of each run.
        efficient: For each run whether no other is as good in both and better in one: those are
            filled and joined by steps.
        label: What the figure shows, for readers who do not see it.
        words: What the axes are called.
        names: Of the runs; else they are numbered from 1.

    Returns:
        The figure and a note that names the runs on the steps.
    """
    x, y = np.asarray(points, dtype=np.float64).T
    best = np.asarray(efficient, dtype=bool)
    names = names or [str(i + 1) for i in range(x.size)]
    front = ", ".join(names[int(i)] for i in np.flatnonzero(best))
    right, low, high = float(x.max()), float(y.min()), float(y.max())
    right, margin = right or 0.1, max(0.15 * (high - low), 0.02)
    places: dict[tuple[int, int], list[int]] = {}  # runs that would write over each other
    for i in range(x.size) if x.size <= NAMED else np.flatnonzero(best).tolist():
        near = round(12 * x[i] / right), round(6 * (y[i] - low) / (high - low + margin))
        places.setdefault(near, []).append(i)

    with _style():
        figure, axes = _axes(3.0)
        order = np.lexsort((y[best], x[best]))
        axes.plot(
            x[best][order], y[best][order], color=INK["unlearned"], linewidth=0.9, alpha=0.6,
            drawstyle="steps-post",
        )  # fmt: skip
        for chosen, name, fill in ((best, "unlearned", "unlearned"), (~best, "original", "none")):
            axes.plot(
                x[chosen], y[chosen], linestyle="none", marker="o", markersize=5.5,
                markeredgecolor=INK[name], markerfacecolor=INK.get(fill, "none"), clip_on=False,
            )  # fmt: skip
        for runs in places.values():
            i = runs[0]
            axes.annotate(
                ", ".join(names[run] for run in runs), (x[i], y[i]), (6, 5),
                textcoords="offset points", fontsize=TEXT, color=INK["muted"],
            )  # fmt: skip
        axes.set_xlim(-0.04 * right, 1.12 * right)
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlabel(words[0])
        axes.set_ylabel(words[1])
        return Drawing(_svg(figure, label), f"Beaten by no other: {front}.")


def shares(
    places: Sequence[Any],
    series: Mapping[str, Sequence[tuple[float, float, float] | None]],
    across: str,
    label: str,
) -> Drawing:
    """Shares with their intervals, a curve for each name, over places that stand equally far apart.

    Args:
        places: What the shares are of, as it is written below the axis.
        series: By name one (share, low, high) per place, None where it was not measured; at most
            as many names as ``CURVES``, which says in which ink each is drawn.
        across: What the places are.
        label: What the figure shows, for readers who do not see it.

    Returns:
        The figure, without a note.
    """
    with _style():
        figure, axes = _axes(2.5)
        for order, (values, ink) in enumerate(zip(series.values(), CURVES, strict=False)):
            # a little apart, so that intervals do not hide each other
            known = [(i + 0.05 * order, *v) for i, v in enumerate(values) if v is not None]
            if not known:
                continue
            x, y, low, high = zip(*known, strict=True)
            axes.vlines(x, low, high, color=INK[ink], linewidth=1.0, alpha=0.55)
            axes.plot(x, y, color=INK[ink], marker="o", markersize=3.2, markeredgewidth=0,
                      clip_on=False, **STYLES[ink])  # fmt: skip
        axes.set_ylim(0, 1)
        axes.set_xticks(range(len(places)), [str(place) for place in places])
        axes.set_xlabel(across)
        axes.set_ylabel("share")
        return Drawing(_svg(figure, label), "")


def strip(marks: Sequence[Mark]) -> str:
    """A finding on one line: the checkpoints' values with their intervals on a shared scale.

    Values between 0 and 1 are drawn on the scale from 0 to 1, others on the range they span. The
    drawing repeats numbers that stand beside it, so it is hidden from screen readers.

    Args:
        marks: The values, each named original, unlearned or retrained.

    Returns:
        An SVG element, empty without marks.

    >>> strip([Mark("unlearned", 0.5)]).count("<circle")
    1
    """
    known = [(mark.value, mark.low, mark.high) for mark in marks]
    ends = [end for mark in known for end in mark if end is not None]
    if not ends:
        return ""
    low, high = (0.0, 1.0) if min(ends) >= 0 and max(ends) <= 1 else (min(ends), max(ends))
    span = (high - low) or 1.0

    def place(value: float) -> str:
        return f"{6 + 148 * (value - low) / span:.1f}" if high > low else "80"

    shapes = ['<line class="axis" x1="6" x2="154" y1="31" y2="31"/>']
    for edge, anchor in ((low, "start"), (high, "end")) if high > low else ((low, "middle"),):
        x = place(edge)
        shapes.append(f'<line class="axis" x1="{x}" x2="{x}" y1="29" y2="33"/>')
        shift = {"start": -2, "end": 2, "middle": 0}[anchor]
        shapes.append(
            f'<text x="{float(x) + shift:g}" y="43" text-anchor="{anchor}">{edge:.3g}</text>'
        )
    for row, mark in enumerate(marks):
        x, y = place(mark.value), 7 + 8 * row
        if mark.low is not None and mark.high is not None:
            start, stop = place(mark.low), place(mark.high)
            shapes.append(f'<line class="{mark.name}" x1="{start}" x2="{stop}" y1="{y}" y2="{y}"/>')
        shapes.append(f'<circle class="{mark.name}" cx="{x}" cy="{y}" r="3.2"/>')
    return f'<svg class="strip" viewBox="0 0 160 46" aria-hidden="true">{"".join(shapes)}</svg>'


def _reached(points: Array, rates: Any) -> Any:
    """Largest true positive rate at no more than each false positive rate.

    >>> float(_reached(np.array([[0.0, 0.1], [0.2, 0.5], [1.0, 1.0]]), 0.3))
    0.5
    """
    below = np.searchsorted(points[:, 0], rates, side="right")
    return np.concatenate([[0.0], np.maximum.accumulate(points[:, 1])])[below]


def _finite(values: Sequence[float | None]) -> Array:
    """The finite values of a series, shape (n,)."""
    array = np.array([value for value in values if value is not None], dtype=np.float64)
    return array[np.isfinite(array)]


def _count(number: int, one: str, many: str) -> str:
    """A number with the words that agree with it.

    >>> _count(1, "loss is", "losses are"), _count(2, "loss is", "losses are")
    ('1 loss is', '2 losses are')
    """
    return f"{number:,} {one if number == 1 else many}"


def _medians(series: Mapping[str, Array]) -> str:
    """The median of each series in one sentence; nothing if there is no finite value.

    >>> _medians({"original": np.array([1.0, 3.0]), "unlearned": np.array([])})
    'Median 2.00 original.'
    """
    parts = [f"{np.median(values):#.3g} {name}" for name, values in series.items() if values.size]
    return f"Median {', '.join(parts)}." if parts else ""


def _range(series: Mapping[str, Array]) -> tuple[float, float]:
    """The range to draw: every series within three interquartile ranges of its middle half."""
    lows, highs = [], []
    for values in series.values():
        first, third = np.percentile(values, [25, 75])
        reach = 3 * (third - first)
        lows.append(float(max(values.min(), first - reach)))
        highs.append(float(min(values.max(), third + reach)))
    return min(lows), max(highs)


def _edges(low: float, high: float, n: int, logarithmic: bool) -> Array:
    """Bin edges over the range and one bin to either side: more bins for more values."""
    bins = int(min(40, max(18, 4 * n ** (1 / 3))))  # twice Rice's rule: three series share them
    if logarithmic:
        return np.exp(_edges(math.log(low), math.log(high), n, logarithmic=False))
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):  # all equal: a bin in the middle
        reach = max(abs(low) / 2, 0.5)
        return np.linspace(low - reach, high + reach, 20)
    margin = (high - low) / bins
    return np.linspace(low - margin, high + margin, bins + 3)


def _beyond(series: Iterable[Array], edges: Array) -> list[str]:
    """Sentences on how many values lie outside the bins."""
    values = np.concatenate(list(series))
    notes = []
    for count, where in (
        (int((values < edges[0]).sum()), f"below {edges[0]:.3g} counted in the first bin"),
        (int((values > edges[-1]).sum()), f"above {edges[-1]:.3g} counted in the last bin"),
    ):
        if count:
            notes.append(f"{_count(count, 'loss', 'losses')} {where}.")
    return notes


def _thin(x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """A curve as the mean, smallest and largest value of equal stretches; NaN if none is known."""
    stretches = [part for part in np.array_split(np.arange(x.size), LONGEST) if part.size]
    known = [part[np.isfinite(y[part])] for part in stretches]
    middle = np.array([x[part].mean() for part in stretches])
    middle[0], middle[-1] = x[0], x[-1]
    summaries = [
        np.array([summary(y[part]) if part.size else math.nan for part in known])
        for summary in (np.mean, np.min, np.max)
    ]
    return middle, summaries[0], summaries[1], summaries[2]


def _style() -> AbstractContextManager[None]:
    """Matplotlib's own defaults, whatever the user's settings are."""
    from matplotlib import style

    return style.context("default")


def _axes(height: float) -> tuple[Figure, Any]:
    """An empty figure in the page's manner: no frame, faint horizontal lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=INK["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=INK["line"], linewidth=0.6)
    axes.tick_params(length=0, labelsize=TEXT, labelcolor=INK["muted"], pad=4)
    axes.xaxis.label.set(color=INK["muted"], fontsize=TEXT)
    axes.yaxis.label.set(color=INK["muted"], fontsize=TEXT)
    axes.locator_params(axis="y", nbins=4)
    axes.locator_params(axis="x", nbins=6)
    return figure, axes


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers: powers of ten, on short ones 3 times those."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(subs=(1, 3) if high < 1e4 * low else (1,), numticks=7))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(length=0)


def _svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element to stand inside a page, with rounded coordinates."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index("<svg") :]
    body = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL
    )
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", body)
    body = re.sub(r" font-family: [^;\"]*;| transform=\"rotate\(-0 [^\"]*\"", "", body)
    for name, color in INK.items():
        body = body.replace(color, f"var(--{name})")
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d+", _rounded, tag[0]), body)
    body = re.sub(r"\s*\n\s*", " ", body).replace("> <", "><").replace("xlink:href", "href")
    body = body.replace("<defs></defs>", "").replace("<g/>", "")
    view = re.search(r'viewBox="[^"]*"', body)
    content = body[body.index(">") + 1 :].strip()
    name = html.escape(label)
    return (
        f'<svg class="figure" {view[0] if view else ""} role="img" aria-label="{name}">'
        f"<title>{name}</title>{content}"
    )


def _rounded(number: re.Match[str]) -> str:
    """A coordinate to a hundredth of a point."""
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
