"""Look at and load what a checkpoint directory holds, trusting nothing in it.

Weights are safetensors only: a pickle can run code when it is read. Remote code needs the user's
explicit yes. :func:`inspect` reads configuration and headers only and finds every fault it can
before :meth:`Checkpoint.load` touches a weight. Weights are loaded as float32 masters whatever
precision they are stored in.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn import lora_files
from unlearn import pipeline as pipelines
from unlearn.ensemble import ENSEMBLE, Ensemble, single
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Subject
from unlearn.tasks.base import Task
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification
from unlearn.tasks.diffusion import task_of as pipelines_task
from unlearn.weights import (
    PICKLES,
    STATE,
    WEIGHTS,
    Stored,
    cast,
    fingerprint_all,
    fingerprint_files,
    fingerprint_tensors,
    master,
    pickle_message,
    read_state,
    stored,
    weight_files,
)

ADAPTER, ADAPTED, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
FORGOTTEN = "forgotten.txt"
MEMORY = "memory"  # the source of what was handed over as an object
LONGEST = 2048  # tokens, where neither model nor user sets a limit


@dataclass(frozen=True)
class Options:
    """How to read a checkpoint; all of it can also stand in a run's YAML file."""

    model: str | None = None
    task: str | None = None
    trust_remote_code: bool = False
    max_length: int | None = None
    chat_template: bool | None = None
    null_class: Any = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was looked at but not loaded.

    Attributes:
        source: as the user wrote it.
        task: how it scores examples.
        processor: tokenizer, image processor, callable or None.
        stored: precision, number and names of its weights as they are on disk.
        build: makes the model with its weights, in float32 (float64 if stored so).
        fresh: makes the same architecture with new random weights; None if impossible.
        fingerprint: SHA-256 of its weight files (or of its tensors, when it lives in memory).
        lineage: the runs that made it, oldest first.
        state_file: what the last of these runs kept for the next.
        options: how it was read.
        state: what an earlier request kept, for a subject in memory; ``state_note`` its facts.
        made_by: the method of the run that made it and its hyperparameters; None if unknown.
        forgotten: hashes, keyed with ``record_key``, of what the runs that made it forgot.
    """

    source: str
    task: Task
    processor: Any
    stored: Stored
    build: Callable[[], nn.Module]
    fresh: Callable[[], nn.Module] | None
    fingerprint: str
    lineage: tuple[Mapping[str, Any], ...] = ()
    state_file: Path | None = None
    record_key: bytes | None = None
    notes: tuple[str, ...] = field(default=())
    options: Options = field(default_factory=Options)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    state_note: Mapping[str, str] = field(default_factory=dict)
    made_by: tuple[str, Mapping[str, Any]] | None = None
    forgotten: frozenset[bytes] = frozenset()

    def parameter_names(self) -> list[str]:
        """Names of the model's parameters, which may differ from those of its files."""
        if self.fresh is None or self.task.name == "diffusion":  # its files name components apart
            return list(self.stored.names)
        with torch.device("meta"):  # the architecture without its weights
            return [name for name, _ in self.fresh().named_parameters()]

    def has_state(self) -> bool:
        """Whether an earlier run kept something for the next."""
        return self.state_file is not None or bool(self.state)

    def load(self) -> Subject:
        """The subject, on the CPU, in eval mode, every weight checked to be there and finite."""
        model = self.build()
        bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            raise BadInput(f"{self.source}: the weights {', '.join(bad[:3])} are not finite")
        state, note = self.state, self.state_note
        if self.state_file:
            state, note = read_state(self.state_file)
        return Subject(model.eval(), self.processor, state, note)


def inspect(source: Any, options: Options | None = None) -> Checkpoint:
    """Look at a checkpoint without loading it.

    Args:
        source: a Hugging Face directory or hub name, the directory of an earlier run or of a
            peft adapter, a safetensors file (with ``options.model``), an ``nn.Module`` or a
            :class:`Subject`.
        options: how to read it.

    Raises:
        BadInput: missing, truncated or pickled weights, remote code, unknown architecture.
    """
    options = options or Options()
    if isinstance(source, nn.Module) or hasattr(source, "components"):  # or a diffusers pipeline
        source = Subject(source)
    if isinstance(source, Subject):
        found = _from_memory(source, options)
        return replace(found, options=options, state=source.state, state_note=source.note)
    path = Path(str(source)).expanduser()
    if path.is_dir() and (path / "run.json").exists():
        return _from_run(path, options)
    if (path / ADAPTER).exists():
        return _from_adapter(path, options)
    if (path / ENSEMBLE).exists():
        return _from_ensemble(path, options)
    if options.model or path.is_file():
        return replace(_from_module(path, options), options=options)
    if path.is_dir():
        return replace(_from_directory(str(source), path, options), options=options)
    if on_hub(str(source)):
        found = _from_directory(str(source), download(str(source)), options)
        return replace(found, options=options)
    raise BadInput(f"the checkpoint {source} does not exist: check the path")


