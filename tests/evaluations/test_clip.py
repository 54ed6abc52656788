"""CLIP scores: by hand, as CLIP wants its pictures, and in audits of text-to-image pipelines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

import unlearn
from tests import digits, shapes
from unlearn.case import Case, of_audit
from unlearn.cli.main import cli
from unlearn.config import AuditConfig, configure
from unlearn.errors import BadInput
from unlearn.evaluations import audit, clip, drawing, pictures
from unlearn.evaluations.schema import Finding, Report
from unlearn.evaluations.seen import Seen
from unlearn.interface import Records
from unlearn.run import Run

NAMED = {"forget_concepts": "a red disc", "keep_concepts": "a green box", "audit": "quick"}
FEW = {"steps": 2, "images": 4}
GREY = (0.5, 0.5, 0.5)
PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a CLIP model that learned nothing, with the tokenizer of the shapes."""
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    tokenizer = AutoTokenizer.from_pretrained(shapes.HOME / "tokenizer")
    size = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    text = {
        **size, "vocab_size": len(tokenizer), "max_position_embeddings": 8,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = CLIPConfig(
        text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed(source: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(source, folder)
    change(folder)
    return folder


def written(name: str, **values: Any) -> Callable[[Path], None]:
    """Puts values in a JSON file of a directory."""

    def write(folder: Path) -> None:
        file = folder / name
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | values))

    return write


def finding(report: Report, subset: str) -> Finding:
    (found,) = [f for f in report.findings if (f.name, f.subset) == ("clip_score", subset)]
    return found


def blocks(*colours: tuple[int, int, int], side: int = 4) -> Tensor:
    """Pictures of one colour each, bytes."""
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, side, side)


def test_pictures_are_prepared_as_pillow_would() -> None:
    draw = np.random.default_rng(0)
    for height, width, side in ((20, 32, 8), (32, 20, 12), (9, 9, 24), (7, 13, 7)):
        raw = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        short = min(height, width)
        size = side * width // short, side * height // short
        image = Image.fromarray(raw).resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        image = image.crop((left, top, left + side, top + side))
        wanted = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        given = torch.from_numpy(raw).permute(2, 0, 1)[None]
        seen = clip.prepared(given, side, *PLAIN)[0]
        assert (seen - wanted).abs().max() <= 1.01 / 255


def test_colours_are_normalised() -> None:
    seen = clip.prepared(blocks((255, 0, 51)), 2, (0.5, 0.25, 0.2), (0.5, 0.25, 1.0))
    assert torch.allclose(seen, torch.tensor([1.0, -1.0, 0.0])[None, :, None, None].expand_as(seen))
    grey = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    assert torch.equal(clip.prepared(grey, 4, GREY, GREY), torch.ones(1, 3, 4, 4))
    opaque = torch.cat([blocks((255, 255, 255)), blocks((0, 0, 0))[:, :1]], 1)
    assert torch.equal(clip.prepared(opaque, 4, GREY, GREY), torch.ones(1, 3, 4, 4))


def test_embeddings_are_those_of_the_whole_model(tiny: Path) -> None:
    found = clip.read(tiny, "tiny")
    shown = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (70, 3, 16, 16), np.uint8))
    prompts = ["a red disc", "a green box of the blue thing and the gold plus"]
    whole = CLIPModel.from_pretrained(tiny)
    with torch.no_grad():
        said = whole(
            pixel_values=clip.prepared(shown, 16, found.mean, found.std), **found.read(prompts)
        )
    for ours, theirs in ((found.look(shown), said.image_embeds),
                         (found.texts(prompts), said.text_embeds)):  # fmt: skip
        ours = ours / np.linalg.norm(ours, axis=1, keepdims=True)
        assert ours == pytest.approx(theirs.numpy(), abs=1e-5)  # 70 pictures are two batches
    assert found.read(prompts)["input_ids"].shape == (2, 8)
    assert found.read(prompts)["input_ids"][1, -1] == found.tokenizer.eos_token_id  # cut off


def test_scores_are_two_and_a_half_times_the_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    says = {"along": [1.0, 0.0], "against": [0.0, -2.0]}
    monkeypatch.setattr(clip.Clip, "texts", lambda self, ps: np.array([says[p] for p in ps]))
    monkeypatch.setattr(clip.Clip, "look", lambda self, x: x[:, :2, 0, 0].double().numpy())
    run: Any = Run(None)  # type: ignore[arg-type]
    given = [blocks((3, 4, 0), (7, 0, 0)), blocks((3, 4, 0))]
    made = clip.Clip(nn.Identity(), None, "none", "", 4, 8, *PLAIN)
    one, two = made.scores(list(says), given, run)
    assert one.tolist() == pytest.approx([1.5, 2.5])
    assert two.tolist() == [0.0]


