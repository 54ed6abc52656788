"""A diffusers pipeline as one network: its denoiser learns, everything beside it stays.

The denoiser (a UNet or a transformer) is the registered module, so methods, scopes and
fingerprints see its parameters, under the names they have in the pipeline (``unet....``). Text
encoder, autoencoder, tokenizer and scheduler come along. :meth:`Pipeline.with_trained` makes
another component the one that learns.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn

from unlearn.errors import BadInput, Unsupported
from unlearn.noising import Kind, noised, to_eps

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
SAMPLING = "sampling.json"  # how a pipeline wants to be sampled, where a method has changed that
KNOWN = ("DDPMPipeline", "DDIMPipeline", "DiTPipeline", "StableDiffusionPipeline")


class Pipeline(nn.Module):
    """Denoiser, text encoder, autoencoder and scheduler of a diffusers pipeline.

    Args:
        pipeline: from ``diffusers``.
        trained: name of the component that is registered; None: the denoiser.
        steps: of sampling; None: the caller chooses.
        null_class: the class index that stands for no class, in a UNet that was trained with one.

    Raises:
        Unsupported: a scheduler without ``alphas_cumprod`` (flow matching), or a pipeline of
            another kind.
    """

    def __init__(
        self, pipeline: Any, trained: str | None = None, steps: int | None = None,
        null_class: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if type(pipeline).__name__ not in KNOWN:
            raise Unsupported(
                f"{type(pipeline).__name__} is not supported: known are {', '.join(KNOWN)}"
            )
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise Unsupported(
                f"{type(pipeline.scheduler).__name__} has no noise variances (flow matching is not "
                "supported): use a pipeline with a DDPM or DDIM scheduler"
            )
        if pipeline.scheduler.config.prediction_type not in get_args(Kind):
            raise Unsupported(
                f"the scheduler's prediction type {pipeline.scheduler.config.prediction_type!r} is "
                f"not supported: known are {', '.join(get_args(Kind))}"
            )
        self.pipeline, self.steps, self.stated_null = pipeline, steps, null_class
        self.denoiser_name = "unet" if hasattr(pipeline, "unet") else "transformer"
        self.trained = trained or self.denoiser_name
        # not by add_module, which refuses names that are properties here
        self._modules[self.trained] = getattr(pipeline, self.trained)
        for _, part in self._beside():
            part.eval().requires_grad_(False)
        if null_class is not None and self.classes is not None and null_class != self.classes - 1:
            raise BadInput(
                f"null_class {null_class} is not the last of the {self.classes} rows of the class "
                "embedding: only that can stand for no class"
            )

    def _beside(self) -> list[tuple[str, nn.Module]]:
        parts = self.pipeline.components.items()
        return [(n, p) for n, p in parts if isinstance(p, nn.Module) and n != self.trained]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pipeline:
        for _, part in self._beside():
            part._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def with_trained(self, name: str) -> Pipeline:
        """The same components, another of which learns; ``unet``, ``text_encoder`` and so on."""
        if not isinstance(getattr(self.pipeline, name, None), nn.Module):
            raise Unsupported(f"{type(self.pipeline).__name__} has no {name}")
        return Pipeline(self.pipeline, name, self.steps, self.stated_null)

    def with_fresh_denoiser(self) -> Pipeline:
        """The same components around a denoiser with new random weights."""
        fresh = type(self.denoiser).from_config(self.denoiser.config).to(self.device, self.dtype)
        self.pipeline.register_modules(**{self.denoiser_name: fresh})
        return Pipeline(self.pipeline, None, self.steps, self.stated_null)

    @property
    def denoiser(self) -> Any:
        """The network that predicts noise."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def text_encoder(self) -> Any:
        """The network that reads prompts, if there is one."""
        return getattr(self.pipeline, "text_encoder", None)

    @property
    def vae(self) -> Any:
        """The autoencoder of latent diffusion, if there is one."""
        return getattr(self.pipeline, "vae", None)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of prompts, if there is one."""
        return getattr(self.pipeline, "tokenizer", None)

    @property
    def kind(self) -> Kind:
        """What the denoiser predicts."""
        found: Kind = self.pipeline.scheduler.config.prediction_type
        return found

    @property
    def abars(self) -> Tensor:
        """alphas_cumprod, shape (T,), float64 on the model's device."""
        found: Tensor = self.pipeline.scheduler.alphas_cumprod
        return found.to(self.device, torch.float64)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        found: torch.device = next(self.denoiser.parameters()).device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser."""
        found: torch.dtype = next(self.denoiser.parameters()).dtype
        return found

    @property
    def classes(self) -> int | None:
        """Number of classes the denoiser is conditioned on; None where it is not.

        A row more than there are classes, which stands for none, is not told apart here: see
        :attr:`null_class`.
        """
        config = self.denoiser.config
        embedded = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
        if embedded is None or self.text_encoder is not None:
            return None
        return int(embedded)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what is denoised."""
        config = self.denoiser.config
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(config["in_channels"]), int(height), int(width)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the pictures."""
        channels, height, width = self.shape
        if self.vae is None:
            return channels, height, width
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return int(self.vae.config.in_channels), height * scale, width * scale

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """What the denoiser predicts, in its own terms, shape of ``x_t``.

        Args:
            x_t: noisy pictures or latents, shape (rows, channels, height, width).
            t: integer times, shape (rows,).
            condition: class indices (rows,), or text states (rows, tokens, dim); None: none.
        """
        if self.text_encoder is not None:
            out = self.denoiser(x_t, t, encoder_hidden_states=condition)
        elif condition is not None:
            out = self.denoiser(x_t, t, class_labels=condition)
        else:
            out = self.denoiser(x_t, t)
        predicted: Tensor = out.sample
        return predicted[:, : x_t.shape[1]]  # some also predict a variance

    def eps(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None, null: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """The predicted noise; with ``null``, null + guidance * (conditional - null).

        Classifier-free guidance (Ho & Salimans 2022, eq. 6, written with weight 1 for none).
        """
        predicted = self.guided(x_t, t, condition, null, guidance)
        return to_eps(predicted, x_t, self.abars[t], self.kind)

    def guided(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None, null: Tensor | None,
        guidance: float,
    ) -> Tensor:  # fmt: skip
        """What the denoiser predicts under guidance, in its own terms.

        Those are affine in the noise, so it comes to the same as guiding the noise.
        """
        if null is None or condition is None or guidance == 1.0:
            predicted: Tensor = self(x_t, t, condition)
            return predicted
        both = self(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([null, condition]))
        bare, told = both.chunk(2)
        mixed: Tensor = bare + guidance * (told - bare)
        return mixed

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t at integer times, shape (rows,)."""
        return noised(x_0, eps, self.abars[t])

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as padded token ids, shape (prompts, tokens)."""
        found: Tensor = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.tokenizer.model_max_length,
            truncation=True, return_tensors="pt",
        ).input_ids  # fmt: skip
        return found.to(self.device)

    def text_states(self, ids: Tensor) -> Tensor:
        """What the text encoder makes of token ids, shape (rows, tokens, dim)."""
        found: Tensor = self.text_encoder(ids)[0]
        return found

    def condition(self, wanted: Sequence[str] | Sequence[int] | Tensor | None) -> Tensor | None:
        """Prompts, class indices or token ids as the denoiser takes them; None: unconditional."""
        if wanted is None or (self.classes is None and self.text_encoder is None):
            return None
        if self.text_encoder is None:
            return torch.as_tensor(wanted, device=self.device).long()
        texts = wanted if isinstance(wanted, Tensor) else self.token_ids([str(w) for w in wanted])
        return self.text_states(texts.to(self.device))

    @property
    def null_class(self) -> int | None:
        """The row of the class embedding that stands for no class; None where there is none."""
        if self.classes is None:
            return None
        if self.denoiser_name == "transformer":  # DiT adds one to its table
            return self.classes
        return self.stated_null

    def null(self, rows: int) -> Tensor | None:
        """The condition that says nothing; None where the network has none."""
        if self.text_encoder is not None:
            return self.condition([""]).expand(rows, -1, -1)  # type: ignore[union-attr]
        if self.null_class is None:
            return None
        return torch.full((rows,), self.null_class, device=self.device)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures in [0, 1], shape (rows, c, h, w), as what is denoised; latents' means."""
        scaled = 2 * pictures - 1
        if self.vae is None:
            return scaled
        latents = self.vae.encode(scaled).latent_dist.mode()
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        found: Tensor = (latents - shift) * self.vae.config.scaling_factor
        return found

    def decode(self, x_0: Tensor) -> Tensor:
        """What is denoised as pictures in [0, 1]."""
        if self.vae is not None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            x_0 = self.vae.decode(x_0 / self.vae.config.scaling_factor + shift).sample
        return (x_0 / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def sample(
        self, wanted: Sequence[str] | Sequence[int] | Tensor | None, generator: torch.Generator,
        steps: int = 20, guidance: float = 1.0, count: int | None = None, decode: bool = True,
    ) -> Tensor:  # fmt: skip
        """Pictures in [0, 1] by DDIM (Song et al. 2021, eta 0), shape (rows, c, h, w).

        Args:
            wanted: a prompt or class index per picture, or text states (rows, tokens, dim).
            generator: on the CPU: the starting noise, the same on every device.
            steps: network calls (twice as many rows each with guidance); a pipeline that was made
                for another number is sampled in that.
            guidance: weight of the condition; 1: none, as in a pipeline made for one step.
            count: pictures of an unconditional pipeline.
            decode: False: latents as they are denoised.
        """
        is_states = isinstance(wanted, Tensor) and wanted.ndim == 3
        condition = wanted if is_states else self.condition(wanted)
        rows = count if condition is None else len(condition)
        if rows is None:
            raise BadInput("say how many pictures: this pipeline is not conditioned on anything")
        # a one-step generator was never told nothing
        guided = self.null(rows) if guidance != 1.0 and not self.steps else None
        own = self.pipeline.scheduler
        spacing = "trailing" if self.steps else own.config.get("timestep_spacing", "leading")
        scheduler = library().DDIMScheduler.from_config(
            own.config, trained_betas=own.betas.tolist(), timestep_spacing=spacing,
            clip_sample=bool(own.config.get("clip_sample")) and self.vae is None,
        )  # fmt: skip
        scheduler.set_timesteps(self.steps or steps)
        x = torch.randn((rows, *self.shape), generator=generator).to(self.device, self.dtype)
        for t in scheduler.timesteps:
            times = torch.full((rows,), int(t), device=self.device)
            found = self.guided(x, times, condition, guided, guidance)  # type: ignore[arg-type]
            x = scheduler.step(found, t, x).prev_sample
        return self.decode(x) if decode else x

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the whole pipeline, as diffusers reads it."""
        self.pipeline.save_pretrained(directory, safe_serialization=True)
        # transformers loads a component in the precision its configuration names, diffusers in
        # the one it is asked for: without this a plain load would mix the two
        for file in Path(directory).glob("*/config.json"):
            config = json.loads(file.read_text())
            if config.get("dtype"):
                file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
        note: dict[str, int] = {}
        if self.steps:
            note["num_inference_steps"] = self.steps
        if self.stated_null is not None:
            note["null_class"] = self.stated_null
        if note:
            (Path(directory) / SAMPLING).write_text(json.dumps(note) + "\n")


def kind_of(directory: Path) -> str:
    """The class a pipeline directory names.

    Raises:
        BadInput: its index is damaged, or it brings code of its own.
        Unsupported: a pipeline of another kind.
    """
    try:
        index = json.loads((directory / INDEX).read_text())
        name, parts = index["_class_name"], {k: v for k, v in index.items() if isinstance(v, list)}
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise BadInput(f"{directory / INDEX} is damaged: get it again") from error
    if not isinstance(name, str):
        raise BadInput(f"{directory} brings Python code of its own, which is never run")
    parts.pop("safety_checker", None)  # of Stable Diffusion 1: left out
    if odd := [k for k, v in parts.items() if v[0] not in (None, "diffusers", "transformers")]:
        raise BadInput(f"the {odd[0]} of {directory} is code of its own, which is never run")
    if name not in KNOWN:
        raise Unsupported(f"{directory} is a {name}: supported are {', '.join(KNOWN)}")
    return name


def library() -> Any:
    """The diffusers package, without its progress bars.

    Raises:
        Unsupported: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise Unsupported(
            "diffusion models need diffusers: pip install 'unlearn-toolkit[diffusion]'"
        ) from error
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def read(directory: Path, dtype: torch.dtype, null_class: int | None = None) -> Pipeline:
    """Load a pipeline; safetensors only, no code but that of diffusers and transformers.

    Args:
        directory: as diffusers writes it.
        dtype: to load in.
        null_class: see :class:`Pipeline`; None: what the directory says.

    Raises:
        BadInput: it cannot be loaded.
        Unsupported: of another kind.
    """
    name = kind_of(directory)
    diffusers = library()
    extra = {"safety_checker": None} if name == "StableDiffusionPipeline" else {}
    with _loading(directory):
        pipeline = getattr(diffusers, name).from_pretrained(
            directory, torch_dtype=dtype, use_safetensors=True, local_files_only=True, **extra
        )
    return _sampled_as_stated(directory, pipeline, null_class)


def outline(directory: Path, null_class: int | None = None) -> Pipeline:
    """The pipeline without weights, its networks on the meta device; arguments as :func:`read`.

    Raises:
        BadInput: a configuration that cannot be read.
        Unsupported: of another kind.
    """
    name = kind_of(directory)
    diffusers = library()
    index = json.loads((directory / INDEX).read_text())
    parts: dict[str, Any] = {}
    with _loading(directory):
        for part, named in index.items():
            if not isinstance(named, list):
                continue
            module, kind = named
            if module is None or part == "safety_checker":
                parts[part] = None
                continue
            found = getattr(diffusers if module == "diffusers" else transformers, kind)
            place = directory / part
            if not issubclass(found, nn.Module):
                parts[part] = found.from_pretrained(place, local_files_only=True)
            elif module == "diffusers":
                with torch.device("meta"):
                    parts[part] = found.from_config(found.load_config(place))
            else:
                with torch.device("meta"):
                    parts[part] = found(found.config_class.from_pretrained(place))
        pipeline = getattr(diffusers, name)(**parts)
    return _sampled_as_stated(directory, pipeline, null_class)


@contextmanager
def _loading(directory: Path) -> Iterator[None]:
    """What the libraries raise on damaged files becomes one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that will be dropped
            yield
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise BadInput(f"{directory} cannot be loaded: {str(error).splitlines()[0]}") from error


def _sampled_as_stated(directory: Path, pipeline: Any, null_class: int | None) -> Pipeline:
    note = directory / SAMPLING
    stated = json.loads(note.read_text()) if note.exists() else {}
    if null_class is None:
        null_class = stated.get("null_class")
    return Pipeline(pipeline, None, stated.get("num_inference_steps"), null_class)
