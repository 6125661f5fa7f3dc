"""Models as folders: config.json, tokenizer, tensors; dense in Hugging Face's layout, sparse in ours.

    open_model   config -> a model without data, checked against what the folder holds
    fill         its tensors, read; under ZeRO-3 each rank reads its own ranges instead

There is one way in, so that what one stage reads no other refuses. Nothing of a folder is unpickled or executed.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from sparse_train.errors import UserError
from sparse_train.hub import hub_answers
from sparse_train.models.generation import model_tokens
from sparse_train.sparse import BitmaskTensor, TensorFolder, sparse_linears, sparsify, write_tensors

# What transformers' MPT takes for granted whatever the config says: another value would be another model, silently.
_MPT_ATTENTION = {"attn_type": "multihead_attention", "qk_ln": False, "alibi": True, "alibi_bias_max": 8,
                  "prefix_lm": False, "rope": False}
_MPT = {"logit_scale": None}


def from_config(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `config` with the head that predicts text. Raises UserError where there is no such model."""
    try:
        return _auto_class(config).from_config(config, dtype=dtype)
    except ValueError as error:
        raise UserError(f"no model that predicts text can be made of this {config.model_type} config: "
                        f"{first_line(error)}") from error


def _auto_class(config: PretrainedConfig):
    if config.model_type == "whisper":
        return AutoModelForSpeechSeq2Seq
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def read_config(path: str | Path) -> PretrainedConfig:
    """Of a folder or hub name. Raises UserError where there is none, or one whose model transformers does not have."""
    if not Path(path).exists():
        hub_answers()
    try:
        given, _ = PretrainedConfig.get_config_dict(path, trust_remote_code=False)
        if given.get("model_type") == "mpt":
            _check_mpt(path, given)
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read a model config from {path}: {first_line(error)}; "
                        "give a folder with config.json or a hub name") from error
    except StrictDataclassError as error:
        raise UserError(f"the config of {path} is not valid: {' '.join(str(error).split())}") from error


def read_generation(path: str | Path) -> GenerationConfig:
    """How a folder or hub name generates; where it has no file of that, what its config.json says, as from_pretrained
    does. Raises UserError."""
    source = {}
    if cached_file(path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False,
                   _raise_exceptions_for_connection_errors=False) is None:
        source = {"config_file_name": CONFIG_NAME, "_from_model_config": True}
    with reading(path, GENERATION_CONFIG_NAME):
        found = GenerationConfig.from_pretrained(path, **source)
    model_tokens(found, path)
    return found


