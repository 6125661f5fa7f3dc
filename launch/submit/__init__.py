"""Start work: the `run` and `bench` commands, processes on this machine, jobs on SLURM, sweeps."""
