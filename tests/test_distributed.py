"""Two processes do what one does: data parallel and FSDP2, over gloo on the CPU.

Run as a program (``-m tests.test_distributed FOLDER``) this file is one process of a launch.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import unlearn
from tests import plain
from unlearn import demo, distributed, registry
from unlearn.attacks.signals import collect
from unlearn.checkpoint import Options, inspect
from unlearn.data import load
from unlearn.errors import Unsupported
from unlearn.generation import greedy_answers
from unlearn.interface import Records, Request, Subject
from unlearn.reference import ReferenceLogits, reference_nll
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification
from unlearn.training import Term, Training, descend, likelihood
from unlearn.weights import save

ROOT = Path(__file__).parents[1]
WORLD = demo.people(seed=1, forget=1, retain=3, holdout=1)
STEPS = {"epochs": 2, "batch_size": 5, "micro_batch_size": 2, "lr": 1e-3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "two terms": ("grad_diff", STEPS),
    "references": ("npo", {**STEPS, "retention": "kl"}),
    "adapters": ("grad_diff", {**STEPS, "scope": "lora", "lr": 1e-2}),
    "head": ("simnpo", {**STEPS, "scope": "head"}),
    "blocks run again": ("gradient_ascent", {**STEPS, "checkpointing": True}),
    "an empty share": ("gradient_ascent", {**STEPS, "epochs": 1, "batch_size": 1, "lr": 1e-4}),
}
RECIPE = {"epochs": 2, "batch_size": 5, "lr": 1e-3}


def start() -> tuple[Subject, Request, CausalLM]:
    """An untrained tiny language model, and a request."""
    subject = demo.tiny_llama([*WORLD.forget, *WORLD.retain], width=32, depth=2)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    forget = Encoded(load(WORLD.forget, "forget"), task)
    retain = Encoded(load(WORLD.retain, "retain"), task)
    return subject, Request(Records(len(forget)), forget, retain), task


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unlearned(case: str, **settings: Any) -> dict[str, torch.Tensor]:
    """The weights after one of the cases."""
    subject, asked, task = start()
    name, hyperparameters = CASES[case]
    run = Run(task, **settings)
    after = registry.build(name, hyperparameters).unlearn(subject, asked, run).model
    assert after.get_output_embeddings().weight is after.get_input_embeddings().weight
    assert all(p.requires_grad and p.grad is None for p in after.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in after.modules())
    return weights(after)


# ------------------------------------------------------------------------------ one process


class Stopped(Exception):
    pass


class StopAt:
    """Progress that stops a run."""

    def advance(self, phase: str, done: int, total: int, numbers: object) -> None:
        if phase == "unlearn" and done == 2:
            raise Stopped

    def say(self, sentence: str) -> None: ...


def agree(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether all processes have the same ones."""
    each = distributed.spread(lambda _: tensors, range(distributed.world()))
    return all(torch.equal(one[n], tensors[n]) for one in each for n in tensors)


def process(folder: Path) -> None:
    with distributed.launched():
        assert distributed.world() == 2
        assert list(distributed.spread(lambda n: (n, distributed.rank()), "abc")) == [
            ("a", 0), ("b", 1), ("c", 0),
        ]  # fmt: skip
        sharded = distributed.shards()
        for case in CASES:
            found = unlearned(case, sharded=sharded)
            assert agree(found), case
            if distributed.is_main():
                save_file(found, folder / f"{case}.safetensors")
        if sharded:
            an_audited_run(folder)
            with pytest.raises(Unsupported, match="launch without FSDP"):
                noisy(sharded=True)
        else:
            shared_passes()
            assert agree(noisy())
            assert agree(batch_statistics())
            interrupted(folder)
            failures()
        print("all is well")


def shared_passes() -> None:
    """Forward passes over a set of two batches: each process does one and has both."""
    subject, asked, task = start()
    many = asked.retain_set().select([i % 24 for i in range(100)], "many")
    passed = []
    subject.model.register_forward_hook(lambda *_: passed.append(1))
    task.head(subject.model)

    def passes() -> list[Any]:
        run = Run(task)
        found = collect(subject.model, many, run, b"key", "signals", ["model.layers.1"])
        logits = ReferenceLogits(subject.model, many, range(100), run)
        likely = reference_nll(subject.model, many, run)
        arrays = [found.logprob, found.ended, found.features["model.layers.1"]]
        return [np.concatenate([np.ravel(a) for a in (*arrays, logits.values, likely)]),
                found.record]  # fmt: skip

    passed.clear()
    ours = [*passes(), len(passed)]
    alone = distributed.on_main(lambda: [*passes(), len(passed)])
    assert (ours[0] == alone[0]).all()
    assert ours[1] == alone[1]
    assert (ours[2], alone[2]) == (3, 3 + 6)
    answers = partial(greedy_answers, subject.model, many, Run(task), "answers", 50)
    assert answers() == distributed.on_main(answers)


