"""On PYTHONPATH, makes each job of a run write down which keys of its config it reads, a line per key: $READS/STAGE.

A job's config is a copy of its own, so that what the launcher and the worker read of theirs does not count.
"""

import os
from pathlib import Path

from sparse_train.config import PruneConfig, RunConfig, Section
from sparse_train.jobs import job

_prefix: dict[int, str] = {}  # of a section, by its id, as long as the process lives
_alive, _seen, _stage = [], set(), []


def _register(value, key):
    if isinstance(value, Section):
        _alive.append(value)
        _prefix[id(value)] = key
        for name in type(value).model_fields:
            _register(value.__dict__[name], f"{key}{name}.")
    elif isinstance(value, dict):
        for name, part in value.items():
            _register(part, f"{key}{name}.")


def _read(section, name):
    value = found(section, name)
    key = _prefix.get(id(section))
    if key is not None and name in type(section).model_fields and not isinstance(value, (Section, dict)):
        _note(key + name)
    return value


def _note(key):
    if key not in _seen:
        _seen.add(key)
        with open(Path(os.environ["READS"]) / _stage[0].replace("/", "-"), "a", encoding="utf-8") as file:
            file.write(key + "\n")


def _copy(section, **given):
    copied = copy(section, **given)
    if id(section) in _prefix:
        _register(copied, _prefix[id(section)])
    return copied


def _levels(section):
    made = levels.fget(section)
    if id(section) in _prefix:
        for level in made:
            _register(level, _prefix[id(section)])
    return made


def _dump(section, **given):
    # The whole config goes to wandb, which is no result.
    if id(section) in _prefix and not isinstance(section, RunConfig):
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, Section):
                _dump(value)
    return dump(section, **given)


def _start(self, config, stage, *more, **named):
    _stage[:] = [stage.id]
    own = config.model_copy(deep=True)
    _register(own, "")
    start(self, own, stage, *more, **named)


levels, PruneConfig.levels = PruneConfig.levels, property(_levels)
found, copy, dump, start = Section.__getattribute__, Section.model_copy, Section.model_dump, job.Job.__init__
Section.__getattribute__, Section.model_copy, Section.model_dump, job.Job.__init__ = _read, _copy, _dump, _start
