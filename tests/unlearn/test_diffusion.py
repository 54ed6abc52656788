"""The seam of diffusion models: draws, losses, pipelines, and what is refused."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import unlearn
from tests import digits, shapes
from unlearn.cli.main import cli
from unlearn.data import load
from unlearn.errors import BadInput, Unsupported
from unlearn.noising import Kind, from_eps
from unlearn.pipeline import Pipeline, outline, read
from unlearn.tasks.base import Encoded
from unlearn.tasks.diffusion import Denoised, Diffusion, task_of

SMALL = {"epochs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def model() -> Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return digits.untrained().eval()


def encoded(model: Pipeline, rows: list[dict[str, Any]], name: str = "forget") -> Encoded:
    return Encoded(load(rows, name), task_of(model))


# Draws


def test_draws_belong_to_the_record(model: Pipeline) -> None:
    """The same in another set, in another place, beside other records, for another model."""
    rows = digits.records(6)
    one, other = encoded(model, rows), encoded(model, rows[::-1], "retain")
    task = task_of(model)
    t, noise = task.drawn(model, one.batch(range(6)))
    again, noise_again = task.drawn(digits.untrained().eval(), other.batch([3]))
    assert torch.equal(t[2:3], again)
    assert torch.equal(noise[2:3], noise_again)
    assert not torch.equal(t[2], t[3])


def test_times_are_antithetic_and_stratified(model: Pipeline) -> None:
    task = task_of(model)
    task.draws = 8
    t, noise = task.drawn(model, encoded(model, digits.records(20)).batch(range(20)))
    assert noise.shape == (20, 8, 1, 8, 8)
    assert torch.equal(t[:, :4] + t[:, 4:], torch.full((20, 4), 999))
    assert torch.equal(t[:, :4] // 125, torch.arange(4).expand(20, 4))  # one in each stratum


def test_draws_are_fresh_in_train_mode(model: Pipeline) -> None:
    batch, task = encoded(model, digits.records(4)).batch(range(4)), task_of(model)
    model.train()
    try:
        (one, _), (two, _) = task.drawn(model, batch), task.drawn(model, batch)
    finally:
        model.eval()
    assert one.shape == (4, 2)
    assert not torch.equal(one, two)
    assert torch.equal(one.sum(1), torch.full((4,), 999))


def test_redrawn_batches_differ_in_eval_mode_and_follow_the_seed(model: Pipeline) -> None:
    batch, task = encoded(model, digits.records(4)).batch(range(4)), task_of(model)
    found = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found.append(task.nll(model, task.redrawn(batch)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_single_draws_make_up_the_loss(model: Pipeline) -> None:
    batch, task = encoded(model, digits.records(5)).batch(range(5)), task_of(model)
    with torch.no_grad():
        parts = torch.stack([task.nll(model, one) for one in task.singly(batch)])
        torch.testing.assert_close(parts.mean(0), task.nll(model, batch))
    assert len(parts) == task.draws


# Losses


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_one_noise_predictor_in_other_terms(kind: Kind) -> None:
    """What it predicts stands for the same noise; its loss is that of its own terms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = digits.untrained().double().eval()

    class Translated(torch.nn.Module):
        config = inner.denoiser.config

        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Any:
            eps = inner(x_t, t, class_labels)
            said = from_eps(eps, x_t, inner.abars[t], kind)
            return type("Out", (), {"sample": said})()

    import diffusers

    scheduler: Any = diffusers.DDPMScheduler.from_config(
        inner.pipeline.scheduler.config, prediction_type=kind
    )
    pipeline: Any = inner.pipeline.__class__(inner.denoiser, scheduler)
    other = Pipeline(pipeline, null_class=10).double()
    assert other.kind == kind
    other.pipeline.unet = other.unet = Translated()
    other.eval()
    rows = encoded(inner, digits.records(6)).batch(range(6))
    task = task_of(inner)
    with torch.no_grad():
        t, noise = task.drawn(inner, rows)
        x_t = inner.noised(rows["pixel_values"].double(), noise[:, 0], t[:, 0])
        torch.testing.assert_close(
            other.eps(x_t, t[:, 0], rows["labels"][:, 0]),
            inner.eps(x_t, t[:, 0], rows["labels"][:, 0]),
        )
        per_draw = task.predictions(inner, rows).compact, task.predictions(other, rows).compact
    abar = inner.abars[t]
    factor = 1 / abar if kind == "v_prediction" else (1 - abar) / abar
    torch.testing.assert_close(per_draw[1], per_draw[0] * factor)


