"""Whole runs on small real models: forgotten, not forgotten, killed, resumed, verified."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import unlearn
from unlearn import demo
from unlearn.errors import BadInput, Collapsed
from unlearn.interface import Subject
from unlearn.weights import save

ROOT = Path(__file__).parents[1]
RECIPE = {"lr": 1e-3, "epochs": 20, "batch_size": 16, "beta": 0.3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows sixteen people, and one that never met four of them."""
    directory = tmp_path_factory.mktemp("world")
    people = demo.people(seed=4, forget=4, retain=12, holdout=4)
    for name, records in zip(demo.World._fields, people, strict=True):
        demo.write_jsonl(directory / f"{name}.jsonl", records)
    everybody = [*people.forget, *people.retain]
    for name, known in (("model", everybody), ("retrained", people.retain)):
        subject = demo.tiny_llama(everybody, width=64, depth=2)
        save(demo.train(subject, known, epochs=100), torch.float32, directory / name)
    return directory


def request(world: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "npo",
        "forget": world / "forget.jsonl",
        "retain": world / "retain.jsonl",
        "holdout": world / "holdout.jsonl",
        "retrained": world / "retrained",
        "set": RECIPE,
        **changes,
    }


def finding(report: Any, name: str, subset: str) -> Any:
    (found,) = [f for f in report.findings if (f.name, f.subset) == (name, subset)]
    return found


def test_npo_forgets_four_people_and_keeps_the_others(world: Path, tmp_path: Path) -> None:
    report = unlearn.forget(world / "model", **request(world), out=tmp_path / "run").report
    gone = finding(report, "extraction_strength", "forget")
    assert gone.original.value > 0.9
    assert gone.unlearned.value < gone.retrained.value + 0.1
    assert gone.verdict != "fail"
    kept = finding(report, "rouge_l_recall", "retain")
    assert kept.unlearned.value > 0.9 * kept.original.value
    run = tmp_path / "run"
    expected = {"run.json", "lineage.json", "model", "metrics.jsonl", "signals", "report.json",
                "report.html", "junit.xml", "statement.json", "record.key", "forgotten.txt",
                "SHA256SUMS"}  # fmt: skip
    assert {p.name for p in run.iterdir()} == expected
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_no_forgotten_text_in_the_run_directory(world: Path, tmp_path: Path) -> None:
    settings = request(world, set={**RECIPE, "epochs": 1})
    unlearn.forget(world / "model", **settings, out=tmp_path / "run")
    answers = [json.loads(line)["answer"] for line in (world / "forget.jsonl").open()]
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file() and file.name != "tokenizer.json":
            content = file.read_bytes()
            assert not any(answer.encode() in content for answer in answers), file


def test_an_unmodified_model_fails_and_a_retrained_one_passes(world: Path, tmp_path: Path) -> None:
    idle = unlearn.forget(
        world / "model", **request(world, set={"lr": 1e-12, "epochs": 1}), out=tmp_path / "idle"
    ).report
    assert idle.verdict == "not forgotten"
    assert finding(idle, "extraction_strength", "forget").verdict == "fail"
    # the retrained model under audit in the place of the unlearned one
    exact = unlearn.forget(
        world / "model",
        **request(world, method="retrain", set={"init": str(world / "retrained"), "lr": 1e-12,
                                                "epochs": 1}),
        out=tmp_path / "exact",
    ).report  # fmt: skip
    assert exact.verdict != "not forgotten", exact.verdict_reason
    assert finding(exact, "extraction_strength", "forget").verdict == "pass"


def test_without_any_reference_the_verdict_is_inconclusive(world: Path) -> None:
    settings = request(world, retrained=None, holdout=None, set={"lr": 1e-12, "epochs": 1})
    report = unlearn.forget(world / "model", **settings).report
    assert report.verdict == "inconclusive"
    assert finding(report, "extraction_strength", "forget").verdict == "not_run"


