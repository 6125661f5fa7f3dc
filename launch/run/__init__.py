"""A run as data and files. Nothing here starts work.

    stages.py        the stage graph: every stage, its inputs, and the keys of the config that it depends on
    sources.py       whether a finished stage is current, and if not, why
    plan.py          what running some stages would do
    folder.py        where results, logs and progress are
    lock.py          one launcher at a time
    recipes.py       the recipes of the package
    cluster.py       where a run's processes run, and with which resources
    snapshot.py      the copy of the code that queued jobs run
    slurm_queue.py   the run's jobs in SLURM
"""
