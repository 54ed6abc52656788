"""What is known of unfinished work when it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unlearn import workplace
from unlearn.workplace import Stopwatch


def test_time_of_interrupted_work_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 11.5, 20.0, 21.0])
    monkeypatch.setattr(workplace.time, "monotonic", lambda: next(clock))
    first: dict[str, float] = {}
    watch = Stopwatch(first, tmp_path)
    with watch.phase("measure"):
        pass
    with pytest.raises(KeyboardInterrupt), watch.phase("train"):
        raise KeyboardInterrupt
    again: dict[str, float] = {}
    with Stopwatch(again, tmp_path).phase("train"):
        pass
    assert first == {"measure": 2.0, "train": 1.5}
    assert again == {"measure": 2.0, "train": 2.5}
    assert json.loads((tmp_path / "seconds.json").read_text()) == again
