"""The stage graph of a run: which job makes which folder from which, and when that is already done.

A stage's key is the digest of its part of the config and of its inputs. A finished folder with the same key is current.
"""

from dataclasses import dataclass, field
from pathlib import Path

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.config_file import load_config
from sparse_train.errors import UserError

CONFIG, JOB_FILE = "config.yaml", "job"
JOBS = ("dense", "prune", "finetune", "evaluate", "compress", "benchmark", "report")


@dataclass(frozen=True)
class Stage:
    id: str
    """Its folder below the run's, such as finetune/squarehead, or finetune/75/squarehead in a chain."""
    sections: tuple[str, ...]
    """Parts of the config it depends on, dotted."""
    inputs: tuple[str, ...] = ()
    """Ids of stages."""
    distributed: bool = False
    """Runs on all ranks of the cluster config; otherwise on one."""
    external: dict[str, str] = field(default_factory=dict)
    """Inputs from outside the run: id -> folder or hub name."""

    level: int = 0
    """prune, finetune: which of config.prune.levels; benchmark: which of config.benchmark.devices."""

    @property
    def job(self) -> str:
        """The module of `jobs` that does it, and the name it is selected by."""
        return self.id.partition("/")[0]


def read_run(folder: Path) -> RunConfig:
    """The config of the run in `folder`, whose path is where it is now, as seen from here."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run folder: it has no {CONFIG}; give the folder that a run made")
    folder = folder.absolute()
    return load_config(RunConfig, folder / CONFIG).model_copy(update={"folder": str(folder.parent),
                                                                      "name": folder.name})


def find_stage(config: RunConfig, name: str) -> "Stage":
    """By its id, or by its job where there is one. Raises UserError."""
    found = select(build_stages(config), [name])
    exact = [stage for stage in found if stage.id == name] or found
    if len(exact) > 1:
        raise UserError(f"{name} is {len(found)} stages of this run; give one: {', '.join(s.id for s in found)}")
    return exact[0]


def build_stages(config: RunConfig) -> list[Stage]:
    """In the order in which they run."""
    external = {"dense": config.dense.path} if config.dense.path else {}
    dense = () if external else ("dense",)
    training = ("accumulation", "activation_checkpointing", "batch_size", "betas", "clip", "learning_rate",
                "num_examples", "precision", "steps", "warmup_steps", "weight_decay", "zero")
    stages = [] if external else [
        Stage("dense", ("seed", "task", "model", *(f"dense.{name}" for name in training)), distributed=True)]
    chain, one_shots, tuned = _chain(config, training, dense, external)
    stages += chain
    # In a chain, that of the last level.
    last = next(stage for stage in reversed(tuned) if stage.rpartition("/")[2] == config.compressed_loss)
    devices = config.benchmark.devices
    benchmarks = [Stage(f"benchmark/{device}" if len(devices) > 1 else "benchmark",
                        ("name", "task", "benchmark", "prune.sparsity"), (*dense, last, "compress"), external=external,
                        level=index) for index, device in enumerate(devices)]
    stages += [
        Stage("evaluate", ("task", "evaluate"), (*dense, *one_shots, *tuned), external=external),
        Stage("compress", ("task", "evaluate", "compress"), (last,)),
        *benchmarks,
        Stage("report", ("name", "about", "finetune.losses", "prune"),
              (*dense, *(stage.id for stage in chain), "evaluate", "compress", *(stage.id for stage in benchmarks)),
              external=external),
    ]
    return stages


def _chain(config: RunConfig, training, dense, external) -> tuple[list[Stage], list[str], list[str]]:
    """(prune and finetune stages, ids of those pruned from dense, ids of the fine-tunes).

    Every level has its one-shot model, pruned from dense; from the second level on each loss prunes its own last one.
    """
    levels, losses = config.prune.levels, list(config.finetune.losses)
    pruning = ("task", *(f"prune.{name}" for name in type(config.prune).model_fields if name != "sparsity"))
    stages: list[Stage] = []
    one_shots, tuned = [], {}
    found = []
    for index, level in enumerate(levels):
        below = f"/{100 * level.sparsity:g}" if len(levels) > 1 else ""
        one_shots.append(f"prune{below}/one-shot" if below else "prune")
        stages.append(Stage(one_shots[-1], pruning, dense, external=external, level=index))
        for name in losses:
            pruned = one_shots[-1]
            if index:
                pruned = f"prune{below}/{name}"
                stages.append(Stage(pruned, pruning, (tuned[name],), level=index))
            tuned[name] = f"finetune{below}/{name}"
            found.append(tuned[name])
            stages.append(Stage(tuned[name], ("seed", "task", *(f"finetune.{key}" for key in training),
                                              f"finetune.losses.{name}"),
                                (*dense, pruned), distributed=True, external=external, level=index))
    return stages, one_shots, found


def select(stages: list[Stage], names: list[str]) -> list[Stage]:
    """The stages whose job or id is named; all when none is."""
    known = list(dict.fromkeys(name for stage in stages for name in (stage.job, stage.id)))
    for name in names:
        if name not in known:
            raise UserError(f"there is no stage {name} in this run; choose from: {', '.join(known)}")
    return [stage for stage in stages if not names or stage.job in names or stage.id in names]


def stage_key(stage: Stage, config: RunConfig) -> str | None:
    """None while an input is not finished."""
    tree = config.model_dump(mode="json")
    parts = {section: _part(tree, section) for section in stage.sections}
    outside = [*stage.external.values(), *(tree[section]["path"] for section in ("task", "model")
                                           if section in stage.sections)]
    if stage.job == "prune" and config.prune.calibration:
        outside.append(config.prune.calibration.path)
    inputs: dict = {path: _fingerprint(Path(path)) for path in outside if path}
    for name in stage.inputs:
        manifest = artifacts.read_manifest(config.path / name)
        if manifest is None:
            return None
        inputs[name] = artifacts.digest(manifest["files"])
    if stage.job == "prune":
        parts["sparsity"] = config.prune.levels[stage.level].sparsity
    return artifacts.digest({"stage": stage.id, "config": parts, "inputs": inputs})


def is_current(stage: Stage, config: RunConfig) -> bool:
    manifest = artifacts.read_manifest(config.path / stage.id)
    return manifest is not None and manifest["key"] == stage_key(stage, config)


def input_paths(stage: Stage, config: RunConfig) -> dict[str, Path | str]:
    """dense first, then in the order of the graph."""
    return {**stage.external, **{name: config.path / name for name in stage.inputs}}


def partial_folder(stage: Stage, config: RunConfig) -> Path:
    return config.path / f"{stage.id}.partial"


def log_folder(stage: Stage, config: RunConfig) -> Path:
    return config.path / "logs" / stage.id


def progress_file(stage: Stage, config: RunConfig) -> Path:
    return log_folder(stage, config) / "progress.json"


def _fingerprint(path: Path) -> list:
    """Name, size and time of a file or of a folder's: reading a large model to skip a stage is too much."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return [(str(file.relative_to(path)), (stat := file.stat()).st_size, stat.st_mtime_ns)
            for file in files if file.is_file()]


def _part(tree: dict, section: str):
    for key in section.split("."):
        tree = tree[key]
    return tree
