"""dense: a model from a folder, from the hub or initialised here, fine-tuned on the task. It is the teacher later."""

from typing import Any

import torch

from sparse_train.jobs.finetune import TrainingData, fine_tune
from sparse_train.jobs.job import Job
from sparse_train.models import build_model, build_processor, load_processor
from sparse_train.tasks import build_task, build_tokenizer
from sparse_train.training import TrainingRun, load_student


def run(job: Job) -> dict[str, Any]:
    config = job.config
    if config.model.path:
        processor = load_processor(config.model.path, config.task.language)
        model = load_student(config.model.path, config.dense)
    else:
        processor = build_processor(config.model, build_tokenizer(build_task(config.task), config.model.vocab_size))
        torch.manual_seed(config.seed)  # every rank builds the same model
        model = build_model(config.model, processor)
    data = TrainingData(job, config.dense, processor)
    return fine_tune(job, data, processor, TrainingRun(model, data.batch, data.order, config.dense, seed=config.seed,
                                                       packed=data.packed))
