"""What a run and an audit can be told: the same names as flags, in a YAML file, and in Python."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from unlearn.errors import BadInput, did_you_mean


def _none_or_four(shadows: int) -> int:
    if shadows < 4 and shadows != 0:
        raise ValueError("fewer than 4 shadow models tell nothing: pass 4 or more, or 0 for none")
    return shadows


class CaseConfig(BaseModel):
    """What a run and an audit can both be told."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True)

    forget: Annotated[
        Any,
        Field(description="what must go: jsonl, parquet, image folder, saved dataset or hub name"),
    ] = None
    retain: Annotated[Any, Field(description="what must stay, in the same formats")] = None
    holdout: Annotated[Any, Field(description="data the model never saw, to compare with")] = None
    data: Annotated[
        Any,
        Field(description="all training data, split by --forget, --forget-ids or --forget-classes"),
    ] = None
    forget_ids: Annotated[
        str | None,
        Field(
            description="records of --data to forget: ids 'a,b', row numbers '0:5000', or '@file'"
        ),
    ] = None
    forget_classes: Annotated[
        str | None, Field(description="classes of --data to forget, by name or number: 'cat,3'")
    ] = None
    forget_concepts: Annotated[
        str | None,
        Field(
            description="what prompts name, of a text-to-image model: 'circle,a red cross' or "
            "'@file', one a line"
        ),
    ] = None
    keep_concepts: Annotated[
        str | None, Field(description="neighbouring concepts that must stay, in the same form")
    ] = None
    anchor: Annotated[
        str | None,
        Field(description="class or prompt that a model which generates shows instead"),
    ] = None
    sampling: Annotated[
        dict[str, Any],
        Field(
            description="how pictures are generated, key=value: steps, guidance, images (per class "
            "or prompt), null_class (index of the UNet's class for none)"
        ),
    ] = Field(default_factory=dict)
    classifier: Annotated[
        Any,
        Field(description="image classifier that judges generated pictures, in any form of model"),
    ] = None
    clip: Annotated[
        str | Path | None,
        Field(
            description="directory or hub name of a CLIP model; an audit says how well it finds "
            "pictures to match their prompts"
        ),
    ] = None
    retrained: Annotated[
        Any, Field(description="a checkpoint trained without the forget set, as reference")
    ] = None
    set: Annotated[
        dict[str, Any], Field(description="hyperparameters of the method, key=value")
    ] = Field(default_factory=dict)
    columns: Annotated[dict[str, str], Field(description="renames, field=column of the data")] = (
        Field(default_factory=dict)
    )
    out: Annotated[
        str | Path | None, Field(description="the directory to write; must not exist")
    ] = None
    task: Annotated[
        Literal["causal_lm", "classification", "diffusion"] | None,
        Field(description="model family, where it cannot be told from the checkpoint"),
    ] = None
    model: Annotated[
        str | None, Field(description="package.module:factory of a plain nn.Module")
    ] = None
    max_length: Annotated[int | None, Field(gt=1, description="longest text in tokens")] = None
    chat_template: Annotated[
        bool | None,
        Field(description="render questions through the chat template; default: if there is one"),
    ] = None
    trust_remote_code: Annotated[
        bool, Field(description="run Python code that the checkpoint brings")
    ] = False
    criteria: Annotated[
        Any, Field(description="YAML file of the rules that decide; default: the shipped ones")
    ] = None
    neighbours: Annotated[
        Any, Field(description="records of neighbouring topics, to see what else was lost")
    ] = None
    translations: Annotated[
        Any,
        Field(
            description="forget records in other languages: the usual fields, language, and row, "
            "the number of the forget record from 0; a deep audit asks them"
        ),
    ] = None
    translator: Annotated[
        Any,
        Field(description="sequence-to-sequence checkpoint that translates them instead"),
    ] = None
    jailbreaks: Annotated[
        str | Path | None,
        Field(description="further jailbreak prompts for a deep audit, each with {question} in it"),
    ] = None
    acr: Annotated[
        int,
        Field(
            ge=0,
            description="forget records whose shortest adversarial prompt a deep audit looks for "
            "(minutes each)",
        ),
    ] = 0
    shadows: Annotated[
        int,
        Field(multiple_of=2, description="shadow models of a deep audit, 0 for none"),
        AfterValidator(_none_or_four),
    ] = 16
    training: Annotated[
        dict[str, Any],
        Field(
            description="how the original was trained, as hyperparameters of `retrain`, key=value; "
            "a deep audit trains its shadow models so"
        ),
    ] = Field(default_factory=dict)
    shadow_cache: Annotated[
        str | Path | None, Field(description="directory that keeps shadow models between audits")
    ] = None
    include_examples: Annotated[
        bool, Field(description="put a few forget records and answers in the report")
    ] = False
    seed: Annotated[int, Field(ge=0, description="of everything random")] = 0
    device: Annotated[
        str | None, Field(description="cpu, cuda, cuda:1; default: a GPU when there is one")
    ] = None


