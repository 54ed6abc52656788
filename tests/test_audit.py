"""Whole audits: through the command line and through Python, interrupted, refused, hostile."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_model

from tests import plain
from unlearn import demo, manifest
from unlearn.attacks.extraction.compression import Compression, compressions
from unlearn.cli.main import cli
from unlearn.errors import BadInput, Collapsed, UnlearnError
from unlearn.evaluations import audit, robustness, shadowing
from unlearn.evaluations.report import read
from unlearn.interface import Subject
from unlearn.weights import save

ROOT = Path(__file__).parents[1]
STRANGE = [
    {"question": "What is <script>alert(1)</script>?", "answer": "<img src=x onerror=alert(2)>"},
    {"question": "What is long?", "answer": "x" * 10_000},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows eight people, two that never met two of them, and the records."""
    directory = tmp_path_factory.mktemp("audited")
    people = demo.people(seed=6, forget=2, retain=6, holdout=3)
    for name, records in zip(demo.World._fields, people, strict=True):
        demo.write_jsonl(directory / f"{name}.jsonl", records)
    everybody = [*people.forget, *people.retain]
    trained = (("model", everybody, 0), ("retrained", people.retain, 0),
               ("again", people.retain, 1))  # fmt: skip
    for name, known, seed in trained:
        subject = demo.tiny_llama(everybody, seed, width=48, depth=2)
        save(demo.train(subject, known, 80, seed), torch.float32, directory / name)
    return directory


def settings(world: Path, **changes: Any) -> dict[str, Any]:
    data = {name: world / f"{name}.jsonl" for name in demo.World._fields}
    return {**data, "retrained": world / "retrained", "audit": "quick", **changes}


def flags(**given: Any) -> list[str]:
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def verdicts(report: Any) -> dict[tuple[str, str], str]:
    return {(f.name, f.subset): f.verdict for f in report.findings}


