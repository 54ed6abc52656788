"""Make a trained PyTorch model forget chosen data, and prove how well it did.

>>> import unlearn
>>> result = unlearn.forget("checkpoint", method="npo", forget="forget.jsonl",
...                         retain="retain.jsonl", out="runs/1")  # doctest: +SKIP
>>> result.report.verdict  # doctest: +SKIP
'forgotten'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from unlearn.evaluations.series import Outcomes
    from unlearn.run import Progress, Result

__all__ = ["forget", "forget_all"]


def forget(checkpoint: Any, *, progress: Progress | None = None, **settings: Any) -> Result:
    """Carry out one erasure request, as ``unlearn run`` does.

    Args:
        checkpoint: a directory, hub name, earlier run, ``nn.Module`` or
            :class:`unlearn.interface.Subject`; one in memory is changed in place.
        progress: told about every step.
        **settings: the fields of :class:`unlearn.config.RunConfig`: method, forget, retain,
            holdout, data, forget_classes, retrained, set (hyperparameters), out, seed and more.
            Data may be paths or objects in memory. Without ``out`` nothing is kept on disk.

    Returns:
        The new subject, the report, fingerprints and cost.

    Raises:
        unlearn.errors.UnlearnError: with a sentence on what is wrong and what to do.
    """
    # this face looks up into evaluations; inside the rooms imports only point downwards
    from unlearn.config import RunConfig, configure
    from unlearn.evaluations.criteria import read
    from unlearn.evaluations.examination import examiner
    from unlearn.plan import plan
    from unlearn.run import execute

    config = configure(RunConfig, checkpoint=checkpoint, **settings)
    if config.audit != "none":
        read(config.criteria)  # before anything else is looked at
    planned = plan(config)
    examination = examiner(planned, config.criteria) if config.audit != "none" else None
    return execute(planned, examination, progress)


def forget_all(
    checkpoint: Any,
    requests: Sequence[Mapping[str, Any]],
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Outcomes:
    """Carry out requests one after another, as ``unlearn run --requests`` does.

    See :func:`unlearn.evaluations.series.forget_all`.
    """
    from unlearn.evaluations import series

    return series.forget_all(checkpoint, requests, progress=progress, **settings)