class RunConfig(CaseConfig):
    """Everything `unlearn run` can be told; the same names in YAML, in Python and as flags."""

    checkpoint: Annotated[
        Any,
        Field(description="Hugging Face directory, hub name, earlier run, or safetensors file"),
    ]
    method: Annotated[str, Field(description="the unlearning method; `unlearn methods` lists them")]
    scope: Annotated[
        str | None,
        Field(description="parameters that may move: all, head, lora, experts, or name patterns"),
    ] = None
    merge: Annotated[
        bool,
        Field(
            description="with scope lora: write the whole model with the adapters merged, not the "
            "adapters alone"
        ),
    ] = False
    audit: Annotated[
        Literal["quick", "standard", "deep", "none"],
        Field(description="how closely the result is examined"),
    ] = "quick"
    watch: Annotated[
        int,
        Field(
            ge=0,
            description="look at what is forgotten and kept every so many steps, for the report; "
            "0: only before and after",
        ),
    ] = 0
    save_every: Annotated[
        float, Field(ge=0, description="seconds between saves of unfinished training")
    ] = 60.0

    @field_validator("watch")
    @classmethod
    def _in_a_report(cls, watch: int, info: ValidationInfo) -> int:
        if watch and info.data.get("audit") == "none":
            raise ValueError("what is seen stands in the report: it needs an audit")
        return watch


class AuditConfig(CaseConfig):
    """Everything `unlearn audit` can be told."""

    original: Annotated[
        Any, Field(description="the checkpoint before it forgot, in any form `run` takes")
    ]
    unlearned: Annotated[
        Any, Field(description="the checkpoint after: a run directory or any checkpoint")
    ]
    method: Annotated[
        str | None,
        Field(description="how it was made to forget, where it is no run directory"),
    ] = None
    audit: Annotated[
        Literal["quick", "standard", "deep"],
        Field(description="how closely the result is examined"),
    ] = "standard"


# what a search has no use for: closer audits than that of a trial read it, or reports
UNREAD = {
    "translations", "translator", "jailbreaks", "acr", "shadows", "training", "shadow_cache",
    "include_examples", "clip",
}  # fmt: skip


class TuneConfig(CaseConfig):
    """Everything `unlearn tune` can be told, but for what stands in ``UNREAD``."""

    checkpoint: Annotated[
        Any, Field(description="every trial starts from it; in any form `run` takes, on disk")
    ]
    method: Annotated[str, Field(description="the method whose hyperparameters are searched")]
    scope: Annotated[
        str | None,
        Field(description="parameters that may move, in every trial; else as the method has it"),
    ] = None
    trials: Annotated[
        int, Field(ge=1, description="trials in total, of all workers and of earlier calls")
    ] = 20
    out: Annotated[
        str | Path | None,
        Field(
            description="the directory of this worker: a new one, or that of the same command "
            "before, which then goes on"
        ),
    ] = None
    storage: Annotated[
        str | None,
        Field(
            description="where the trials are kept, as sqlite:///FILE or another database URL that "
            "optuna takes; workers that name the same share them; default: a file in --out"
        ),
    ] = None
    range: Annotated[
        dict[str, Any],
        Field(
            description="where to look, instead of the ranges that `unlearn methods NAME` shows: "
            "key=LOW:HIGH, key=LOW:HIGH:log, key=LOW:HIGH:STEP, or choices key=A,B,C"
        ),
    ] = Field(default_factory=dict)


