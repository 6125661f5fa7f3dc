"""Checks run on every rank before its stage, so that problems which would surface hours later are reported in seconds.

They log a table of ranks and devices and test a sum over all ranks, the run folder as each node sees it, free disk
for the checkpoints of a training, and memory. Each problem is a UserError of one line.
"""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sparse_train import dist
from sparse_train.config import RunConfig, TrainConfig
from sparse_train.cpus import available_cpus
from sparse_train.errors import UserError
from sparse_train.jobs.stage import Kind, Stage
from sparse_train.launch.run.folder import log_folder, partial_folder
from sparse_train.launch.worker.process_info import ProcessInfo
from sparse_train.models import as_folder, describe, empty_model, read_config
from sparse_train.pruning.parameters import ParameterCounts, count_parameters
from sparse_train.training.partition import GRADIENT_BYTES, MASTER_BYTES, MOMENT_BYTES, WEIGHT_BYTES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankInfo:
    """What one rank has. Memory in bytes."""

    rank: int
    host: str
    local_rank: int
    device: str
    num_cpus: int
    free_memory: int
    """Of the node, for all of its ranks."""
    gpu_name: str = ""
    gpu_uuid: str = ""
    free_gpu_memory: int | None = None


def check_ranks(process: ProcessInfo, config: RunConfig, stage: Stage) -> None:
    """Collective. Raises UserError, the same on every rank."""
    ranks: list[RankInfo] = dist.gather_objects(_this_rank(process))
    if process.rank == 0:
        log.info("%s", _table(ranks))
    dist.agree(lambda: _require_distinct_devices(ranks))
    dist.agree(_require_sum)
    first_of_nodes = [info.rank for info in ranks if info.local_rank == 0]
    _require_shared_folder(process, first_of_nodes, config.path, log_folder(stage, config))
    if stage.kind is Kind.PRUNE:  # whose ranks hold a block at a time
        return
    path = config.dense.path or config.model.path
    model = empty_model(read_config(as_folder(path)) if path else describe(config.model))
    counts = count_parameters(model, config.prune)
    if stage.is_training:
        dist.agree(lambda: _require_disk(config, stage, counts))
    dist.agree(lambda: _require_memory(process, config, stage, counts, ranks[process.rank]))


def _this_rank(process: ProcessInfo) -> RankInfo:
    device = dist.device()
    name, uuid, free_gpu_memory = "", "", None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, uuid, free_gpu_memory = properties.name, str(properties.uuid), torch.cuda.mem_get_info(device)[0]
    return RankInfo(process.rank, process.host, process.local_rank, str(device), available_cpus(), _free_memory(), name,
                    uuid, free_gpu_memory)


