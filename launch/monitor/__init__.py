"""Watch runs and end them, by their files and SLURM's answers. All but `inspect` load neither torch nor submitit.

    status.py    `status` and `runs`: tables of stages and of runs
    state.py     the state of each stage
    folders.py   the runs below a folder
    logs.py      `logs`: the output of a rank
    cancel.py    `cancel`: end a run's jobs, or its launcher on this machine
    inspect.py   `inspect`: the tensors of a checkpoint folder
"""
