"""Audits of diffusion pipelines: unmodified, retrained, broken, edited, and what they leave."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn

import unlearn
from tests import digits
from unlearn.attacks.interface import Attack
from unlearn.case import Case, of_audit
from unlearn.cli.main import cli
from unlearn.config import AuditConfig, configure
from unlearn.data import Examples, load
from unlearn.errors import BadInput
from unlearn.evaluations import audit, drawing, judging, pictures
from unlearn.evaluations import criteria as rules
from unlearn.evaluations.report import read
from unlearn.evaluations.schema import Finding, Report
from unlearn.evaluations.seen import Seen
from unlearn.interface import Concepts
from unlearn.pipeline import Pipeline
from unlearn.pipeline import read as read_pipeline
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.diffusion import Diffusion

QUICK = {"steps": 6}
TINY = {"steps": 2, "images": 4}


@pytest.fixture(scope="session")
def without_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that never saw a three; trained once for all workers."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    directory = shared / "digits-without-three"
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            labels = digits.pictures()[1][:1437]
            digits.save(digits.trained(250, only=labels != 3), shared / "unfinished-three")
            (shared / "unfinished-three").rename(directory)
    return directory


def edited(source: Path, directory: Path, change: Callable[[Pipeline], None]) -> Path:
    model = read_pipeline(source, torch.float32)
    with torch.no_grad():
        change(model)
    return digits.save(model, directory)


def swap(model: Pipeline) -> None:
    """Asked for a three, it draws a five; nothing else changes."""
    rows = model.denoiser.class_embedding.weight
    rows[3] = rows[5]


def shake(model: Pipeline) -> None:
    """Noise on all weights."""
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.add_(p.std(correction=0) * torch.randn(p.shape, generator=draw))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


@pytest.fixture(scope="module")
def swapped(digits_pipeline: Path, place: Path) -> Path:
    return edited(digits_pipeline, place / "swapped", swap)


def examined(original: Path, after: Path, judge: nn.Module | None, **settings: Any) -> Report:
    given = {"forget_classes": "3", "audit": "quick", "sampling": QUICK, "classifier": judge}
    return audit(original, after, **given | settings)


def finding(report: Report, name: str) -> Finding:
    (found,) = [f for f in report.findings if f.name == name]
    return found


@pytest.fixture(scope="module")
def of_the_swapped(
    digits_pipeline: Path, swapped: Path, without_three: Path, digits_judge: nn.Module, place: Path
) -> Path:
    """The directory of its audit."""
    out = place / "audit"
    examined(digits_pipeline, swapped, digits_judge, retrained=without_three, out=out)
    return out


@pytest.fixture(scope="module")
def of_the_same(digits_pipeline: Path, digits_judge: nn.Module) -> Report:
    return examined(digits_pipeline, digits_pipeline, digits_judge)


def test_an_unmodified_pipeline_has_not_forgotten(of_the_same: Report) -> None:
    assert of_the_same.verdict == "not forgotten"
    found = finding(of_the_same, "unlearning_accuracy")
    assert found.verdict == "fail"
    assert found.original == found.unlearned
    assert finding(of_the_same, "retained_accuracy").verdict == "pass"
    assert finding(of_the_same, "unchanged_weights").verdict == "fail"


def test_a_pipeline_retrained_without_the_class_is_not_accused(
    digits_pipeline: Path, without_three: Path, digits_judge: nn.Module
) -> None:
    report = examined(digits_pipeline, without_three, digits_judge)
    assert report.verdict != "not forgotten"
    assert finding(report, "unlearning_accuracy").unlearned.value > 0.8
    assert finding(report, "picture_quality").verdict == "pass"


def test_a_broken_pipeline_fails_by_the_quality_of_its_pictures(
    digits_pipeline: Path, digits_judge: nn.Module, tmp_path: Path
) -> None:
    broken = edited(digits_pipeline, tmp_path / "broken", shake)
    report = examined(digits_pipeline, broken, digits_judge)
    assert finding(report, "unlearning_accuracy").unlearned.value > 0.7  # noise shows no three
    assert finding(report, "picture_quality").verdict == "fail"
    assert finding(report, "retained_accuracy").verdict == "fail"
    assert report.verdict == "not forgotten"


def test_a_swapped_condition_passes_without_a_search(of_the_swapped: Path) -> None:
    report = read(of_the_swapped / "report.json")
    assert report.verdict == "forgotten"
    assert finding(report, "unlearning_accuracy").verdict == "pass"
    assert finding(report, "retained_accuracy").unlearned == (
        finding(report, "retained_accuracy").original
    )  # the same noise, the same weights
    for name in ("frechet_distance", "kernel_distance", "precision", "recall"):
        found = finding(report, f"{name}_from_original")
        assert found.original == found.unlearned
        assert found.verdict == "info"
    assert any("Nobody searched for other prompts" in limit for limit in report.limits)


def test_audits_are_bit_identical_on_what_they_share(
    of_the_same: Report, of_the_swapped: Path
) -> None:
    other = read(of_the_swapped / "report.json")
    assert [g.original for g in of_the_same.grids] == [g.original for g in other.grids]
    for found in of_the_same.findings:
        if found.original is not None:
            assert finding(other, found.name).original == found.original


def test_the_page_shows_pictures_before_and_after(of_the_swapped: Path) -> None:
    report = read(of_the_swapped / "report.json")
    assert [g.condition for g in report.grids][:2] == ["class 3", "class 0"]
    three = report.grids[0]
    assert three.subset == "forget"
    assert three.original.seen.count("3") > 4
    assert three.unlearned.seen.count("3") < 4
    strip = Image.open(io.BytesIO(base64.b64decode(three.original.png)))
    assert strip.size == (8 * 8 + 7, 8)
    page = (of_the_swapped / "report.html").read_text()
    assert "img-src data:" in page
    assert page.count("<img ") == 3 * len(report.grids)
    assert page.count("src=") == page.count('src="data:image/png;base64,')
    assert 'alt="8 pictures that the unlearned model draws for class 3; the judge sees ' in page
    assert "Drawn for what must be gone</span>, 64 pictures" in page


def test_what_an_audit_of_pictures_leaves(of_the_swapped: Path) -> None:
    assert {p.name for p in of_the_swapped.rglob("*") if p.is_file()} == {
        "audit.json", "report.json", "report.html", "junit.xml", "statement.json", "record.key",
        "SHA256SUMS",
    }  # fmt: skip
    assert json.loads((of_the_swapped / "audit.json").read_text())["settings"]["sampling"] == QUICK


def test_attacks_take_part_by_standing_in_a_list(
    digits_pipeline: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small audit with records, and a judge trained on them."""

    def old_row(
        model: Pipeline, condition: pictures.Condition, known: pictures.Known,
        shows: pictures.Shows, draw: torch.Generator, how: pictures.Sampling,
    ) -> Any:  # fmt: skip
        assert condition.wanted == 3
        assert known.pictures.shape == (condition.count, 1, 8, 8)
        drawn = model.sample([5, 5, 5], draw, 4)
        assert shows(drawn).shape == (3,)
        return [1.0, 1.0, 0.0]

    def brightness(model: Pipeline, examples: Any, run: Run) -> Any:
        return [float(examples[i]["pixel_values"].mean()) for i in range(len(examples))]

    search = pictures.Search("old_row", "the old embedding", "nowhere", old_row, "quick")
    score = pictures.Score(Attack("brightness", "Brightness", "nowhere", len), brightness)
    monkeypatch.setattr(pictures, "SEARCHES", (search,))
    monkeypatch.setattr(pictures, "SCORES", (score,))

    after = edited(digits_pipeline, place / "swapped-again", swap)
    x, y = digits.pictures()
    unseen = [{"image": x[i], "label": int(y[i])} for i in range(1437, 1557)]
    out = place / "attacked"
    report = examined(
        digits_pipeline, after, None, data=digits.records(400), holdout=unseen, sampling=TINY,
        out=out,
    )  # fmt: skip
    revived = finding(report, "revival_old_row")
    assert (revived.n, revived.verdict) == (3, "info")  # nothing says how much may come back
    assert revived.unlearned.value == pytest.approx(2 / 3)
    assert not any("Nobody searched" in limit for limit in report.limits)
    for name in ("membership_loss", "membership_brightness"):
        found = finding(report, name)
        assert found.n == sum(s.n for s in report.sets if s.name in ("forget", "holdout_forget"))
    bright = finding(report, "membership_brightness")
    assert bright.original == bright.unlearned
    assert (
        finding(report, "membership_loss").original != finding(report, "membership_loss").unlearned
    )
    assert finding(report, "judge_accuracy").verdict == "pass"
    assert "a small network trained for this audit" in report.request["judge"]
    assert finding(report, "frechet_distance_from_real").original is not None
    assert {p.suffix for p in (out / "signals").iterdir()} == {".parquet", ".safetensors"}


