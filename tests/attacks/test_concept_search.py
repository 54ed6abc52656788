"""Does a search bring back what was only hidden, and leave the model as it was?"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import digits, shapes
from unlearn.attacks import concept_search
from unlearn.attacks.concept_search import (
    FINALISTS,
    SCREENED,
    Count,
    Sampling,
    concept_loss,
    condition_of,
    embedding_attack,
    fed,
    other_conditions,
    swap_attack,
    token_attack,
)
from unlearn.errors import BadInput
from unlearn.interface import Concepts, Request, Subject
from unlearn.methods.uce import UCE
from unlearn.pipeline import Pipeline, read
from unlearn.run import Run
from unlearn.tasks.diffusion import task_of

GONE, STANDIN = 3, 5
FEW = Sampling(count=16, steps=8, guidance=1.0)
PROMPT = "a red disc"


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def threes() -> Tensor:
    x, y = digits.pictures()
    return x[:1437][y[:1437] == GONE][:32]


def table(model: Pipeline) -> Tensor:
    return model.denoiser.class_embedding.weight.data


def same(model: Pipeline, kept: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return all(torch.equal(found[name], value) for name, value in kept.items())


@pytest.fixture
def original(digits_pipeline: Path) -> Pipeline:
    return read(digits_pipeline, torch.float32)


@pytest.fixture
def swapped(digits_pipeline: Path) -> Pipeline:
    """A model that looks class 3 up where class 5 is, and forgot nothing."""
    model = read(digits_pipeline, torch.float32)
    table(model)[GONE] = table(model)[STANDIN]
    return model


@pytest.fixture(scope="module")
def without() -> Pipeline:
    """A model that never saw a three."""
    _, y = digits.pictures()
    return digits.trained(200, only=y[:1437] != GONE)


@pytest.fixture
def shows(digits_judge: digits.Judge):
    return lambda pictures: digits.says(digits_judge, pictures) == GONE


def test_a_class_is_embedded_as_other_vectors_while_it_is_fed(original: Pipeline) -> None:
    x, t, told = torch.randn(4, 1, 8, 8, generator=draw()), torch.arange(4) * 200, torch.arange(4)
    plain, as_five = original(x, t, told), original(x, t, torch.tensor([0, 1, 2, STANDIN]))
    with fed(original, GONE, condition_of(original, STANDIN)):
        torch.testing.assert_close(original(x, t, told), as_five, rtol=0, atol=0)
    torch.testing.assert_close(original(x, t, told), plain, rtol=0, atol=0)


def test_every_row_can_be_fed_other_vectors(original: Pipeline) -> None:
    x, t = torch.randn(2, 1, 8, 8, generator=draw()), torch.tensor([300, 300])
    vectors = torch.stack([condition_of(original, 7), condition_of(original, 1)])
    with fed(original, GONE, vectors):
        found = original(x, t, torch.tensor([GONE, GONE]))
    torch.testing.assert_close(found, original(x, t, torch.tensor([7, 1])), rtol=0, atol=1e-6)


def test_a_transformer_is_fed_in_every_block() -> None:
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1,
            num_layers=2, sample_size=8, patch_size=4, num_embeds_ada_norm=4, norm_num_groups=1,
        ).eval()  # fmt: skip
        for parameter in transformer.parameters():  # modulation starts at zero
            parameter.data.normal_(0, 0.3)
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(8,), norm_num_groups=8
    )
    scheduler = diffusers.DDIMScheduler()
    model = Pipeline(diffusers.DiTPipeline(transformer, vae, scheduler))
    x, t = torch.randn(1, 1, 8, 8, generator=draw()), torch.tensor([500])
    with torch.no_grad():
        plain, other = (model(x, t, torch.tensor([label])) for label in (0, 2))
        assert condition_of(model, 2).shape == (2, 16)
        with fed(model, 0, condition_of(model, 2)):
            found = model(x, t, torch.tensor([0]))
    assert not torch.allclose(plain, other)
    torch.testing.assert_close(found, other)


def test_the_loss_of_a_condition_is_that_of_its_class(original: Pipeline) -> None:
    """A class denoises its own pictures best, whatever the class it is fed for."""
    made = torch.stack([condition_of(original, label) for label in range(10)])
    x_0 = original.encode(threes())
    found = concept_loss(original, GONE, made, x_0)
    assert int(found.argmin()) == GONE
    np.testing.assert_allclose(found, concept_loss(original, 8, made, x_0), rtol=1e-5)
    np.testing.assert_allclose(found[4:], concept_loss(original, GONE, made[4:], x_0), rtol=1e-5)


def test_the_old_embedding_undoes_a_swap(original: Pipeline, swapped: Pipeline, shows) -> None:
    found = swap_attack(swapped, GONE, condition_of(original, GONE), shows, draw(), sampling=FEW)
    plainly = swap_attack(original, GONE, condition_of(original, GONE), shows, draw(), sampling=FEW)
    assert found.before.rate <= 0.1
    assert found.after.rate >= 0.6
    assert found.after == plainly.after == plainly.before  # nothing else had been changed
    assert isinstance(found.after, Count)
    assert found.after.trials == FEW.count


def test_descent_finds_what_a_swap_hid(swapped: Pipeline, shows) -> None:
    kept = {name: value.clone() for name, value in swapped.state_dict().items()}
    found = embedding_attack(swapped, GONE, shows, draw(), pictures=threes(), sampling=FEW)
    again = embedding_attack(swapped, GONE, shows, draw(), pictures=threes(), sampling=FEW)
    assert found.before.rate <= 0.1
    assert found.after.rate >= 0.5
    assert torch.equal(found.condition, again.condition)
    assert found.after == again.after
    made = torch.stack([condition_of(swapped, GONE), found.condition])
    losses = concept_loss(swapped, GONE, made, swapped.encode(threes()))
    assert losses[1] < 0.9 * losses[0]
    assert same(swapped, kept)
    assert all(p.grad is None and p.requires_grad for p in swapped.parameters())


def test_a_model_that_never_saw_the_class_gives_little_back(
    original: Pipeline, without: Pipeline, shows
) -> None:
    """Not nothing: free numbers can ask for digits that are nearly threes."""
    old = swap_attack(without, GONE, condition_of(original, GONE), shows, draw(), sampling=FEW)
    found = embedding_attack(without, GONE, shows, draw(), pictures=threes(), sampling=FEW)
    assert old.after.rate <= 0.2
    assert found.after.rate <= 0.45


def test_another_class_brings_back_what_was_moved_there(original: Pipeline, shows) -> None:
    table(original)[[GONE, STANDIN]] = table(original)[[STANDIN, GONE]]
    found = other_conditions(original, GONE, shows, draw(), pictures=threes(), sampling=FEW)
    assert found.told == f"class {STANDIN}"
    assert found.before.rate <= 0.1
    assert found.after.rate >= 0.6
    assert torch.equal(found.condition, condition_of(original, STANDIN))


def test_halfway_points_are_searched(original: Pipeline, shows) -> None:
    """Two rows are moved apart so that only their middle is a three."""
    away = torch.randn(table(original)[GONE].shape, generator=draw()) * 3
    three = table(original)[GONE].clone()
    table(original)[1], table(original)[2] = three + away, three - away
    table(original)[GONE] = table(original)[STANDIN]
    settings = {"pictures": threes(), "sampling": FEW}
    found = other_conditions(original, GONE, shows, draw(), **settings)
    assert found.told == "halfway from class 1 to 2"
    assert found.after.rate >= 0.6
    cut = other_conditions(original, GONE, shows, draw(), 10, **settings)
    assert cut.told.startswith("class ")


def test_an_interrupted_attack_goes_on_with_what_it_found(
    swapped: Pipeline, shows, tmp_path: Path
) -> None:
    run, asked = Run(task_of(swapped), work=tmp_path), []

    def watched(pictures: Tensor) -> np.ndarray:
        asked.append(len(pictures))
        return shows(pictures)

    def attack(generator: torch.Generator) -> object:
        return embedding_attack(
            swapped, GONE, watched, generator, 2, pictures=threes(), sampling=FEW, run=run
        )

    first, second = draw(), draw()
    once = attack(first)
    assert asked == [FEW.count] * 2
    again = attack(second)
    assert asked == [FEW.count] * 2
    assert torch.equal(once.condition, again.condition)
    assert (once.told, once.before, once.after) == (again.told, again.before, again.after)
    assert torch.equal(first.get_state(), second.get_state())


def test_what_cannot_be_searched_is_refused(original: Pipeline, shows) -> None:
    with pytest.raises(BadInput, match="index from 0 to 10"):
        condition_of(original, 11)
    with pytest.raises(BadInput, match="there are none"):
        embedding_attack(original, GONE, shows, draw(), pictures=threes()[:0])
    with pytest.raises(BadInput, match="other_conditions"):
        token_attack(original, "three", shows, draw(), pictures=threes())
    with pytest.raises(BadInput, match=r"shape \(1, 64\), not \(3,\)"):
        swap_attack(original, GONE, torch.zeros(3), shows, draw())
    with pytest.raises(BadInput, match="yes or no"):
        swap_attack(
            original, GONE, condition_of(original, 1), lambda p: [True], draw(), sampling=FEW
        )


@pytest.fixture(scope="module")
def erased() -> Pipeline:
    """Cross-attention reads discs as boxes."""
    model = shapes.pipeline()
    request = Request(Concepts(("disc",), "box", ("wedge", "plus")))
    done = UCE().unlearn(Subject(model), request, Run(task_of(model))).model
    assert isinstance(done, Pipeline)
    return done.eval()


@pytest.fixture(scope="module")
def discs() -> Tensor:
    """Drawings of red discs."""
    return shapes.pictures(256)[::16]


@pytest.fixture(scope="module")
def shows_disc():
    judge = shapes.judge()

    def shows(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            return judge(pictures)[1].argmax(1) == shapes.SHAPES.index("disc")

    return shows


GUIDED = Sampling(count=16, steps=8, guidance=2.0)


def test_text_states_and_tokens_bring_back_what_keys_and_values_hid(
    erased: Pipeline, discs: Tensor, shows_disc
) -> None:
    kept = {name: value.clone() for name, value in erased.state_dict().items()}
    drawn = []

    def watched(pictures: Tensor) -> Tensor:
        drawn.append(len(pictures))
        return shows_disc(pictures)

    settings = {"pictures": discs, "sampling": GUIDED}
    states = embedding_attack(erased, PROMPT, shows_disc, draw(), 30, **settings)
    tokens = token_attack(erased, PROMPT, watched, draw(), 100, **settings)
    assert states.before == tokens.before
    assert states.before.rate <= 0.3
    assert states.after.rate >= states.before.rate + 0.3
    assert tokens.told != PROMPT
    assert tokens.after.rate >= states.before.rate + 0.3
    assert not torch.equal(tokens.condition, condition_of(erased, PROMPT))
    assert sum(drawn) == FINALISTS * SCREENED + 2 * GUIDED.count
    assert same(erased, kept)


def test_old_text_states_undo_an_edit_of_the_text_encoder(shows_disc) -> None:
    model = shapes.pipeline().eval()
    old = condition_of(model, PROMPT)
    words = model.text_encoder.get_input_embeddings().weight
    disc, box = (model.token_ids([shape])[0, 1] for shape in ("disc", "box"))
    with torch.no_grad():
        words[disc] = words[box]
    found = swap_attack(model, PROMPT, old, shows_disc, draw(), sampling=GUIDED)
    assert found.before.rate <= 0.3
    assert found.after.rate >= 0.6


def test_a_gradient_foresees_the_loss_of_tokens_nearby(discs: Tensor) -> None:
    """First order: what is left is small where the step in the embedding is."""
    model = shapes.pipeline().eval()
    x_0, ids = model.encode(discs), model.token_ids([PROMPT])[0]
    place, near, far = 3, int(model.token_ids(["x"])[0, 1]), int(model.token_ids(["plus"])[0, 1])
    words = model.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        words[near] = words[ids[place]] + 0.01 * (words[far] - words[ids[place]])
    promised = concept_search._promised(model, PROMPT, ids, place, x_0)
    plain, found = concept_loss(
        model, PROMPT, torch.stack([condition_of(model, p) for p in (PROMPT, "a red x")]), x_0
    )
    assert float(promised[ids[place]]) == pytest.approx(float(plain), abs=1e-6)
    assert float(promised[near] - plain) == pytest.approx(float(found - plain), rel=0.1)
    assert float(promised[far] - plain) == pytest.approx(float(100 * (found - plain)), rel=0.1)


def test_one_token_is_put_before_behind_or_in_the_place_of_a_word() -> None:
    templates, places = concept_search._slots([8, 1, 2, 9, 9], [1, 2])
    assert templates.tolist() == [[8, 1, 2, 9, 9]] * 2 + [[8, 1, 1, 2, 9], [8, 1, 2, 2, 9]]
    assert places.tolist() == [1, 2, 1, 3]
    full, places = concept_search._slots([8, 1, 2, 3, 9], [1, 2, 3, 4])  # cut, and no room
    assert full.tolist() == [[8, 1, 2, 3, 9]] * 3
    assert places.tolist() == [1, 2, 3]


def test_classes_are_not_searched_among_prompts(
    erased: Pipeline, discs: Tensor, shows_disc
) -> None:
    with pytest.raises(BadInput, match="token_attack"):
        other_conditions(erased, 0, shows_disc, draw(), pictures=discs)
    with pytest.raises(BadInput, match="names no concept"):
        token_attack(erased, "", shows_disc, draw(), pictures=discs)
