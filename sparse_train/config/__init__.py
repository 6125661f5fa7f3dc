"""The config of a run: a file per section, read from YAML and overrides; each mistake is reported in one line.

    base.py                      what all sections share
    task.py, model.py, training.py, pruning.py, loss.py   sections, each read by the room of that name
    run.py                       the other sections, and the whole config
    load.py                      files, `extends` and key=value overrides -> a config
    mistakes.py                  pydantic's errors in one line
    yaml_core.py                 YAML 1.2's core schema
    options.py                   settings that pruning methods and tasks declare themselves

Nothing here imports torch, because `status` and its kind read configs too.
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
from sparse_train.config.task import RunTaskConfig, TaskConfig
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
    "RunTaskConfig",
    "Section",
    "TaskConfig",
    "TeacherConfig",
    "TrainConfig",
    "WandbConfig",
    "Weight",
    "ZeroConfig",
]
