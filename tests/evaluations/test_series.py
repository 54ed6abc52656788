"""Requests one after another: what they leave, what they refuse, and how they go on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_model
from torch import nn

import unlearn
from tests import plain
from unlearn.cli.main import cli
from unlearn.errors import BadInput, UnlearnError
from unlearn.evaluations import series
from unlearn.evaluations.schema import Moment
from unlearn.evaluations.series import worst

LABELS = {"method": "random_label", "set": {"lr": 0.03, "epochs": 6, "batch_size": 8}}
REQUESTS = [{"forget_ids": "0:10"}, {"forget_classes": 2}, {"forget_ids": "30,33"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A network that has learned three blobs, with its data."""
    folder = tmp_path_factory.mktemp("blobs")
    draw = torch.Generator().manual_seed(0)
    centres = torch.eye(plain.CLASSES, plain.WIDTH) * 3
    labels = torch.arange(240) % plain.CLASSES
    inputs = centres[labels] + torch.randn(240, plain.WIDTH, generator=draw)
    rows = [{"features": x.tolist(), "label": int(y)} for x, y in zip(inputs, labels, strict=True)]
    for name, part in (("data", rows[:150]), ("holdout", rows[150:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = plain.factory()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[:150]), labels[:150]).backward()
        optimizer.step()
    save_model(model, str(folder / "net.safetensors"))
    return {
        "checkpoint": folder / "net.safetensors", "model": "tests.plain:factory",
        "data": folder / "data.jsonl", "holdout": folder / "holdout.jsonl",
    }  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_what_was_forgotten_is_not_retained_again(world: dict[str, Any], tmp_path: Path) -> None:
    unlearn.forget_all(requests=REQUESTS, **world, **LABELS, audit="none", out=tmp_path / "s")
    runs = [json.loads((tmp_path / "s" / f"{i:03d}/run.json").read_text()) for i in (1, 2, 3)]
    # 50 of class 2, of which the first request took 3 (rows 2, 5 and 8)
    assert [r["sets"]["forget"]["n"] for r in runs] == [10, 47, 2]
    assert [r["sets"]["retain"]["n"] for r in runs] == [140, 93, 91]
    assert len((tmp_path / "s/003/forgotten.txt").read_text().split()) == 59
    assert len(json.loads((tmp_path / "s/003/lineage.json").read_text())) == 3


def test_a_later_run_alone_knows_what_is_gone(world: dict[str, Any], tmp_path: Path) -> None:
    first = {**world, **LABELS, "audit": "none"}
    unlearn.forget(**first, forget_ids="0:10", out=tmp_path / "one")
    result = unlearn.forget(
        **{**first, "checkpoint": tmp_path / "one"}, forget_ids="10:20", out=tmp_path / "two"
    )
    assert result.outcome.sets["retain"]["n"] == 130
    assert any("10 records that earlier requests forgot" in note for note in result.outcome.notes)


def test_every_moment_is_measured(world: dict[str, Any], tmp_path: Path) -> None:
    done = unlearn.forget_all(
        requests=REQUESTS, **world, **LABELS, audit="quick", out=tmp_path / "s"
    )
    moments = done.series.moments
    assert [m.request for m in moments] == [0, 1, 2, 3]
    assert all(len(m.forget) == 3 for m in moments)
    assert moments[0].forget[1] > 0.9 > 0.2 > moments[2].forget[1]  # the class, before and after
    assert moments[2].retain > 0.8
    assert len(done.verdicts) == 3
    assert done.verdict in done.verdicts
    report = json.loads((tmp_path / "s/003/report.json").read_text())
    assert report["series"]["moments"] == json.loads(done.series.model_dump_json())["moments"]
    assert "The series of requests" in (tmp_path / "s/003/report.html").read_text()


def test_a_killed_series_goes_on(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**world, **LABELS, "audit": "none"}
    whole = unlearn.forget_all(requests=REQUESTS, **settings, out=tmp_path / "whole")
    execute = series.execute

    def killed(plan: Any, *rest: Any) -> Any:
        if plan.config.out.name == "002":
            raise KeyboardInterrupt
        return execute(plan, *rest)

    monkeypatch.setattr(series, "execute", killed)
    with pytest.raises(KeyboardInterrupt):
        unlearn.forget_all(requests=REQUESTS, **settings, out=tmp_path / "s")
    started = (tmp_path / "s/001/run.json").stat().st_mtime_ns
    monkeypatch.setattr(series, "execute", execute)
    with pytest.raises(BadInput, match="other settings"):
        unlearn.forget_all(requests=REQUESTS[:2], **settings, out=tmp_path / "s")
    again = unlearn.forget_all(requests=REQUESTS, **settings, out=tmp_path / "s")
    assert (tmp_path / "s/001/run.json").stat().st_mtime_ns == started
    one, two = weights(tmp_path / "whole/003"), weights(tmp_path / "s/003")
    assert all(torch.equal(one[name], two[name]) for name in one)
    same = {"exclude": {"moments": {"__all__": {"seconds"}}}}
    assert again.series.model_dump(**same) == whole.series.model_dump(**same)
    with pytest.raises(BadInput, match="exists already"):
        unlearn.forget_all(requests=REQUESTS, **settings, out=tmp_path / "s")


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "no request"),
        (["0:10"], "request 1 is not a mapping"),
        ([{"forget_ids": "0:5"}, {"forget_clases": 2}], "request 2 says 'forget_clases'"),
        ([{"forget_ids": "0:5"}, {"forget_ids": "9999"}], "request 2: .*9999"),
        ([{"forget_classes": 2}, {"forget_classes": 2}], "request 2: .*already"),
    ],
)
def test_all_requests_are_checked_before_the_first(
    world: dict[str, Any], tmp_path: Path, requests: list[Any], message: str
) -> None:
    with pytest.raises(UnlearnError, match=message):
        unlearn.forget_all(requests=requests, **world, **LABELS, out=tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_the_command_says_it_all(world: dict[str, Any], tmp_path: Path) -> None:
    listed = tmp_path / "requests.yaml"
    listed.write_text('- forget_ids: "0:10"\n- forget_classes: 2\n')
    arguments = [
        "run", str(world["checkpoint"]), "--model", world["model"], "--data", str(world["data"]),
        "--method", "random_label", "--set", "lr=0.03", "--set", "epochs=6",
        "--set", "batch_size=8",
        "--audit", "none", "--requests", str(listed), "--out", str(tmp_path / "s"),
    ]  # fmt: skip
    found = CliRunner().invoke(cli, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    assert len(json.loads(found.stdout)["moments"]) == 3
    arguments[-1] = str(tmp_path / "t")
    shown = CliRunner().invoke(cli, arguments)
    assert "class 2" in shown.stdout
    assert "Highest accuracy on anything forgotten" in shown.stdout


def moment(request: int, retain: float, *forget: float) -> Moment:
    return Moment(request=request, forget=forget, retain=retain)


def test_the_worst_moments_by_hand() -> None:
    moments = [
        moment(0, 0.90, 1.0, 1.0),
        moment(1, 0.70, 0.1, 1.0),
        moment(2, 0.80, 0.4, 0.2),
    ]
    found = list(worst(moments).values())
    assert found == pytest.approx([0.4, 0.3, 0.7, 0.2, 0.2, 0.5 * 0.8 + 0.5 * 0.6])
    assert worst(moments[:1]) == {}