@pytest.mark.parametrize("asked", [False, True])
def test_pictures_of_forgotten_records_are_shown_only_if_asked_for(
    digits_pipeline: Path, digits_judge: nn.Module, asked: bool
) -> None:
    settings = {"forget_classes": None, "forget_ids": "0:3", "data": digits.records(40),
                "include_examples": asked, "sampling": TINY}  # fmt: skip
    report = examined(digits_pipeline, digits_pipeline, digits_judge, **settings)
    assert bool(report.grids) is asked
    assert finding(report, "extraction_rate").counted == "pictures"
    assert not [f for f in report.findings if f.name == "unlearning_accuracy"]


def case_of(pipeline: Path, judge: nn.Module | None, **settings: Any) -> Case:
    given = {"original": pipeline, "unlearned": pipeline, "audit": "quick", "sampling": TINY}
    return of_audit(configure(AuditConfig, **given | {"classifier": judge} | settings))[0]


def seen(case: Case, asked: list[pictures.Condition], **drawn: list[Tensor]) -> Seen:
    made = {role: pictures.Drawn(p, [], [], 1, {}) for role, p in drawn.items()}
    return Seen(asked, made, None, "nobody", case, torch.device("cpu"))


def test_copies_of_forgotten_records_are_found(digits_pipeline: Path) -> None:
    records = digits.records(60)
    case = case_of(digits_pipeline, None, forget_ids="0:10", data=records)
    raw = [(255 * r["image"]).round().to(torch.uint8) for r in records]
    asked = [pictures.Condition(1, "class 1", "forget", 40)]
    forgotten, retained = torch.stack(raw[:10] * 4), torch.stack(raw[10:50])
    made = seen(case, asked, original=[forgotten], unlearned=[retained])
    criteria = rules.read()
    raw_rate, adaptive, nearest = made._copies(criteria)
    assert raw_rate.fields["original"].value == 1.0
    assert raw_rate.fields["unlearned"].value == 0.0  # copies, but of what may stay
    assert adaptive.fields["original"].value == 1.0
    assert nearest.fields["original"].value == pytest.approx(0.0, abs=0.002)
    assert nearest.fields["unlearned"].value > 0.1
    (decided,) = rules.decide([raw_rate], criteria)
    assert (decided.verdict, decided.powered) == ("pass", True)
    leaky = seen(case, asked, original=[forgotten], unlearned=[forgotten])
    assert rules.decide(leaky._copies(criteria)[:1], criteria)[0].verdict == "fail"


