"""SFD: its losses against Gaussians whose scores are known, and pictures drawn in one step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unlearn
from tests import digits, shapes
from unlearn import registry
from unlearn.distillation import (
    FLOOR,
    Distillation,
    Learner,
    Rows,
    fake_loss,
    generator_loss,
    one_step_scheduler,
)
from unlearn.errors import BadInput, Collapsed, Unsupported
from unlearn.interface import Classes, Concepts, Request, Subject
from unlearn.methods.sfd import Conditions, conditions, rows
from unlearn.noising import noised, to_x0
from unlearn.pipeline import Pipeline, read
from unlearn.run import Run
from unlearn.tasks.diffusion import task_of

ABAR = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
THREE = Classes((3,), ("3",))
SMALL: dict[str, Any] = {"steps": 4, "batch_size": 3, "forget_rows": 2, "lr": 1e-3}
PAINTED = "|".join(f"a {colour} {{}}" for colour in shapes.COLOURS)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------ the losses


def seen(x_t: Tensor, abar: Tensor, mean: float, spread: float) -> Tensor:
    """E[x_0 | x_t] of data N(mean, spread^2)."""
    a = abar.view(-1, 1, 1, 1)
    gain = a.sqrt() * spread**2 / (a * spread**2 + 1 - a)
    return mean + gain * (x_t - a.sqrt() * mean)


def noise_seen(x_t: Tensor, abar: Tensor, mean: float, spread: float) -> Tensor:
    """E[noise | x_t] of the same data."""
    a = abar.view(-1, 1, 1, 1)
    return (x_t - a.sqrt() * seen(x_t, abar, mean, spread)) / (1 - a).sqrt()


def test_an_exact_sampler_has_nothing_to_learn() -> None:
    mean, spread = torch.tensor(0.7, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    drawn = mean + spread * normal(3, 1, 2, 2)
    x_t = noised(drawn, normal(3, 1, 2, 2, seed=1), ABAR)
    both = seen(x_t, ABAR, 0.7, 0.4)  # a fake score that knows what is drawn is the teacher
    loss = generator_loss(both, both.clone(), drawn, 1.2)
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert mean.grad == spread.grad == 0


def test_the_true_score_has_the_least_fake_loss() -> None:
    abar = torch.full((40_000,), 0.3, dtype=torch.float64)
    data, noise = 0.7 + 0.4 * normal(40_000, 1, 2, 1), normal(40_000, 1, 2, 1, seed=1)
    said = noise_seen(noised(data, noise, abar), abar, 0.7, 0.4).requires_grad_()
    loss = fake_loss(said, noise)
    a, pixels = 0.3, 2
    expected = pixels * a * 0.4**2 / (a * 0.4**2 + 1 - a)  # variance of the noise, given x_t
    assert float(loss.detach().mean()) == pytest.approx(expected, rel=0.02)
    # orthogonal to every function of x_t: no shift and no stretch of the answer helps
    (slope,) = torch.autograd.grad(loss.mean(), said)
    stretch = (slope * said.detach()).sum()
    assert abs(float(slope.sum())) < 0.02
    assert abs(float(stretch)) < 0.02


def test_generator_loss_expanded() -> None:
    real, fake, drawn = (normal(3, 2, 4, 4, seed=i) for i in range(3))
    apart = real - fake
    squared, mixed = (part.flatten(1).sum(1) for part in (apart.square(), apart * (fake - drawn)))
    omega = (real - drawn).abs().mean((1, 2, 3))
    expected = ((1 - 1.2) * squared + mixed) / omega
    assert torch.allclose(generator_loss(real, fake, drawn, 1.2), expected, rtol=0, atol=1e-12)


def test_omega_is_a_constant_with_a_floor() -> None:
    real, fake = normal(1, 1, 2, 2), normal(1, 1, 2, 2, seed=1)
    drawn = normal(1, 1, 2, 2, seed=2).requires_grad_()
    (found,) = torch.autograd.grad(generator_loss(real, fake, drawn, 1.0).sum(), drawn)
    omega = (real - drawn).abs().mean().detach()
    assert torch.allclose(found, -(real - fake) / omega, rtol=0, atol=1e-12)
    exact = generator_loss(real, fake, real, 1.0)  # omega would be 0
    assert torch.allclose(exact, -(real - fake).square().sum() / FLOOR, rtol=1e-12)


class Gaussians(nn.Module):
    """One pixel, normal in every class: a pipeline whose optimal networks have three numbers."""

    kind = "epsilon"

    def __init__(self, means: list[float]) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor(means, dtype=torch.float64))
        self.spread = nn.Parameter(torch.full((len(means),), 0.5, dtype=torch.float64))
        self.abars = torch.linspace(0.99, 0.02, 50, dtype=torch.float64)
        self.shape, self.device, self.dtype = (1, 1, 1), torch.device("cpu"), torch.float64

    def forward(self, x_t: Tensor, t: Tensor, told: Tensor) -> Tensor:
        a, s = self.abars[t], self.spread[told]
        apart = x_t.flatten() - a.sqrt() * self.means[told]
        return ((1 - a).sqrt() * apart / (a * s**2 + 1 - a)).view(x_t.shape)

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return noised(x_0, eps, self.abars[t])


def test_it_draws_the_anchor_in_the_place_of_what_must_go() -> None:
    model: Any = Gaussians([-1.0, 2.0, 0.5])
    losses = Distillation(model, t_init=40, alpha=1.0)
    table = torch.arange(3)
    told = Conditions(table, table[[0, 2]], table[[1]], table[[0]][None])
    teacher = {name: p.detach() for name, p in model.named_parameters()}
    generator, fake = Learner(teacher, 0.02), Learner(teacher, 0.05)
    for step in range(400):
        half = partial(rows, model, told, (32, 32), 1.0, (2, 48))
        draws = [torch.Generator().manual_seed(2 * step + i) for i in range(2)]
        fake.step(partial(losses.fake, generator.still, fake.weights), half(draws[0]), 64)
        of_generator = partial(losses.generator, generator.weights, fake.still, teacher)
        generator.step(of_generator, half(draws[1]), 64)
    start = normal(3000, 1, 1, 1)
    drawn = losses.drawn(generator.still, start, table.repeat_interleave(1000)).view(3, 1000)
    assert drawn.mean(1).tolist() == pytest.approx([-1.0, -1.0, 0.5], abs=0.15)


# --------------------------------------------------------------------- rows and their passes


def trio(model: Pipeline) -> list[dict[str, Tensor]]:
    """Three different sets of weights of one architecture."""
    found = []
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        found.append(
            {
                name: (p + 0.02 * torch.randn(p.shape, generator=draw)).detach().requires_grad_()
                for name, p in model.named_parameters()
            }
        )
    return found


def still(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in weights.items()}


def world() -> tuple[Pipeline, Rows]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = digits.untrained().double().eval()
    told = conditions(model, THREE)
    draw = torch.Generator().manual_seed(0)
    return model, rows(model, told, (4, 2), 0.1, (60, 950), draw)


def test_one_pass_over_both_kinds_of_rows_is_two_passes() -> None:
    model, both = world()
    assert both.start.dtype == torch.float64
    apart = [Rows(*(getattr(both, f)[part] for f in Rows.__annotations__))
             for part in (slice(4), slice(4, 6))]  # fmt: skip
    generator, fake, teacher = trio(model)
    losses = Distillation(model, 755, alpha=1.2)
    for learns, loss in (
        (fake, partial(losses.fake, still(generator), fake)),
        (generator, partial(losses.generator, generator, still(fake), still(teacher))),
    ):
        merged = torch.autograd.grad((loss(both) * both.weight).sum(), list(learns.values()))
        retained, forgotten = (loss(part).mean() for part in apart)
        separate = torch.autograd.grad(retained + 0.1 * forgotten, list(learns.values()))
        assert max(float((a - b).abs().max()) for a, b in zip(merged, separate, strict=True)) < 1e-9


def test_the_cut_into_pieces_changes_nothing() -> None:
    model, both = world()
    found = []
    for size in (2, 6):
        generator, fake = Learner(trio(model)[0], 1e-3), Learner(trio(model)[1], 1e-3)
        losses = Distillation(model, 755)
        fake.step(partial(losses.fake, generator.still, fake.weights), both, size)
        found.append([p.grad for p in fake.weights.values() if p.grad is not None])
    assert found[0]
    assert max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) < 1e-9


def test_the_teacher_alone_is_guided() -> None:
    model, both = world()
    weights = still(dict(model.named_parameters()))
    losses = Distillation(model, 755, 1.2, guidance=2.0, null=model.null(1))
    found = losses.generator(weights, weights, weights, both)
    with torch.no_grad():
        t_init = torch.full((6,), 755)

        def x_0(eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
            return to_x0(eps, x_t, model.abars[t], "epsilon")

        drawn = x_0(model.eps(both.start, t_init, both.told), both.start, t_init)
        x_t = model.noised(drawn, both.noise, both.t)
        real = model.eps(x_t, both.t, both.instead, model.null(6), 2.0)
        fake = model.eps(x_t, both.t, both.told)
        real, fake = (x_0(part, x_t, both.t) for part in (real, fake))
    assert torch.allclose(found, generator_loss(real, fake, drawn, 1.2), rtol=1e-9)


def test_rows_ask_the_teacher_for_something_else_where_it_must_go() -> None:
    told = conditions(digits.untrained(), Classes((3, 8), ("3", "8")))
    found = rows(
        digits.untrained(), told, (50, 60), 0.5, (10, 20), torch.Generator().manual_seed(0)
    )
    assert torch.equal(found.told[:50], found.instead[:50])
    kept = {0, 1, 2, 4, 5, 6, 7, 9}  # not the null class
    assert set(found.told[:50].tolist()) == kept
    assert set(found.told[50:].tolist()) == {3, 8}
    assert set(found.instead[50:].tolist()) == kept
    assert set(found.t.tolist()) == set(range(10, 20))
    assert found.weight.unique().tolist() == pytest.approx([0.5 / 60, 1 / 50])


def test_an_anchor_is_what_everything_turns_into() -> None:
    told = conditions(digits.untrained(), Classes((3, 8), ("3", "8"), anchor=5))
    assert told.instead.tolist() == [[5], [5]]
    assert told.retained.tolist() == [0, 1, 2, 4, 5, 6, 7, 9]


class Prompted:
    """Prompts stand for themselves."""

    def condition(self, prompts: list[str]) -> list[str]:
        return prompts


def prompts(target: Concepts, templates: str) -> tuple[list[str], list[str], list[list[str]]]:
    model: Any = Prompted()
    told = conditions(model, target, templates)
    table: Any = told.table
    said = [[table[i] for i in part] for part in (told.retained, told.forgotten)]
    return said[0], said[1], [[table[i] for i in row] for row in told.instead]


def test_prompts_differ_from_their_override_by_the_concept_alone() -> None:
    retained, forgotten, instead = prompts(
        Concepts(("disc", "ring"), "box", ("plus",)), "a {}| a red {} "
    )
    assert retained == ["a box", "a red box", "a plus", "a red plus"]
    assert forgotten == ["a disc", "a red disc", "a ring", "a red ring"]
    assert instead == [["a box"], ["a red box"]] * 2


def test_without_an_anchor_any_kept_concept_stands_in() -> None:
    _, forgotten, instead = prompts(Concepts(("disc",), "", ("plus", "box")), "a {}|the {}")
    assert forgotten == ["a disc", "the disc"]
    assert instead == [["a plus", "a box"], ["the plus", "the box"]]


def test_faults_of_requests() -> None:
    model: Any = Prompted()
    with pytest.raises(BadInput, match="pass --anchor"):
        conditions(model, Concepts(("disc",)))
    with pytest.raises(BadInput, match="'red' has no"):
        conditions(model, Concepts(("disc",), "box"), "a {}|red")
    everything = Classes(tuple(range(10)), tuple("0123456789"))
    with pytest.raises(BadInput, match="every class would be forgotten"):
        conditions(digits.untrained(), everything)
    with pytest.raises(BadInput, match="stands for none"):
        forget(digits.untrained(null=None), guidance=2.0)


# ----------------------------------------------------------------------------- in one step


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_one_inference_step_goes_from_the_start_to_the_picture(kind: Any) -> None:
    import diffusers

    before: Any = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    scheduler = one_step_scheduler(before, 440)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [440]
    assert torch.equal(scheduler.alphas_cumprod, before.alphas_cumprod[:441])
    said, start = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    drawn = scheduler.step(said, 440, start).prev_sample
    abar = before.alphas_cumprod[440].double().expand(2)
    assert torch.allclose(drawn, to_x0(said, start, abar, kind), rtol=0, atol=1e-5)


def forget(model: Pipeline, run: Run | None = None, target: Any = THREE, **settings: Any) -> Any:
    method: Any = registry.build("sfd", {**SMALL, **settings})
    return method.unlearn(Subject(model), Request(target), run or Run(task_of(model)))


def untrained() -> Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return digits.untrained()


def same(one: Subject, other: Subject) -> bool:
    a, b = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a)


class Watching:
    """Notes progress, and is killed after a step."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.steps, self.said = last, list[int](), list[str]()

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        assert set(numbers) == {"fake_loss", "generator_loss"}
        assert total == SMALL["steps"]
        self.steps.append(done)

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


