"""What runs in each process of a stage.

    entry.py          what submitit calls
    process.py        the whole course: join the ranks, do the job, publish its folder, write the ending
    process_info.py   this process's rank, node and attempt
    attempts.py       the attempts at a stage; an old one must not write any more
    ranks.py          join the other ranks; exit when one falls silent
    rank_checks.py    checks on every rank before training
    staging.py        the folder that a stage writes, from its inputs to its publication
    failures.py       exceptions as endings
    endings.py        how a process ended, as a file
    requeue.py        whether a failed SLURM job runs again
"""
