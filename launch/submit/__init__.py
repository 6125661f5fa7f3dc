"""Start work.

    command.py     the `run` command
    validate.py    checks before the first job, and a summary of the work
    local.py       the stages of a run on this machine, one after the other
    processes.py   processes on this machine, one per rank
    slurm.py       the stages of a run as SLURM jobs
    sweep.py       a run per combination, and one table of their scores
    bench.py       the `bench` commands
"""