@pytest.fixture(scope="module")
def closely(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The standard audit of the unmodified model."""
    out = tmp_path_factory.mktemp("audits") / "standard"
    audit(world / "model", world / "model", **settings(world, audit="standard"), out=out)
    return out


def test_the_unmodified_model_fails_by_every_kind_of_evidence(closely: Path) -> None:
    report = read(closely / "report.json")
    assert report.verdict == "not forgotten"
    failed = {f.group for f in report.findings if f.verdict == "fail"}
    assert {"extraction", "membership", "probe", "guard"} <= failed
    assert all(f.verdict != "fail" for f in report.findings if f.group == "utility")


@pytest.fixture(scope="module")
def deeply(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Deep audits without shadow models: of the unmodified model, and of another retrained one."""
    records = [json.loads(line) for line in (world / "forget.jsonl").open()]
    strange = [
        {"language": "x", "row": row, "question": f"Ix! {record['question']} Ux?"}
        for row, record in enumerate(records)
    ]
    given = settings(world, audit="deep", shadows=0, acr=1, translations=strange)
    given["neighbours"] = world / "retain.jsonl"
    folder = tmp_path_factory.mktemp("deep")
    short = partial(compressions, attack=Compression(budget=30))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(robustness, "compressions", short)
        return {
            name: audit(world / "model", world / name, **given, out=folder / name)
            for name in ("model", "again")
        }


EIGHT = {"familiarity", "languages", "jailbreak", "in_context", "relearning", "downstream",
         "latent_knowledge", "side_effects"}  # fmt: skip
HANDLED = {"eight_bits", "four_bits", "pruning", "relearning_unrelated", "soft_tokens"}


def test_eight_ways_of_looking_find_what_nobody_removed(deeply: dict[str, Any]) -> None:
    found = {f.name: f for f in deeply["model"].findings if f.unlearned}
    assert {*EIGHT, *HANDLED, "adversarial_compression"} <= set(found)
    failed = {name for name in found if found[name].verdict == "fail"}
    assert {"familiarity", "jailbreak", "downstream", "four_bits", "eight_bits"} <= failed
    assert found["side_effects"].verdict == "pass"
    for name in {*EIGHT, *HANDLED} - {"side_effects"}:
        assert found[name].unlearned == found[name].original
        assert found[name].original.value >= found[name].retrained.value


def test_eight_ways_of_looking_accuse_no_retrained_model(deeply: dict[str, Any]) -> None:
    looked = [f for f in deeply["again"].findings if f.name in {*EIGHT, *HANDLED}]
    assert looked
    assert not [f.name for f in looked if f.verdict == "fail"]


def test_what_both_checkpoints_give_away(deeply: dict[str, Any]) -> None:
    same, other = ({f.name: f for f in deeply[name].findings} for name in ("model", "again"))
    assert same["weights_moved"].unlearned.value == 0
    assert same["hidden_states_moved"].unlearned.value == 0.5  # nothing moved, so nobody can tell
    assert other["weights_moved"].unlearned.value > 0
    assert other["weights_changed"].unlearned.value > 0.9
    assert 0 < other["weights_in_one_block"].unlearned.value <= 1
    for name in ("hidden_states_moved", "rows_moved"):
        assert 0 <= other[name].retrained.value <= 1
        assert other[name].verdict == "info"


def test_what_an_audit_leaves(closely: Path) -> None:
    assert {p.name for p in closely.iterdir()} == {
        "audit.json", "report.json", "report.html", "junit.xml", "statement.json", "signals",
        "record.key", "SHA256SUMS",
    }  # fmt: skip
    assert not manifest.faults(closely)
    assert [p.name for p in closely.parent.iterdir()] == ["standard"]
    statement = json.loads((closely / "statement.json").read_text())
    assert statement["predicate"]["result"] == "FAILED"
    assert ET.parse(closely / "junit.xml").getroot().findall(".//failure")


def test_every_likelihood_attack_ran_and_says_how_sure_it_is(closely: Path) -> None:
    report = read(closely / "report.json")
    attacks = [f for f in report.findings if f.name.startswith("membership_")]
    assert len(attacks) >= 12
    assert all(f.unlearned.interval for f in attacks if f.verdict != "not_run")
    assert {layer.probe for layer in report.layers} == {"logit_lens"}
    assert report.curves
    assert report.exposed
    assert report.criteria_digest
    assert report.depth == "standard"


def test_no_record_text_in_an_audit(world: Path, closely: Path) -> None:
    answers = [json.loads(line)["answer"] for line in (world / "forget.jsonl").open()]
    for file in closely.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not any(answer.encode() in content for answer in answers), file


def test_the_same_audit_twice_and_through_the_command_line(world: Path, tmp_path: Path) -> None:
    given = settings(world, retrained=None)
    del given["retrained"]
    one = audit(world / "model", world / "retrained", **given, out=tmp_path / "one")
    arguments = flags(original=world / "model", unlearned=world / "retrained", **given,
                      out=tmp_path / "two")  # fmt: skip
    done = CliRunner().invoke(cli, ["audit", *arguments, "--json"])
    code = {"forgotten": 0, "not forgotten": 3, "inconclusive": 4}
    assert done.exit_code == code[one.verdict], done.output
    two = read(tmp_path / "two" / "report.json")
    assert json.loads(done.stdout)["verdict"] == one.verdict
    assert [f.model_dump() for f in one.findings] == [f.model_dump() for f in two.findings]


def test_exit_code_of_a_model_that_forgot_nothing(world: Path, tmp_path: Path) -> None:
    arguments = flags(original=world / "model", unlearned=world / "model", **settings(world),
                      out=tmp_path / "audit")  # fmt: skip
    done = CliRunner().invoke(cli, ["audit", *arguments])
    assert done.exit_code == 3
    assert "Not forgotten. Failed: Extraction strength" in done.stdout
    assert f"Report: {tmp_path / 'audit' / 'report.html'}" in done.stdout.replace("\n", "")


def test_an_audit_that_was_killed_goes_on(world: Path, tmp_path: Path) -> None:
    given = flags(original=world / "model", unlearned=world / "again", **settings(world),
                  out=tmp_path / "audit")  # fmt: skip
    command = [sys.executable, "-m", "unlearn", "audit", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT)
    place = tmp_path / ".audit.partial"
    deadline = time.monotonic() + 120
    while not list(place.glob("result/signals/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "audit").exists()
    again = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT, check=False)
    assert b"Going on with the unfinished audit" in again.stderr
    assert (tmp_path / "audit" / "report.html").exists()
    assert not place.exists()


def test_the_method_is_read_from_the_run(world: Path, tmp_path: Path) -> None:
    import unlearn

    unlearn.forget(
        world / "model", method="npo", forget=world / "forget.jsonl",
        retain=world / "retain.jsonl", set={"epochs": 1, "beta": 0.25}, audit="none",
        out=tmp_path / "run",
    )  # fmt: skip
    report = audit(world / "model", tmp_path / "run", **settings(world), out=tmp_path / "audit")
    assert report.method == "npo"
    assert {h.name: h.value for h in report.hyperparameters}["beta"] == "0.25"
    keys = [(tmp_path / name / "record.key").read_text() for name in ("run", "audit")]
    assert keys[0] == keys[1]  # so that records have one name in both reports


def test_strange_records_stay_harmless(world: Path, tmp_path: Path) -> None:
    people = demo.people(seed=6, forget=2, retain=6, holdout=3)
    given = settings(world, forget=[*people.forget, STRANGE[0]], audit="quick")
    report = audit(
        world / "model", world / "again", **given, include_examples=True, out=tmp_path / "a"
    )
    page = (tmp_path / "a" / "report.html").read_text()
    assert report.examples
    assert "<script>alert" not in page
    assert "<img src=x" not in page


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"unlearned": "nowhere"}, "nowhere does not exist"),
        ({"criteria": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"criteria": {"rules": {"membreship": {"margin": 0.1}}}}, "membreship"),
        ({"criteria": {"rules": {"membership": {"margin": 7}}}}, "margin"),
        ({"audit": "deep"}, "pass --training"),
        ({"audit": "deep", "training": {"epochz": 1}}, "epochz"),
        ({"audit": "deep", "training": {"init": "nosuch"}}, "nosuch does not exist"),
        (
            {"audit": "deep", "training": {"epochs": 1}, "method": "finetune", "retain": None},
            "shadow models.*cannot forget by the method.*needs a retain set",
        ),
        ({"set": {"lr": 1}}, "--method"),
        ({"method": "npoo"}, "npo"),
        ({"audit": "none"}, "'quick', 'standard' or 'deep'"),
        ({"shadows": 5, "audit": "deep"}, "multiple of 2"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, sentence: str
) -> None:
    from unlearn.checkpoint import Checkpoint

    def load(self: Checkpoint) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Checkpoint, "load", load)
    given = settings(world, unlearned=world / "again") | changes
    unlearned = given.pop("unlearned")
    with pytest.raises(BadInput, match=sentence):
        audit(world / "model", unlearned, **given, out=tmp_path / "audit")
    assert not list(tmp_path.iterdir())