def an_audited_run(folder: Path) -> None:
    assert agree(weights(inspect(folder / "model", Options()).load().model))
    result = unlearn.forget(folder / "model", **request(folder / "records"), out=folder / "run")
    assert (result.directory / "report.json").exists()
    assert agree(weights(result.subject.model))


def request(files: Path) -> dict[str, Any]:
    """What is asked of an audited run."""
    sets = {name: files / f"{name}.jsonl" for name in ("forget", "retain", "holdout")}
    return {"method": "grad_diff", **sets, "set": RECIPE}


def noisy(**settings: Any) -> dict[str, torch.Tensor]:
    """A method that moves weights by random numbers before every step."""
    subject, asked, task = start()
    method = registry.build("refresh", {**STEPS, "epochs": 1, "noise": 1.0})
    return weights(method.unlearn(subject, asked, Run(task, **settings)).model)


def batch_statistics() -> dict[str, torch.Tensor]:
    """Training that renews running statistics, each process on its share."""
    torch.manual_seed(0)
    model, task = plain.with_statistics(), Classification(plain.CLASSES)
    rows = [(torch.tensor(r["features"]), r["label"]) for r in plain.vectors(12)]
    inputs, labels = torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])
    data = Encoded(load((inputs, labels), "retain"), task)
    term = Term("retain", data, likelihood, "unit")
    descend(Subject(model), [term], Training(epochs=1, batch_size=6), Run(task), dropout=True)
    assert not torch.equal(model[1].running_mean, torch.zeros(8))
    return {**weights(model), "mean": model[1].running_mean, "variance": model[1].running_var}


def interrupted(folder: Path) -> None:
    """Every process stops; what the main one kept is enough for all to go on from."""
    work = folder / f"work-{distributed.rank()}"
    work.mkdir()
    with pytest.raises(Stopped):
        unlearned("references", work=work, save_every=0.0, progress=StopAt())
    assert bool(list(work.glob("training-*"))) == distributed.is_main()
    found = unlearned("references", work=work, save_every=0.0)
    assert agree(found)
    if distributed.is_main():
        save_file(found, folder / "interrupted.safetensors")


def failures() -> None:
    """What goes wrong in one process is heard in all, also while the main one works alone."""

    def fail(number: int) -> None:
        if number == 1:
            raise RuntimeError("disk on fire")

    with (
        pytest.raises(distributed.Lost, match=r"process 1 of 2 failed .Run.*: disk on fire"),
        distributed.together(),
    ):
        list(distributed.spread(fail, range(4)))

    def refuse_one(number: int) -> None:
        if number == 1:
            raise Unsupported("not this one")

    with pytest.raises(Unsupported, match="not this one"):  # in both, which may go on
        list(distributed.spread(refuse_one, range(4)))
    assert list(distributed.spread(str, range(3))) == ["0", "1", "2"]

    def refuse() -> None:
        raise Unsupported("not here")

    with pytest.raises(Unsupported, match="not here"), distributed.together():
        distributed.on_main(refuse)
    with distributed.together():
        assert distributed.on_main(distributed.world) == 1
        assert distributed.summed([1.0, float(distributed.rank())]) == [2.0, 1.0]


# ------------------------------------------------------------------------------ the launches


