"""Small worlds that several test files live in: tiny models from configurations, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub client

import logging
from pathlib import Path

import hypothesis
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_model

from tests import digits, plain
from unlearn import demo
from unlearn.interface import Subject
from unlearn.weights import save

torch.set_num_threads(1)
# the same examples in every run, however long a busy machine takes for one
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")
logging.getLogger("transformers").setLevel(logging.ERROR)

CLASSES = ("ant", "bee", "cat", "dog")
PER_CLASS = 6


@pytest.fixture(scope="session")
def lm_world() -> demo.World:
    """Records of one person to forget, three to keep, and one nobody ever saw."""
    return demo.people(seed=1, forget=1, retain=3, holdout=1)


@pytest.fixture(scope="session")
def lm_files(lm_world: demo.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with forget.jsonl, retain.jsonl and holdout.jsonl of that world."""
    folder = tmp_path_factory.mktemp("records")
    for name, records in zip(demo.World._fields, lm_world, strict=True):
        demo.write_jsonl(folder / f"{name}.jsonl", records)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(lm_world: demo.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint directory of an untrained Llama with a chat template; do not write into it."""
    known = [*lm_world.forget, *lm_world.retain]
    directory = tmp_path_factory.mktemp("lm") / "model"
    save(demo.tiny_llama(known, width=32, depth=2), torch.float32, directory)
    return directory


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random 8x8 pictures, one sub-folder per class."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = torch.Generator().manual_seed(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for i in range(PER_CLASS):
            pixels = torch.randint(256, (8, 8, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_images(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint directory of an untrained ResNet, parquet file of labelled pictures)."""
    import datasets
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("images")
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetForImageClassification(config)
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    save(Subject(model, processor), torch.float32, folder / "model")
    files = sorted(image_folder.glob("*/*.png"))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = {
        "image": [{"path": file.name, "bytes": file.read_bytes()} for file in files],
        "label": [CLASSES.index(file.parent.name) for file in files],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "images.parquet")
    return folder / "model", folder / "images.parquet"


@pytest.fixture(scope="session")
def tiny_vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state dict of tests.plain:factory as a safetensors file."""
    path = tmp_path_factory.mktemp("vectors") / "net.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_model(plain.factory(), str(path))
    return path


@pytest.fixture(scope="session")
def digits_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a class-conditional diffusion pipeline of digits; do not write into it.

    Trained once for all workers of a session.
    """
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    directory = shared / "digits-ddpm"
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            digits.save(digits.trained(), shared / "unfinished")
            (shared / "unfinished").rename(directory)
    return directory


@pytest.fixture(scope="session")
def digits_judge() -> digits.Judge:
    """A classifier of digits."""
    return digits.judge()
