"""Last line of each batch script: decide whether a failed job runs again, and requeue it.

    python -m sparse_train.launch.worker.requeue RUN STAGE CODE

A training, a pruning or an evaluation that was stopped, by a signal or its time limit, has saved its state and
continues. A stage that lost a rank, or that was stopped and keeps no state, runs again as long as it makes progress.
After a mistake in the recipe or an error in the code the job would only fail again, so it is not requeued. SLURM itself
requeues preempted jobs and jobs whose node failed.
"""

import subprocess
import sys
import time
from pathlib import Path

from sparse_train.config.load import load_config
from sparse_train.launch.run.cluster import CLUSTER, ClusterConfig
from sparse_train.launch.run.folder import log_folder, read_run
from sparse_train.launch.run.stages import find_stage
from sparse_train.launch.worker import attempts
from sparse_train.launch.worker.attempts import AttemptRecord
from sparse_train.launch.worker.endings import EXIT_CODES, Ending, read_ending
from sparse_train.launch.worker.process_info import Attempt, current_attempt

_MAX_QUERIES = 12  # of a SLURM controller that does not answer


def reason_to_run_again(run: Path, stage_id: str, attempt: Attempt, code: int) -> str | None:
    """None where the job is not to be requeued; the reason is printed."""
    config, cluster = read_run(run), load_config(ClusterConfig, run / CLUSTER)
    stage = find_stage(config, stage_id)
    logs = log_folder(stage, config)
    records = attempts.read_attempts(logs)
    if successor := _successor(records, attempt):
        _say(successor)
        return None
    ending = _ending(logs, records, attempt, code)
    _say(f"{ending.status}: rank {ending.rank} {ending.message}")
    if ending.status == "stopped" and stage.is_distributed:
        return "to continue from its state"
    if ending.status not in ("stopped", "lost"):
        return None
    count = attempts.count_attempts(logs, attempt)
    if count >= cluster.tries:
        _say(f"not requeued: {count} attempts made no progress; cluster.tries=N allows more")
        return None
    return f"after attempt {count} of {cluster.tries} from the same step"


def _say(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


def _successor(records: list[AttemptRecord], attempt: Attempt) -> str:
    """A line on the job or attempt that has replaced this attempt; "" where there is none."""
    of_job = [record.attempt for record in records if record.job == attempt.job]
    if of_job and records[-1].job != attempt.job:
        return f"not requeued: job {records[-1].job} works on this stage"
    if any(other.restarts > attempt.restarts for other in of_job):  # a node that was cut off has come back
        return "this job runs again already"
    return ""


def _ending(logs: Path, records: list[AttemptRecord], attempt: Attempt, code: int) -> Ending:
    if matches := [record for record in records if record.attempt == attempt]:
        return read_ending(logs, attempt, matches[-1].ranks)
    if code == EXIT_CODES["broken"]:  # such as a package that cannot be imported
        return Ending("broken", "ended before it began")
    if code == EXIT_CODES["mistake"]:  # such as a full disk
        return Ending("mistake", "ended before it began")
    return Ending("lost", "ended before it began")


def main(run: str, stage_id: str, code: int) -> int:
    attempt = current_attempt()
    reason = reason_to_run_again(Path(run), stage_id, attempt, code)
    if reason is None:
        return code
    job = attempt.job  # in an array with its task: the number alone may mean the whole array
    for _ in range(_MAX_QUERIES):
        squeue = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, encoding="utf-8",
                                errors="replace")
        if squeue.returncode == 0:
            if squeue.stdout.strip() != "RUNNING":  # cancelled, or SLURM has requeued it already
                return code
            _say(f"requeued {reason}")
            attempts.note_requeue(Path(run) / "logs" / stage_id, attempt)
            if subprocess.run(["scontrol", "requeue", job]).returncode == 0:
                time.sleep(600)  # until SLURM ends this script; to exit now would race with it
                return code
        time.sleep(10)  # a controller that is busy or restarts
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
