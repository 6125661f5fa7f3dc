"""Runs as processes: on this machine or as SLURM jobs.

    cli.py      the command line
    monitor/    look at runs and end them: status, logs, cancel, inspect; loads neither torch nor submitit
    submit/     start work: the `run`, `bench` and `generate` commands, on this machine, on SLURM, sweeps
    worker/     what runs inside each process of a stage
    run/        a run as data and files: its stages, its folder, its lock, where it runs; starts nothing

Rooms import from those below them only, and submit/ and monitor/ not from each other.
"""