class Killed(BaseException):
    pass


class Killing(Watching):
    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        if done == 3:  # before this step is kept
            raise Killed


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = forget(untrained())
    task = task_of(untrained())
    with pytest.raises(Killed):
        forget(untrained(), Run(task, work=tmp_path, save_every=0, progress=Killing()))
    watching = Watching()
    resumed = forget(untrained(), Run(task, work=tmp_path, save_every=0, progress=watching))
    assert watching.steps == [3, 4]
    assert "draws in one step" in watching.said[-1]
    assert same(whole, resumed)
    assert not same(whole, forget(untrained(), Run(task, seed=1)))
    assert not same(whole, Subject(untrained()))


def test_a_destroyed_model_is_not_returned() -> None:
    with pytest.raises(Collapsed, match="at step 1: the generator_loss"):
        forget(untrained(), fake_lr=1e38)


def test_half_precision_stays_near() -> None:
    full, half = forget(untrained()), forget(untrained(), precision="bf16")
    a, b = full.model.state_dict(), half.model.state_dict()
    far = [float((a[k] - b[k]).abs().max()) for k in a]
    assert 0 < max(far) < 0.05
    assert all(value.dtype is torch.float32 for value in b.values())


def test_steps_pass_without_a_mean() -> None:
    assert not same(forget(untrained()), forget(untrained(), average=0))