class MemorizationConfig(CaseConfig):
    """Everything `unlearn audit --only memorization` can be told."""

    checkpoint: Annotated[
        Any, Field(description="the language model, in any form `run` takes a checkpoint")
    ]
    prefixes: Annotated[
        str | None,
        Field(
            description="of memorization: tokens of the beginnings that are given, '8,16,50'; "
            "default: doubling, as far as the texts go"
        ),
    ] = None
    suffix: Annotated[
        int, Field(gt=0, description="of memorization: tokens that must follow a beginning")
    ] = 50
    sample: Annotated[
        int, Field(ge=1, description="of memorization: distinct texts measured at most")
    ] = 10_000
    further: Annotated[
        Any,
        Field(
            exclude=True,
            description="of memorization: other records to train on, to see what is retained; "
            "default: half of --holdout",
        ),
    ] = None
    retention_steps: Annotated[
        int, Field(ge=0, description="of memorization: steps of that training, 0 for none")
    ] = 64
    retention_lr: Annotated[
        float, Field(gt=0, description="of memorization: its learning rate")
    ] = 1e-4
    corpus: Annotated[
        str | Path | None,
        Field(
            description="of memorization: files and folders in which generated text is looked up, "
            "'a.txt,folder'; default: the records"
        ),
    ] = None
    match: Annotated[
        int, Field(gt=0, description="of memorization: tokens that a verbatim match must have")
    ] = 50
    generations: Annotated[
        int, Field(ge=0, description="of memorization: texts generated for that, 0 for none")
    ] = 200


Config = TypeVar("Config", bound=CaseConfig)


def configure(kind: type[Config], **values: Any) -> Config:
    """A validated configuration of this kind.

    Raises:
        BadInput: unknown keys (with the nearest known one) and bad values, all at once.
    """
    known = kind.model_fields
    faults = [
        f"there is no setting {key!r}: {did_you_mean(key, known)}"
        for key in values
        if key not in known
    ]
    kept = {key: value for key, value in values.items() if key in known}
    try:
        config = kind(**kept)
    except ValidationError as error:
        faults += [
            f"{'.'.join(str(part) for part in fault['loc'])}: "
            + ("it is missing" if fault["type"] == "missing" else fault["msg"])
            for fault in error.errors()
        ]
        raise BadInput("\n".join(faults)) from error
    if faults:
        raise BadInput("\n".join(faults))
    return config


def as_flags(names: Iterable[str]) -> str:
    """Settings as the command line writes them, in order of their names."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings from a YAML file; whether they exist is checked by :func:`configure`.

    Raises:
        BadInput: no such file, or not a mapping.
    """
    settings = _yaml(path, "configuration")
    if not isinstance(settings, dict):
        raise BadInput(f"{path} must hold settings as `name: value` lines")
    return {str(name): value for name, value in settings.items()}


def read_list(path: Path) -> list[Any]:
    """The items of a YAML or JSON file that holds a list.

    Raises:
        BadInput: no such file, or not a list.
    """
    items = _yaml(path, "list")
    if not isinstance(items, list):
        raise BadInput(f"{path} must hold a list, such as `- forget_classes: cat` lines")
    return items


def _yaml(path: Path, what: str) -> Any:
    if not path.is_file():
        raise BadInput(f"the {what} {path} does not exist: check the path")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not YAML: {' '.join(str(error).split())}") from error