def on_hub(name: str) -> bool:
    """Whether what is no path here reads like a name on the hub: owner/model."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/"))


def download(name: str) -> Path:
    """Weights, configuration and tokenizer of a model on the hub; where they lie now.

    Raises:
        BadInput: there is none, or no way to it.
    """
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise BadInput(
            f"{name} is no local directory, and getting it from the hub failed: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _from_run(run: Path, options: Options) -> Checkpoint:
    key, state = run / "record.key", run / STATE
    try:
        made = json.loads((run / "run.json").read_text())
        lineage = tuple(json.loads((run / "lineage.json").read_text()))
        record_key = bytes.fromhex(key.read_text().strip()) if key.exists() else None
        gone = (run / FORGOTTEN).read_text().split() if (run / FORGOTTEN).exists() else []
        forgotten = frozenset(map(bytes.fromhex, gone))
        model = run / "model" / WEIGHTS if made["model_kind"] == "module" else run / "model"
        before = made["options"]
        made_by = made["method"], made["hyperparameters"]
        options = Options(
            options.model or before["model"],
            options.task or before["task"],
            options.trust_remote_code,
            options.max_length or before["max_length"],
            before["chat_template"] if options.chat_template is None else options.chat_template,
            options.null_class,
        )
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise BadInput(f"{run} is damaged: `unlearn verify` tells what has changed") from error
    return replace(
        inspect(model, options),
        source=str(run),
        lineage=lineage,
        state_file=state if state.exists() else None,
        record_key=record_key,
        made_by=made_by,
        forgotten=forgotten,
    )


def _from_adapter(path: Path, options: Options) -> Checkpoint:
    """A peft adapter: the checkpoint it was made for, with the adapter merged into it."""
    weights = path / ADAPTED
    try:
        config = json.loads((path / ADAPTER).read_text())
        base, kind = config["base_model_name_or_path"], config["peft_type"]
        known = (path / BASE).exists()
        made_for = json.loads((path / BASE).read_text())["fingerprint"] if known else None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise BadInput(f"the adapter {path} is damaged: get it again") from error
    if kind != "LORA":
        raise Unsupported(f"the adapter {path} is {kind}: only LORA can be merged into a model")
    if not weights.is_file():
        raise BadInput(f"the adapter {path} has no {weights.name}: save it as safetensors")
    names = set(stored([weights]).names)
    if not base or not isinstance(base, str):
        raise BadInput(
            f"the adapter {path} does not name the checkpoint it was made for: merge it first"
        )
    # what an adapter names must not run code because its user trusts the adapter's directory
    trusted = options.trust_remote_code and Path(base).is_dir()
    try:
        found = inspect(base, replace(options, trust_remote_code=trusted))
    except RecursionError as error:
        raise BadInput(f"the adapter {path} names itself as its base: get it again") from error
    if made_for not in (None, found.fingerprint):
        raise BadInput(
            f"{base} is no longer the checkpoint the adapter {path} was made for: its weights "
            "have changed"
        )

    def build() -> nn.Module:
        try:
            import peft
        except ImportError as error:
            raise Unsupported(
                "reading an adapter needs peft: pip install 'unlearn-toolkit[lora]'"
            ) from error
        try:
            adapted = peft.PeftModel.from_pretrained(found.build(), path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # pipelines have no vocabulary
                fitting = set(peft.get_peft_model_state_dict(adapted))
            if odd := names ^ fitting:
                raise ValueError(f"{min(odd)} is on one side only")
            merged: nn.Module = adapted.merge_and_unload()
        except (RuntimeError, ValueError, SafetensorError) as error:
            raise BadInput(f"the adapter {path} does not fit {base}: {error}") from error
        return cast(merged, found.stored.dtype).to(master(found.stored.dtype))

    fingerprint = _of_both(found, weights)
    return replace(
        found, source=str(path), build=build, fingerprint=fingerprint, state_file=None, made_by=None
    )


def _from_ensemble(path: Path, options: Options) -> Checkpoint:
    """Several checkpoints of one architecture, each in a folder of its own."""
    try:
        declared = json.loads((path / ENSEMBLE).read_text())
        file = {"transformers": "", "module": WEIGHTS}[declared["kind"]]
        folders = [path / str(number) for number in range(max(1, declared["members"]))]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise BadInput(f"the ensemble {path} is damaged: get it again") from error
    if missing := [folder.name for folder in folders if not folder.is_dir()]:
        raise BadInput(f"the ensemble {path} lacks its member {missing[0]}: get it again")
    if file and not options.model:
        raise BadInput(f"{path} holds bare state dicts: name their network with --model")
    members = [inspect(folder / file, options) for folder in folders]
    found = members[0]
    if any(member.stored != found.stored for member in members):
        raise BadInput(f"the members of {path} differ in shape or precision: get it again")
    one = found.fresh
    fresh = (lambda: Ensemble(one() for _ in members)) if one else None

    def build() -> nn.Module:
        return Ensemble(member.build() for member in members)

    names = (f"members.{i}.{name}" for i, _ in enumerate(members) for name in found.stored.names)
    parameters = len(members) * found.stored.parameters
    return replace(
        found, source=str(path), build=build, fresh=fresh,
        stored=Stored(found.stored.dtype, parameters, tuple(names)),
        fingerprint=fingerprint_all([member.fingerprint for member in members]),
    )  # fmt: skip


def _of_both(base: Checkpoint, adapter: Path) -> str:
    """The fingerprint of a checkpoint with an adapter."""
    both = f"{base.fingerprint}{fingerprint_files([adapter])}"
    return hashlib.sha256(both.encode()).hexdigest()


def save_adapter(adapter: Path, base: Checkpoint, directory: Path) -> str:
    """Write an adapter that peft saved, with the name and fingerprint of what it was made for.

    Args:
        adapter: directory that peft wrote.
        base: the checkpoint it was made for, from a directory or hub name.
        directory: to write.

    Returns:
        The fingerprint of the checkpoint with the adapter.

    """
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(adapter / ADAPTED, directory / ADAPTED)
    config = json.loads((adapter / ADAPTER).read_text())
    local = Path(base.source).expanduser()
    config["base_model_name_or_path"] = str(local.absolute()) if local.exists() else base.source
    (directory / ADAPTER).write_text(json.dumps(config, indent=2) + "\n")
    (directory / BASE).write_text(json.dumps({"fingerprint": base.fingerprint}) + "\n")
    if getattr(base.task, "tokenizer", None) and base.task.name == "diffusion":
        lora_files.write(adapter, directory)
    return _of_both(base, directory / ADAPTED)


def _from_pipeline(source: str, path: Path, options: Options) -> Checkpoint:
    """A diffusers pipeline; its denoiser is what learns."""
    pipelines.kind_of(path)
    files = weight_files(path)
    found = stored([f for f in files if f.parent.name in pipelines.DENOISERS])
    if options.task not in (None, "diffusion"):
        raise BadInput(f"{source} is a diffusion pipeline: leave --task {options.task} out")
    null = _null_class(options)
    held = pipelines.outline(path, null)
    task, found = pipelines_task(held), found._replace(names=tuple(dict(held.named_parameters())))

    def build() -> nn.Module:
        return pipelines.read(path, master(found.dtype), null)

    def fresh() -> nn.Module:
        model = pipelines.read(path, master(found.dtype), null)
        return model.with_fresh_denoiser()

    return Checkpoint(source, task, None, found, build, fresh, fingerprint_files(files))


def _from_directory(source: str, path: Path, options: Options) -> Checkpoint:
    import transformers

    if (path / pipelines.INDEX).exists():
        return _from_pipeline(source, path, options)
    config_file = path / "config.json"
    if not config_file.exists():
        raise BadInput(
            f"{path} has no config.json: pass a Hugging Face checkpoint, or a safetensors file "
            "with --model module:factory"
        )
    try:
        raw = json.loads(config_file.read_text())
    except ValueError as error:
        raise BadInput(f"{config_file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{config_file} is not a JSON object: get it again")
    if "auto_map" in raw and not options.trust_remote_code:
        raise BadInput(
            f"{source} brings its own Python code: read it, then pass --trust-remote-code"
        )
    files = weight_files(path)
    found = stored(files)
    if raw.get("quantization_config"):
        raise Unsupported(f"{source} is quantised: unlearn the checkpoint it was made from")
    trust = {"trust_remote_code": options.trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **trust)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Unsupported(
            f"the configuration of {source} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    auto, kind = _auto_class(raw.get("architectures") or [], source, options.task)
    processor, task, notes = _processor_and_task(path, config, kind, options)

    def build() -> nn.Module:
        try:
            model, info = auto.from_pretrained(
                path, dtype=master(found.dtype), use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **trust,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BadInput(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from error
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise BadInput(f"{source} lacks the weights {missing}: it is not a complete checkpoint")
        if info["unexpected_keys"]:
            extra = ", ".join(sorted(info["unexpected_keys"])[:3])
            raise BadInput(
                f"{source} holds weights its architecture does not know ({extra}), which would be "
                "lost: remove them from the checkpoint first"
            )
        if info["mismatched_keys"]:
            name, shape, wanted = min(info["mismatched_keys"])
            raise BadInput(
                f"the weights {name} of {source} have the shape {tuple(shape)}, and its "
                f"config.json asks for {tuple(wanted)}: it is damaged"
            )
        _mend_generation(model)
        loaded: nn.Module = model
        return loaded

    def fresh() -> nn.Module:
        built: nn.Module = auto.from_config(config, dtype=master(found.dtype), **trust)
        return built

    return Checkpoint(
        source, task, processor, found, build, fresh, fingerprint_files(files),
        notes=notes,
    )  # fmt: skip


def _mend_generation(model: Any) -> None:
    """Sampling settings beside do_sample=false are refused on saving; say what they mean."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def _auto_class(architectures: list[str], source: str, task: str | None) -> tuple[Any, str]:
    import transformers

    name = architectures[0] if architectures else ""
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        found = transformers.AutoModelForCausalLM, "causal_lm"
    elif name.endswith("ForImageClassification"):
        found = transformers.AutoModelForImageClassification, "classification"
    elif name.endswith("ForSequenceClassification"):
        found = transformers.AutoModelForSequenceClassification, "classification"
    else:
        raise Unsupported(
            f"{source} is a {name or 'model of unknown architecture'}: supported are causal "
            "language models, image classifiers and sequence classifiers"
        )
    if task not in (None, found[1]):
        raise BadInput(f"{source} is a {name}, which is {found[1]}: leave --task {task} out")
    return found


