"""Reads and checks the headers of a checkpoint folder, once, before any tensor is read.

The files are regular and readable, safetensors has checked that every tensor lies inside its file, the index names
files of this folder, and every sparse weight has the parts that its shape needs. What only the tensors show (the number
of bits, values that are not finite) is checked when they are read, in `format.py`.
"""

import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from sparse_train.errors import UserError, describe_error
from sparse_train.kernels import GROUP

HEADER, VERSION = "sparse_train", 1
KEY, METHOD = "quantization_config", "sparse-train"
"""The key of a sparse folder's config.json that transformers looks for, and its `quant_method`."""
SPARSE, DENSE = "sparse", "model"
PARTS = ("values", "bitmask", "scale")
NUM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes per entry, for the dtypes that can be read."""
INT4 = "U8"
"""What values of four bits are stored as, two codes per byte."""
QUANTISED = ("I8", INT4)
PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "I8": "int8", INT4: "int4"}
"""Of sparse weights, by the dtype of their values."""
READ = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Suffixes of the files of a model folder: config, tensors, tokenizer, chat template."""


class TensorInfo(NamedTuple):
    """A tensor in a safetensors file, without its entries."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _is_plain(name: str) -> str:
    if name != os.path.basename(name) or name in ("", ".", "..") or not name.isprintable():
        raise ValueError(f"{name!r} must be the name of a file in the same folder, without a path")
    return name


class _Index(BaseModel):
    weight_map: dict[str, Annotated[str, AfterValidator(_is_plain)]]


def _is_ours(version: int) -> int:
    if version != VERSION:
        raise ValueError(f"format version {version}, this release reads {VERSION}; update sparse-train")
    return version


class _Metadata(BaseModel):
    model_config = ConfigDict(strict=True)
    version: Annotated[int, AfterValidator(_is_ours)]
    shapes: dict[str, tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]]


def read_headers(folder: Path) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Every tensor of a checkpoint folder by name, and (R, C) of each sparse weight. Raises UserError."""
    require_plain_files(folder)
    stored: dict[str, TensorInfo] = {}
    shapes: dict[str, tuple[int, int]] = {}
    files, index = _list(folder)
    for file in files:
        stored_here, shapes_here = _read_header(file)
        if duplicates := stored_here.keys() & stored.keys():
            name = min(duplicates)
            raise UserError(f"{folder}: {name} is in two files, {stored[name].file.name} and {file.name}; remove "
                            "the one that does not belong there")
        stored |= stored_here
        shapes |= shapes_here
    for name, file_name in index.items():
        if name not in stored or stored[name].file.name != file_name:
            raise UserError(f"{folder}: {name} is not in {file_name}, where the index has it; the folder is not "
                            "complete, fetch or write it again")
    for name, shape in shapes.items():
        _check_parts(folder, name, shape, stored)
    return stored, shapes


def require_plain_files(folder: Path) -> None:
    """Raises UserError for entries that are not regular files (a pipe would hang), and for unreadable model files."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {describe_error(error)}") from error
    for entry in entries:
        is_read = Path(entry.name).suffix in READ
        if not (os.path.isfile(entry) or (os.path.isdir(entry) and not is_read)):
            raise UserError(f"{entry.path} is not a regular file but a folder, a pipe or a broken link; remove it, or "
                            "fetch the folder again")
        if is_read and not os.access(entry, os.R_OK):
            raise UserError(f"{entry.path}: permission denied; ask its owner to let you read it (chmod a+r)")


def _list(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Files, and the index's map from tensors to them; a single file has priority over an index, as for
    from_pretrained."""
    stems = [stem for stem in (SPARSE, DENSE) if any((folder / f"{stem}.safetensors{end}").is_file()
                                                     for end in ("", ".index.json"))]
    if len(stems) > 1:
        raise UserError(f"{folder} holds two models, {SPARSE}.safetensors and {DENSE}.safetensors; move one to a "
                        "folder of its own")
    if not stems:
        raise UserError(f"{folder} is not a checkpoint: it holds neither {SPARSE}.safetensors nor {DENSE}.safetensors; "
                        "give the folder that a stage or save_pretrained wrote")
    single = folder / f"{stems[0]}.safetensors"
    if single.is_file():
        return [single], {}
    index = Path(f"{single}.index.json")
    weight_map = _validated(_Index, index.read_bytes(), index).weight_map
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, which {index.name} names; the folder is not complete, fetch or write "
                            "it again")
    return files, weight_map


def _read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    try:
        # safetensors compares the header's length and every offset with the size of the file.
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is not a dict
            stored = {name: TensorInfo(file, tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or not a safetensors file: {error}") from error
    for name, (_, _, dtype) in stored.items():
        if dtype not in NUM_BYTES:
            raise UserError(f"{file}: {name} is stored as {dtype}, which is not supported (supported: "
                            f"{', '.join(NUM_BYTES)}); give a folder whose weights are not quantised")
    if HEADER not in metadata:
        return stored, {}
    return stored, _validated(_Metadata, metadata[HEADER], file).shapes


def _check_parts(folder: Path, name: str, shape: tuple[int, int], stored: dict[str, TensorInfo]) -> None:
    for part in ("values", "bitmask"):
        if f"{name}.{part}" not in stored:
            raise UserError(f"{folder}: {name}.{part} is missing; the checkpoint is not complete")
    values = stored[f"{name}.values"]
    needed = {"values": ((max((1, *values.shape[:1])),), values.dtype if values.dtype in PRECISIONS else "F32"),
              "bitmask": ((shape[0], 8 * -(-shape[1] // 64)), "U8"),
              "scale": {"I8": ((shape[0],), "F32"),
                        INT4: ((shape[0], -(-shape[1] // GROUP)), "BF16")}.get(values.dtype)}
    for part, need in needed.items():
        tensor = stored.get(f"{name}.{part}")
        spec = tensor and (tensor.shape, tensor.dtype)
        if spec != need:
            raise UserError(f"{folder}: {name}.{part} is {_words(spec)}; a weight of shape {shape} with values in "
                            f"{values.dtype} has {_words(need)}, so the file is damaged")


def _words(spec: tuple[tuple[int, ...], str] | None) -> str:
    return "not there" if spec is None else f"{spec[1]} {spec[0]}"


def _validated(schema: type[BaseModel], text: str | bytes, file: Path) -> Any:
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"cannot read {file}: {key + ': ' if key else ''}{first['msg']}") from error
