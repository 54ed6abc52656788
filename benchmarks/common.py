"""What every benchmark shares: where the data is, what the machine is, how a result is written."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def bench_data() -> Path:
    """The folder with ``data/`` and ``models/`` that UNLEARN_BENCH_DATA names."""
    named = os.environ.get("UNLEARN_BENCH_DATA")
    if not named or not (Path(named) / "models").is_dir():
        sys.exit("set UNLEARN_BENCH_DATA to the folder that holds data/ and models/")
    return Path(named)


def machine() -> str:
    """The device, or processor and threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def ratios(
    work: Callable[[], Any], floor: Callable[[], Any], rounds: int = 3
) -> tuple[float, float, float]:
    """(median ratio, seconds of work, seconds of floor), measured in turn after one warm-up."""
    work(), floor()
    pairs = []
    for _ in range(rounds):
        start = perf_counter()
        work()
        middle = perf_counter()
        floor()
        pairs.append((middle - start, perf_counter() - middle))
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, *(statistics.median(column) for column in zip(*pairs, strict=True))


def publish(name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one table and write one JSON file."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name} ({machine()})")
    for column in columns:
        table.add_column(column)
    for row in rows:
        cells = [row.get(c, "") for c in columns]
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=160).print(table)
    RESULTS.mkdir(exist_ok=True)
    record = {
        "benchmark": name,
        "machine": machine(),
        "torch": torch.__version__,
        "rows": [dict(row) for row in rows],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def trials(file: Path) -> list[dict[str, Any]]:
    """Every setting a search has measured so far, a line each."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def tried(
    file: Path, trial: Mapping[str, Any], measure: Callable[[], dict[str, Any]], column: str = ""
) -> dict[str, Any]:
    """The row of a setting, measured and added to the file unless it is there with ``column``."""
    for row in reversed(trials(file)):
        if row["trial"] == trial and (column in row or not column or "failed" in row):
            return row
    row = {**measure(), "trial": trial}
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
    return row


def setting_of(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(method, hyperparameters) from ``METHOD key=value ...``."""
    import yaml

    method, *pairs = words
    return method, {k: yaml.safe_load(v) for k, v in (pair.split("=", 1) for pair in pairs)}
