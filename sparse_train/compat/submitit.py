"""Private interfaces of submitit, a function each. Tested with submitit 1.5.4."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

    import submitit


def local_process(job: "submitit.Job[Any]") -> "subprocess.Popen[bytes]":
    """The process that started the tasks of a job on this machine. The public cancel() sends SIGINT and kills a second
    later, in the middle of a save; polling and signals of our own need the process itself."""
    from submitit import LocalJob  # slow to import, and looking at runs does without

    if not isinstance(job, LocalJob) or job._process is None:
        raise TypeError(f"{job} was not started by this process")
    return job._process


def batch_text(executor: "submitit.SlurmExecutor", num_jobs: int) -> str:
    """The batch file that `executor` will submit for so many jobs, an array where there are several. In public it is
    only written at submission, and a dry run submits nothing."""
    if num_jobs > 1:
        executor.parameters["map_count"] = num_jobs
    return executor._make_submission_file_text(executor._submitit_command_str, "")