def named(report: Any, name: str) -> Any:
    (found,) = [f for f in report.findings if f.name == name]
    return found


def test_a_model_retrained_by_another_seed_is_not_accused(world: Path) -> None:
    report = audit(world / "model", world / "again", **settings(world, audit="standard"))
    assert report.verdict != "not forgotten", report.verdict_reason


def test_a_reference_that_is_the_audited_model_proves_nothing(world: Path) -> None:
    report = audit(world / "model", world / "retrained", **settings(world))
    assert report.verdict == "inconclusive"
    assert "nothing could differ" in named(report, "independent_reference").reason


class Masked(torch.nn.Module):
    """A classifier whose output for one class is held down; no parameter is touched."""

    def __init__(self, model: torch.nn.Module, label: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mask", torch.zeros(plain.CLASSES).index_fill(
            0, torch.tensor([label]), -60.0))  # fmt: skip

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(features) + self.mask
        return logits


def test_hidden_layers_of_the_original_are_found_whatever_the_output_says() -> None:
    torch.manual_seed(0)
    model = Masked(plain.factory(), 1)
    model.mask.zero_()
    masked = copy.deepcopy(model)
    masked.mask[1] = -60.0
    given: dict[str, Any] = {"data": plain.vectors(90, 1), "forget_classes": "1",
                             "holdout": plain.vectors(60, 2), "audit": "quick"}  # fmt: skip
    alone = audit(copy.deepcopy(model), copy.deepcopy(masked), **given)
    assert named(alone, "hidden_weights").verdict == "inconclusive"
    other = audit(copy.deepcopy(model), copy.deepcopy(masked), **given,
                  retrained=Masked(plain.factory(), 1))  # fmt: skip
    assert named(other, "hidden_weights").verdict == "fail"
    assert other.verdict == "not forgotten"
    frozen = copy.deepcopy(model)  # a backbone that no training ever moved
    with torch.no_grad():
        list(frozen.parameters())[-1].add_(1.0)
    shared = audit(copy.deepcopy(model), masked, **given, retrained=frozen)
    assert not [f for f in shared.findings if f.name == "hidden_weights"]


