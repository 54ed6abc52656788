"""What is left, what was lost, what follows: metrics, criteria, verdicts, reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if not __name__.startswith("unlearn."):
    raise ImportError("the folder evaluations/ is installed as 'unlearn.evaluations'; import that")

if TYPE_CHECKING:
    from unlearn.evaluations.schema import AuditReport
    from unlearn.evaluations.tuned import Tuned
    from unlearn.run import Progress

__all__ = ["audit", "tune"]


def audit(
    original: Any, unlearned: Any, *, progress: Progress | None = None, **settings: Any
) -> AuditReport:
    """Examine a checkpoint that was made to forget, as ``unlearn audit`` does.

    Args:
        original: the checkpoint before, in any form :func:`unlearn.forget` takes.
        unlearned: the checkpoint after: a run directory or any checkpoint.
        progress: told about every step.
        **settings: the fields of :class:`unlearn.config.AuditConfig`: forget, retain, holdout,
            retrained, audit (quick, standard, deep), criteria, out, seed and more.

    Returns:
        The report; ``report.verdict`` is "forgotten", "not forgotten" or "inconclusive".

    Raises:
        unlearn.errors.UnlearnError: with a sentence on what is wrong and what to do.
    """
    from unlearn.config import AuditConfig, configure
    from unlearn.evaluations import examination

    config = configure(AuditConfig, original=original, unlearned=unlearned, **settings)
    return examination.audit(config, progress)[0]


def tune(checkpoint: Any, *, progress: Progress | None = None, **settings: Any) -> Tuned:
    """Search over a method's hyperparameters, as ``unlearn tune`` does.

    Args:
        checkpoint: every trial starts from it: a directory, hub name or earlier run.
        progress: told about every step.
        **settings: the fields of :class:`unlearn.config.TuneConfig`: method, trials, storage, out,
            range, and what :func:`unlearn.forget` takes.

    Returns:
        All finished trials; ``recipe`` holds the best as keyword arguments of
        :func:`unlearn.forget`.

    Raises:
        unlearn.errors.UnlearnError: with a sentence on what is wrong and what to do.
    """
    from unlearn.config import TuneConfig, configure
    from unlearn.evaluations import tuning

    return tuning.search(configure(TuneConfig, checkpoint=checkpoint, **settings), progress)
