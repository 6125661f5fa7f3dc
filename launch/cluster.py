"""Where jobs run: one file of configs/cluster per place."""

from pathlib import Path
from typing import Literal

import torch

from sparse_train.config import Positive, Section, load_config
from sparse_train.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class ClusterConfig(Section):
    executor: Literal["local"] = "local"
    """local: processes on this machine, started by submitit."""
    ranks: Positive = 2
    """Processes of a training stage; the other stages have one."""
    gpus: int | None = None
    """GPUs given to a stage; None takes one per rank where there are that many."""
    timeout_min: Positive = 7 * 24 * 60

    def visible_gpus(self) -> int:
        return min(self.ranks, torch.cuda.device_count()) if self.gpus is None else self.gpus


def load_cluster(name: str) -> ClusterConfig:
    """`name`: a file of configs/cluster without its ending."""
    path = CONFIGS / "cluster" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise UserError(f"--on {name}: there is no {path}; choose one of: {', '.join(known)}")
    return load_config(ClusterConfig, path)