def test_there_are_no_logits(model: Pipeline) -> None:
    found = task_of(model).predictions(model, encoded(model, digits.records(2)).batch([0, 1]))
    assert isinstance(found, Denoised)
    with pytest.raises(Unsupported, match="no logits"):
        found.each(lambda logits, labels: labels)
    torch.testing.assert_close(found.unit_nll()[:, 0], found.nll())


def test_relabelled_records_aim_at_what_the_network_says_itself(model: Pipeline) -> None:
    task = task_of(model)
    one = encoded(model, digits.records(3))
    same = one.replaced(
        {**one[i], "instead_labels": torch.tensor(one[i]["label"])} for i in range(3)
    )
    with torch.no_grad():
        assert float(task.nll(model, same.batch(range(3))).abs().max()) == 0


def test_relabelled_and_other_records_in_one_batch(model: Pipeline) -> None:
    """Each keeps its own aim, whichever comes first."""
    task, plain = task_of(model), encoded(model, digits.records(2))
    told = {**plain[1], "instead_labels": torch.tensor((plain[1]["label"] + 1) % 10)}
    mixed = plain.replaced([plain[0], told])
    with torch.no_grad():
        for order in ([0, 1], [1, 0]):
            found = task.nll(model, mixed.batch(order))
            alone = [task.nll(model, mixed.batch([i]))[0] for i in order]
            torch.testing.assert_close(found, torch.stack(alone))
        expected = task.nll(model, plain.batch([0, 1]))
        torch.testing.assert_close(task.nll(model, mixed.batch([0])), expected[:1])
        assert not torch.allclose(task.nll(model, mixed.batch([1])), expected[1:])


# Pipelines


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    model = digits.untrained()
    model.steps = 7
    model.save_pretrained(tmp_path / "made")
    back = read(tmp_path / "made", torch.float32)
    assert back.null_class == digits.NULL
    assert back.steps == 7
    state = back.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    back.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "made").rglob("*.safetensors"):
        again = tmp_path / "again" / file.relative_to(tmp_path / "made")
        assert file.read_bytes() == again.read_bytes()


PLAIN = """
import sys, torch, diffusers
assert "unlearn" not in sys.modules
pipe = diffusers.DDPMPipeline.from_pretrained(sys.argv[1], use_safetensors=True)
said = pipe.unet(torch.zeros(1, 1, 8, 8), torch.tensor([5]), class_labels=torch.tensor([2])).sample
print(float(said.double().abs().sum()))
"""


