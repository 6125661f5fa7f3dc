"""Every shipped recipe: parses, its model builds at full size without data, its stages resolve, a dry run counts."""

from pathlib import Path

import pytest

from sparse_train.config import RunConfig
from sparse_train.config.load import load_config
from sparse_train.launch.cli import main
from sparse_train.launch.run.stages import build_stages
from sparse_train.launch.submit.validate import validate
from sparse_train.tasks import Example
from sparse_train.tasks.arithmetic import Arithmetic

_CONFIGS = Path(__file__).parents[1] / "configs"
_RECIPES = sorted(str(path.relative_to(_CONFIGS)) for path in _CONFIGS.rglob("*.yaml") if "cluster" not in path.parts)
# Billions of parameters, as published.
_SIZES = {"mpt-7b/base.yaml": 6.65, "mpt-30b/gsm8k.yaml": 29.96, "llama-2-7b/gsm8k.yaml": 6.74,
          "qwen3-8b/gsm8k.yaml": 8.19, "t5-small/wmt14.yaml": 0.0605, "whisper-base/digits.yaml": 0.0726,
          "whisper-small/hindi.yaml": 0.2417}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("recipe", _RECIPES)
def test_a_recipe_is_counted_without_data(recipe, tmp_path, capsys, monkeypatch):
    path = _CONFIGS / recipe
    monkeypatch.chdir(tmp_path)  # where no data lies beside
    config = load_config(RunConfig, path)
    own = config.task.path is not None and config.task.path.startswith(".")  # the user's files, to be put there first
    assert main(["run", str(path), f"folder={tmp_path}", "--dry-run"]) == (2 if own else 0)
    out, err = capsys.readouterr()
    stages = [stage.id for stage in build_stages(config)]
    if own:
        assert f"task.path={config.task.path}: there is no such file or folder" in err
    elif not config.sweep:
        assert [line.split()[0] for line in out.splitlines()[-len(stages):]] == stages
    if config.task.path:
        assert f"data {config.task.path}: not on this machine" in out and own != ("to be a name on the hub" in out)
    assert "prunable parameters kept" in out and f"{config.finetune.steps:,} steps" in out
    known = set()
    for stage in build_stages(config):
        assert {source.id for source in stage.inputs if not source.external} <= known, stage.id
        known.add(stage.id)


@pytest.mark.parametrize("recipe", _SIZES)
def test_a_full_sized_model_has_the_published_number_of_parameters(recipe):
    validation = validate(load_config(RunConfig, _CONFIGS / recipe), dry_run=True)
    assert validation.parameters.total / 1e9 == pytest.approx(_SIZES[recipe], rel=0.01)


def test_the_papers_rows_are_trained_and_evaluated_as_its_code_does():
    for row in ("40", "2of4", "80"):
        config = load_config(RunConfig, _CONFIGS / "mpt-7b" / f"{row}.yaml")
        task = Arithmetic(config.task)
        assert task.problem("Q?", "A") == Example("Q?", "A") and config.finetune.clip == 0
        assert task.problem("Q?", "A", "test") == Example("Question: Q?\nAnswer:", "A") and config.task.shots == 0
    for recipe, splits in (("t5-small/wmt14.yaml", ("train", "validation")),
                           ("whisper-small/hindi.yaml", ("train+dev", "test"))):
        config = load_config(RunConfig, _CONFIGS / recipe)
        assert (config.task.train_split, config.task.test_split) == splits
        assert config.dense.clip == config.finetune.clip == 0


def test_a_chain_prunes_each_level_from_the_one_before():
    config = load_config(RunConfig, _CONFIGS / "demo.yaml", ["prune.sparsity=[0.5, 0.75]"])
    inputs = {stage.id: [source.id for source in stage.inputs] for stage in build_stages(config)}
    assert inputs["prune/75/ce"] == ["finetune/50/ce"]
    assert inputs["finetune/75/ce"] == ["dense", "prune/75/ce"]
    assert inputs["prune/75/one-shot"] == ["dense"]
    assert inputs["compress"] == ["finetune/75/squarehead"]