def test_command_line_and_python_give_the_same_bits(world: Path, tmp_path: Path) -> None:
    settings = {"epochs": 2, "lr": 1e-3}
    command = [sys.executable, "-m", "unlearn", "run", str(world / "model"), "--method", "npo",
               "--forget", str(world / "forget.jsonl"), "--retain", str(world / "retain.jsonl"),
               "--set", "epochs=2", "--set", "lr=1e-3", "--out", str(tmp_path / "cli"),
               "--audit", "none"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env=one_thread())
    unlearn.forget(
        world / "model", method="npo", forget=world / "forget.jsonl",
        retain=world / "retain.jsonl", set=settings, audit="none", out=tmp_path / "python",
    )  # fmt: skip
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("cli", "python")]
    assert files[0].read_bytes() == files[1].read_bytes()


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("method", ["npo", "ssd"])
def test_killed_in_the_middle_then_repeated(world: Path, tmp_path: Path, method: str) -> None:
    """kill -9, the same command again: the same weights as a run that was left alone."""

    def command(out: str) -> list[str]:
        settings = ["--set", "epochs=3", "--set", "lr=1e-3"] if method == "npo" else []
        return [sys.executable, "-m", "unlearn", "run", str(world / "model"), "--method", method,
                "--forget", str(world / "forget.jsonl"), "--retain", str(world / "retain.jsonl"),
                "--save-every", "0", "--out", str(tmp_path / out), *settings]  # fmt: skip

    alone = subprocess.run(command("alone"), check=False, capture_output=True, env=one_thread())
    assert alone.returncode == 4, alone.stderr  # inconclusive: there is no reference
    victim = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL, env=one_thread())
    work = tmp_path / ".killed.partial" / "work"
    sign = "training-*" if method == "npo" else "once/importances_forget.safetensors"
    deadline = time.monotonic() + 120
    while not list(work.glob(sign)) and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert victim.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed").exists()
    again = subprocess.run(command("killed"), check=False, capture_output=True, env=one_thread())
    assert b"Going on with the unfinished run" in again.stderr
    files = [tmp_path / d / "model" / "model.safetensors" for d in ("alone", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not work.exists()


def test_an_unfinished_run_with_other_settings_is_not_continued(
    world: Path, tmp_path: Path
) -> None:
    place = tmp_path / ".run.partial"
    place.mkdir()
    (place / "identity").write_text("another run")
    with pytest.raises(BadInput, match="other settings"):
        unlearn.forget(world / "model", **request(world), out=tmp_path / "run")


def test_a_collapse_leaves_nothing_and_the_input_untouched(world: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in (world / "model").iterdir()}
    with pytest.raises(Collapsed):
        unlearn.forget(
            world / "model", **request(world, set={"lr": 1e9}, audit="none"), out=tmp_path / "run"
        )
    assert not list(tmp_path.iterdir())
    assert before == {p: p.read_bytes() for p in (world / "model").iterdir()}


def test_a_second_request_continues_lineage_state_and_key(world: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in (world / "retain.jsonl").open()]
    first = request(world, method="ssd", set={"percentile": 99}, retrained=None)
    unlearn.forget(world / "model", **first, out=tmp_path / "one")
    unlearn.forget(
        tmp_path / "one", method="ssd", forget=records[:8], set={"percentile": 99},
        out=tmp_path / "two",
    )  # fmt: skip
    lineage = json.loads((tmp_path / "two" / "lineage.json").read_text())
    assert [entry["forget"]["n"] for entry in lineage] == [32, 8]
    assert lineage[1]["fingerprint_in"] == lineage[0]["fingerprint_out"]
    keys = [(tmp_path / d / "record.key").read_text() for d in ("one", "two")]
    assert keys[0] == keys[1]
    assert (tmp_path / "two" / "state.safetensors").exists()


def test_half_precision_comes_back_in_half_precision(world: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    save(Subject(model, tokenizer), torch.bfloat16, tmp_path / "half")
    settings = request(world, set={"lr": 1e-6, "epochs": 1}, audit="none", retrained=None)
    unlearn.forget(tmp_path / "half", **settings, out=tmp_path / "run")
    before = load_file(tmp_path / "half" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert {v.dtype for v in after.values()} == {torch.bfloat16}


def test_a_plain_module_from_python() -> None:
    """An nn.Module and tensors, nothing on disk."""
    draw = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(60, 4, generator=draw), torch.arange(60) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    result = unlearn.forget(
        model, method="grad_diff", data=(inputs, labels), forget_classes="1",
        set={"lr": 0.02, "epochs": 10},
    )  # fmt: skip
    assert result.directory is None
    assert finding(result.report, "accuracy", "forget").unlearned.value < 0.2


def blobs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=draw), torch.arange(n) % 3


def perceptron(classes: int = 3) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn = torch.nn
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes))


def test_requests_in_memory_carry_their_state_along() -> None:
    first = unlearn.forget(perceptron(), method="ssd", data=blobs(60, 0), forget_ids="0:10")
    second = unlearn.forget(first.subject, method="ssd", forget=blobs(6, 1))
    assert second.subject.note["ssd.count"] == "44"


def test_another_method_does_not_hand_on_state_it_does_not_keep(tmp_path: Path) -> None:
    first = unlearn.forget(perceptron(), method="ssd", data=blobs(60, 0), forget_ids="0:10")
    second = unlearn.forget(
        first.subject, method="gradient_ascent", forget=blobs(6, 1), set={"epochs": 1},
        out=tmp_path / "run",
    )  # fmt: skip
    assert not second.subject.state
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_a_retrained_model_with_other_classes_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="other classes"):
        unlearn.forget(
            perceptron(), method="ssd", data=blobs(60, 0), forget_ids="0:10",
            retrained=perceptron(classes=2), out=tmp_path / "run",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_module_may_have_a_config_of_its_own() -> None:
    model = perceptron()
    model.config = {"width": 8}  # type: ignore[assignment]
    result = unlearn.forget(model, method="ssd", data=blobs(60, 0), forget_ids="0:10")
    assert result.report is not None
