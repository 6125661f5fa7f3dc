"""A run as SLURM jobs: one per stage, each after the stages that it reads; a sweep as arrays, a task per combination.

submitit writes the batch files and starts the processes. Its signal handlers are not used: they save on one rank only,
count short jobs as timed out, and give up after a node failure. worker/requeue.py decides which jobs run again.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import submitit
from rich.console import Console

from sparse_train import artifacts
from sparse_train.compat.submitit import batch_text
from sparse_train.config import RunConfig
from sparse_train.errors import StageFailed, UserError
from sparse_train.jobs.stage import Stage
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.run.folder import JOB_FILE, log_folder
from sparse_train.launch.run.lock import locked
from sparse_train.launch.run.plan import check_replaced, claim, plan
from sparse_train.launch.run.slurm_queue import array_of, require_idle
from sparse_train.launch.run.snapshot import freeze_code
from sparse_train.launch.run.stages import build_stages, select
from sparse_train.launch.worker.entry import process

RUNS_FILE = "runs.txt"


def submit(config: RunConfig, cluster: ClusterConfig, names: list[str], console: Console, dry_run: bool = False,
           replace: bool = False) -> None:
    """Submit the stages that are not current. With `dry_run` the batch files are printed and nothing is written."""
    with _prepared(config.path, [(config, names)], cluster, dry_run, replace) as code:
        _submit_graph([config], cluster, names, console, dry_run, code)
    if not dry_run:
        _print_status_command(config.path, console)


def prepare(config: RunConfig, cluster: ClusterConfig, names: list[str], replace: bool = False) -> None:
    """Write the run folder and print what slurm/pipeline.sh submits: the folder, then a line for each stage that is not
    current, tab-separated: its id, the stages it reads (with commas; - for none), options of sbatch."""
    with _prepared(config.path, [(config, names)], cluster, dry_run=False, replace=replace):
        print(config.path.absolute())
        for planned in plan(config, names):
            if not planned.is_current:
                stage = planned.stage
                options = cluster.resources(stage).options()
                options["signal"] = f"USR2@{cluster.warning_s}"
                print(stage.id, ",".join(source.id for source in stage.upstream) or "-", *(
                    f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()), sep="\t")


def submit_sweep(folder: Path, dense: Sequence[RunConfig], runs: Sequence[RunConfig], cluster: ClusterConfig,
                 names: list[str], console: Console, dry_run: bool = False, replace: bool = False) -> None:
    """The dense models of `dense` as one array, then each stage of `runs`, where there are any, as one.

    `names`: of their stages, or all. All are runs of the sweep in `folder`.
    """
    targets = [*((config, ["dense"]) for config in dense), *((config, names) for config in runs)]
    with _prepared(folder, targets, cluster, dry_run, replace) as code:
        dense_jobs = _submit_graph(dense, cluster, ["dense"], console, dry_run, code) if dense else []
        # A dense model that fails must not stop the runs that read another one.
        kind = "afterok" if len(dense) == 1 else "afterany"
        after = f"{kind}:{array_of(dense_jobs[0]['dense'])}" if dense_jobs and dense_jobs[0] else ""
        if runs:
            _submit_graph(runs, cluster, names, console, dry_run, code, after)
    if not dry_run:
        _print_status_command(folder, console)


def _print_status_command(folder: Path, console: Console) -> None:
    console.print(f"sparse-train status {shlex.quote(str(folder))} --watch", highlight=False, markup=False,
                  soft_wrap=True)


@contextlib.contextmanager
def _prepared(folder: Path, runs: Sequence[tuple[RunConfig, list[str]]], cluster: ClusterConfig, dry_run: bool,
              replace: bool) -> Iterator[Path]:
    """Write the code and each run's config to `folder`, and hold its lock; the value is the folder of the code.

    `runs`: each with the names of its selected stages; `replace`: see check_replaced. Raises UserError, such as where
    jobs of the folder are in the queue.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--on slurm: there is no sbatch here; run this on a login node of the cluster")
    if "%" in str(folder.absolute()) or not str(folder.absolute()).isprintable():
        raise UserError(f"{folder.absolute()}: SLURM takes % in a path for a pattern, and no line breaks; give another "
                        "folder")
    code = folder.absolute() / "code"
    if dry_run:
        yield code
        return
    with locked(folder):
        require_idle(folder)
        for config, names in runs:  # check all of them before writing any
            check_replaced([config], names, replace)
        freeze_code(folder)
        for config, names in runs:
            config.path.mkdir(parents=True, exist_ok=True)
            claim(config, cluster, names, replace)
        yield code