def test_quality_is_told_without_a_judge_too(digits_pipeline: Path) -> None:
    case = case_of(digits_pipeline, None, forget_classes="3")
    raw = torch.stack([(255 * r["image"]).round().to(torch.uint8) for r in digits.records(240)])
    asked = [pictures.Condition(3, "class 3", "forget", 80),
             pictures.Condition(4, "class 4", "retain", 80)]  # fmt: skip
    noise = torch.randint(256, (80, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    verdicts = {}
    for name, drawn in (("digits", raw[160:]), ("noise", noise.to(torch.uint8))):
        made = seen(case, asked, original=[raw[:80], raw[80:160]], unlearned=[drawn, drawn])
        (check,) = made._quality(rules.read())
        verdicts[name] = rules.decide([check], rules.read())[0].verdict
        assert [c.state[0] for c in made._unlearning_accuracy(rules.read(), None)] == ["not_run"]
    assert verdicts == {"digits": "pass", "noise": "fail"}


def test_without_a_judge_nothing_is_said_in_its_place(
    digits_pipeline: Path, tmp_path: Path
) -> None:
    """The command line, without any data."""
    settings = ["--sampling", "steps=2", "--sampling", "images=4", "--audit", "quick"]
    named = ["run", str(digits_pipeline), "--method", "swap_class", "--forget-classes", "3"]
    done = CliRunner().invoke(cli, [*named, *settings, "--out", str(tmp_path / "run")])
    assert done.exit_code == 4, done.output
    assert "unlearning accuracy" in done.output
    report = read(tmp_path / "run" / "report.json")
    assert finding(report, "unlearning_accuracy").verdict == "not_run"
    assert "--classifier" in finding(report, "unlearning_accuracy").reason
    assert finding(report, "unlearning_accuracy").unlearned is None
    assert not [f for f in report.findings if "distance" in f.name]
    assert "Drawn for what must" not in (tmp_path / "run" / "model" / "README.md").read_text()
    assert "drawn for what must be gone" in (tmp_path / "run" / "model" / "README.md").read_text()
    dry = CliRunner().invoke(cli, [*named, "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.output)["target"] == "class 3"


def test_what_was_drawn_is_read_back(digits_pipeline: Path, tmp_path: Path) -> None:
    case = case_of(digits_pipeline, None, forget_classes="3")
    asked = [pictures.Condition(3, "class 3", "forget", 3)]
    run = Run(case.checkpoint.task, work=tmp_path)
    model = read_pipeline(digits_pipeline, torch.float32)
    how = pictures.Sampling(None, 2, 1.0)
    first = pictures.drawn("original", model, asked, how, None, run, "quick", True)
    shake(model.requires_grad_(False))
    again = pictures.drawn("original", model, asked, how, None, run, "quick", True)
    assert torch.equal(first.pictures[0], again.pictures[0])
    fresh = pictures.drawn("unlearned", model, asked, how, None, run, "quick", True)
    assert not torch.equal(first.pictures[0], fresh.pictures[0])


def test_what_is_drawn(digits_pipeline: Path, digits_judge: nn.Module) -> None:
    case = case_of(digits_pipeline, digits_judge, forget_classes="3,4", anchor="9", sampling={})
    judge, _ = judging.judge(case)
    found = pictures.conditions(case, pictures.sampling(case), judge)
    assert [c.wanted for c in found if c.subset == "forget"] == [3, 4]
    assert sorted(c.wanted for c in found if c.subset == "retain") == [0, 1, 2, 5, 6, 7, 8, 9]
    assert {c.subset: c.count for c in found} == {"forget": 32, "retain": 24}
    assert all(c.shown == {c.wanted} for c in found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampling": {"stpes": 3}}, "steps"),
        ({"sampling": {"steps": "0"}}, "whole number above 0"),
        ({"audit": "deep"}, "standard"),
        ({"classifier": nn.Linear(3, 10)}, "cannot look at pictures"),
        ({"classifier": nn.Sequential(nn.Flatten(), nn.Linear(64, 3))}, "no class for class 3"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_anything_is_drawn(
    digits_pipeline: Path, settings: dict[str, Any], words: str
) -> None:
    case = case_of(digits_pipeline, None, **{"forget_classes": "3"} | settings)
    with pytest.raises(BadInput, match=words):
        drawing.DiffusionExamination().prepare(case)


def test_a_series_of_pipelines_is_refused(digits_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="one by one"):
        unlearn.forget_all(
            digits_pipeline, [{"forget_classes": "3"}], method="salun", data=digits.records(40),
            out=tmp_path / "series",
        )  # fmt: skip


def test_a_judge_that_cannot_tell_decides_nothing(digits_pipeline: Path) -> None:
    case = case_of(digits_pipeline, None, forget_classes="3")
    asked = [pictures.Condition(3, "class 3", "forget", 4, frozenset({3}))]
    task = judging.Classification(10)
    blind = judging.Judge(nn.Identity(), task, "a blind one", (), (True, False, False))
    drawn = pictures.Drawn([], [np.eye(10)[[3, 3, 1, 2]]], [], 1, {})
    made = Seen(
        asked, {"original": drawn, "unlearned": drawn}, blind, "", case, torch.device("cpu")
    )
    (accuracy,), doubt = made._judge_accuracy(rules.read())
    (check,) = made._unlearning_accuracy(rules.read(), doubt)
    assert accuracy.state[0] == check.state[0] == "invalid"
    assert check.fields["unlearned"].value == 0.5


class Words:
    """A tokenizer that nothing is read with."""

    model_max_length = 1

    def __call__(self, text: str, **how: Any) -> Any:
        return SimpleNamespace(input_ids=[0])


def test_prompts_that_are_drawn_and_a_judge_of_them() -> None:
    task = Diffusion((1, 8, 8), tokenizer=Words())
    rows = [
        {"image": torch.full((1, 8, 8), level), "text": f"a {colour} {shape}"}
        for level, shape in ((0.1, "disc"), (0.9, "box"))
        for colour in ("red", "blue")
        for _ in range(20)
    ]
    nothing = Encoded(Examples([], [], "forget", "nothing"), task)
    case: Any = SimpleNamespace(
        target=Concepts(("disc",), "box", ("a green wedge",)),
        sets=SimpleNamespace(forget=nothing, retain=Encoded(load(rows, "retain"), task)),
        checkpoint=SimpleNamespace(task=task),
        config=SimpleNamespace(sampling={}, audit="quick", seed=0, classifier=None),
    )
    judge, why = judging.judge(case)
    assert judge is not None, why
    assert judge.names == ("disc", "box", "a green wedge")  # 20 records of a caption are too few
    assert all(judge.right)
    found = pictures.conditions(case, pictures.sampling(case), judge)
    told = {c.wanted: (c.subset, c.shown) for c in found}
    assert told == {
        "disc": ("forget", {0}), "a red disc": ("forget", {0}), "a blue disc": ("forget", {0}),
        "box": ("retain", {1}), "a green wedge": ("retain", {2}),
        "a red box": ("retain", {1}), "a blue box": ("retain", {1}), "": ("retain", None),
    }  # fmt: skip
    assert pictures.sampling(case).guidance == 3.0


def test_captions_become_classes_of_a_judge() -> None:
    names = ["a red disc", "a blue disc", "a red box"]
    assert judging.shown_by("a picture of a disc", names) == {0, 1}
    assert judging.shown_by("red", names) == {0, 2}
    assert judging.shown_by("a green wedge", names) == frozenset()
    assert judging.shown_by("a red disc", ["disc", "box", "tinca, tench"]) == {0}
    assert judging.shown_by("a tench", ["disc", "box", "tinca, tench"]) == {2}
    assert judging.shown_by("", names) == frozenset()


def test_a_pipeline_of_one_step_is_not_asked_to_denoise(digits_pipeline: Path, place: Path) -> None:
    def in_one_step(model: Pipeline) -> None:
        swap(model)
        model.steps = 1

    after = edited(digits_pipeline, place / "one-step", in_one_step)
    x, y = digits.pictures()
    unseen = [{"image": x[i], "label": int(y[i])} for i in range(1437, 1500)]
    report = examined(
        digits_pipeline, after, None, data=digits.records(200), holdout=unseen, sampling=TINY,
        out=place / "one-step-audit",
    )  # fmt: skip
    assert any("sampled in 1 step, and was" in note for note in report.notes)
    assert any("is no denoiser" in limit for limit in report.limits)
    assert not [f for f in report.findings if f.name.startswith("membership")]