def _processor_and_task(
    path: Path, config: Any, kind: str, options: Options
) -> tuple[Any, Task, tuple[str, ...]]:
    import transformers

    trust = {"trust_remote_code": options.trust_remote_code}
    text = getattr(config, "get_text_config", lambda: config)()
    try:
        if (path / "preprocessor_config.json").exists():
            processor = transformers.AutoImageProcessor.from_pretrained(path, **trust)
        else:
            processor = transformers.AutoTokenizer.from_pretrained(path, **trust)
    except Exception as error:  # the tokenizers library raises no other kind
        raise BadInput(
            f"the tokenizer or image processor of {path} cannot be read: {error}"
        ) from error
    stated = [
        getattr(text, "max_position_embeddings", None),
        getattr(processor, "model_max_length", None),
    ]
    own = min((n for n in stated if n), default=None)
    if options.max_length and own and options.max_length > own:
        raise BadInput(
            f"max_length {options.max_length} exceeds what {path} can read: at most {own}"
        )
    limit = options.max_length or min(own or LONGEST, LONGEST)
    if kind == "causal_lm":
        task: Task = CausalLM(processor, text.vocab_size, limit, options.chat_template)
        if processor.pad_token_id is None:
            note = "The tokenizer has no pad token; padding is masked by position instead."
            return processor, task, (note,)
        return processor, task, ()
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        raise Unsupported(f"{path} does {config.problem_type}: only single-label classifiers")
    if hasattr(processor, "pad_token_id"):
        pads = {"tokenizer": processor.pad_token_id, "model": getattr(text, "pad_token_id", None)}
        if unpadded := [part for part, pad in pads.items() if pad is None]:
            raise BadInput(
                f"the {' and the '.join(unpadded)} of {path} has no pad token: set one and save it "
                "there"
            )
    names = _class_names(config, config.num_labels)
    return processor, Classification(config.num_labels, names, processor, limit), ()


