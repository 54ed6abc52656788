"""Weights on disk and off it: safetensors headers, fingerprints, precision, saving.

Knows tensors and files; knows nothing about configurations or tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from unlearn.ensemble import ENSEMBLE, Ensemble
from unlearn.errors import BadInput, Collapsed, Unsupported
from unlearn.interface import Subject
from unlearn.pipeline import INDEX

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS, STATE = "model.safetensors", "state.safetensors"


class Stored(NamedTuple):
    """What weight files declare: precision, number of weights, tensor names."""

    dtype: torch.dtype
    parameters: int
    names: tuple[str, ...]


def header(path: Path) -> dict[str, Any]:
    """The tensors a safetensors file declares, after checking that all their bytes are there.

    Raises:
        BadInput: not a safetensors file, or a truncated one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise BadInput(f"{path} is not a safetensors file, or is truncated: get it again")
        try:
            declared: dict[str, Any] = json.loads(file.read(length))
            declared.pop("__metadata__", None)
            promised = (
                8 + length + max((t["data_offsets"][1] for t in declared.values()), default=0)
            )
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise BadInput(f"{path} is not a safetensors file: its header is damaged") from error
    if promised != size:
        raise BadInput(
            f"{path} is truncated or padded: its header promises {promised} bytes and it has "
            f"{size}; get it again"
        )
    try:
        with safe_open(path, "pt"):  # checks dtypes, shapes and offsets, reads no weight
            return declared
    except SafetensorError as error:
        raise BadInput(f"{path} is not a safetensors file: {error}") from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, an index respected.

    Raises:
        BadInput: none there, only pickles, or a shard missing.
    """
    if (directory / INDEX).exists():  # of a diffusers pipeline, a folder per component
        configured = {file.parent for file in directory.glob("*/*.json")}
        weighty = {
            f.parent for f in directory.glob("*/*") if f.suffix in {*PICKLES, ".safetensors"}
        }
        return [file for part in sorted(configured & weighty) for file in weight_files(part)]
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise BadInput(f"{index} is damaged: get it again") from error
        missing = [s for s in shards if not (directory / s).is_file()]
        if missing:
            raise BadInput(f"{directory} lacks the weight file {missing[0]} its index names")
        return [directory / s for s in shards]
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise BadInput(pickle_message(directory / pickles[0]))
    raise BadInput(f"{directory} holds no safetensors weights: pass a checkpoint directory")


def pickle_message(path: Path) -> str:
    """Why a pickle is refused, and what to do."""
    return (
        f"{path} is a pickle, which can run code when it is read: convert it to safetensors first "
        "(load it where you trust it, then save_pretrained or safetensors.torch.save_model)"
    )


def fingerprint_files(files: list[Path]) -> str:
    """SHA-256 over the bytes of these files, in order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def fingerprint_all(fingerprints: Sequence[str]) -> str:
    """One fingerprint of what consists of several checkpoints, in order."""
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()


def stored(files: list[Path]) -> Stored:
    """Read it from the headers; the precision is that of most weights.

    Raises:
        BadInput: a damaged file.
        Unsupported: no floating-point weights.
    """
    sizes: Counter[str] = Counter()
    names: list[str] = []
    for path in files:
        for name, tensor in header(path).items():
            count = 1
            for side in tensor["shape"]:
                count *= side
            sizes[tensor["dtype"]] += count
            names.append(name)
    floats = Counter({kind: n for kind, n in sizes.items() if kind in DTYPES})
    if not floats:
        raise Unsupported(
            f"{files[0]} holds no floating-point weights: quantised ones cannot learn"
        )
    return Stored(DTYPES[floats.most_common(1)[0][0]], sum(sizes.values()), tuple(names))


def master(stored: torch.dtype) -> torch.dtype:
    """The precision a checkpoint is trained in: never less than float32."""
    return torch.float64 if stored is torch.float64 else torch.float32


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of these tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        value = tensors[name].detach().cpu().contiguous()
        digest.update(
            value.view(torch.uint8).numpy().tobytes() if value.ndim else repr(value.item()).encode()
        )
    return digest.hexdigest()


def save(subject: Subject, stored: torch.dtype, directory: Path) -> str:
    """Write model and processor in the format and precision they came in.

    Of an ensemble, each member is a checkpoint of its own, in a folder named by its number.

    Returns:
        The fingerprint of the weight files.

    Raises:
        Collapsed: a weight is not finite, also after the cast to ``stored``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model = cast(subject.model, stored)
    check_finite(model, stored)
    if isinstance(model, Ensemble):
        made = [
            save(replace(subject, model=member), stored, directory / str(number))
            for number, member in enumerate(model.members)
        ]
        kind = "transformers" if (directory / "0" / "config.json").exists() else "module"
        declared = {"members": len(made), "kind": kind}
        (directory / ENSEMBLE).write_text(json.dumps(declared) + "\n")
        return fingerprint_all(made)
    if callable(write := getattr(model, "save_pretrained", None)):
        write(directory)
        if hasattr(subject.processor, "save_pretrained"):
            subject.processor.save_pretrained(directory)
    else:
        save_model(model, str(directory / WEIGHTS))
    return fingerprint_files(weight_files(directory))


def check_finite(model: nn.Module, stored: torch.dtype) -> None:
    """Refuse a model that was destroyed, also by the cast to ``stored``.

    Raises:
        Collapsed: a weight is not finite.
    """
    bad = [name for name, p in model.state_dict().items() if not bool(torch.isfinite(p).all())]
    if bad:
        raise Collapsed(
            f"the unlearned weights {', '.join(bad[:3])} are not finite in {stored}: nothing was "
            "written; use a smaller learning rate"
        )


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model on the CPU in ``dtype``, but for buffers that are computed and never stored.

    Rounded rotary frequencies would make the model in memory another one than the one read back.
    """
    written = model.state_dict().keys()
    computed = {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in written
    }
    model.to("cpu", dtype)
    for name, buffer in computed.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer.cpu())
    return model


def write_state(path: Path, state: Mapping[str, Tensor], note: Mapping[str, str]) -> None:
    """Write what a method keeps for the next request."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, path, metadata=dict(note))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read it back."""
    header(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
