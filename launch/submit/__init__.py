"""Start work: the `run`, `bench` and `generate` commands, processes on this machine, jobs on SLURM, sweeps."""
