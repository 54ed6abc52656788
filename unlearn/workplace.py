"""Where a run or an audit does its work: a hidden sibling of the output directory.

It is renamed into place when it is complete. Killed work goes on from there, and so does work that
failed after its model was saved; work that failed for a reason before leaves nothing.
"""

from __future__ import annotations

import json
import platform
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import torch

from unlearn import data, distributed
from unlearn.case import Case
from unlearn.errors import BadInput, UnlearnError

SAVED = "saved"  # this empty file beside a result says that its model is finished
PACKAGES = ("unlearn-toolkit", "torch", "transformers", "accelerate", "safetensors", "numpy",
            "scipy", "scikit-learn")  # fmt: skip


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, renamed to it when the block ends without an error."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(".new")
    yield new
    new.rename(path)


@contextmanager
def workplace(case: Case) -> Iterator[tuple[Path, bool]]:
    """The directory of unfinished work, ours alone, and whether there is some from before.

    Removed when the work fails for a reason, unless a finished model is in it. Of several
    processes at one work, all but the main one get an empty directory that nobody keeps.

    Raises:
        BadInput: another process is at it, it holds work with other settings or data, or several
            processes were sent to one GPU.
        UnlearnError: what the work raised; where a finished model is kept, its message says so.
    """
    if distributed.world() > 1 and case.device.index is not None:
        raise BadInput(f"each process has a GPU of its own: pass --device cuda, not {case.device}")
    if case.config.out is None or not distributed.is_main():
        with tempfile.TemporaryDirectory(prefix="unlearn-") as temporary:
            yield Path(temporary), False
        return
    out = Path(case.config.out).absolute()
    place = out.parent / f".{out.name}.partial"
    lock = filelock.FileLock(place.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise BadInput(f"another process is writing {out}: wait for it") from error
    try:
        resumed = place.exists()
        identity, ours = place / "identity", case.identity()
        if resumed and identity.exists() and identity.read_text() != ours:
            raise BadInput(
                f"{place} holds an unfinished run with other settings or data: repeat its command "
                "to finish it, delete it, or choose another --out"
            )
        place.mkdir(exist_ok=True)
        identity.write_text(ours)
        try:
            yield place, resumed
        except UnlearnError as error:
            if (place / SAVED).exists():
                error.args = (
                    f"{error}\nThe unlearned model is finished and kept in "
                    f"{place / 'result' / 'model'}: repeat the command to go on from there, or "
                    f"delete {place}",
                )
            elif not isinstance(error, distributed.Lost):
                shutil.rmtree(place, ignore_errors=True)
            raise
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def publish(case: Case, place: Path) -> Path | None:
    """Move the finished result to where it was asked for, and remove the workplace."""
    if case.config.out is None:
        return None
    out = Path(case.config.out)
    if not distributed.is_main():
        return out
    if out.exists():
        raise BadInput(f"{out} appeared while the work was going on: it was not overwritten")
    (place / "result").rename(out)
    shutil.rmtree(place)
    return out


@dataclass
class Outcome:
    """What is known when the work is done, for run.json and the report.

    Attributes:
        fingerprint_in: of the weights that came in.
        fingerprint_out: of the weights that went out.
        sets: per set its size and keyed fingerprint.
        record_key: key of every record hash in the run directory.
        seconds: per phase.
        peak_memory: highest resident (CPU) or allocated (GPU) memory, in bytes.
        environment: versions and machine.
        notes: sentences for the report.
        created: UTC, ISO 8601.
    """

    fingerprint_in: str
    record_key: bytes
    sets: dict[str, dict[str, Any]]
    environment: dict[str, str]
    created: str
    fingerprint_out: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    notes: list[str] = field(default_factory=list)


def begin(case: Case, result: Path) -> Outcome:
    """What is known before the work starts; makes the key of the record hashes."""
    key_file = result / "record.key"
    if not key_file.exists():
        found = [c.record_key for c in (case.unlearned, case.checkpoint) if c and c.record_key]
        key = found[0] if found else secrets.token_bytes(16)
        key_file.touch(mode=0o600)
        key_file.write_text(key.hex() + "\n")
    key = bytes.fromhex(key_file.read_text().strip())
    sets: dict[str, dict[str, Any]] = {
        name: {
            "n": len(value),
            "fingerprint": data.fingerprint(
                data.record_hashes(value.examples, case.checkpoint.task.content, key)
            ),
        }
        for name, value in case.sets.named().items()
    }
    environment = {name: version(name) for name in PACKAGES}
    environment |= {"python": platform.python_version(), "platform": platform.platform()}
    environment["device"] = str(case.device)
    if case.device.type == "cuda":
        environment["gpu"] = torch.cuda.get_device_name(case.device)
    environment["threads"] = str(torch.get_num_threads())
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Outcome(case.checkpoint.fingerprint, key, sets, environment, now)


class Stopwatch:
    """Seconds by phase, with those that interrupted work has spent, as ``work`` keeps them."""

    def __init__(self, seconds: dict[str, float], work: Path) -> None:
        self.seconds, self.file = seconds, work / "seconds.json"
        if self.file.exists():
            seconds.update(json.loads(self.file.read_text()))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block."""
        start = time.monotonic()
        try:
            yield
        finally:
            spent = self.seconds.get(name, 0.0) + time.monotonic() - start
            self.seconds[name] = round(spent, 3)
            if distributed.is_main():
                with written_whole(self.file) as new:
                    new.write_text(json.dumps(self.seconds))


def peak_memory(device: torch.device) -> int | None:
    """Highest resident (CPU) or allocated (GPU) memory, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