@pytest.fixture(scope="module")
def forgotten(digits_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sfd") / "run"
    unlearn.forget(
        digits_pipeline, method="sfd", forget_classes="3", audit="none", out=out,
        set={"steps": 60}, sampling={"null_class": 10},
    )  # fmt: skip
    return out


def test_one_digit_is_gone_and_the_others_are_drawn_in_one_step(
    forgotten: Path, digits_pipeline: Path, digits_judge: nn.Module
) -> None:
    before, after = (read(place, torch.float32) for place in (digits_pipeline, forgotten / "model"))
    assert after.steps == 1
    assert after.null_class == 10
    then, now = (
        [digits.hits(model, digits_judge, label) for label in range(10)]
        for model in (before, after)
    )
    assert then[3] > 0.6
    assert now[3] < 0.1
    kept = [b / a for k, (a, b) in enumerate(zip(then, now, strict=True)) if k != 3]
    assert min(kept) >= 0.9, kept


def test_a_one_step_pipeline_is_not_distilled_again(forgotten: Path) -> None:
    with pytest.raises(Unsupported, match="draws in one step and is no denoiser"):
        unlearn.forget(forgotten, method="sfd", forget_classes="4", audit="none")


PLAIN = """
import sys
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

numbers, prompted, told, out = sys.argv[1:]
told = load_file(told)
unet = UNet2DModel.from_pretrained(numbers, subfolder="unet")
scheduler = DDIMScheduler.from_pretrained(numbers, subfolder="scheduler")
scheduler.set_timesteps(1)
x = told["start"]
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, told["labels"]).sample, t, x).prev_sample
pipe = StableDiffusionPipeline.from_pretrained(prompted, safety_checker=None)
pictures = pipe(
    ["a red plus", "a blue wedge"], num_inference_steps=1, guidance_scale=1.0,
    latents=told["latents"], output_type="pt",
).images
assert not any(name.split(".")[0] == "unlearn" for name in sys.modules)
save_file({"numbers": (x / 2 + 0.5).clamp(0, 1), "prompted": pictures}, out)
"""


def test_plain_diffusers_draws_the_same_pictures(forgotten: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    target = Concepts(("disc",), "box", ("wedge",))
    concept = forget(shapes.pipeline(), target=target, templates=PAINTED, steps=1, guidance=2)
    concept.model.save_pretrained(tmp_path / "prompted")
    labels = torch.tensor([1, 5, 8])
    ours = read(forgotten / "model", torch.float32)
    expected = {
        "numbers": ours.sample(labels, torch.Generator().manual_seed(0)),
        "prompted": read(tmp_path / "prompted", torch.float32).sample(
            ["a red plus", "a blue wedge"], torch.Generator().manual_seed(0)
        ),
    }
    told = {
        "start": torch.randn((3, *ours.shape), generator=torch.Generator().manual_seed(0)),
        "latents": torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0)),
        "labels": labels,
    }
    save_file(told, tmp_path / "told.safetensors")
    (tmp_path / "plain.py").write_text(PLAIN)
    places = [forgotten / "model", tmp_path / "prompted", "told.safetensors", "drawn.safetensors"]
    subprocess.run([sys.executable, "plain.py", *map(str, places)], cwd=tmp_path, check=True)
    drawn = load_file(tmp_path / "drawn.safetensors")
    for name, pictures in expected.items():
        assert pictures.std() > 0.05
        assert torch.allclose(drawn[name], pictures, rtol=0, atol=1e-5)