@pytest.mark.parametrize("made", ["digits", "shapes"])
def test_an_outline_says_what_the_weights_say(made: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue("digits_pipeline") if made == "digits" else shapes.HOME
    whole, bare = read(path, torch.float32), outline(path)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert {n: p.shape for n, p in bare.named_parameters()} == {
        n: p.shape for n, p in whole.named_parameters()
    }
    ours, theirs = (vars(task_of(m)) | {"tokenizer": None} for m in (bare, whole))
    assert ours == theirs


def test_diffusers_alone_reads_what_a_run_wrote(tmp_path: Path, digits_pipeline: Path) -> None:
    run = unlearn.forget(
        digits_pipeline, method="grad_diff", data=digits.records(40), forget_classes="3",
        set=SMALL, audit="none", out=tmp_path / "run",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "run" / "model")],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    model: Any = run.subject.model
    with torch.no_grad():
        said = model(torch.zeros(1, 1, 8, 8), torch.tensor([5]), torch.tensor([2]))
    assert float(done.stdout.split()[-1]) == pytest.approx(
        float(said.double().abs().sum()), rel=1e-6
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["model_kind"] == "pipeline"
    assert record["fingerprint_in"] != record["fingerprint_out"]
    again = unlearn.forget(
        tmp_path / "run", method="grad_diff", data=digits.records(40)[:20], forget_classes="4",
        set=SMALL, audit="none", out=tmp_path / "second",
    )  # fmt: skip
    lineage = json.loads((tmp_path / "second" / "lineage.json").read_text())
    assert [entry["fingerprint_in"] for entry in lineage] == [
        record["fingerprint_in"], record["fingerprint_out"],
    ]  # fmt: skip
    assert again.outcome.fingerprint_in == run.outcome.fingerprint_out


def test_a_killed_run_goes_on_to_the_same_weights(
    tmp_path: Path, digits_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import unlearn.training as training

    request: dict[str, Any] = {
        "method": "npo", "data": digits.records(60), "forget_classes": "3", "audit": "none",
        "set": {"epochs": 6, "batch_size": 4, "beta": 2.0, "lr": 1e-3}, "save_every": 0.0,
    }  # fmt: skip
    unlearn.forget(digits_pipeline, **request, out=tmp_path / "whole")
    clipped = training._clipped
    left = [5]

    def dies(*given: Any) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return clipped(*given)

    monkeypatch.setattr(training, "_clipped", dies)
    with pytest.raises(KeyboardInterrupt):
        unlearn.forget(digits_pipeline, **request, out=tmp_path / "cut")
    monkeypatch.setattr(training, "_clipped", clipped)
    unlearn.forget(digits_pipeline, **request, out=tmp_path / "cut")
    files = [next((tmp_path / n / "model/unet").glob("*.safetensors")) for n in ("whole", "cut")]
    one, two = (load_file(file) for file in files)
    assert all(torch.equal(one[k], two[k]) for k in one)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    events = [(event["event"], event.get("step")) for event in map(json.loads, lines)]
    assert ("resumed", 5) in events


def _transformer() -> Pipeline:
    import diffusers

    transformer: Any = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=4, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    vae: Any = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        in_channels=3, sample_size=8,
    )  # fmt: skip
    scheduler: Any = diffusers.DDIMScheduler()
    return Pipeline(diffusers.DiTPipeline(transformer, vae, scheduler))


def test_a_class_conditional_transformer(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _transformer().save_pretrained(tmp_path / "dit")
    draw = torch.Generator().manual_seed(0)
    rows = [{"image": torch.rand(3, 8, 8, generator=draw), "label": i % 10} for i in range(20)]
    done = unlearn.forget(
        tmp_path / "dit", method="grad_diff", data=rows, forget_classes="3", set=SMALL,
        audit="none", out=tmp_path / "run",
    )  # fmt: skip
    model: Any = done.subject.model
    assert (model.classes, model.null_class, model.shape) == (10, 10, (4, 4, 4))
    assert all(name.startswith("transformer.") for name, _ in model.named_parameters())
    drawn = model.sample([3, 4], draw, steps=2, guidance=2.0)
    assert drawn.shape == (2, 3, 8, 8)
    pruned = unlearn.forget(
        tmp_path / "dit", method="subspace_pruning", forget_classes="3", audit="none",
        set={"steps": 3, "tau": 2, "rho": 0.1},
    )  # fmt: skip
    blocks = pruned.subject.model.denoiser.transformer_blocks
    assert all(bool((block.ff.net[2].weight == 0).any()) for block in blocks)
    back = read(tmp_path / "run" / "model", torch.float32).state_dict()
    assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())


# What is refused, in Python and on the command line, before anything starts


def _flags(settings: dict[str, Any]) -> list[str]:
    return [part for k, v in settings.items() for part in (f"--{k.replace('_', '-')}", str(v))]


def refused(
    tmp_path: Path, checkpoint: Path, message: str, kind: type[Exception] = BadInput,
    records: list[dict[str, Any]] | None = None, **settings: Any,
) -> None:  # fmt: skip
    """The same sentence both ways, and nothing left behind."""
    settings = {"method": "grad_diff", "audit": "none", **settings}
    out = tmp_path / "out"
    given = {"data": records} if records else {}
    with pytest.raises(kind, match=message):
        unlearn.forget(checkpoint, **settings, **given, out=out)
    if records:
        file = tmp_path / "records.parquet"
        _write(records, file)
        settings["data"] = file
    result: Result = CliRunner().invoke(
        cli, ["run", str(checkpoint), *_flags(settings), "--out", str(out)]
    )
    assert result.exit_code == 2
    flat = " ".join(result.stderr.split())
    assert re.search(message, flat), flat
    assert "Traceback" not in flat
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".out", "out"))]


def _write(records: list[dict[str, Any]], file: Path) -> None:
    import datasets

    rows: dict[str, list[Any]] = {key: [] for key in records[0]}
    for record in records:
        picture = (record["image"].permute(1, 2, 0) * 255).byte().numpy().squeeze()
        kept = io.BytesIO()
        Image.fromarray(picture).save(kept, "png")
        for key, value in {**record, "image": {"bytes": kept.getvalue(), "path": None}}.items():
            rows[key].append(value)
    features = {k: datasets.Value("int64" if k == "label" else "string") for k in rows}
    features["image"] = datasets.Image()
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)


@pytest.fixture
def copied(tmp_path: Path, digits_pipeline: Path) -> Path:
    return Path(shutil.copytree(digits_pipeline, tmp_path / "copied"))


def test_a_class_out_of_range(tmp_path: Path, digits_pipeline: Path) -> None:
    message = "class 12 is out of range: the pipeline has classes 0 to 9"
    rows = digits.records(20)
    refused(tmp_path, digits_pipeline, message, records=rows, forget_classes="12")
    refused(tmp_path, digits_pipeline, message, records=[*rows, {**rows[0], "label": 12}],
            forget_classes="3")  # fmt: skip


