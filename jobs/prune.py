"""prune: a model and calibration batches -> the sparse student, each pruned weight a (values, bitmask) pair.

The model is the dense one, or the fine-tuned one of the level before, whose pruned weights stay pruned. No rank holds
it: blocks are read one by one, and written as they are finished, so that the same command continues behind the last.
"""

import logging
from typing import Any

from sparse_train import dist
from sparse_train.jobs.job import Job, Stopped
from sparse_train.models import family_of, load_processor, open_model, save_model
from sparse_train.pruning import build_pruner, calibration_batches, choose_specs, prune_layers
from sparse_train.pruning.saved import PrunedBlocks
from sparse_train.pruning.statistics import Gradients
from sparse_train.resources import peak_memory
from sparse_train.sparse import densify
from sparse_train.stopping import StopMonitor

log = logging.getLogger(__name__)


def run(job: Job) -> dict[str, Any]:
    """Collective. Raises Stopped."""
    level = job.config.prune.levels[job.stage.level]
    (source,) = job.inputs
    processor, (model, folder) = load_processor(source.path, job.config.task.language), open_model(source.path)
    model, blocks, pruner = densify(model), PrunedBlocks(job.out / "checkpoints", folder), build_pruner(level)
    num_blocks = len(family_of(model).blocks(model))
    batches = list(calibration_batches(level, job.config.task, processor)) if level.calibrates else []
    sparsities = blocks.sparsities(lambda: {name: spec.sparsity for name, spec in choose_specs(
        model, batches, level, blocks.earlier, folder.get_dense).items()})
    specs = {name: level.model_copy(update={"sparsity": sparsity}) for name, sparsity in sparsities.items()}
    read = folder.get_dense if pruner.Statistics is Gradients else blocks.read
    with StopMonitor(job.deadline_s) as monitor:
        for name, weights in prune_layers(model, pruner, specs, batches, blocks.earlier, read, blocks.num_done,
                                          monitor.begin_step):
            with monitor.saving():
                blocks.save(weights, job.require_newest_attempt)
            if dist.rank() == 0:
                job.progress(blocks.num_done, num_blocks, name)
            if dist.any_rank(monitor.end_step()):
                raise Stopped
    peaks = dist.gather_objects(peak_memory(dist.device()))
    log.info("at most %.2f GB of memory on this rank", peaks[dist.rank()] / 1e9)
    if dist.rank() == 0:
        save_model(job.out, model, processor, blocks.student(model))
    counts = blocks.counts()
    num_kept, num_weights = map(sum, zip(*counts.values(), strict=True))
    return {"sparsity": 1 - num_kept / num_weights, "num_prunable": num_weights,
            "layers": {name: 1 - kept / total for name, (kept, total) in counts.items()},
            "peak_memory_gb": [peak / 1e9 for peak in peaks]}