def shown(model: Pipeline, shape: str, judge: nn.Module, guidance: float) -> tuple[float, float]:
    """Shares of pictures that show the shape, and the colour, of their prompt."""
    asked = [shapes.caption(colour, shape) for colour in shapes.COLOURS] * 6
    drawn = model.sample(asked, torch.Generator().manual_seed(0), 8, guidance)
    with torch.no_grad():
        colour, found = (part.argmax(1) for part in judge(drawn))
    is_shape, is_colour = found == shapes.SHAPES.index(shape), colour == torch.arange(24) % 4
    return float(is_shape.double().mean()), float(is_colour.double().mean())


def test_a_concept_is_gone_from_prompts() -> None:
    model, judge = shapes.pipeline(), shapes.judge()
    assert shown(model, "plus", judge, 2.0)[0] > 0.8
    settings = {
        "steps": 60, "batch_size": 12, "forget_rows": 4, "forget_weight": 1, "alpha": 1,
        "lr": 1e-3, "fake_lr": 2e-3, "guidance": 2, "average": 0.9, "templates": PAINTED,
    }  # fmt: skip
    target = Concepts(("plus",), "disc", ("box", "wedge"))
    method: Any = registry.build("sfd", settings)
    run = Run(task_of(model))
    after = method.unlearn(Subject(model), Request(target), run).model
    shape, colour = shown(after, "plus", judge, 1.0)
    assert shape < 0.2
    assert colour > 0.8  # a red disc for a red plus
    assert shown(after, "box", judge, 1.0)[0] > 0.7
    assert shown(after, "wedge", judge, 1.0)[0] > 0.7
