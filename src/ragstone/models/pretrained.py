"""Loading, saving and putting together: what every RAG model class can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ragstone import local
from ragstone.encoders import load_backbone, read_encoder_settings
from ragstone.encoders.checkpoint import quiet
from ragstone.encoders.precision import parse_device, parse_dtype
from ragstone.errors import InputError, ModelError
from ragstone.models.adapters import PARTS, base_of, load_trained
from ragstone.models.configuration import RagConfig, check_place
from ragstone.models.null_passage import NullPassage
from ragstone.models.protocols import Retriever

__all__ = ["RagPreTrainedModel", "new_config"]

CAUSAL_CONTEXT_LENGTH = 1024
"""``max_combined_length`` of a new model with a causal generator, whose context is a whole prompt."""

Model = TypeVar("Model", bound="RagPreTrainedModel")


class RagPreTrainedModel(PreTrainedModel):
    """Loading, saving and the generation config of all RAG models. Abstract."""

    config_class = RagConfig
    base_model_prefix = "rag"
    accepts_loss_kwargs = False
    _supports_flash_attn = True
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = []

    rag: Any  # a RagModel; transformers evaluates annotations here, where the class does not exist yet

    @classmethod
    def from_pretrained_question_encoder_generator(
        cls: type[Model],
        question_encoder_pretrained_model_name_or_path: str | Path | None = None,
        generator_pretrained_model_name_or_path: str | Path | None = None,
        retriever: Retriever | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> Model:
        """Put a model together from two checkpoints.

        Args:
            question_encoder_pretrained_model_name_or_path: any ``AutoModel`` name or folder, or ``"local"``.
            generator_pretrained_model_name_or_path: any seq2seq or causal language model name or folder, or ``"local"``.
            retriever: see :class:`ragstone.RagRetriever`.
            device, dtype: of both models.
            kwargs: fields of :class:`ragstone.RagConfig`, or a whole one as ``config=``; ``question_encoder_model=`` and
                ``generator_model=``, parts that are built already. What else begins with ``question_encoder_`` or
                ``generator_`` goes, without that prefix, to the ``from_pretrained`` of the part.

        Raises:
            ModelError: a part is missing, damaged or of a kind that does not fit.
            TypeError: an option that nobody takes.
        """
        known = RagConfig.__dataclass_fields__
        parts = {
            side: {
                name.removeprefix(f"{side}_"): kwargs.pop(name)
                for name in list(kwargs)
                if name.startswith(f"{side}_") and name not in known
            }
            for side in ("question_encoder", "generator")
        }
        question_encoder, generator = (
            parts["question_encoder"].pop("model", None),
            parts["generator"].pop("model", None),
        )
        config = kwargs.pop("config", None)
        unknown = set(kwargs) - set(known if config is None else ())
        for side, model in (("question_encoder", question_encoder), ("generator", generator)):
            unknown |= {f"{side}_{name}" for name in parts[side]} if model is not None else set()
        if unknown:
            raise TypeError(
                f"{cls.__name__} has no option {', '.join(sorted(unknown))}; it takes fields of RagConfig (not beside "
                "config=) and options of parts that are not built yet."
            )
        if question_encoder is None:
            name = _named(question_encoder_pretrained_model_name_or_path, "question encoder")
            question_encoder = load_backbone(name, **parts["question_encoder"])
            settings = read_encoder_settings(name)
            kwargs.setdefault("question_encoder_pooling", settings.pooling)
            kwargs.setdefault("question_encoder_normalize", settings.normalize)
            kwargs.setdefault("question_prompt", settings.question_prompt)
        if generator is None:
            name = _named(generator_pretrained_model_name_or_path, "generator")
            generator = _load_generator(name, **parts["generator"])
        if config is None:
            config = new_config(question_encoder, generator, **kwargs)
        model = cls(config, question_encoder=question_encoder, generator=generator, retriever=retriever)
        model.eval()
        _move(model, device, dtype)
        return model

    @classmethod
    def from_pretrained(cls: type[Model], name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint of either model class, written by Ragstone or transformers; see ``PreTrainedModel``.

        ``"local"`` names the default models that need no hub, with the adapters that come with Ragstone, and
        ``"local-untrained"`` those without. A checkpoint of adapters is loaded into its base.
        Fields of the config can be replaced: ``null_passage="bias"`` adds a null passage to a checkpoint without one.
        ``device`` and ``dtype`` are those of both parts; without them it is on the CPU, in the dtypes it was saved in.

        Raises:
            ModelError: it is missing, damaged, or lacks weights (which transformers would draw at random).
        """
        if str(name_or_path) == local.LOCAL:
            name_or_path = local.adapter_folder()
        if str(name_or_path) == local.UNTRAINED:
            return _local_model(cls, **kwargs)
        if not {"config", "subfolder"} & kwargs.keys():
            check_place(name_or_path)
        saved = RagConfig.load(name_or_path) if Path(name_or_path, CONFIG_NAME).is_file() else None
        if saved is not None and saved.base_model is not None:
            return _on_base(cls, Path(name_or_path), saved, *args, **kwargs)
        wants_report = kwargs.pop("output_loading_info", False)
        retriever = kwargs.pop("retriever", None)  # transformers makes a deep copy of every option
        # It would leave the parts in the dtypes that their own configs name.
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        kwargs = {**local.hub_options(name_or_path), **kwargs}
        try:
            with quiet():
                model, report = super().from_pretrained(name_or_path, *args, output_loading_info=True, **kwargs)
        except InputError:  # a field that cannot be
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"The checkpoint {str(name_or_path)!r} cannot be loaded: {error}") from error
        missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
        if model.config.pooling != "pooler" and any("question_encoder.pooler." in name for name in missing):
            model.question_encoder.pooler = None  # the checkpoint was saved without one, which pooling does not need
            missing = [name for name in missing if "question_encoder.pooler." not in name]
        if "null_passage" in kwargs or "config" in kwargs:  # added to a checkpoint that has none: it begins anew
            missing = [name for name in missing if "null_passage." not in name]
        if missing:
            raise ModelError(
                f"The checkpoint {str(name_or_path)!r} lacks {len(missing)} weights, such as {missing[0]!r}; "
                "it is damaged, or no RAG checkpoint."
            )
        _move(model, device, dtype)
        model.set_retriever(retriever)
        return (model, report) if wants_report else model

    @property
    def question_encoder(self) -> Any:
        """The raw Hugging Face question encoder."""
        return self.rag._modules["question_encoder"]

    @property
    def generator(self) -> Any:
        """The raw Hugging Face generator."""
        return self.rag._modules["generator"]

    @property
    def retriever(self) -> Retriever | None:
        """The retriever, if one is set."""
        return self.rag._retriever

    def set_retriever(self, retriever: Retriever | None) -> None:
        """Use ``retriever`` from now on; one without an encoder of its own is handed the model's."""
        self.rag._retriever = retriever
        if retriever is not None:
            retriever.attach(self.question_encoder)

    # The generator's generation config is the model's: forced tokens, lengths and beams are taken over whole, and
    # save_pretrained and from_pretrained carry it along.
    @property
    def generation_config(self) -> Any:
        """The generator's."""
        rag = self._modules.get("rag", self)
        generator = rag._modules.get("generator") if rag is not None else None
        return getattr(generator, "generation_config", None)

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        rag = self._modules.get("rag", self)
        generator = rag._modules.get("generator") if rag is not None else None
        if generator is not None and value is not None:
            generator.generation_config = value

    def get_input_embeddings(self) -> Any:
        """The generator's."""
        return self.generator.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """The generator's."""
        self.generator.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The generator's."""
        return self.generator.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """The generator's."""
        self.generator.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Change the size of the generator's vocabulary; see ``PreTrainedModel``."""
        embeddings = self.generator.resize_token_embeddings(*args, **kwargs)
        self._read_parts()
        return embeddings

    def _read_parts(self) -> None:
        """Bring the config up to date with its parts, whose own configs may have been changed."""
        for name in PARTS:
            part, known = getattr(self, name), getattr(self.config, name)
            values = {**_part_config(part), "architectures": known.architectures}
            setattr(self.config, name, type(part.config).from_dict(values))

    def _init_weights(self, module: Any) -> None:
        """The parts initialise themselves; the body has no weights of its own but the null passage's."""
        if isinstance(module, NullPassage):
            module.reset_parameters()

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write ``config.json``, ``generation_config.json`` and safetensors weights; see ``PreTrainedModel``."""
        from ragstone import __version__

        self._read_parts()
        # A checkpoint of transformers stays uncased when it is saved as one of ours.
        self.config.lowercase_questions = self.config.lowercases_questions
        self.config.ragstone_version = __version__
        super().save_pretrained(save_directory, **kwargs)


def _move(model: PreTrainedModel, device: str | torch.device | None, dtype: torch.dtype | str | None) -> None:
    """Bring a model where it was asked for; what is None stays as it is (models spread over devices cannot be moved)."""
    wanted = {"device": device and parse_device(device), "dtype": parse_dtype(dtype)}
    if given := {name: value for name, value in wanted.items() if value is not None}:
        model.to(**given)


def _on_base(kind: type[Model], folder: Path, saved: RagConfig, *args: Any, **kwargs: Any) -> Model:
    """The base of a checkpoint of adapters, with the adapters in its weights."""
    assert saved.base_model is not None
    if saved.null_passage is not None:
        kwargs["null_passage"] = saved.null_passage
    model = kind.from_pretrained(base_of(folder, saved.base_model), *args, **kwargs)
    load_trained(model, folder)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for name in set(RagConfig.__dataclass_fields__) - {"question_encoder", "generator", "base_model", *kwargs}:
        setattr(model.config, name, getattr(saved, name))
    return model


def _local_model(kind: type[Model], **kwargs: Any) -> Model:
    """The default models that need no hub, with their prompt, τ and ends of an answer."""
    folders = local.resolve(local.LOCAL, "encoder"), local.resolve(local.LOCAL, "generator")
    fields = {"score_scale": local.SCORE_SCALE, **local.PROMPT, **kwargs}
    model = kind.from_pretrained_question_encoder_generator(*folders, **fields)
    tokenizer = AutoTokenizer.from_pretrained(folders[1])
    stops = [tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in local.STOPS]
    ends = [*model.rag.adapter().eos_token_ids, *(ids[0] for ids in stops if len(ids) == 1)]
    model.generation_config.eos_token_id = ends
    return model


def new_config(question_encoder: PreTrainedModel, generator: PreTrainedModel, **fields: Any) -> RagConfig:
    """The config of a model put together from two parts; ``fields`` as in :class:`ragstone.RagConfig`."""
    from ragstone import __version__

    causal = not generator.config.is_encoder_decoder
    fields.setdefault("is_encoder_decoder", not causal)
    fields.setdefault("ragstone_version", __version__)
    fields.setdefault("question_encoder_pooling", "pooler" if question_encoder.config.model_type == "dpr" else "mean")
    fields.setdefault("question_encoder_normalize", False)
    if causal:
        fields.setdefault("max_combined_length", CAUSAL_CONTEXT_LENGTH)
    return RagConfig(question_encoder=_part_config(question_encoder), generator=_part_config(generator), **fields)


def _part_config(part: PreTrainedModel) -> dict[str, Any]:
    """A part's config as a dictionary that names the class to load it with."""
    values = part.config.to_dict()
    values["architectures"] = [type(part).__name__]
    values["dtype"] = str(part.dtype).removeprefix("torch.")  # its config's is the one that it was loaded in
    values.pop("quantization_config", None)
    values.pop("_name_or_path", None)  # a path of this machine has no place in a checkpoint
    return values


def _named(name: str | Path | None, part: str) -> str:
    if name is None:
        raise InputError(f"Name the {part}: a model name, a folder, or 'local'.")
    return str(name)


def _load_generator(name: str, **kwargs: Any) -> PreTrainedModel:
    name = local.resolve(name, "generator")
    try:
        with quiet():
            kwargs = {**local.hub_options(name), **kwargs}
            config, kwargs = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **kwargs)
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model, report = auto.from_pretrained(name, config=config, output_loading_info=True, **kwargs)
    except TypeError:  # an option that the model does not know
        raise
    except Exception as error:
        raise ModelError(f"The generator {name!r} cannot be loaded: {error}") from error
    if report["missing_keys"]:
        raise ModelError(
            f"{name!r} lacks {len(report['missing_keys'])} weights of a {type(model).__name__}, such as "
            f"{min(report['missing_keys'])!r}, and these would be random; give a checkpoint of a generator."
        )
    return model
