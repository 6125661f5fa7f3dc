"""The command line's answers to mistakes: one line on stderr, exit code 2, nothing written."""

from pathlib import Path

import pytest

from sparse_train.launch.cli import main

_DEMO = str(Path(__file__).parents[1] / "configs" / "demo.yaml")


@pytest.mark.parametrize("arguments, told", [
    (["run", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
    (["run", "demoo"], "there is no recipe demoo; give a .yaml file or one of: claim/arithmetic, demo, "),
    (["run", "demo", "folder=FILE/runs", "--stages", "dense"], "FILE is not a folder, so no run can be in it"),
    (["run", "demo", "folder=100%j", "--stages", "dense"], "%j, %t, %A and %a stand for"),
    (["status", "x" * 300], "File name too long; give a shorter name"),
    (["runs", "FILE"], "holds no runs"),
    (["run", _DEMO, "finetune.stepz=3"], "did you mean finetune.steps?"),
    (["run", _DEMO, "prune.sparsity=1.5"], "outside [0, 1)"),
    (["run", _DEMO, "prune.sparsity=null", "prune.pattern=3:7"], "pattern 3:7 does not divide transformer.blocks.0"),
    (["run", _DEMO, "prune.sparsity=[0.5,0.99999]"], "prune.sparsity=0.99999 keeps none of the 384 x 128 weights"),
    (["run", _DEMO, "dense.zero.stage=5"], "there is no ZeRO stage 5"),
    (["run", _DEMO, "task.name=gsm8k"], "task.path is missing"),
    (["run", _DEMO, "task.name=gsm8k", "task.path=./nowhere"], "there is no such file or folder"),
    (["run", _DEMO, "task.name=gsm8k", "task.path=EMPTY"], "holds no train.jsonl"),
    (["run", _DEMO, "dense.path=EMPTY"], "is not a checkpoint"),
    (["run", _DEMO, "dense.path=./nowhere"], "there is no folder ./nowhere"),
    (["run", _DEMO, "nodes=4"], "did you mean cluster.nodes?"),
    (["run", _DEMO, "cluster.partition=gpu"], "only SLURM has this; use --on slurm"),
    (["run", _DEMO, "cluster.gpus_per_node=99", "--dry-run"], "cluster.gpus_per_node=99: this machine has"),
    (["run", _DEMO, "task.name=gsm8k", "task.path=../data/nowhere", "--dry-run"], "there is no such file or folder"),
    (["run", _DEMO, "cluster.nodes=4"], "sparse-train: cluster.nodes=4: this machine is one node"),
    (["run", _DEMO, "--stages", "report, dens"], "there is no stage dens in this run"),
    (["run", _DEMO, "--on", "mars"], "one of: local, slurm"),
    (["run", _DEMO, "--stages", "prun"], "there is no stage prun in this run"),
    (["run", _DEMO, "--stages", "report"], "stage report needs dense"),
    (["run", _DEMO, "--stages", "dense,finetune", "--dry-run"], "needs prune, which is not current"),
    (["run", _DEMO, "--stages", "finetune", "--dry-run", "sweep={prune.sparsity: [0.5]}"], "needs prune"),
    (["run", _DEMO, "--prepare", "--dry-run"], "--prepare writes the run folder"),
    (["run", _DEMO, "--prepare", "sweep={seed: [1, 2]}"], "--prepare: a sweep is many runs"),
    (["status", "EMPTY"], "is not a run folder"),
    (["inspect", "EMPTY"], "is not a checkpoint"),
    (["inspect", "nowhere"], "there is no folder nowhere"),
    (["generate", "./nowhere", "--prompt", "x"], "there is no folder ./nowhere"),
    (["generate", "EMPTY", "--prompt", "x"], "is not a checkpoint"),
    (["generate", "EMPTY", "--prompt", "x", "--max-new-tokens", "0"], "must be at least 1"),
    (["generate", "EMPTY", "--prompt", "x", "--temperature", "-1"], "--temperature -1.0: it must be a number of at"),
    (["generate", "EMPTY", "--prompt", "x", "--temperature", "1e-40"], "of at least 1e-06, or 0, which takes the most"),
    (["generate", "EMPTY", "--prompt", "x", "--temperature", "nan"], "--temperature nan: it must be a number of at"),
    (["generate", "EMPTY", "--prompt", "x", "--stop", "\udcff"], "--stop '\\udcff': it is not UTF-8; give it as UTF-8"),
    (["generate", "EMPTY", "--prompt", "x", "--top-p", "1.5"], "--top-p 1.5: it must be above 0 and at most 1"),
    (["generate", "EMPTY", "--prompt", "x", "--stop", ""], "--stop: it must have at least one character"),
    (["generate", "EMPTY", "--prompts", "FILE"], "--prompts FILE: it holds no prompt"),
    (["generate", "EMPTY", "--prompts", "nowhere"], "cannot read nowhere: "),
])
def test_a_mistake_is_one_line_and_exit_code_2(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {"EMPTY": str(tmp_path / "empty"), "FILE": str(tmp_path / "file")}
    for word, place in places.items():
        arguments, told = [argument.replace(word, place) for argument in arguments], told.replace(word, place)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert told in err and err.startswith("sparse-train: ") and err.count("\n") == 1
    assert "Traceback" not in out + err


def test_an_unknown_option_is_a_mistake_and_overrides_may_follow_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", _DEMO, "name=x", "--dry-run", "prune.sparsity=0.5", "folder=here"]) == 0
    assert "finetune/squarehead" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(["run", _DEMO, "--frobnicate"])
    assert stop.value.code == 2


@pytest.mark.parametrize("arguments, told", [
    (["run", _DEMO, "--prune.sparsity=0.5"], "keys of the config have no dashes; write prune.sparsity=0.5"),
    (["run", _DEMO, "-seed=1"], "write seed=1"),
    (["run"], "the following arguments are required: config; see"),
])
def test_what_the_parser_refuses_has_a_remedy(arguments, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_help_tells_of_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("run", "status", "inspect", "generate"))