def _submit_graph(runs: Sequence[RunConfig], cluster: ClusterConfig, names: list[str], console: Console, dry_run: bool,
                  code: Path, start_after: str = "") -> list[dict[str, str]]:
    """Submit the selected stages that are not current in one of the runs. Returns for each run stage -> job.

    `start_after`: the dependency of stages that read no submitted one.
    """
    to_run = [{planned.stage.id for planned in plan(config, names) if not planned.is_current} for config in runs]
    jobs: list[dict[str, str]] = [{} for _ in runs]
    for stages in itertools.zip_longest(*(select(build_stages(config), names) for config in runs)):
        if len({stage and stage.id for stage in stages}) > 1:
            raise UserError("sweep: the combinations have different stages, so they cannot be arrays; sweep over keys "
                            "that leave the stages alone, or use --on local")
        stage = stages[0]
        if not any(stage.id in todo for todo in to_run):
            console.print(f"{stage.id:<22} current", highlight=False, style="dim")
            continue
        after = _dependency(stage, jobs) or start_after
        executor = make_executor(stage, runs, cluster, code, after)
        if dry_run:
            console.print(f"{stage.id:<22} {after or 'at once'}", highlight=False, soft_wrap=True)
            print(_indented(batch_text(executor, len(runs))))
            ids = [f"<{stage.id}>"] * len(runs)
        else:
            ids = _submit(executor, stage, runs)
            console.print(f"{stage.id:<22} job {array_of(ids[0])} {after}", highlight=False, soft_wrap=True)
        for config, job_of_stage, job in zip(runs, jobs, ids, strict=True):
            job_of_stage[stage.id] = job
            if not dry_run:  # now: a submission that is cut off must leave no unknown job
                note = log_folder(stage, config) / JOB_FILE
                note.parent.mkdir(parents=True, exist_ok=True)
                artifacts.write_text(note, job)
    return jobs


def make_executor(stage: Stage, runs: Sequence[RunConfig], cluster: ClusterConfig, code: Path,
                  after: str = "") -> submitit.SlurmExecutor:
    """submitit's, set up for one job, or for an array of as many tasks as runs."""
    resources, root = cluster.resources(stage), _root(runs)
    folder = root / "logs" / stage.id
    options = {key.replace("-", "_"): value for key, value in resources.options().items()}  # as submitit spells them
    options |= {"requeue": True, "kill-on-invalid-dep": "yes"}
    # Since SLURM 22.05 srun does not inherit --cpus-per-task from sbatch. A rank that ends badly ends its step.
    cpus = [f"--cpus-per-task={resources.cpus_per_rank}"] if resources.cpus_per_rank else []
    # Without the safe path, the folder that the job was submitted from, perhaps the checkout, would precede the copy.
    # 76: srun could not start the step. launch.worker.requeue tells this from an error of the code.
    exports = {"PYTHONSAFEPATH": "1", "SLURM_EXIT_ERROR": "76", "SLURM_EXIT_IMMEDIATE": "76", **cluster.environment}
    if len(runs) == 1:
        run = shlex.quote(str(root))
    else:  # the tasks of an array share one batch file
        run = f'"$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(folder / RUNS_FILE))})"'
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(
        job_name=f"{root.name}/{stage.id}", time=None, wckey=None, dependency=after or None,
        signal_delay_s=cluster.warning_s, stderr_to_stdout=True, additional_parameters=options,
        srun_args=["--export=ALL", "--kill-on-bad-exit=1", *cpus],
        # set +e: the lines after a failed step decide whether it runs again.
        setup=[*cluster.setup, "set +e", f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
               *(f"export {key}={shlex.quote(value)}" for key, value in exports.items())],
        teardown=["code=$?", '[ "$code" -eq 0 ] && exit 0',
                  f"{shlex.quote(sys.executable)} -m sparse_train.launch.worker.requeue {run} {shlex.quote(stage.id)} "
                  '"$code"'],
    )
    return executor


def _root(runs: Sequence[RunConfig]) -> Path:
    """The folder of the run, or of the sweep."""
    return (runs[0].path if len(runs) == 1 else runs[0].path.parent).absolute()


def _submit(executor: submitit.SlurmExecutor, stage: Stage, runs: Sequence[RunConfig]) -> list[str]:
    """Ids of its jobs, by run."""
    targets = [str(config.path.absolute()) for config in runs]
    try:
        if len(runs) == 1:
            with _clean_environment():
                return [executor.submit(process, targets[0], stage.id).job_id]
        executor.folder.mkdir(parents=True, exist_ok=True)
        artifacts.write_text(executor.folder / RUNS_FILE, "".join(f"{target}\n" for target in targets))
        with _clean_environment(), executor.batch():
            jobs = [executor.submit(process, target, stage.id) for target in targets]
        return [job.job_id for job in jobs]
    except submitit.core.utils.FailedJobError as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error).strip()]
        raise StageFailed(f"SLURM did not accept stage {stage.id}: {lines[0].strip()}; the jobs before it are "
                          f"submitted: sparse-train cancel {shlex.quote(str(_root(runs)))} withdraws them") from error


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Hide the variables of a job that this runs in, and of the shell, which would change the submitted jobs."""
    names = ("SBATCH_NO_REQUEUE", "SBATCH_REQUEUE", "SBATCH_SIGNAL", "SBATCH_OPEN_MODE", "SBATCH_EXPORT")
    hidden = {key: os.environ.pop(key) for key in list(os.environ)
              if key in names or (key.startswith(("SLURM_", "SUBMITIT_")) and key != "SLURM_CONF")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _dependency(stage: Stage, jobs: list[dict[str, str]]) -> str:
    """The jobs of its inputs, all of which must succeed first; in an array, each task waits for its own run's."""
    inputs = dict.fromkeys(array_of(jobs[0][source.id]) for source in stage.inputs if source.id in jobs[0])
    kind = "afterok" if len(jobs) == 1 else "aftercorr"
    return ",".join(f"{kind}:{job}" for job in inputs)


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())
