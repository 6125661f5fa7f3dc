"""From a command to processes, on this machine or as SLURM jobs.

    cli.py      the command line
    submit/     start work: the `run`, `bench` and `generate` commands, on this machine, on SLURM, sweeps
    monitor/    watch runs and end them: `status`, `runs`, `logs`, `cancel`, `inspect`
    worker/     what runs in each process of a stage
    run/        a run as data and files: its stages, plan, folder, lock, cluster file; starts nothing

A room imports only from rooms below it, and submit/ and monitor/ not from each other.
"""
