"""The model card of a folder, from what the manifests say that were written as it was made.

The tables are those of the run's report. Paths of this machine become their last names.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from pydantic import ValidationError

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.config.yaml_core import write_yaml
from sparse_train.hub import license_of, may_be_hub_name
from sparse_train.jobs.report import Table, read_tables, table_name
from sparse_train.jobs.stage import Kind, kind_of
from sparse_train.models import family_of_type, read_config, read_config_keys
from sparse_train.registry import TASKS
from sparse_train.sparse import TensorFolder
from sparse_train.sparse.header import PRECISIONS

TAG = "sparse-train"
"""Of every model that `push` uploads: it overwrites no other."""
_SAME_SPARSITY = 1e-3  # reports round it
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_NOT_PUBLISHED = {"name", "folder", "about", "tracking"}  # of a recipe: they do not change the model


class _Origin(NamedTuple):
    folder: dict[str, Any]
    """The manifest of the model folder, empty where it has none."""
    stage: dict[str, Any]
    """That of the stage of a run that made it, empty where none did."""
    report: Path | None
    """report.json of the same run, where that has scored this very result."""


class _Layer(NamedTuple):
    name: str
    rows: int
    columns: int
    num_kept: int


def _sparsity(layers: Sequence[_Layer]) -> float:
    """Of all of them together."""
    return 1 - sum(layer.num_kept for layer in layers) / sum(layer.rows * layer.columns for layer in layers)


def make_card(folder: Path, name: str) -> ModelCard:
    """For the model in `folder`, which will be called `name`. Raises UserError where there is no model."""
    config, tensors, origin = read_config(folder), TensorFolder(folder), _origin(folder)
    base, layers = _base(folder), _layers(tensors)
    stored_as = read_config_keys(folder).get("quantization_config") or {}
    precision = stored_as.get("precision") or PRECISIONS.get(tensors.spec(tensors.names[0])[1], "mixed precision")
    task = "automatic-speech-recognition" if family_of_type(config.model_type).takes_audio else "text-generation"
    recipe = _recipe(origin.stage.get("config"))
    pattern = origin.folder.get("pattern") or recipe.get("prune", {}).get("pattern")
    sparsity = _sparsity(layers) if layers else None
    is_pruned = bool(layers) or origin.stage.get("stage") == Kind.COMPRESS
    on_hub = base is not None and may_be_hub_name(base) and not Path(base).exists()
    data = ModelCardData(
        base_model=base if on_hub else None, license=license_of(base) if base else None,
        library_name=TAG if layers else "transformers", pipeline_tag=task,
        tags=[TAG, *(("sparse", "pruning") if is_pruned else ()), precision],
        model_name=name, eval_results=_eval_results(origin, folder.name, task, sparsity))
    versions = origin.stage.get("versions") or origin.folder.get("versions") or {}
    return ModelCard.from_template(
        data, str(_TEMPLATE), name=name, base=base and (base if on_hub else Path(base).name), on_hub=on_hub,
        model_type=config.model_type, precision=precision, is_pruned=is_pruned, pattern=pattern,
        layers=[(layer.name, f"{layer.rows} x {layer.columns}", f"{_sparsity([layer]):.4f}") for layer in layers],
        sparsity=sparsity, tables=[_escaped(table) for table in _tables(origin)],
        recipe=write_yaml(recipe) if recipe else None, imported=origin.folder.get("importer"), versions=versions)


def _origin(folder: Path) -> _Origin:
    manifest, made = artifacts.read_manifest(folder) or {}, artifacts.stage_of(folder)
    if made is None:
        return _Origin(manifest, {}, None)
    place, stage = made
    run = place.parents[len(Path(stage["stage"]).parts) - 1]
    report = artifacts.read_manifest(run / Kind.REPORT)
    inputs = (report or {}).get("sources", {}).get("inputs", {})
    is_scored = inputs.get(stage["stage"]) == artifacts.digest(stage["files"])
    return _Origin(manifest, stage, run / Kind.REPORT / "report.json" if is_scored else None)


def _base(folder: Path) -> str | None:
    """What the model was first made from: a name on the hub, a path, or None where it was new or nothing tells."""
    found, seen = None, set()
    while folder.is_dir() and folder not in seen:
        seen.add(folder)
        manifest, made = artifacts.read_manifest(folder) or {}, artifacts.stage_of(folder)
        source = manifest.get("source")
        if source is None and made is not None:
            config = made[1].get("config", {})
            source = config.get("dense", {}).get("path") or config.get("model", {}).get("path")
        if source is None:
            break
        found, folder = str(source), Path(source)
    return found


def _layers(tensors: TensorFolder) -> list[_Layer]:
    """All but a head whose weights are stored as codes, and all kept."""
    layers = [_Layer(name, *shape, tensors.num_kept(name)) for name, shape in tensors.shapes.items()]
    return [layer for layer in layers if _sparsity([layer])]


def _recipe(config: Any) -> dict[str, Any]:
    """The keys of a run that differ from their defaults and change its models; empty where no run made the model."""
    if not isinstance(config, dict):
        return {}
    with contextlib.suppress(ValidationError):  # of another release: then all keys
        config = RunConfig.model_validate(config).model_dump(mode="json", exclude_defaults=True)
    return {key: _without_paths(value) for key, value in config.items() if key not in _NOT_PUBLISHED}


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _tables(origin: _Origin) -> list[Table]:
    return read_tables(origin.report) if origin.report else []


def _escaped(table: Table) -> Table:
    def cells(row: Any) -> list[str]:
        return [cell.replace("|", "\\|") for cell in row]
    return Table(table.title, cells(table.header), [cells(row) for row in table.rows], table.note)


def _eval_results(origin: _Origin, folder: str, task: str, sparsity: float | None) -> list[EvalResult] | None:
    """The scores of this model alone, for the hub's metadata. In a chain, a level is told by its `sparsity`."""
    if origin.report is None:
        return None
    data, stage = artifacts.read_json(origin.report), origin.stage
    is_compressed = kind_of(stage["stage"]) is Kind.COMPRESS and folder.startswith("sparse-")
    names = {Kind.DENSE: "dense", Kind.PRUNE: "one-shot", Kind.COMPRESS: data["compressed_loss"]}
    model = names.get(kind_of(stage["stage"]), stage["stage"].rpartition("/")[2])
    engine = f"runtime {folder.removeprefix('sparse-')}" if is_compressed else None
    rows = {row["metric"]: row for row in data["scores"] if row["loss"] == model and (
        row["engine"] == engine if engine else not row["engine"].startswith("runtime")) and (
        sparsity is None or abs(row["sparsity"] - sparsity) < _SAME_SPARSITY)}
    path = stage["config"]["task"].get("path")
    data_set = path if path and may_be_hub_name(path) else data["task"]
    metrics = (TASKS.load(data["task"]).metric, "cross_entropy")
    return [EvalResult(task, data_set, data["task"], metric, rows[metric]["value"], metric_name=table_name(metric))
            for metric in metrics if metric in rows and rows[metric]["value"] is not None] or None
