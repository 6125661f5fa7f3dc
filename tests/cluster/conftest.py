"""The cluster ring: a real SLURM of three nodes on this machine, which `make test-cluster` starts."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from sparse_train import artifacts
from sparse_train.launch.run.slurm_queue import job_states, read_jobs
from sparse_train.launch.worker import attempts
from tests.launch.test_pipeline import RECIPE, _cli

STATE = Path(os.environ.get("SLURM_STATE", "/tmp/sparse-train-slurm"))
START = Path(__file__).parents[2] / "slurm" / "cluster" / "start.sh"
STAGES = ["dense", "prune", "finetune/ce", "finetune/squarehead", "evaluate", "compress", "benchmark", "report"]
PLACE = START.with_name("test.yaml")
# Long enough to be disturbed in the middle, with checkpoints on the way.
NUM_STEPS = 400
LONG = (f"finetune.steps={NUM_STEPS}", "finetune.checkpoint_every=20", "tracking.wandb={mode: offline}")


def pytest_collection_modifyitems(items):
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = None if not here or is_up() else "needs the test cluster: make test-cluster starts it (root, Debian)"
    if reason and os.environ.get("REQUIRE_CLUSTER"):
        pytest.exit(reason, returncode=1)
    for item in here:
        item.add_marker(pytest.mark.cluster)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def is_up() -> bool:
    if shutil.which("scontrol") is None or not (STATE / "pids" / "slurmctld.pid").is_file():
        return False
    return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=30).returncode == 0


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.3)
    return found


def state_of(run: Path, stage: str):
    return job_states(read_jobs(run))[stage]


def wait_for_end(run: Path, stage: str, seconds=240):
    """The job's last state. A node failure is no end: SLURM runs the job again."""
    def ended():
        state = state_of(run, stage)
        return None if state.is_active or state.state in ("NODE_FAIL", "PREEMPTED", "UNKNOWN") else state
    return wait_for(ended, seconds, f"the end of {stage}")


def steps_done(run: Path, stage: str) -> int:
    for folder in (f"{stage}.partial", stage):
        file = run / folder / "metrics.jsonl"
        if file.is_file():
            return file.read_text().count("\n")
    return 0


@pytest.fixture(scope="session")
def place():
    return PLACE


@pytest.fixture(scope="session")
def undisturbed(place, tmp_path_factory):
    """The folder of a complete run on the cluster."""
    repair()
    folder = tmp_path_factory.mktemp("on the cluster; quote me")
    _cli("run", RECIPE, f"folder='{folder}'", "--on", place, *LONG)
    for stage in STAGES:
        assert wait_for_end(folder / "tiny", stage, 400).state == "COMPLETED", stage
    return folder / "tiny"


@pytest.fixture(autouse=True)
def _leave_no_jobs():
    yield
    subprocess.run(["scancel", "--user", "root"])
    wait_for(lambda: not queue(), 60, "an empty queue")


@pytest.fixture
def pruned(undisturbed, tmp_path):
    """The folder of the same run as far as its long fine-tune, which is to be submitted."""
    run = tmp_path / "tiny"
    for stage in ("dense", "prune"):
        shutil.copytree(undisturbed / stage, run / stage)
    shutil.copy(undisturbed / "config.yaml", run)  # by which it is known for a run
    yield run
    repair()


@pytest.fixture
def started(pruned, place):
    """The same, with the fine-tune at work in the middle."""
    submit(pruned, place)
    at_work(pruned)
    return pruned


def queue() -> str:
    return subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout


def submit(run: Path, place: Path, *overrides):
    """The fine-tune, and a stage behind it."""
    return _cli("run", RECIPE, f"folder='{run.parent}'", "--on", place, "--stages",
                "finetune/squarehead,compress", *LONG, *overrides)


def at_work(run: Path, step=30):
    wait_for(lambda: steps_done(run, "finetune/squarehead") >= step, 120, f"step {step}")


def repair():
    """Boot what was crashed and plug in what was unplugged."""
    for node in (1, 2, 3):
        subprocess.run(["ip", "link", "set", f"slurm-node{node}", "up"], check=False)
    subprocess.run(["bash", START], check=True, capture_output=True, timeout=120)


def require_same_end(run: Path, undisturbed: Path, num_attempts: int):
    """Bits, metrics of every step once, and the wandb run are as without the disturbance; what waited for it has run
    once, and nothing is left in the queue."""
    assert wait_for_end(run, "compress").state == "COMPLETED"
    assert len(attempts.read_attempts(run / "logs" / "compress")) == 1
    wait_for(lambda: not queue(), 30, "an empty queue")
    stage = run / "finetune" / "squarehead"
    assert artifacts.damage(stage) is None
    assert (stage / "sparse.safetensors").read_bytes() == \
        (undisturbed / "finetune" / "squarehead" / "sparse.safetensors").read_bytes()
    lines = [line.split(",")[0] for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert lines == [f'{{"step": {step}' for step in range(1, NUM_STEPS + 1)]
    records = attempts.read_attempts(run / "logs" / "finetune" / "squarehead")
    assert len(records) == num_attempts and records[-1].from_step > 0
    ids = [folder.name.rpartition("-")[2] for folder in (run / "wandb").glob("offline-run-*")]
    behind = (run / "logs" / "compress" / "wandb-id").read_text()
    assert sorted(ids) == sorted([(stage / "wandb-id").read_text()] * num_attempts + [behind])