def _import_factory(name: str) -> Callable[[], nn.Module]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise BadInput(f"--model {name} is not of the form package.module:factory")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"--model {name} cannot be imported: {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(factory):
        raise BadInput(f"--model {name} is not callable: name a function or class")
    made: Callable[[], nn.Module] = factory
    return made


def _from_module(path: Path, options: Options) -> Checkpoint:
    if path.suffix in PICKLES:
        raise BadInput(pickle_message(path))
    if not path.is_file():
        raise BadInput(f"the weights {path} do not exist: pass a safetensors file with --model")
    found = stored([path])
    if not options.model:
        raise BadInput(f"{path} is a bare state dict: name its network with --model module:factory")
    factory = _import_factory(options.model)
    if options.task not in (None, "classification"):
        raise Unsupported(f"--model supports classification, not {options.task}")

    def fresh() -> nn.Module:
        try:
            model = factory()
        except TypeError as error:
            raise BadInput(
                f"--model {options.model} cannot be called without arguments: {error}"
            ) from error
        if not isinstance(model, nn.Module):
            raise BadInput(f"--model {options.model} returned {type(model).__name__}, not a module")
        return model.to(master(found.dtype))

    def build() -> nn.Module:
        model = fresh()
        try:
            load_model(model, path)
        except (RuntimeError, SafetensorError) as error:
            raise BadInput(f"{path} does not fit {options.model}: {error}") from error
        return model

    task = Classification(_classes_of(fresh()))
    return Checkpoint(str(path), task, None, found, build, fresh, fingerprint_files([path]))


