"""One run from within: what is seen on the way, and that looking changes nothing."""

import json
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

import unlearn
from tests import plain
from tests.test_distributed import launch
from unlearn import distributed
from unlearn.data import load
from unlearn.errors import BadInput, Unsupported
from unlearn.evaluations.report import read
from unlearn.evaluations.schema import Course, Look
from unlearn.evaluations.stability import looks_of, right, worst
from unlearn.run import Run, Silent, execute
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification

STEPS = {"lr": 0.01, "epochs": 5, "batch_size": 8, "schedule": "constant"}  # 2 per pass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A network with batch statistics that has learned three blobs, and a request."""
    folder = tmp_path_factory.mktemp("blobs")
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % plain.CLASSES
    inputs = 2 * torch.eye(plain.CLASSES, plain.WIDTH)[labels]
    inputs = inputs + torch.randn(120, plain.WIDTH, generator=draw)
    rows = [{"features": x.tolist(), "label": int(y)} for x, y in zip(inputs, labels, strict=True)]
    for name, part in (("data", rows[:80]), ("holdout", rows[80:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = plain.with_statistics()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[:80]), labels[:80]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    save_model(model, str(folder / "net.safetensors"))
    return {
        "checkpoint": folder / "net.safetensors", "model": "tests.plain:with_statistics",
        "data": folder / "data.jsonl", "holdout": folder / "holdout.jsonl",
        "forget_ids": "0:16", "audit": "quick",
    }  # fmt: skip


def seen(world: dict[str, Any], out: Path, method: str = "random_label", **changes: Any) -> Course:
    """What the report of a run says of its course."""
    settings = {"set": STEPS, "watch": 2, **changes}
    unlearn.forget(**world, method=method, out=out, **settings)
    course = read(out / "report.json").course
    assert course is not None
    return course


def same(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.fixture(scope="module")
def whole(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps, looked at every two."""
    out = tmp_path_factory.mktemp("whole") / "run"
    seen(world, out)
    return out


def course_of(run: Path) -> Course:
    course = read(run / "report.json").course
    assert course is not None
    return course


def test_looking_changes_no_bit(world: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    unlearn.forget(
        **{**world, "audit": "none"}, method="random_label", set=STEPS, out=tmp_path / "plain"
    )
    assert same(whole, tmp_path / "plain")


def test_looking_leaves_batch_statistics(world: dict[str, Any], tmp_path: Path) -> None:
    course = seen(world, tmp_path / "watched", "refresh", watch=1)
    unlearn.forget(
        **{**world, "audit": "none"}, method="refresh", set=STEPS, out=tmp_path / "plain"
    )
    assert same(tmp_path / "watched", tmp_path / "plain")
    assert len(course.looks) > 10


def test_adapters_are_seen_while_they_train(world: dict[str, Any], tmp_path: Path) -> None:
    settings = {**STEPS, "lr": 0.1, "scope": "lora"}
    course = seen(world, tmp_path / "watched", set=settings, merge=True)
    unlearn.forget(
        **{**world, "audit": "none"}, method="random_label", set=settings, merge=True,
        out=tmp_path / "plain",
    )  # fmt: skip
    assert same(tmp_path / "plain", tmp_path / "watched")
    known = [look.forget for look in course.looks]
    assert known[0] > known[2]  # type: ignore[operator]
    # of the last step before the adapters are merged there is none: the end stands in its place
    assert [look.step for look in course.looks] == [0, 2, 4, 6, 8, 10]


def test_a_look_is_the_model_at_that_step(
    world: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    long = course_of(whole)
    short = seen(world, tmp_path / "short", set={**STEPS, "epochs": 2})
    assert [look.step for look in long.looks] == [0, 2, 4, 6, 8, 10]
    assert [look.step for look in short.looks] == [0, 2, 4]
    assert list(long.looks[:3]) == list(short.looks)
    assert long.looks[0] != long.looks[-1]
    report = read(whole / "report.json")
    (accuracy,) = [f for f in report.findings if (f.name, f.subset) == ("accuracy", "forget")]
    assert accuracy.original is not None
    assert accuracy.unlearned is not None
    ends = [accuracy.original.value, accuracy.unlearned.value]
    assert [long.looks[0].forget, long.looks[-1].forget] == pytest.approx(ends)
    page = (whole / "report.html").read_text()
    assert "The run from within" in page
    assert "Lowest accuracy on the retain set" in page


class Killed(Silent):
    """Ends a run at a step, as a person would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def advance(self, phase: str, done: int, total: int, numbers: object) -> None:
        if phase == "unlearn" and done == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [5, 6])  # between two looks, and behind one
def test_a_killed_run_has_seen_it_all(
    world: dict[str, Any], whole: Path, tmp_path: Path, step: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        seen(world, tmp_path / "run", save_every=0, progress=Killed(step))
    assert not (tmp_path / "run").exists()
    assert seen(world, tmp_path / "run", save_every=0) == course_of(whole)
    assert same(tmp_path / "run", whole)
    events = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "resumed"] == [step - 1]


def test_phases_follow_one_another(world: dict[str, Any], tmp_path: Path) -> None:
    course = seen(
        world, tmp_path / "run", "scrub", watch=3, set={**STEPS, "epochs": 2, "batch_size": 4}
    )
    steps = [look.step for look in course.looks]
    assert steps == sorted(set(steps))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    taken = [e for e in map(json.loads, lines) if e["event"] == "step"]
    assert len({event["phase"] for event in taken}) > 1
    assert steps[-1] == len(taken)
    assert len(steps) > 4


def test_without_a_loop_both_ends_are_all(world: dict[str, Any], tmp_path: Path) -> None:
    course = seen(world, tmp_path / "run", "ssd", set={})
    assert len(course.looks) == 2
    assert "takes no gradient steps" in course.note
    assert course.note in (tmp_path / "run" / "report.html").read_text()
    few = seen(world, tmp_path / "few", watch=1000)
    assert len(few.looks) == 2
    assert "10 steps, too few" in few.note


def test_a_model_that_is_replaced_is_not_watched(world: dict[str, Any], tmp_path: Path) -> None:
    request = {k: v for k, v in world.items() if k != "forget_ids"} | {"forget_ids": "0:4"}
    settings = {"shards": 2, "slices": 1, "epochs": 3, "batch_size": 8}
    course = seen(request, tmp_path / "run", "sisa", watch=1, set=settings)
    assert len(course.looks) == 2
    assert "another model" in course.note


def test_modes_and_random_numbers_stay(world: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in Path(world["data"]).read_text().splitlines()]
    examples = Encoded(load(rows, "forget"), Classification(plain.CLASSES))
    model = plain.with_statistics()
    save, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = right(model, examples, Run(examples.task))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), save)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    inputs = torch.tensor([row["features"] for row in rows])
    with torch.no_grad():
        said = model.eval()(inputs).argmax(1)
    hits = (said == torch.tensor([row["label"] for row in rows])).sum().item()
    assert found == hits / len(rows)


def look(step: int, forget: float | None, retain: float | None = None) -> Look:
    return Look(step=step, forget=forget, retain=retain)


def test_the_worst_moments_by_hand() -> None:
    looks = [look(0, 1.0, 0.9), look(5, 0.2, 0.5), look(10, 0.7, 0.8), look(15, 0.3, 0.75)]
    assert list(worst(looks).values()) == pytest.approx(
        [0.7, 0.5, 0.5, 0.4, 0.4, 0.5 * 0.7 + 0.5 * 0.5]
    )
    assert list(worst([look(0, 1.0), look(5, 0.2)]).values()) == pytest.approx([0.2, 0.0])
    assert worst([look(0, None), look(5, None)]) == {}
    assert worst(looks[:1]) == {}


def lines(*events: dict[str, Any]) -> list[str]:
    return [json.dumps(event) for event in events]


def test_the_log_of_two_phases_and_two_attempts() -> None:
    def step(phase: str, number: int) -> dict[str, Any]:
        return {"event": "step", "phase": phase, "step": number}

    def at(when: str, phase: str, number: int, forget: float, **more: bool) -> dict[str, Any]:
        return {"event": "look", "when": when, "phase": phase, "step": number,
                "forget": forget, **more}  # fmt: skip

    start = at("before", "", 0, 1.0)
    log = lines(
        start, step("a", 1), step("a", 2), at("step", "a", 2, 0.8), step("a", 3),
        start, {"event": "resumed", "step": 1}, step("a", 2), at("step", "a", 2, 0.8),
        step("a", 3), step("b", 1), step("b", 2), at("step", "b", 2, 0.5), step("b", 3),
        at("after", "", 0, 0.4, in_place=True),
    )  # fmt: skip
    looks, total, in_place = looks_of(log)
    assert (total, in_place) == (6, True)
    assert [(x.step, x.forget) for x in looks] == [(0, 1.0), (2, 0.8), (5, 0.5), (6, 0.4)]


def test_what_cannot_be_watched_is_refused(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes, message in (
        ({"audit": "none"}, "needs an audit"), ({"watch": -1}, "greater than or equal to 0"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=f"watch: .*{message}"):
            unlearn.forget(**{**world, "watch": 2, **changes}, method="finetune")
    drawing = Namespace(
        config=Namespace(watch=2), checkpoint=Namespace(task=Namespace(name="diffusion"))
    )
    with pytest.raises(Unsupported, match="this one draws"):
        execute(drawing)  # type: ignore[arg-type]
    monkeypatch.setattr(distributed, "shards", lambda: True)
    with pytest.raises(Unsupported, match="launch without FSDP"):
        seen(world, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_two_processes_see_what_one_sees(
    world: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    asked = {**world, "method": "random_label", "watch": 2, "out": tmp_path / "two"}
    done = launch(
        "ddp", "unlearn", "run", str(asked.pop("checkpoint")),
        *(f"--{name.replace('_', '-')}={value}" for name, value in asked.items()),
        *(f"--set={name}={value}" for name, value in STEPS.items()),
    )  # fmt: skip
    assert (tmp_path / "two").is_dir(), done.stderr
    one, two = course_of(whole), course_of(tmp_path / "two")
    assert [look.step for look in two.looks] == [look.step for look in one.looks]
    for ours, theirs in zip(one.looks, two.looks, strict=True):
        assert theirs.forget == pytest.approx(ours.forget, abs=1e-6)
        assert theirs.retain == pytest.approx(ours.retain, abs=0.02)  # sums in another order


def test_half_a_line_breaks_no_report():
    lines = [
        json.dumps({"event": "look", "time": 1.0, "when": when, "phase": "", "step": 0,
                    "forget": 0.5, **more})
        for when, more in (("before", {}), ("after", {"in_place": True}))
    ]  # fmt: skip
    whole = looks_of(lines)
    # killed while it wrote, and gone on behind; garbage; and the same at the end
    assert looks_of([lines[0][:31] + lines[0], "\x00\x00", "17", *lines[1:], lines[0][:9]]) == whole
