"""Submitting, looking and withdrawing on a real SLURM: what a user does before and after the training itself."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

from sparse_train import artifacts
from sparse_train.launch.run.folder import read_run
from sparse_train.launch.run.slurm_queue import read_jobs
from sparse_train.launch.run.stages import build_stages
from sparse_train.launch.worker import attempts
from tests.cluster.conftest import NUM_STEPS, PLACE, at_work, submit, wait_for, wait_for_end
from tests.launch.test_pipeline import RECIPE, _cli

_TOP = Path(__file__).parents[2]


def test_a_failed_stage_holds_its_dependents_and_status_says_why(place, tmp_path):
    _cli("run", RECIPE, f"folder={tmp_path}", "--on", place, "dense.learning_rate=1e30", "dense.clip=0",
         "dense.warmup_steps=0", "--stages", "dense,prune,evaluate,finetune/ce", "finetune.losses={ce: {}}",
         "compress.loss=ce")
    run = tmp_path / "tiny"
    assert wait_for_end(run, "dense").state == "FAILED"
    assert wait_for_end(run, "prune").state == "CANCELLED"
    out, _ = _cli("status", run)
    rows = {line.split()[0]: line for line in out.splitlines()[:9]}
    assert "FloatingPointError: step 2: the gradient's norm is" in out and "failed" in rows["dense"]
    assert "held: dense did not finish" in rows["prune"]
    assert len(attempts.read_attempts(run / "logs" / "dense")) == 1, "an error of its own came again"
    out, _ = _cli("runs", tmp_path)
    assert "tiny" in out and "failed" in out


def test_what_is_wrong_with_the_place_is_one_line_and_final(place, tmp_path):
    _cli("run", RECIPE, f"folder={tmp_path}", "--on", place, "--stages", "dense", "finetune.sequence_parallel=1",
         "dense.sequence_parallel=3", "model.n_heads=2")
    run = tmp_path / "tiny"
    assert wait_for_end(run, "dense").state == "FAILED"
    out, _ = _cli("status", run)
    assert "sequence_parallel=3 does not divide 4 ranks" in out
    assert len(attempts.read_attempts(run / "logs" / "dense")) == 1


def test_a_queued_job_keeps_its_code_and_config(place, tmp_path):
    """It waits while the same run is submitted again, which is refused, and runs what was there when it was queued."""
    _cli("run", RECIPE, f"folder={tmp_path}", "--on", place, "--stages", "dense", "cluster.sbatch={hold: true}")
    run = tmp_path / "tiny"
    frozen = (run / "config.yaml").read_bytes()
    _, err = _cli("run", RECIPE, f"folder={tmp_path}", "--on", place, "--stages", "dense", "dense.steps=9", code=2)
    assert "has jobs in the queue (dense)" in err and "sparse-train cancel" in err
    assert (run / "config.yaml").read_bytes() == frozen
    worker = run / "code" / "sparse_train" / "launch" / "worker" / "process.py"
    worker.write_text(worker.read_text() + "\nprint('frozen:', __file__)\n")
    subprocess.run(["scontrol", "release", read_jobs(run)["dense"]], check=True)
    assert wait_for_end(run, "dense").state == "COMPLETED"
    out, _ = _cli("logs", run, "dense", "--rank", "3", "-f")
    assert f"frozen: {worker}" in out


def test_nasty_values_arrive_as_they_are(tmp_path):
    nasty = "it's \"$(touch pwned)\"; `touch pwned`\nsecond line"
    file = tmp_path / "nasty place.yaml"
    file.write_text(PLACE.read_text() + f"sbatch: {{comment: {json.dumps(nasty.splitlines()[0])}}}\n")
    folder = tmp_path / "a 'b'; c"
    out, _ = _cli("run", RECIPE, f"folder={json.dumps(str(folder))}", "--on", file, "--stages", "dense",
                  f"cluster.environment={json.dumps({'NASTY': nasty, 'DS_ACCELERATOR': 'cpu'})}", "dense.steps=2")
    run = folder / "tiny"
    job = read_jobs(run)["dense"]
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    assert f"Comment={nasty.splitlines()[0]}" in shown
    pid = wait_for(lambda: _pid_of(job), 60, "a process of the job")
    given = Path(f"/proc/{pid}/environ").read_text().split("\0")
    assert f"NASTY={nasty}" in given
    assert wait_for_end(run, "dense").state == "COMPLETED"
    assert shlex.quote(str(run)) in out
    assert not [path for place in (tmp_path, _TOP, Path.cwd()) for path in place.glob("pwned")]


def _pid_of(job):
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_JOB_ID={job}" in (given := (folder / "environ").read_text()) and "SLURM_PROCID" in given and \
                    "submitit.core._submit" in (folder / "cmdline").read_text():
                return folder.name
        except OSError:
            continue
    return None


def test_a_sweep_is_arrays_that_share_their_teacher(place, tmp_path):
    """One of two combinations fails: what is behind it is held, and the other goes on."""
    _cli("run", RECIPE, f"folder={tmp_path}", "--on", place, "name=swept", "--stages", "prune,finetune,compress",
         "finetune.losses={ce: {}}", "compress.loss=ce", "sweep={finetune.learning_rate: [0.001, 1.0e+30]}",
         "finetune.steps=4", "finetune.clip=0", "finetune.warmup_steps=0", "cluster.nodes=1")
    points = sorted((tmp_path / "swept").glob("learning_rate-*"))
    jobs = [read_jobs(point) for point in points]
    assert [job["prune"].split("_")[1] for job in jobs] == ["0", "1"]
    assert len({job["prune"].split("_")[0] for job in jobs}) == 1
    good, bad = points
    assert wait_for_end(bad, "finetune/ce", 300).state == "FAILED"
    assert wait_for_end(bad, "compress").state == "CANCELLED"
    assert wait_for_end(good, "compress").state == "COMPLETED"
    teachers = {artifacts.read_manifest(point / "prune")["inputs"]["dense"] for point in points}
    assert len(teachers) == 1 and (Path(teachers.pop()) / "DONE").is_file()
    out, _ = _cli("status", tmp_path / "swept")
    rows = [line.split()[:2] for line in out.splitlines() if line.startswith(" ")]
    assert [state for stage, state in rows if stage == "finetune/ce"] == ["done", "failed:"], "also of the dense run"
    assert "held: finetune/ce did not finish" in out and "the gradient's norm is" in out
    out, _ = _cli("logs", good, "finetune/ce")
    assert "4/4 loss" in out


def test_another_number_of_nodes_after_a_requeue(pruned, place):
    """Half of the training on two nodes, the rest on one."""
    submit(pruned, place)
    at_work(pruned)
    _cli("cancel", pruned)
    wait_for_end(pruned, "finetune/squarehead")
    submit(pruned, place, "cluster.nodes=1", "cluster.ranks_per_node=1")
    assert wait_for_end(pruned, "finetune/squarehead").state == "COMPLETED"
    records = attempts.read_attempts(pruned / "logs" / "finetune" / "squarehead")
    assert [record.ranks for record in records] == [4, 1] and records[1].from_step > 0
    lines = (pruned / "finetune" / "squarehead" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, NUM_STEPS + 1))


def test_plain_sbatch_does_the_same(undisturbed, place, tmp_path):
    environment = {**os.environ, "CLUSTER": str(place), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                   "SPARSE_TRAIN_PYTHON": str(_TOP / ".venv" / "bin" / "python")}
    if not Path(environment["SPARSE_TRAIN_PYTHON"]).is_file():
        environment["SPARSE_TRAIN_PYTHON"] = shutil.which("python")
    folder = tmp_path / "by hand"
    done = subprocess.run([_TOP / "slurm" / "pipeline.sh", RECIPE, f"folder='{folder}'", "finetune.losses={ce: {}}",
                           "compress.loss=ce", "finetune.steps=6", "--", "--time=30"],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:2] == ["prune:", "job"]
    run = folder / "tiny"
    wait_for(lambda: (run / "report" / "DONE").is_file(), 400, "the report")
    same = [(folder / "dense" / "model.safetensors").read_bytes() for folder in (run, undisturbed)]
    assert same[0] == same[1]
    out, _ = _cli("status", run)
    assert all("done in" in line for line in out.splitlines()[1:])
    assert read_jobs(run).keys() == {stage.id for stage in build_stages(read_run(run))}
    limit = subprocess.run(["sacct", "-nXP", "-j", read_jobs(run)["finetune/ce"], "-o", "Timelimit,NNodes,NTasks"],
                           capture_output=True, text=True).stdout
    assert limit.startswith("00:30:00|2|")