@pytest.mark.parametrize(
    ("name", "values", "mean"),
    [
        ("preprocessor_config.json", {"image_mean": GREY, "image_std": GREY}, GREY),
        ("processor_config.json", {"image_processor": {"image_mean": GREY}}, GREY),
        ("preprocessor_config.json", {"do_normalize": False, "image_mean": GREY}, PLAIN[0]),
        ("special.json", {"image_mean": GREY}, (0.48145466, 0.4578275, 0.40821073)),
    ],
)
def test_where_the_normalisation_stands(
    tiny: Path, tmp_path: Path, name: str, values: Any, mean: Any
) -> None:
    found = clip.read(changed(tiny, tmp_path / "other", written(name, **values)), "other")
    assert found.mean == pytest.approx(mean)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return write


def ended_by(token: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["eos_token_id"] = token
        (folder / "config.json").write_text(json.dumps(config))

    return write


def of_more(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["circle"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("config.json"), "no config.json"),
        (written("config.json", model_type="siglip"), "is none but siglip"),
        (written("config.json", architectures=["CLIPTextModel"]), "is none but CLIPTextModel"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json of .* is damaged"),
        (without("model.safetensors"), "holds no safetensors weights"),
        (pickled, "is a pickle"),
        (cut, "is truncated"),
        (weights(lambda w: w.pop("text_projection.weight")), "lacks the weights text_projection"),
        (weights(lambda w: w["visual_projection.weight"].fill_(torch.nan)), "not finite"),
        (without("tokenizer.json"), "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer of .* cannot be read"),
        (ended_by(0), "ends prompts otherwise than the model"),
        (of_more, "knows more tokens than the model"),
        (written("preprocessor_config.json", image_std=[1.0, 1.0]), "of three colours"),
        (written("preprocessor_config.json", image_std=[0.0] * 3), "of three colours"),
    ],
)
def test_what_is_no_clip_model_is_refused_before_anything_is_drawn(
    tiny: Path, tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    folder = changed(tiny, tmp_path / "broken", change)
    with pytest.raises(BadInput, match=words) as refused:
        drawing.DiffusionExamination().prepare(case_of(folder))
    assert "\n" not in str(refused.value)


def test_older_checkpoints_name_another_end(tiny: Path, tmp_path: Path) -> None:
    older = clip.read(changed(tiny, tmp_path / "older", ended_by(2)), "older")
    prompts = ["a red disc", "a blue box"]
    assert np.array_equal(older.texts(prompts), clip.read(tiny, "tiny").texts(prompts))


def case_of(folder: Any, **settings: Any) -> Case:
    given = {"original": shapes.HOME, "unlearned": shapes.HOME, "sampling": FEW, "clip": folder}
    return of_audit(configure(AuditConfig, **given | NAMED | settings))[0]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no directory: check the path"):
        drawing.DiffusionExamination().prepare(case_of(tmp_path / "nothing"))


def test_models_without_pictures_or_prompts_are_refused(
    tiny: Path, tiny_lm: Path, lm_files: Path
) -> None:
    with pytest.raises(BadInput, match="this model draws none"):
        audit(tiny_lm, tiny_lm, forget=lm_files / "forget.jsonl", clip=tiny)
    with pytest.raises(BadInput, match="takes no prompts"):
        audit(digits.untrained(), digits.untrained(), forget_classes="3", clip=tiny)
    with pytest.raises(BadInput, match="for the audit, and there is none"):
        unlearn.forget(shapes.HOME, method="uce", forget_concepts="disc", audit="none", clip=tiny)


def test_the_command_line_refuses_too(tmp_path: Path) -> None:
    named = ["run", str(shapes.HOME), "--method", "uce", "--forget-concepts", "disc"]
    given = ["--clip", str(tmp_path), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(cli, [*named, *given])
    assert done.exit_code == 2, done.output
    assert "the directory has no config.json" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_a_clip_model_counts_by_content(tiny: Path, tmp_path: Path) -> None:
    same = changed(tiny, tmp_path / "same", lambda f: None)
    other = changed(tiny, tmp_path / "other", weights(lambda w: w["logit_scale"].add_(1)))
    first = case_of(tiny).identity()
    assert case_of(same).identity() == first
    assert case_of(other).identity() != first
    assert case_of(None).identity() != first


@pytest.fixture(scope="module")
def report(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    out = tmp_path_factory.mktemp("audits") / "audit"
    return audit(
        shapes.HOME, shapes.HOME, **NAMED, sampling=FEW, clip=tiny, retrained=shapes.HOME, out=out
    )


def test_an_audit_reports_scores_of_every_model(report: Report) -> None:
    gone, kept = finding(report, "forget"), finding(report, "retain")
    assert (gone.better, gone.group, kept.better, kept.group) == (
        "lower", "extraction", "higher", "utility",
    )  # fmt: skip
    for found in (gone, kept):
        assert found.title.endswith("/tiny-clip sees it")
        assert (found.verdict, found.criterion, found.counted) == ("info", "", "pictures")
        assert found.original == found.unlearned == found.retrained
        value = found.original
        assert value.interval.low <= value.value <= value.interval.high
        assert value.interval.low >= 0
        assert value.interval.high <= 2.5
    drawn = {g.condition: g.count for g in report.grids}
    assert "no prompt" in drawn  # was drawn, and has no score
    assert kept.n == 4
    assert "tiny-clip, weights " in report.request["CLIP model"]


def test_scores_are_the_same_twice_and_leave_random_numbers_alone(
    tiny: Path, report: Report
) -> None:
    before = torch.random.get_rng_state()
    again = audit(shapes.HOME, shapes.HOME, **NAMED, sampling=FEW, clip=tiny)
    assert torch.equal(torch.random.get_rng_state(), before)
    for subset in ("forget", "retain"):
        assert finding(again, subset).original == finding(report, subset).original


def test_an_audit_without_a_clip_model_says_nothing_of_it() -> None:
    plain = audit(shapes.HOME, shapes.HOME, **NAMED, sampling=FEW)
    assert not [f for f in plain.findings if f.name == "clip_score"]
    assert "CLIP model" not in plain.request


def test_scores_are_read_back(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [pictures.Condition("a red disc", "disc", "forget", 3),
             pictures.Condition("", "no prompt", "retain", 2)]  # fmt: skip
    case, judge = case_of(tiny), clip.read(tiny, "tiny")
    run, how = Run(case.checkpoint.task, work=tmp_path), pictures.Sampling(None, 2, 1.0)
    model = shapes.pipeline()

    def draw(role: str) -> pictures.Drawn:
        return pictures.drawn(role, model, asked, how, None, run, "quick", {}, judge)

    first = draw("original")
    assert list(first.matched) == [0]
    assert first.matched[0].shape == (3,)
    assert judge.model.device.type == "cpu"

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(clip.Clip, "look", never)
    assert draw("original").matched[0].tolist() == first.matched[0].tolist()
    with pytest.raises(AssertionError, match="again"):
        draw("unlearned")


def test_an_interrupted_run_scores_each_model_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, phases = clip.Clip.scores, []

    def dies(self: clip.Clip, prompts: Any, drawn: Any, run: Run, phase: str) -> Any:
        phases.append(phase)
        if len(phases) == 2:
            raise KeyboardInterrupt
        return scores(self, prompts, drawn, run, phase)

    def run() -> Report:
        return unlearn.forget(
            shapes.HOME, method="uce", **NAMED, sampling=FEW, clip=tiny, out=tmp_path / "run"
        ).report

    monkeypatch.setattr(clip.Clip, "scores", dies)
    with pytest.raises(KeyboardInterrupt):
        run()
    found = finding(run(), "forget")
    assert [phase.split()[3] for phase in phases] == ["original", "unlearned", "unlearned"]
    assert found.original is not None
    assert found.unlearned != found.original


def _words(self: clip.Clip, prompts: Sequence[str]) -> Any:
    return np.array([[float(colour in p) for colour in ("red", "green", "blue")] for p in prompts])


def _colours(self: clip.Clip, shown: Tensor) -> Any:
    return shown.double().square().mean((2, 3)).numpy() + 1e-9


def test_the_score_falls_where_pictures_no_longer_match(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told "red", it draws blue; a CLIP that knows colours alone sees it."""
    monkeypatch.setattr(clip.Clip, "texts", _words)
    monkeypatch.setattr(clip.Clip, "look", _colours)
    monkeypatch.setattr(clip, "_check", lambda *_: None)
    model = shapes.pipeline()
    red, blue = (model.token_ids([word])[0, 1] for word in ("red", "blue"))
    rows = model.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        rows[red] = rows[blue]
    model.save_pretrained(tmp_path / "blue")
    report = audit(
        shapes.HOME, tmp_path / "blue", **NAMED, sampling={"steps": 8, "images": 8}, clip=tiny
    )
    gone, kept = finding(report, "forget"), finding(report, "retain")
    assert gone.original.value > gone.unlearned.value + 0.5
    assert gone.original.interval.low > gone.unlearned.interval.high
    assert kept.original == kept.unlearned
    assert kept.original.value > 1.5


def test_records_say_nothing_of_their_captions(tiny: Path) -> None:
    case = case_of(tiny, forget_concepts=None, keep_concepts=None, forget_ids="0:2",
                   data=shapes.records(16))  # fmt: skip
    assert isinstance(case.target, Records)
    drawn = pictures.Drawn([], [], [], 1, {}, {0: np.array([0.5, 1.0])})
    asked = [pictures.Condition("a red disc", "disc", "forget", 2)]
    made = Seen(asked, {"original": drawn, "unlearned": drawn}, None, "", case, case.device, "tiny")
    (check,) = made._clip_scores()
    assert check.fields["better"] == "closer_to_retrained"
    assert check.fields["unlearned"].value == 0.75
