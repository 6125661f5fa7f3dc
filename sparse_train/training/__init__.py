"""Fine-tuning under ZeRO.

    run.py                                    what a training needs (TrainingRun), and what watches it (Hooks)
    loop.py, step.py                          all steps; one step
    losses.py, terms/                         the weighted sum of the loss terms; a term each
    teacher.py, features.py                   the teacher's answers; outputs of blocks
    engine.py, loading.py, gather.py          DeepSpeed's engines; models into them and out of them
    partition.py, sequence.py                 how ranks share a parameter, and the tokens of an example
    order.py, schedule.py                     examples and learning rate of a step
    checkpoint.py, fragments.py, bits.py      saved states; what of them a rank owns; bits that do not change
    metrics.py                                lines of metrics
"""

from sparse_train.training.bits import audit
from sparse_train.training.gather import gathered_tensors
from sparse_train.training.loading import load_sharded, load_student, load_teacher
from sparse_train.training.loop import Outcome, train
from sparse_train.training.run import Hooks, TrainingRun
from sparse_train.training.terms.feature import squarehead

__all__ = [
    "Hooks", "Outcome", "TrainingRun", "audit", "gathered_tensors", "load_sharded", "load_student", "load_teacher",
    "squarehead", "train",
]