def test_a_class_that_is_no_number(tmp_path: Path, digits_pipeline: Path) -> None:
    refused(tmp_path, digits_pipeline, "has no class 'seven': its classes have no names",
            records=digits.records(20), forget_classes="seven")  # fmt: skip


def test_concepts_of_a_pipeline_without_prompts(tmp_path: Path, digits_pipeline: Path) -> None:
    refused(tmp_path, digits_pipeline, "--forget-concepts is for text-to-image models",
            method="subspace_pruning", forget_concepts="seven")  # fmt: skip


def test_a_pipeline_without_classes(tmp_path: Path) -> None:
    import diffusers

    unet: Any = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip
    scheduler: Any = diffusers.DDPMScheduler()
    model = Pipeline(diffusers.DDPMPipeline(unet, scheduler))
    model.save_pretrained(tmp_path / "plain")
    refused(tmp_path, tmp_path / "plain", "not conditioned on classes: name concepts or records",
            records=digits.records(20), forget_classes="3")  # fmt: skip
    done = unlearn.forget(  # pictures alone can be forgotten
        tmp_path / "plain", method="grad_diff", data=digits.records(20), forget_ids="0:4",
        set=SMALL, audit="none",
    )  # fmt: skip
    assert done.subject.model.null(2) is None
    with pytest.raises(BadInput, match="say how many pictures"):
        done.subject.model.sample(None, torch.Generator())
    assert done.subject.model.sample(None, torch.Generator(), 2, count=3).shape == (3, 1, 8, 8)


def test_flow_matching(tmp_path: Path, copied: Path) -> None:
    import diffusers

    index = json.loads((copied / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (copied / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(copied / "scheduler")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(copied / "scheduler")
    refused(tmp_path, copied, "flow matching is not supported", Unsupported,
            records=digits.records(20), forget_classes="3")  # fmt: skip


def test_pickled_weights(tmp_path: Path, copied: Path) -> None:
    file = next((copied / "unet").glob("*.safetensors"))
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    refused(tmp_path, copied, "safetensors", records=digits.records(20), forget_classes="3")


def test_code_of_its_own(tmp_path: Path, copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "unet": ["my_unet", "Net"]}))
    refused(tmp_path, copied, "the unet of .* is code of its own, which is never run",
            records=digits.records(20), forget_classes="3")  # fmt: skip
    own = {**index, "_class_name": ["pipeline", "MyPipeline"]}
    (copied / "model_index.json").write_text(json.dumps(own))
    refused(tmp_path, copied, "brings Python code of its own, which is never run",
            records=digits.records(20), forget_classes="3")  # fmt: skip


def test_another_kind_of_pipeline(tmp_path: Path, copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    refused(tmp_path, copied, "is a FluxPipeline: supported are", Unsupported,
            records=digits.records(20), forget_classes="3")  # fmt: skip


def test_kl_needs_logits(tmp_path: Path, digits_pipeline: Path) -> None:
    message = "npo works on causal_lm and classification, and this model is diffusion"
    with pytest.raises(BadInput, match=message):
        unlearn.forget(
            digits_pipeline, method="npo", data=digits.records(20), forget_classes="3",
            set={"retention": "kl"}, audit="none",
        )  # fmt: skip


# Prompts


def test_a_word_the_tokenizer_reads_as_nothing() -> None:
    task = Diffusion((3, 32, 32), tokenizer=shapes._tokenizer())
    assert task.expressible("a red disc") is None
    assert "knows no word of '7 !'" in (task.expressible("7 !") or "")
    assert task.lost_words("a red 7") == ["7"]


def test_concepts_are_checked_before_anything_starts(tmp_path: Path) -> None:
    refused(tmp_path, shapes.HOME, "the tokenizer knows no word of '777'",
            method="subspace_pruning", forget_concepts="777")  # fmt: skip
    refused(tmp_path, shapes.HOME, "the anchor 'disc' is one of the concepts to forget",
            method="subspace_pruning", forget_concepts="disc", anchor="disc")  # fmt: skip


def test_a_lost_word_is_named_in_a_warning(tmp_path: Path) -> None:
    done = unlearn.forget(
        shapes.HOME, method="subspace_pruning", forget_concepts="a red disc 7", audit="none",
        set={"steps": 2, "tau": 1, "seeds": 1, "rho": 0.01},
    )  # fmt: skip
    assert any("does not know '7' of 'a red disc 7'" in note for note in done.outcome.notes)
