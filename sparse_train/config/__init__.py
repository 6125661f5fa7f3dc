"""The config of a run: a file per section, read from YAML and overrides, with mistakes in one line.

    base.py                             what all sections share
    task.py model.py training.py pruning.py loss.py      one section each, for the room of that name
    run.py                              the whole of it
    load.py                             files, `extends` and key=value overrides -> a section
    mistakes.py, yaml_core.py           a mistake as one line; YAML 1.2's core schema
    options.py                          the settings that methods and tasks of other packages declare

Nothing here loads torch: commands that only look at runs read configs too.
"""

from sparse_train.config.base import Positive, Section, Weight
from sparse_train.config.loss import LossConfig
from sparse_train.config.model import ModelConfig
from sparse_train.config.pruning import PruneConfig, PruneLevel
from sparse_train.config.run import (
    BenchmarkConfig,
    CompressConfig,
    EvaluateConfig,
    FinetuneConfig,
    RunConfig,
    WandbConfig,
)
from sparse_train.config.task import TaskConfig
from sparse_train.config.training import DenseConfig, TeacherConfig, TrainConfig, ZeroConfig

__all__ = [
    "BenchmarkConfig",
    "CompressConfig",
    "DenseConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "LossConfig",
    "ModelConfig",
    "Positive",
    "PruneConfig",
    "PruneLevel",
    "RunConfig",
    "Section",
    "TaskConfig",
    "TeacherConfig",
    "TrainConfig",
    "WandbConfig",
    "Weight",
    "ZeroConfig",
]
