"""What a text changes by being in the training data."""

import numpy as np
import pytest
import torch

from unlearn import demo
from unlearn.checkpoint import inspect
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.evaluations.counterfactual import check_start, halves, memories, recipe
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.weights import save


def test_memories_by_hand():
    correct = [[0.9, 0.5], [0.7, 0.5], [0.2, 0.5], [0.0, 0.7]]
    member = [[True, False], [True, True], [False, True], [False, False]]
    scores, found = memories(correct, member)
    # (0.9 + 0.7)/2 - (0.2 + 0.0)/2 and (0.5 + 0.5)/2 - (0.5 + 0.7)/2
    assert scores == pytest.approx([0.7, -0.1])
    assert found.models == 4
    assert found.memory.value == pytest.approx(0.3)
    assert (found.inside, found.outside) == pytest.approx((0.65, 0.35))
    assert found.quantiles["1"] == pytest.approx(0.7)
    assert found.quantiles["0.5"] == pytest.approx(0.3)


def test_what_many_texts_say_is_no_memory(tmp_path):
    """Texts of their own are memorised, and what is common is known without them."""
    draw = np.random.default_rng(0)
    own = [{"text": " ".join(draw.choice(list("abcdefghij"), 8))} for _ in range(8)]
    common = [{"text": f"n{i} z z z z z z z z z z"} for i in range(8)]
    subject = demo.tiny_llama(
        [{"question": r["text"], "answer": ""} for r in own + common], width=32, depth=1
    )
    save(subject, torch.float32, tmp_path / "model")
    checkpoint = inspect(tmp_path / "model")
    settings = recipe({"lr": 1e-2, "epochs": 25}, checkpoint)
    texts = Encoded(load(own + common, "data"), checkpoint.task)
    run = Run(checkpoint.task, checkpoint=checkpoint)
    pool = halves(texts, None, settings, run, 4, tmp_path / "cache")
    scores, found = memories(pool.trained["texts"].correct, pool.member)
    assert scores[:8].mean() > 0.3
    assert abs(scores[8:].mean()) < 0.6 * scores[:8].mean()
    assert found.inside > found.outside
    again = halves(texts, None, settings, run, 4, tmp_path / "cache")
    assert np.array_equal(again.trained["texts"].correct, pool.trained["texts"].correct)


def test_recipes_that_cannot_be_followed(tiny_lm):
    with pytest.raises(BadInput, match="epoch"):
        recipe({"epoks": 3}, inspect(tiny_lm))
    in_memory = inspect(inspect(tiny_lm).load())
    with pytest.raises(BadInput, match="init="):
        recipe({"epochs": 3}, in_memory)


def test_weights_to_start_from_take_the_models_place(tiny_lm, tiny_images, tmp_path):
    words, pictures = inspect(tiny_lm), inspect(tiny_images[0])
    for init, checkpoint in ((None, words), (str(tiny_lm), words), (str(tiny_images[0]), pictures)):
        check_start(init, checkpoint)
    other = demo.tiny_llama([{"question": "quite other", "answer": "words"}], width=32, depth=1)
    save(other, torch.float32, tmp_path / "words")
    for init, checkpoint, fault in (
        (tmp_path / "nosuch", words, "nosuch does not exist"),
        (tmp_path / "words", words, "another vocabulary"),
        (tiny_images[0], words, "for classification, and the audited model one for causal_lm"),
    ):
        with pytest.raises(BadInput, match=fault):
            check_start(str(init), checkpoint)
