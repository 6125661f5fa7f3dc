"""The last step of each batch script: the job failed, so is it to run again?

    python -m sparse_train.launch.worker.requeue RUN STAGE CODE

A training that was stopped, by a signal or its time limit, has saved and goes on. A stage that lost a rank, or that was
stopped and keeps no state, runs again while it gets further. A mistake in the recipe and an error of the code's own do
not: they would come again. SLURM itself requeues a preempted job and one whose node is gone; nothing is to do then.
"""

import subprocess
import sys
import time
from pathlib import Path

from sparse_train.config.load import load_config
from sparse_train.launch.run.cluster import CLUSTER, ClusterConfig
from sparse_train.launch.run.stages import find_stage, log_folder, read_run
from sparse_train.launch.worker import attempts
from sparse_train.launch.worker.attempts import EXIT_CODES, Ending
from sparse_train.launch.worker.process_info import attempt_of_job

_PATIENCE = 12


def reason_to_run_again(run: Path, stage_id: str, attempt: str, code: int) -> str | None:
    config, cluster = read_run(run), load_config(ClusterConfig, run / CLUSTER)
    stage = find_stage(config, stage_id)
    logs = log_folder(stage, config)
    job, _, restarts = attempt.rpartition(".")
    everyone = attempts.read_attempts(logs)
    if everyone and everyone[-1]["job"] != job and any(one["job"] == job for one in everyone):
        print(f"not requeued: job {everyone[-1]['job']} is at work on this stage", flush=True)
        return None
    tried = [one for one in everyone if one["job"] == job]
    if any(int(one["id"].rpartition(".")[2]) > int(restarts) for one in tried):
        print("this job runs again already", flush=True)  # a node that was cut off has come back
        return None
    if tried and tried[-1]["id"] == attempt:
        ending = attempts.read_ending(logs, attempt, tried[-1]["ranks"])
    else:
        # broken: such as a package that cannot be imported; mistake: such as a full disk
        status = next((status for status in ("broken", "mistake") if EXIT_CODES[status] == code), "lost")
        ending = Ending(status, "ended before it began")
    print(f"{ending.status}: rank {ending.rank} {ending.message}", flush=True)
    if ending.status == "stopped" and stage.distributed:
        return "to go on from its state"
    if ending.status not in ("stopped", "lost"):
        return None
    if (count := attempts.num_tries(logs, attempt)) >= cluster.tries:
        print(f"not requeued: {count} tries came no further; cluster.tries=N allows more", flush=True)
        return None
    return f"after try {count} of {cluster.tries} from the same step"


def main(run: str, stage_id: str, code: int) -> int:
    attempt = attempt_of_job()
    reason = reason_to_run_again(Path(run), stage_id, attempt, code)
    if reason is None:
        return code
    job = attempt.rpartition(".")[0]  # of an array its task: the bare number may be the whole array's
    for _ in range(_PATIENCE):
        asked = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, encoding="utf-8",
                               errors="replace")
        if asked.returncode == 0:
            if asked.stdout.strip() != "RUNNING":  # cancelled, or SLURM has requeued it already
                return code
            print(f"requeued {reason}", flush=True)
            attempts.note_requeue(Path(run) / "logs" / stage_id, attempt)
            if subprocess.run(["scontrol", "requeue", job]).returncode == 0:
                time.sleep(600)  # until SLURM ends this script; an exit now would race with it
                return code
        time.sleep(10)  # a controller that is busy or restarts
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
