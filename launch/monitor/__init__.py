"""Look at runs and end them, from files and SLURM's answers: status, logs, cancel, inspect."""
