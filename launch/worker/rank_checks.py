"""A look around from every rank before a training starts: what would fail after hours is told in seconds, in one line.

    ranks and devices, printed as a table; a sum over all ranks; the run folder, written and read on every node; free
    disk for checkpoints; memory
"""

import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from sparse_train import dist
from sparse_train.config import RunConfig, TrainConfig
from sparse_train.cpus import available_cpus
from sparse_train.errors import UserError
from sparse_train.launch.run.stages import Stage, log_folder, partial_folder
from sparse_train.launch.worker.process_info import ProcessInfo
from sparse_train.models import describe, empty_model, read_config
from sparse_train.pruning.parameters import ParameterCounts, count_parameters

_MASTER, _MOMENTS, _GRADIENT = 4, 8, 4  # bytes per trained value
_BYTES = {"fp32": 4, "bf16": 2}


def check_ranks(process: ProcessInfo, config: RunConfig, stage: Stage) -> None:
    """Collective. Raises UserError, the same on every rank."""
    table = dist.gather_objects(_own_row(process))
    if process.rank == 0:
        print("\n".join(_lines(table)), flush=True)
    dist.agree(lambda: _require_distinct_devices(table))
    dist.agree(_require_sum)
    writers = [row["rank"] for row in table if row["local_rank"] == 0]
    dist.agree(lambda: _require_shared_folder(process, writers, config.path, log_folder(stage, config)))
    path = config.dense.path or config.model.path
    model = empty_model(read_config(path) if path else describe(config.model))
    counts = count_parameters(model, config.prune)
    dist.agree(lambda: _require_space(process, config, stage, counts, table))


def _own_row(process: ProcessInfo) -> dict[str, Any]:
    device = dist.device()
    row = {"rank": process.rank, "host": process.host, "local_rank": process.local_rank, "device": str(device),
           "cpus": available_cpus(), "free_memory": _free_memory()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {"name": properties.name, "uuid": str(properties.uuid), "free_device_memory":
                torch.cuda.mem_get_info(device)[0]}
    return row


def _free_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this job may still take on its node: what is free there, within the job's own limits."""
    found = [psutil.virtual_memory().available]
    if asked := int(os.environ.get("SLURM_MEM_PER_NODE", 0)):
        found.append(asked << 20)
    for line in own.read_text(encoding="utf-8").splitlines():
        _, kinds, name = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        top = cgroups / kinds
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        folder = top / name.lstrip("/")
        for level in (folder, *folder.parents):
            # The whole tree has no limit, and v1's word for none is a number beyond any machine.
            if (level / limit).is_file() and (most := (level / limit).read_text(encoding="utf-8").strip()) != "max":
                stat = dict(line.split() for line in (level / "memory.stat").read_text(encoding="utf-8").splitlines())
                cache = int(stat.get("total_inactive_file", stat["inactive_file"]))  # the first is v1's, of the tree
                found.append(int(most) - int((level / used).read_text(encoding="utf-8")) + cache)
            if level == top:
                break
    return max(0, min(found))


def _lines(table: list[dict[str, Any]]) -> list[str]:
    lines = [f"{len(table)} ranks on {len({row['host'] for row in table})} nodes"]
    for row in table:
        device = row.get("name", "")
        lines.append(f"rank {row['rank']:>4}  {row['host']} local {row['local_rank']}  {row['device']} {device}  "
                     f"{row['cpus']} CPUs  {row['free_memory'] / 1e9:.1f} GB free")
    return lines


def _require_distinct_devices(table: list[dict[str, Any]]) -> None:
    taken: dict[str, int] = {}
    for row in table:
        if (uuid := row.get("uuid")) is None:
            continue
        if uuid in taken:
            raise UserError(f"ranks {taken[uuid]} and {row['rank']} have the same GPU on {row['host']}; ask for as "
                            "many gpus_per_node as ranks_per_node")
        taken[uuid] = row["rank"]


def _require_sum() -> None:
    found = float(dist.sum_over_ranks(torch.tensor(float(dist.rank() + 1), device=dist.device())))
    if found != (wanted := dist.world_size() * (dist.world_size() + 1) / 2):
        raise UserError(f"a sum over all ranks is {found:g} and should be {wanted:g}; the network or its library is "
                        "broken")


def _require_shared_folder(process: ProcessInfo, writers: list[int], run: Path, logs: Path) -> None:
    """One rank of each node, a writer, leaves a file there, and must see those of the others."""
    folder = logs / f"preflight-{process.attempt}"

    def write() -> str:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / str(process.rank)).touch()
        except OSError as error:
            return f"cannot write to {run} on {process.host}: {error.strerror}"
        return ""

    def look() -> str:
        missing = [rank for rank in writers if not (folder / str(rank)).is_file()]
        return f"{process.host} does not see what rank {missing[0]} wrote to {run}" if missing else ""

    for do in (write, look):
        problems = [found for found in dist.gather_objects(do() if process.rank in writers else "") if found]
        if do is look and process.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        if problems:
            raise UserError(f"{problems[0]}; the run folder must be on storage that all nodes share")


