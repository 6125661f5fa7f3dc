"""Where jobs run: one file of configs/cluster per place, with cluster.key=value overrides."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sparse_train.config import Positive, Section
from sparse_train.config.load import load_config
from sparse_train.errors import UserError
from sparse_train.jobs.stage import Stage, kind_of
from sparse_train.launch.run.recipes import CONFIGS

CLUSTER, UNDER = "cluster.yaml", "cluster."
_RESERVED = {"array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "ntasks-per-node",
             "open-mode", "output", "requeue", "signal", "wrap"}
_FIELD_OF_OPTION = {
    "nodes": "nodes", "cpus-per-task": "cpus_per_rank", "gpus-per-node": "gpus_per_node", "mem": "memory",
    "time": "time", "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint"}


class Resources(Section):
    """What one stage runs on. All but nodes, ranks_per_node and gpus_per_node only concern SLURM."""

    nodes: Positive = 1
    ranks_per_node: Positive = 1
    """Processes of dense, prune, finetune and evaluate on each node, one per GPU; the other stages have one in all."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """None: on this machine one per rank where there are that many; on SLURM none are requested."""
    cpus_per_rank: Positive | None = None
    memory: str | None = None
    """Of each node, such as 64G; "0" is all of it."""
    time: str | None = None
    """Limit in the format of sbatch, such as 30 (minutes) or 1-12:00:00. A training, a pruning or an evaluation
    that reaches it saves and is requeued."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: dict[str, str | int | bool | None] = {}  # noqa: RUF012 - pydantic copies it
    """Any other option of sbatch, without its dashes: {exclude: "node[7-9]", exclusive: true}."""

    @field_validator("memory", "time", mode="before")
    @classmethod
    def _numbers_are_text(cls, value):
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _options_can_be_passed_on(self):
        for option, value in self.sbatch.items():
            if option.replace("_", "-") in _RESERVED:
                raise ValueError(f"sbatch.{option} is set by sparse-train itself; leave it out")
            if option in ("clusters", "M"):
                raise ValueError(f"sbatch.{option}: status and cancel ask one cluster; submit from a login node of the "
                                 "other one")
            if field := _FIELD_OF_OPTION.get(option.replace("_", "-")):
                raise ValueError(f"sbatch.{option} has its own key; give {field}")
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"sbatch.{option}={value!r} must be one line of printable text")
            if not option.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"sbatch.{option!r} is not an option of sbatch; give names without leading dashes")
        for key in ("memory", "time", "partition", "account", "qos", "constraint"):
            value = getattr(self, key)
            if value is not None and not value.isprintable():
                raise ValueError(f"{key}={value!r} must be one line of printable text")
        return self

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def options(self) -> dict[str, str | int | bool]:
        """As options of sbatch, without their dashes; True stands for an option without a value."""
        options = {"ntasks-per-node": self.ranks_per_node,
                   **{option: getattr(self, field) for option, field in _FIELD_OF_OPTION.items()},
                   **{key.replace("_", "-"): value for key, value in self.sbatch.items()}}
        return {key: value for key, value in options.items() if value is not None and value is not False}


class ClusterConfig(Resources):
    executor: Literal["local", "slurm"] = "local"
    """local: processes on this machine; slurm: jobs, one per stage. Both are started by submitit."""
    silence_s: Annotated[float, Field(gt=0)] = 600
    """Ranks give up when one of them sends no heartbeat for this long. In trainings also when a collective takes twice
    as long; in a pruning or an evaluation a rank may be busy for hours while the others wait."""
    warning_s: Positive = 120
    """SLURM sends its warning signal this long before the time limit or a preemption; training then saves."""
    tries: Positive = 3
    """A job that lost a rank, or was stopped and keeps no state, is requeued as long as it makes progress; after
    this many attempts from the same step it fails."""
    setup: tuple[str, ...] = ()
    """Shell lines that each job runs first, such as "module load cuda/12.8". The shell gets them as they are."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = {}  # noqa: RUF012
    """Variables of each process."""
    preflight: bool = True
    """Check memory, disk and the shared folder from every rank before a training, a pruning or an evaluation starts."""
    stages: dict[str, Resources] = {}  # noqa: RUF012
    """Other resources by stage, such as {benchmark: {partition: cpu}, finetune: {nodes: 4}}."""

    @field_validator("stages")
    @classmethod
    def _stages_exist(cls, stages):
        for name in stages:
            kind_of(name)
        return stages

    @field_validator("environment")
    @classmethod
    def _no_secrets(cls, environment):
        for name in environment:
            if name == "PYTHONPATH":
                raise ValueError("environment.PYTHONPATH would replace the run's own copy of the code; export it in "
                                 "setup, or in your shell")
            if re.search("(^|_)(KEY|TOKEN|SECRET|PASSWORD)(_|$)", name.upper()):
                raise ValueError(f"environment.{name} would be written to files and logs; export it in your shell, "
                                 "which jobs inherit")
        return environment

    @model_validator(mode="after")
    def _this_machine_is_one_node(self):
        if self.executor == "local" and self.nodes > 1:
            raise ValueError(f"nodes={self.nodes}: this machine is one node; use --on slurm")
        for key in ("partition", "account", "qos", "constraint"):
            if self.executor == "local" and getattr(self, key) is not None:
                raise ValueError(f"{key}={getattr(self, key)}: only SLURM has this; use --on slurm")
        return self

    def resources(self, stage: Stage) -> Resources:
        """The common resources, overridden by the entries of `stages` for the stage's kind and for its id. A stage
        that is not distributed gets one process. Raises UserError where an entry gives it more."""
        values = {key: getattr(self, key) for key in Resources.model_fields}
        if not stage.is_distributed:
            values |= {"nodes": 1, "ranks_per_node": 1, "gpus_per_node": values["gpus_per_node"] and 1}
        for name in dict.fromkeys((stage.kind.value, stage.id)):
            if entry := self.stages.get(name):
                sbatch = {**values["sbatch"], **entry.sbatch}
                values |= {key: getattr(entry, key) for key in entry.model_fields_set} | {"sbatch": sbatch}
        resources = Resources.model_validate(values)
        if not stage.is_distributed and resources.ranks > 1:
            raise UserError(f"stages.{stage.id}: {resources.ranks} ranks, but this stage is one process; leave nodes "
                            "and ranks_per_node out")
        return resources

    def visible_gpus(self, num_ranks: int) -> int:
        """How many GPUs of this machine the processes use. Raises UserError where it has fewer than gpus_per_node."""
        import torch  # takes seconds, and most commands do not need it

        num_gpus = torch.cuda.device_count()
        if (self.gpus_per_node or 0) > num_gpus:
            raise UserError(f"cluster.gpus_per_node={self.gpus_per_node}: this machine has {num_gpus} GPUs; leave it "
                            "out")
        return min(num_ranks, num_gpus) if self.gpus_per_node is None else self.gpus_per_node


def load_cluster(name: str, overrides: list[str] | tuple[str, ...] = ()) -> ClusterConfig:
    """`name`: a file of configs/cluster without its ending, or a path to one. `overrides`: cluster.key=value."""
    path = Path(name) if name.endswith(".yaml") else CONFIGS / "cluster" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in (CONFIGS / "cluster").glob("*.yaml"))
        raise UserError(f"--on {name}: there is no {path}; give a .yaml file or one of: {', '.join(known)}")
    return load_config(ClusterConfig, path, overrides, UNDER)
