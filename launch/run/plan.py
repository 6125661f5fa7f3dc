"""What running stages would do: which are current, which run and why, and what earlier work they would replace."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.errors import UserError
from sparse_train.jobs.job import finished_file
from sparse_train.jobs.stage import Kind, Stage
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.run.folder import freeze, partial_folder
from sparse_train.launch.run.lock import require_own_run
from sparse_train.launch.run.sources import is_current, why_stale
from sparse_train.launch.run.stages import build_stages, select


class PlanStatus(Enum):
    CURRENT = auto()
    """It has a result, made from the same sources as it would be today."""
    NEW = auto()
    """It has no result yet."""
    STALE = auto()
    """Its result was made from other sources."""
    BEHIND = auto()
    """One of its inputs will be made again."""
    BROKEN = auto()
    """Its files cannot be read."""


@dataclass(frozen=True)
class PlannedStage:
    stage: Stage
    status: PlanStatus
    reason: str
    """As printed: why it will run, or "current"."""

    @property
    def is_current(self) -> bool:
        return self.status is PlanStatus.CURRENT


def plan(config: RunConfig, names: list[str]) -> list[PlannedStage]:
    """What a run of the selected stages would do, in their order."""
    planned: list[PlannedStage] = []
    for stage in select(build_stages(config), names):
        to_run = [other.stage.id for other in planned if not other.is_current]
        planned.append(_plan_stage(stage, config, [source.id for source in stage.upstream if source.id in to_run]))
    return planned


def _plan_stage(stage: Stage, config: RunConfig, inputs_to_run: list[str]) -> PlannedStage:
    if inputs_to_run:
        return PlannedStage(stage, PlanStatus.BEHIND, f"{inputs_to_run[0]} changes")
    manifest = artifacts.read_manifest(config.path / stage.id)
    if manifest is None:
        return PlannedStage(stage, PlanStatus.NEW, "not done yet")
    if difference := why_stale(manifest.get("sources"), stage, config, manifest.get("config")):
        return PlannedStage(stage, PlanStatus.STALE, difference)
    return PlannedStage(stage, PlanStatus.CURRENT, "current")


def check_replaced(configs: Sequence[RunConfig], names: list[str], replace: bool) -> None:
    """Raises UserError where a run or a selected stage would write to a folder of something else, and, without
    `replace`, where it would replace earlier work."""
    if (message := describe_replaced(configs, names)) and not replace:
        raise UserError(message)


def describe_replaced(configs: Sequence[RunConfig], names: list[str]) -> str:
    """A line on the selected stages that would replace a finished one, or start over although they have saved their
    state; "" where there are none. Raises UserError where a stage would write to a folder of something else."""
    losses = []
    for config in configs:
        require_own_run(config.path)
        for planned in plan(config, names):
            if not planned.is_current:
                _require_own_folders(planned.stage, config)
                if loss := _work_lost(planned, config):
                    losses.append(f"{config.name}/{loss}" if len(configs) > 1 else loss)
    if not losses:
        return ""
    return (f"these stages would be done again: {', '.join(losses)}; give --replace to replace what they have, or "
            "name=OTHER for a new run")


def _require_own_folders(stage: Stage, config: RunConfig) -> None:
    for above in Path(stage.id).parents:
        if (config.path / above / artifacts.MANIFEST).is_file():  # replacing that one would remove this one
            raise UserError(f"{config.path / above} is a finished stage, and {stage.id} would be written into it; give "
                            "name=OTHER for a new run")
    for folder in (config.path / stage.id, partial_folder(stage, config)):
        artifacts.require_own(folder, stage.id)


def _work_lost(planned: PlannedStage, config: RunConfig) -> str:
    """The earlier work that running the stage would replace; "" where there is none."""
    stage = planned.stage
    if stage.kind is Kind.REPORT:  # takes seconds, from the other stages' measurements
        return ""
    if artifacts.read_manifest(config.path / stage.id) or (config.path / stage.id).exists():
        return f"{stage.id} ({planned.reason})"
    return _saved_state(planned, config)


def _saved_state(planned: PlannedStage, config: RunConfig) -> str:
    """How far an unfinished stage is that would start over, and why it cannot continue; "" where there is none."""
    partial = partial_folder(planned.stage, config)
    saved = sorted(path.parent.name for path in partial.glob(f"checkpoints/step-*/{artifacts.DONE}"))
    if (finished := finished_file(partial)).is_file() and (lines := finished.read_bytes().count(b"\n")):
        saved = [f"{lines} batches"]
    if not saved or not (partial / artifacts.SOURCES).is_file():
        return ""
    reason: str | None = planned.reason
    if planned.status is PlanStatus.NEW:
        reason = why_stale(artifacts.read_json(partial / artifacts.SOURCES), planned.stage, config)
    return f"{planned.stage.id}, unfinished at {saved[-1]} ({reason})" if reason else ""


def require_inputs(config: RunConfig, names: list[str]) -> None:
    """Raises UserError where a selected stage reads one that is neither selected nor current."""
    selected = select(build_stages(config), names)
    outside = {planned.stage.id: planned for planned in plan(config, [])}
    for stage in selected:
        outside.pop(stage.id, None)
    for stage in selected:
        if is_current(stage, config):
            continue
        for name in [source.id for source in stage.upstream if source.id in outside]:
            if not outside[name].is_current:
                raise UserError(f"stage {stage.id} needs {name}, which is not current ({outside[name].reason}); add it "
                                "to --stages")


def claim(config: RunConfig, cluster: ClusterConfig, names: list[str], replace: bool) -> None:
    """Complete replacements that were cut off, check again that nothing is replaced without `replace`, and write the
    run's config. Call it under the lock: another command may have finished a stage since the first check."""
    for stage in build_stages(config):
        artifacts.heal(config.path / stage.id)
    check_replaced([config], names, replace)
    freeze(config, cluster)