def _require_space(process: ProcessInfo, config: RunConfig, stage: Stage, counts: ParameterCounts,
                   table: list[dict[str, Any]]) -> None:
    train: TrainConfig = config.dense if stage.job == "dense" else config.finetune
    trained = counts.total
    if stage.job == "finetune":
        trained -= counts.prunable - counts.kept[stage.level]
    needed, free = checkpoint_bytes(train, trained), shutil.disk_usage(config.path).free
    # An attempt before this one has written some of them.
    free += sum(file.stat().st_size for file in (partial_folder(stage, config) / "checkpoints").glob("step-*/*"))
    if needed > free:
        raise UserError(f"the checkpoints of {stage.id} take {needed / 1e9:.1f} GB and {config.path} has "
                        f"{free / 1e9:.1f} GB free; make room, or give {stage.job}.checkpoints_kept=1")
    own = state_bytes(train, trained, process.num_ranks)
    if stage.job == "finetune" and config.finetune.losses[stage.id.rpartition("/")[2]].needs_teacher:
        precision = config.finetune.teacher.precision or train.precision
        own += _BYTES[precision] * counts.total // process.num_ranks
    row = table[process.rank]
    if "free_device_memory" in row:
        free, where = row["free_device_memory"], f"{row['device']} of {process.host}"
        own = own if not train.zero.offload_optimizer else own - (_MASTER + _MOMENTS) * trained // process.num_ranks
    else:  # the ranks of a node share its memory
        free, where = row["free_memory"] // process.ranks_on_node, f"{process.host}, for each of its ranks"
    if own > free:
        raise UserError(f"{stage.id} needs {own / 1e9:.1f} GB per rank for weights, gradients and optimizer alone; "
                        f"{where}, has {free / 1e9:.1f} GB free; use more ranks, a higher ZeRO stage, or "
                        f"{stage.job}.zero.offload_optimizer=true")


def checkpoint_bytes(train: TrainConfig, trained: int) -> int:
    """Masters and moments of the kept checkpoints, one more while it is written, and the finished model."""
    return (train.checkpoints_kept + 1) * (_MASTER + _MOMENTS) * trained + _MASTER * trained


def state_bytes(train: TrainConfig, trained: int, num_ranks: int) -> int:
    """Per rank: weights, gradients, masters and moments of the student under its ZeRO stage."""
    share = {"optimizer": train.zero.stage >= 1, "gradient": train.zero.stage >= 2, "weight": train.zero.stage >= 3}
    parts = {"optimizer": _MASTER + _MOMENTS, "gradient": _GRADIENT, "weight": _BYTES[train.precision]}
    if train.precision == "fp32" and train.zero.stage == 0:
        parts["optimizer"] = _MOMENTS  # the weights are their own masters
    return sum(size * trained // (num_ranks if share[name] else 1) for name, size in parts.items())
