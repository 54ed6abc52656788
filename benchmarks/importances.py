"""What exact importances cost: python benchmarks/importances.py

One pass over 5,000 CIFAR-10 images with the shared ResNet. Ratios are medians of runs in turn, each
against a floor measured in the same run: an ordinary forward and backward of the mean loss. In the
last row a request for 100 of these images is held against the same with prepared importances.
"""

from __future__ import annotations

from functools import partial

import torch
from common import bench_data, publish, ratios

from unlearn.config import RunConfig, configure
from unlearn.interface import Request, Subject
from unlearn.methods.ssd import SSD
from unlearn.plan import plan
from unlearn.run import Run
from unlearn.tasks.base import Encoded

IMAGES = 5000
FEW = 100


def main() -> None:
    """Exact, batch-gradient, and a whole later request, over plain forward and backward."""
    root = bench_data()
    images = root / "data/cifar10"
    planned = plan(
        configure(
            RunConfig,
            checkpoint=root / "models/cifar10-resnet/full",
            method="ssd",
            data=images / "train.parquet",
            forget_ids=f"0:{IMAGES}",
        )
    )
    subject = planned.checkpoint.load()
    model, forget = subject.model, planned.sets.forget
    run, settings = Run(planned.checkpoint.task), SSD()
    batches = list(forget.by_length(settings.batch_size))
    for indices in batches:  # decoding images is not what is measured
        forget.batch(indices)

    def floor() -> None:
        model.zero_grad(set_to_none=True)
        for indices in batches:
            run.task.nll(model, forget.batch(indices)).mean().backward()

    def batch_gradient() -> None:
        sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for indices in batches:
            model.zero_grad(set_to_none=True)
            run.task.nll(model, forget.batch(indices)).mean().backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.square()

    exact = partial(settings._exact, model, [forget], run, "forget")
    retain = planned.request().retain_set().sample(2048, 0)
    kept = SSD().unlearn(planned.checkpoint.load(), Request(planned.target, forget, retain), run)
    weights = {k: v.clone() for k, v in kept.model.state_dict().items()}

    def later_request() -> None:
        kept.model.load_state_dict(weights)
        SSD().unlearn(Subject(kept.model, None, kept.state, {"ssd.count": "50000"}),
                      Request(planned.target, forget, None), run)  # fmt: skip

    start = {k: v.clone() for k, v in model.state_dict().items()}
    prepared = settings.prepare(Subject(model), forget, run)
    few, rest = forget.select(range(FEW)), forget.select(range(FEW, IMAGES), "retain")

    def request(subject: Subject, others: Encoded | None) -> dict[str, torch.Tensor]:
        model.load_state_dict(start)
        after = settings.unlearn(subject, Request(planned.target, few, others), run)
        return {k: v.clone() for k, v in after.model.state_dict().items()}

    recomputed, cached = partial(request, Subject(model), rest), partial(request, prepared, None)
    one, other = recomputed(), cached()
    if not all(torch.equal(one[k], other[k]) for k in one):
        raise SystemExit("prepared importances gave other weights than recomputed ones")
    model.load_state_dict(start)

    rows = []
    for name, work, against in (
        ("exact importances / forward+backward", exact, floor),
        ("exact importances / batch-gradient estimator", exact, batch_gradient),
        ("request with kept importances / forward+backward", later_request, floor),
        (f"request for {FEW} of {IMAGES}, recomputed / prepared importances", recomputed, cached),
    ):
        ratio, spent, base = ratios(work, against)
        rows.append({"what": name, "ratio": ratio, "seconds": spent, "floor": base})
    publish("importances", ["what", "ratio", "seconds", "floor"], rows)


if __name__ == "__main__":
    main()
