"""The batches whose activations pruning and rounding see."""

from collections.abc import Iterator

from sparse_train import dist
from sparse_train.config import PruneConfig, TaskConfig
from sparse_train.models import Processor
from sparse_train.tasks import Batch, build_task, training_examples
from sparse_train.tasks.batch import encode


def calibration_batches(spec: PruneConfig, task_config: TaskConfig, processor: Processor) -> Iterator[Batch]:
    """The first spec.num_calibration training examples of spec.calibration, by default of the run's task, in batches on
    this rank's device: every batch that is this rank's turn. Raises UserError where none fits the model."""
    task = build_task(spec.calibration or task_config)
    examples = sorted(training_examples(task, processor, spec.num_calibration)[0],
                      key=lambda example: sum(map(len, encode(example, processor))))  # less padding
    starts = range(0, len(examples), spec.batch_size)
    for start in starts[dist.rank()::dist.world_size()]:
        yield task.batch(examples[start:start + spec.batch_size], processor).to(dist.device())
