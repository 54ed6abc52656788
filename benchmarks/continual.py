"""Twenty requests in a row: python benchmarks/continual.py

A small vision transformer on MNIST (as in gs_lora.py) serves a mixed stream, eighteen requests
of ten records and two of a whole class, by three methods: the analytic head (``acu``), adapters
(``gs_lora_pp``) and dampening (``ssd``). Every request is an ordinary run on the output of the one
before it. Per request: accuracy on what it names and the worst on anything forgotten so far, on 500
records that all requests retain and on 500 test images of the classes that stay; seconds without
the audit, and the bytes of state that the method keeps for the next request.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import publish
from gs_lora import SETTINGS, TRAINED, digits, trained

import unlearn

REQUESTS: list[dict[str, str]] = [
    {"forget_classes": str(3 if i == 6 else 8)} if i in (6, 13) else
    {"forget_ids": f"{10 * i}:{10 * i + 10}"} for i in range(20)
]  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {"acu": {}, "gs_lora_pp": SETTINGS, "ssd": {}}
COLUMNS = ["method", "request", "forgets", "own", "worst", "retain", "test", "seconds", "state MiB"]


def main() -> None:
    """One row per method and request."""
    data, test = digits("train", TRAINED), digits("test")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = trained(data, folder / "start")
        for method, settings in METHODS.items():
            done = unlearn.forget_all(
                start, REQUESTS, method=method, set=settings, data=data, holdout=test,
                audit="none", out=folder / method,
            )  # fmt: skip
            for moment in done.series.moments:
                gone = [v for v in moment.forget[: moment.request] if v is not None]
                state = folder / method / f"{moment.request:03d}" / "state.safetensors"
                rows.append({
                    "method": method, "request": moment.request, "forgets": moment.target,
                    "own": gone[-1] if gone else None, "worst": max(gone, default=None),
                    "retain": moment.retain, "test": moment.holdout, "seconds": moment.seconds,
                    "state MiB": state.stat().st_size / 2**20 if state.exists() else 0.0,
                })  # fmt: skip
            for what, value in done.series.worst.items():
                print(f"{method}: {what}: {value:.3f}")
    publish("continual", COLUMNS, rows)


if __name__ == "__main__":
    main()