def _classes_of(model: nn.Module) -> int:
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise Unsupported(f"{type(model).__name__} has no linear output layer to count classes of")
    return linear[-1].out_features


def _class_names(config: Any, classes: int) -> list[str]:
    """The label names a configuration carries; placeholders such as LABEL_0 are none."""
    named = getattr(config, "id2label", None) or {}
    names = [str(named.get(i, "")) for i in range(classes)]
    return [] if names == [f"LABEL_{i}" for i in range(classes)] or not all(names) else names


def _from_memory(subject: Subject, options: Options) -> Checkpoint:
    model, processor = subject.model, subject.processor
    if isinstance(model, pipelines.Pipeline) or hasattr(model, "components"):
        return _pipeline_in_memory(subject, _null_class(options))
    one = single(model)
    config = getattr(one, "config", None) if isinstance(one, PreTrainedModel) else None
    kind = options.task
    task: Task
    if kind is None:
        kind = "causal_lm" if config and hasattr(model, "get_output_embeddings") and (
            model.get_output_embeddings() is not None  # type: ignore[operator]
        ) else "classification"  # fmt: skip
    if kind == "causal_lm":
        if processor is None or config is None:
            raise BadInput(
                "a language model in memory needs its tokenizer: Subject(model, tokenizer)"
            )
        text = config.get_text_config()
        own = getattr(text, "max_position_embeddings", None) or LONGEST
        limit = options.max_length or min(own, LONGEST)
        task = CausalLM(processor, text.vocab_size, limit, options.chat_template)
    elif kind == "classification":
        classes = getattr(config, "num_labels", None) or _classes_of(one)
        task = Classification(
            classes, _class_names(config, classes), processor, options.max_length or 512
        )
    else:
        raise BadInput(f"there is no task {kind!r}: known are causal_lm, classification")
    floats = [p for p in model.parameters() if p.is_floating_point()]
    found = Stored(
        floats[0].dtype if floats else torch.float32,
        sum(p.numel() for p in floats),
        tuple(name for name, _ in model.named_parameters()),
    )

    def build() -> nn.Module:
        return model.to(master(found.dtype))

    return Checkpoint(
        MEMORY, task, processor, found, build, None, fingerprint_tensors(model.state_dict())
    )  # fmt: skip


def _null_class(options: Options) -> int | None:
    given = options.null_class
    if given is not None and not str(given).isdecimal():
        raise BadInput(f"--sampling null_class={given}: it must be the index of a class")
    return None if given is None else int(given)


def _pipeline_in_memory(subject: Subject, null_class: int | None) -> Checkpoint:
    held: Any = subject.model
    if not isinstance(held, pipelines.Pipeline):
        held = pipelines.Pipeline(held, null_class=null_class)
    elif null_class is not None:
        held = pipelines.Pipeline(held.pipeline, None, held.steps, null_class)
    parameters = dict(held.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    found = Stored(dtype, sum(p.numel() for p in parameters.values()), tuple(parameters))
    return Checkpoint(
        MEMORY, pipelines_task(held), None, found, lambda: held.to(master(dtype)),
        None, fingerprint_tensors(held.state_dict()),
    )  # fmt: skip