def _free_memory(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this job may still take on its node: what is free there, within the job's limits."""
    bounds = [psutil.virtual_memory().available]
    if megabytes := int(os.environ.get("SLURM_MEM_PER_NODE") or 0):
        bounds.append(megabytes << 20)
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, kinds, name = line.split(":", 2)
        if kinds in ("", "memory"):  # of control groups version 2 and 1
            bounds += _free_below_limits(cgroups / kinds, name.lstrip("/"), kinds)
    return max(0, min(bounds))


def _free_below_limits(top: Path, name: str, kinds: str) -> list[int]:
    """Free bytes within the limits of the control group `name` and the groups above it, where they have any."""
    limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
    bounds = []
    for group in (top / name, *(top / parent for parent in Path(name).parents)):
        if not (group / limit).is_file():  # the root group has none
            continue
        most = (group / limit).read_text(encoding="utf-8").strip()
        if most != "max":  # version 1 writes a huge number instead
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
            # Version 1 has a key of its own for the sum over the groups below.
            cache = int(stat.get("total_inactive_file", stat["inactive_file"]))
            bounds.append(int(most) - int((group / used).read_text(encoding="utf-8")) + cache)
    return bounds


def _table(ranks: list[RankInfo]) -> str:
    num_nodes = len({info.host for info in ranks})
    lines = [f"{len(ranks)} rank{'s' * (len(ranks) > 1)} on {num_nodes} node{'s' * (num_nodes > 1)}"]
    lines += [f"rank {info.rank:>4}  {info.host} local {info.local_rank}  {info.device} {info.gpu_name}  "
              f"{info.num_cpus} CPUs  {info.free_memory / 1e9:.1f} GB free" for info in ranks]
    return "\n".join(lines)


def _require_distinct_devices(ranks: list[RankInfo]) -> None:
    rank_of: dict[str, int] = {}
    for info in ranks:
        if not info.gpu_uuid:
            continue
        if info.gpu_uuid in rank_of:
            raise UserError(f"ranks {rank_of[info.gpu_uuid]} and {info.rank} have the same GPU on {info.host}; ask for "
                            "as many gpus_per_node as ranks_per_node")
        rank_of[info.gpu_uuid] = info.rank


def _require_sum() -> None:
    actual = float(dist.sum_over_ranks(torch.tensor(float(dist.rank() + 1), device=dist.device())))
    expected = dist.world_size() * (dist.world_size() + 1) / 2
    if actual != expected:
        raise UserError(f"a sum over all ranks is {actual:g} and should be {expected:g}; the network or its library is "
                        "broken")


def _require_shared_folder(process: ProcessInfo, writers: list[int], run: Path, logs: Path) -> None:
    """One rank of each node, a writer, writes a file there, and must see those of the others. Collective."""
    folder = logs / f"preflight-{process.attempt}"
    is_writer = process.rank in writers
    write_problems = dist.gather_objects(_write_problem(process, folder, run) if is_writer else "")
    _require_no_problem(write_problems)
    read_problems = dist.gather_objects(_read_problem(process, folder, run, writers) if is_writer else "")
    if process.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    _require_no_problem(read_problems)


def _write_problem(process: ProcessInfo, folder: Path, run: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(process.rank)).touch()
    except OSError as error:
        return f"cannot write to {run} on {process.host}: {error.strerror}"
    return ""


def _read_problem(process: ProcessInfo, folder: Path, run: Path, writers: list[int]) -> str:
    missing = [rank for rank in writers if not (folder / str(rank)).is_file()]
    return f"{process.host} does not see what rank {missing[0]} wrote to {run}" if missing else ""


def _require_no_problem(problems: list[str]) -> None:
    for problem in filter(None, problems):
        raise UserError(f"{problem}; the run folder must be on storage that all nodes share")


def _require_disk(config: RunConfig, stage: Stage, counts: ParameterCounts) -> None:
    train = _train_config(config, stage)
    needed, free = checkpoint_bytes(train, _num_trained(config, stage, counts)), shutil.disk_usage(config.path).free
    # An earlier attempt has written some of them.
    free += sum(file.stat().st_size for file in (partial_folder(stage, config) / "checkpoints").glob("step-*/*"))
    if needed > free:
        raise UserError(f"the checkpoints of {stage.id} take {needed / 1e9:.1f} GB and {config.path} has "
                        f"{free / 1e9:.1f} GB free; make room, or give {stage.kind}.checkpoints_kept=1")


def _require_memory(process: ProcessInfo, config: RunConfig, stage: Stage, counts: ParameterCounts,
                    info: RankInfo) -> None:
    offloaded = 0
    if stage.is_training:
        train, num_trained = _train_config(config, stage), _num_trained(config, stage, counts)
        needed, what = state_bytes(train, num_trained, process.num_ranks), "weights, gradients and optimizer"
        remedy = f"use more ranks, a higher ZeRO stage, or {stage.kind}.zero.offload_optimizer=true"
        if stage.kind is Kind.FINETUNE and stage.loss_config(config).needs_teacher:
            precision = config.finetune.teacher.precision or train.precision
            needed += WEIGHT_BYTES[precision] * counts.total // process.num_ranks
        if train.zero.offload_optimizer:
            offloaded = (MASTER_BYTES + MOMENT_BYTES) * num_trained // process.num_ranks
    else:  # the scored model, and the dense one where it is compared with that
        needed = WEIGHT_BYTES[config.evaluate.precision] * counts.total * (2 if config.evaluate.texts else 1)
        what, remedy = "weights", (f"use fewer ranks_per_node (cluster.stages.{stage.kind}.ranks_per_node=1), bf16, or "
                                   "evaluate.placement=sharded")
        if config.evaluate.placement == "sharded":
            needed, remedy = needed // process.num_ranks, "use more ranks, or bf16"
    if info.free_gpu_memory is not None:
        free, where = info.free_gpu_memory, f"{info.device} of {process.host}"
        needed -= offloaded
    else:  # the ranks of a node share its memory
        free, where = info.free_memory // process.ranks_on_node, f"{process.host}, for each of its ranks"
    if needed > free:
        raise UserError(f"{stage.id} needs {needed / 1e9:.1f} GB per rank for {what} alone; {where}, has "
                        f"{free / 1e9:.1f} GB free; {remedy}")


def _train_config(config: RunConfig, stage: Stage) -> TrainConfig:
    return config.dense if stage.kind is Kind.DENSE else config.finetune


def _num_trained(config: RunConfig, stage: Stage, counts: ParameterCounts) -> int:
    """Values that the stage trains."""
    if stage.kind is Kind.DENSE:
        return counts.total
    return counts.total - counts.prunable + counts.kept[stage.level]


def checkpoint_bytes(train: TrainConfig, num_trained: int) -> int:
    """Masters and moments of the kept checkpoints, one more while it is written, and the finished model."""
    return (train.checkpoints_kept + 1) * (MASTER_BYTES + MOMENT_BYTES) * num_trained + MASTER_BYTES * num_trained


def state_bytes(train: TrainConfig, num_trained: int, num_ranks: int) -> int:
    """Per rank: weights, gradients, masters and moments of the student under its ZeRO stage."""
    optimizer = MASTER_BYTES + MOMENT_BYTES
    if train.precision == "fp32" and train.zero.stage == 0:
        optimizer = MOMENT_BYTES  # the weights are their own masters
    # (bytes per value, the ZeRO stage from which on ranks share them)
    parts = ((optimizer, 1), (GRADIENT_BYTES, 2), (WEIGHT_BYTES[train.precision], 3))
    return sum(size * num_trained // (num_ranks if train.zero.stage >= sharing else 1) for size, sharing in parts)