def test_a_probe_that_cannot_be_made_is_not_run_and_missed() -> None:
    """A model without blocks has no layers to probe: that must not make it easier to pass."""

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(plain.WIDTH, 8)
            self.two = torch.nn.Linear(8, plain.CLASSES)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.two(self.one(features).relu())
            return logits

    torch.manual_seed(0)
    report = audit(
        Flat(), Flat(), retrained=Flat(), data=plain.vectors(90, 1), forget_classes="1",
        holdout=plain.vectors(60, 2), audit="standard",
    )  # fmt: skip
    found = named(report, "one_shot_probe")
    assert (found.verdict, found.required) == ("not_run", True)
    assert report.verdict != "forgotten"


def test_holdout_records_that_were_retained_are_refused(world: Path) -> None:
    with pytest.raises(BadInput, match="retain records are also in the holdout"):
        audit(world / "model", world / "again", **settings(world, holdout=world / "retain.jsonl"))


def test_no_name_of_a_record_in_an_audit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = [{**row, "id": f"person-{i}@example.org"} for i, row in enumerate(plain.vectors(60))]
    audit(plain.factory(), plain.factory(), data=rows, audit="standard", out=tmp_path / "audit",
          forget_ids="person-3@example.org,person-4@example.org")  # fmt: skip
    for file in (tmp_path / "audit").rglob("*"):
        assert not file.is_file() or b"@example.org" not in file.read_bytes(), file
    from unlearn.attacks.signals import Signals

    table = Signals.read(tmp_path / "audit" / "signals" / "original-forget.parquet")
    assert not table.features  # what hidden layers made of a record stays behind


def test_checkpoints_that_do_not_belong_together(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UnlearnError, match="not of the same kind"):
        audit(world / "model", plain.factory(), **settings(world))


@pytest.mark.parametrize("size", [10, 100])
def test_few_records_are_inconclusive_and_never_a_crash(size: int) -> None:
    torch.manual_seed(0)
    models = [plain.factory() for _ in range(3)]
    report = audit(
        models[0], models[1], retrained=models[2], forget=plain.vectors(size, 1),
        retain=plain.vectors(30, 2), holdout=plain.vectors(size, 3), audit="standard",
    )  # fmt: skip
    assert report.verdict == "inconclusive"
    assert all(f.verdict != "fail" for f in report.findings if f.group != "utility")


def test_a_deep_audit_of_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadowing, "TARGETS", 20)  # which leaves holdout records for RMIA
    torch.manual_seed(0)
    for name in ("original", "unlearned"):
        save_model(plain.factory(), str(tmp_path / f"{name}.safetensors"))
    given: dict[str, Any] = {
        "model": "tests.plain:factory", "forget": plain.vectors(20, 1),
        "retain": plain.vectors(20, 2), "holdout": plain.vectors(60, 3), "audit": "deep",
        "training": {"epochs": 4, "lr": 0.01}, "shadows": 8,
        "shadow_cache": tmp_path / "shadows",
    }  # fmt: skip
    checkpoints = [tmp_path / f"{name}.safetensors" for name in ("original", "unlearned")]
    unknown = verdicts(audit(*checkpoints, **given))
    assert unknown["membership_u_lira", "forget"] == "not_run"
    assert unknown["membership_lira_online", "forget"] != "not_run"
    report = audit(*checkpoints, **given, method="gradient_ascent", set={"epochs": 1, "lr": 1e-3})
    found = {f.name: f for f in report.findings}
    assert found["membership_u_lira"].verdict != "not_run"
    assert found["membership_rmia_online"].verdict != "not_run"
    assert found["klom"].unlearned.value >= 0
    assert found["memorization_score"].original is not None
    assert any("shadow models" in note for note in report.notes)
    assert found["shadow_likeness"].group == "guard"
    assert (found["epsilon"].verdict, found["epsilon"].n) == ("info", 20)
    limit = "Attacks with shadow models saw 20 random records of the holdout set"
    assert any(limit in sentence for sentence in report.limits)