def _check_mpt(path, given: dict) -> None:
    for facts, section in ((_MPT_ATTENTION, given.get("attn_config") or {}), (_MPT, given)):
        for key, value in facts.items():
            if section.get(key, value) != value:
                raise UserError(f"{path}: {key}={section[key]} is not supported, transformers computes every mpt model "
                                f"as if it were {value}; give one that is")


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A dense model from a folder or hub name, or one with SparseLinears from a sparse folder; in eval mode.

    Raises UserError where tensors are missing, which would be random, silently, or left over, or of another shape.
    """
    model, folder = open_model(path, dtype)
    for name, shape in folder.shapes.items():
        weight = folder.weight(name)  # checks its bits against its values
        sparsify(model, {name: BitmaskTensor(weight.values.to(dtype), weight.bitmask, shape)})
    fill(model, folder)
    return model.eval()


def open_model(path: str | Path, dtype: torch.dtype = torch.float32,
               quantised: bool = False) -> tuple[PreTrainedModel, "ModelFolder"]:
    """A model without data (meta device), dense or with SparseLinears, and the folder to read its tensors from.

    For who loads tensors in parts. A hub name is downloaded first. `quantised`: int8 values are welcome too. Raises
    UserError where the folder lacks a tensor of the model, holds one too many or one of another shape.
    """
    folder = ModelFolder(_local(path))
    model = empty_model(read_config(folder.folder), dtype)
    model.generation_config = read_generation(folder.folder)
    folder.match(model)
    for name, shape in folder.shapes.items():
        (num_values,), stored = folder.spec(f"{name}.values")
        if stored == "I8" and not quantised:
            raise UserError(f"{folder.folder}: {name} is quantised; it runs (sparse-train generate) but does not "
                            "train, so give the fp32 or bf16 folder here")
        bitmask = torch.empty(folder.spec(f"{name}.bitmask")[0], dtype=torch.uint8, device="meta")
        sparsify(model, {name: BitmaskTensor(torch.empty(num_values, dtype=dtype, device="meta"), bitmask, shape)})
    return model, folder


def _local(path: str | Path) -> Path:
    """The folder itself, or that of a hub name, downloaded."""
    folder = Path(path)
    downloaded = not folder.is_dir()
    if downloaded:
        answers = hub_answers()
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
        except (OSError, ValueError) as error:
            cause = first_line(error) if answers else "the hub does not answer, and its cache does not hold it"
            raise UserError(f"cannot download {path}: {cause}; give a folder or a hub name") from error
    if not any(folder.glob("*.safetensors")) and (downloaded or any(folder.glob("*.bin"))):
        raise UserError(f"{path} has no weights in safetensors; pickled ones (*.bin) can execute code and are not "
                        "read: where you trust them, convert them by transformers' from_pretrained and save_pretrained")
    return folder


class ModelFolder(TensorFolder):
    """A checkpoint's tensors under the names that its model gives them, whatever they are stored under."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._stored: dict[str, str] = {}

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        return super().spec(self._stored.get(name, name))

    def get(self, name: str) -> torch.Tensor:
        return super().get(self._stored.get(name, name))

    def get_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        return super().get_range(self._stored.get(name, name), start, stop)

    def match(self, model: PreTrainedModel) -> None:
        """Find each tensor of the dense `model`; raises UserError where one is missing, left over or of another shape.

        transformers' rules for published checkpoints hold: the prefix of a model without its head may be there or not,
        a tied tensor may go by either name, and some names of old may be left over. What a model ties but a checkpoint
        holds apart is untied.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        prefix = f"{model.base_model_prefix}."
        for stored in self.names:
            names = (stored, prefix + stored, stored.removeprefix(prefix))
            self._stored[next((name for name in names if name in expected), stored)] = stored
        self._match_ties(model)
        found = {name: self.spec(name)[0] for name in self._stored} | {
            f"{name}.weight": shape for name, shape in self.shapes.items()}
        odd = SimpleNamespace(missing_keys=set(), unexpected_keys=found.keys() - expected.keys())
        model._adjust_missing_and_unexpected_keys(odd)  # transformers' own list of names of old
        missing, left = sorted(own_tensors(model).keys() - found.keys()), sorted(odd.unexpected_keys)
        kind = f"a {model.config.model_type} model"
        if missing:
            raise UserError(f"{self.folder} lacks {len(missing)} tensors of {kind}, such as {missing[0]}; the "
                            "checkpoint is not complete")
        if left:
            raise UserError(f"{self.folder} holds {len(left)} tensors that {kind} does not have, such as {left[0]}; "
                            "its config.json belongs to another model")
        for name in own_tensors(model):
            if found[name] != expected[name]:
                raise UserError(f"{self.folder}: {name} has shape {found[name]}, but {expected[name]} in {kind} of its "
                                "config.json, which belongs to another model")

    def _match_ties(self, model: PreTrainedModel) -> None:
        ties = model.all_tied_weights_keys
        for target, source in list(ties.items()):
            if {target, source} <= self._stored.keys() and not torch.equal(self.get(target), self.get(source)):
                # T5 v1.1: its config cannot say that the head is not the embedding.
                del ties[target]
                parent, _, short = target.rpartition(".")
                setattr(model.get_submodule(parent), short, nn.Parameter(torch.empty_like(model.get_parameter(target))))
        for names in (ties.items(), ((source, target) for target, source in ties.items())):
            for here, other in names:
                if here in self._stored:
                    self._stored.setdefault(other, self._stored[here])


def empty_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Parameters without data (meta device); buffers that are computed, such as rotary frequencies, with."""
    with torch.device("meta"):
        model = from_config(config, dtype)
    persistent = model.state_dict().keys()
    for prefix, module in model.named_modules():
        own = [name for name, buffer in module.named_buffers(recurse=False)
               if buffer.is_meta and f"{prefix}.{name}" not in persistent]
        for name in own:
            module.register_buffer(name, torch.empty_like(getattr(module, name), device="cpu"), persistent=False)
        if own:
            # transformers' own way to fill what no checkpoint holds, used by from_pretrained.
            model._init_weights(module)
    return model


def fill(model: PreTrainedModel, folder: ModelFolder) -> None:
    """Read what has no data yet, into the dtype that it is to have."""
    model.load_state_dict({name: folder.get(name).to(empty.dtype) for name, empty in own_tensors(model).items()
                           if empty.is_meta}, strict=False, assign=True)
    left = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
    model.tie_weights(missing_keys=left, recompute_mapping=False)


def save_model(folder: Path, model: PreTrainedModel, processor,
               tensors: Iterable[tuple[str, torch.Tensor]] | None = None) -> None:
    """Write config, processor and tensors of `model`; a model with SparseLinears is stored compressed.

    `processor` is a Processor or a tokenizer. `tensors` (name, tensor) replaces the model's own, for models whose
    parameters are partitioned over ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in sparse_linears(model).items()}
    write_tensors(folder, own_tensors(model).items() if tensors is None else tensors, shapes)


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that make up a checkpoint: parameters and persistent buffers, tied ones once."""
    persistent = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if name in persistent}


@contextmanager
def reading(folder: str | Path, what: str) -> Iterator[None]:
    """A net around transformers' loaders: whatever they raise becomes a UserError of one line that names the folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a hostile file may make them raise anything
        raise UserError(f"cannot read {what} from {folder}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Of its message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