def launch(config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of the ready configurations, with two processes and no GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / "examples" / "accelerate" / f"{config}.yaml"),
        "--num_processes", "2", "--main_process_port", str(port), "-m", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "HF_HUB_OFFLINE": "1"}  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def one(tiny_lm: Path, lm_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    unlearn.forget(tiny_lm, **request(lm_files), out=out)
    return out


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def results(
    request: pytest.FixtureRequest,
    tiny_lm: Path,
    lm_files: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """What two processes left."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "model").symlink_to(tiny_lm)
    (folder / "records").symlink_to(lm_files)
    done = launch(request.param, "tests.test_distributed", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all is well") == 1  # the others are silent
    return request.param, folder


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(one[n], other[n], rtol=0, atol=1e-5) for n in one)


def test_two_processes_do_what_one_does(results: tuple[str, Path], one: Path) -> None:
    mode, folder = results
    before = weights(start()[0].model)
    for case in CASES:
        alone = unlearned(case)
        assert not close(before, alone), case
        assert close(alone, load_file(folder / f"{case}.safetensors")), case
    if mode == "ddp":
        resumed = load_file(folder / "interrupted.safetensors")
        assert close(resumed, load_file(folder / "references.safetensors"))
    else:
        assert same_report(folder / "run", one)
        assert not list(folder.glob(".run*"))


def same_report(one: Path, other: Path) -> bool:
    """Weights to 1e-5, every number in the report, every file."""
    files = [load_file(d / "model" / "model.safetensors") for d in (one, other)]
    reports = [json.loads((d / "report.json").read_text()) for d in (one, other)]
    found = [[r[k] for k in ("verdict", "verdict_reason", "findings")] for r in reports]
    names = [{p.relative_to(d) for p in d.rglob("*")} for d in (one, other)]
    return close(*files) and alike(*found) and names[0] == names[1]


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float):
        return bool(one == pytest.approx(other, rel=1e-4, abs=1e-4))
    return bool(one == other)


def command(model: Path, files: Path, out: Path, **changes: float) -> list[str]:
    asked = request(files)
    settings = {**asked.pop("set"), **changes}
    return [
        "unlearn", "run", str(model), "--out", str(out),
        *(f"--{name}={value}" for name, value in asked.items()),
        *(f"--set={name}={value}" for name, value in settings.items()),
    ]  # fmt: skip


def test_the_command_line_gives_the_same_report(
    tiny_lm: Path, lm_files: Path, tmp_path: Path, one: Path
) -> None:
    done = launch("ddp", *command(tiny_lm, lm_files, tmp_path / "two"), "--json")
    assert json.loads(done.stdout), done.stderr  # printed once
    assert same_report(tmp_path / "two", one)
    assert [p.name for p in tmp_path.iterdir()] == ["two"]
    logged = [json.loads(x) for x in (tmp_path / "two" / "metrics.jsonl").open()]
    steps = [event["step"] for event in logged if event["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


def test_an_error_ends_all_with_one_sentence(tiny_lm: Path, lm_files: Path, tmp_path: Path) -> None:
    failing = command(tiny_lm, lm_files, tmp_path / "two", lr=1e9)
    done = launch("ddp", *failing, "--audit", "none")
    assert done.returncode != 0
    assert done.stderr.count("Error: the model collapsed at step") == 1
    assert "unlearn.errors" not in done.stderr  # no traceback of ours
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ without a launch


@pytest.fixture
def as_one_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def pretend(rank: int, world: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world", lambda: world)

    return pretend


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 7))
def test_every_example_is_dealt_once(count: int, size: int, world: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shares = []
        for rank in range(world):
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            patch.setattr(distributed, "world", lambda: world)
            shares.append(distributed.dealt(range(count), size, equally_often=True))
            assert [p for p in shares[-1] if p] == distributed.dealt(
                range(count), size, equally_often=False
            )
    assert sorted(i for share in shares for piece in share for i in piece) == list(range(count))
    assert len({len(share) for share in shares}) == 1
    assert all(len(piece) <= size for share in shares for piece in share)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_the_first_version_of_fsdp_is_refused(
    as_one_of: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert not distributed.shards()  # there is one process
    as_one_of(0, 2)
    with pytest.raises(ValueError, match="set fsdp_version to 2"):
        distributed.shards()


def test_a_large_model_is_written_in_parts_and_read_back(tmp_path: Path) -> None:
    subject = start()[0]
    before = weights(subject.model)
    subject.model.save_pretrained = partial(subject.model.save_pretrained, max_shard_size="40KB")
    save(subject, torch.float32, tmp_path)
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(parts) > 1
    assert {p.name for p in parts} == set(index["weight_map"].values())
    read = weights(inspect(tmp_path, Options()).load().model)
    assert all(torch.equal(before[n], read[n]) for n in before)


if __name__ == "__main__":
    process(Path(sys.argv[1]))
