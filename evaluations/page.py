"""What all pages have in common: their templates, their style sheet, and how numbers are written.

A page is one self-contained file: no script, no network, every text in it escaped, and the same
bytes for the same content.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def rendered(
    template: str, filters: dict[str, Callable[..., Any]] | None = None, /, **shown: Any
) -> str:
    """A page from its template.

    Args:
        template: file name in evaluations/templates.
        filters: what the template calls besides ``number`` and ``duration``.
        **shown: what the template may name; ``css`` is the style sheet of all pages.

    Returns:
        An HTML document.
    """
    from jinja2 import Environment, StrictUndefined

    folder = resources.files("unlearn.evaluations.templates")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, duration=duration, **(filters or {}))
    text = (folder / template).read_text(encoding="utf-8")
    css = (folder / "report.css").read_text(encoding="utf-8")
    return environment.from_string(text).render(css=harmless(css), **shown)


def harmless(text: str) -> Markup:
    """Text of our own, drawn or written, that a page holds as it is."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704


def number(value: float) -> str:
    """A measured number to about three digits, with a true minus sign.

    >>> [number(x) for x in (0.0, 0.12345, -3.2, 51.234, 1234.5, 1.9e-23)]
    ['0', '0.123', '−3.200', '51.23', '1,234', '1.9e−23']
    """
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 0.0005 or size >= 1e7:
        text = f"{value:.1e}"
    elif size < 1000:
        text = f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"
    else:
        text = f"{value:,.0f}"
    return text.replace("-", MINUS)


def duration(seconds: float) -> str:
    """A time span in the units people use.

    >>> [duration(s) for s in (0.4213, 12.34, 312.0, 7500.0)]
    ['0.42 s', '12.3 s', '5 min 12 s', '2 h 05 min']
    """
    if seconds < 1:
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