def a_run(directory: Path, **changes: Any) -> dict[str, Any]:
    """An erasure from a small classifier, with a quick audit."""
    torch.manual_seed(0)
    save_model(plain.factory(), str(directory / "model.safetensors"))
    return {
        "checkpoint": directory / "model.safetensors", "model": "tests.plain:factory",
        "method": "gradient_ascent", "set": {"epochs": 3}, "forget": plain.vectors(20, 1),
        "retain": plain.vectors(20, 2), "holdout": plain.vectors(20, 3), **changes,
    }  # fmt: skip


@pytest.mark.parametrize("failing", ["measure", "conclude"])
def test_a_finished_model_survives_a_failed_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    import unlearn
    from unlearn.evaluations.examination import Examination

    whole = getattr(Examination, failing)

    def broken(self: Examination, *given: Any) -> Any:
        if failing == "conclude" or given[0] == "unlearned":
            raise Collapsed("a shadow model collapsed")
        return whole(self, *given)

    given = a_run(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Examination, failing, broken)
        with pytest.raises(Collapsed, match="a shadow model collapsed") as raised:
            unlearn.forget(**given, out=tmp_path / "run")
    kept = tmp_path / ".run.partial" / "result" / "model"
    assert f"kept in {kept}: repeat the command" in str(raised.value)
    weights = (kept / "model.safetensors").read_bytes()
    result = unlearn.forget(**given, out=tmp_path / "run")
    assert result.report is not None
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == weights
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [e["event"] for e in events].count("resumed") == 1
    steps = [e["step"] for e in events if e["event"] == "step"]
    assert len(steps) == len(set(steps))  # none was trained twice
    assert not kept.exists()


def test_an_audit_that_fails_before_there_is_a_model_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import unlearn
    from unlearn.evaluations.examination import Examination

    def broken(self: Examination, *given: Any) -> None:
        raise BadInput("no.")

    monkeypatch.setattr(Examination, "measure", broken)
    with pytest.raises(BadInput, match=r"^no\.$"):
        unlearn.forget(**a_run(tmp_path), out=tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_statement_is_the_same_when_it_is_rendered_again(tmp_path: Path) -> None:
    import unlearn

    unlearn.forget(**a_run(tmp_path), out=tmp_path / "run")
    done = CliRunner().invoke(cli, ["report", str(tmp_path / "run"), "--format", "statement"])
    assert done.exit_code == 0, done.output
    assert done.stdout == (tmp_path / "run" / "statement.json").read_text()
    subjects = {s["name"] for s in json.loads(done.stdout)["subject"]}
    assert subjects == {"model/model.safetensors", "model/README.md"}


def test_models_in_memory_are_given_back_as_they_were() -> None:
    torch.manual_seed(0)
    before = {role: plain.with_statistics().bfloat16() for role in ("original", "unlearned")}
    before["unlearned"][1].double()  # several precisions in one model
    given = copy.deepcopy(before)
    for model in given.values():
        model[2].eval()
    audit(given["original"], Subject(given["unlearned"]), forget=plain.vectors(10, 1),
          retain=plain.vectors(10, 2), audit="standard")  # fmt: skip
    for role, model in given.items():
        assert [m.training for m in model] == [True, True, False, True]
        for (name, now), then in zip(
            model.state_dict().items(), before[role].state_dict().values(), strict=True
        ):
            assert now.dtype == then.dtype, name
            assert torch.equal(now, then), name


def test_the_example_pipeline_gates_on_the_verdict(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("gate", ROOT / "examples/erase_and_gate.py")
    assert spec is not None
    assert spec.loader is not None
    gate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gate)
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    for name in demo.World._fields:
        (work / "data" / f"{name}.jsonl").write_text((world / f"{name}.jsonl").read_text())
    for name in ("model", "retrained"):
        (work / name).symlink_to(world / name)
    monkeypatch.setattr(demo, "RECIPE", {"epochs": 1, "lr": 1e-9})
    verdict = gate.erase(work)
    gate.deploy(work, verdict)
    assert verdict == "not forgotten"
    assert not (work / "deployed").exists()
    gate.deploy(work, "forgotten")
    assert (work / "deployed" / "model.safetensors").exists()
