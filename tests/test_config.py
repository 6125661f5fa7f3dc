"""Configs: closed, validated, one line per mistake; every recipe that is shipped loads."""

from pathlib import Path

import pytest
import yaml
from sparse_train.launch.cluster import ClusterConfig
from sparse_train.launch.stages import build_stages, select

from sparse_train.config import RunConfig, TaskConfig
from sparse_train.config_file import dump_config, load_config
from sparse_train.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "cluster")
_DEMO = CONFIGS / "demo.yaml"


def test_a_path_that_is_there_holds_from_every_folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(RunConfig, CONFIGS / "demo.yaml", ["task={name: text, path: data}", "model.path=owner/name"])
    assert config.task.path == str(tmp_path / "data") and config.model.path == "owner/name"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_recipe_loads_and_its_graph_resolves(path):
    config = load_config(RunConfig, path)
    assert [stage.job for stage in build_stages(config)][-1] == "report"


@pytest.mark.parametrize("path", sorted((CONFIGS / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_cluster_file_loads(path):
    load_config(ClusterConfig, path)


def test_the_resolved_config_reads_back_equal(tmp_path):
    config = load_config(RunConfig, _DEMO, ["prune.pattern=2:4", "prune.sparsity=null",
                                            "tracking.wandb={mode: offline}"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(RunConfig, tmp_path / "config.yaml") == config
    assert config.prune.sparsity == 0.5 and config.prune.group == (2, 4)


def test_overrides_are_typed_and_nested():
    config = load_config(RunConfig, _DEMO, ["finetune.losses.kd.logit_weight=0.5", "finetune.learning_rate=1e-4",
                                            "name=a.b", "model.path=null"])
    assert config.finetune.losses["kd"].logit_weight == 0.5
    assert config.finetune.learning_rate == 1e-4 and config.name == "a.b" and config.model.path is None


@pytest.mark.parametrize("override, told", [
    ("finetune.stepz=3", "there is no key finetune.stepz; did you mean steps?"),
    ("finetune.losses.ce.feature_wait=1", "did you mean feature_weight?"),
    ("tracking.wandb.mod=offline", "did you mean mode?"),
    ("prune.sparsity=1.0", "sparsity=1.0 is outside [0, 1)"),
    ("prune.sparsity=-0.1", "sparsity=-0.1 is outside [0, 1)"),
    ("prune.sparsity=null", "sparsity is missing"),
    ("prune.pattern=2:4", "sparsity=0.75 contradicts pattern=2:4"),
    ("prune.pattern=5:4", "keeps more than it has"),
    ("prune.pattern=2to4", "neither unstructured nor N:M"),
    ("finetune.zero.stage=4", "there is no ZeRO stage 4; use 0, 1, 2 or 3"),
    ("finetune.losses={}", "losses is empty"),
    ("finetune.losses.prune={}", "a loss cannot be called prune"),
    ("finetune.losses.ce.task_weight=0", "all loss weights are 0"),
    ("finetune.accumulation=7", "accumulation=7 must divide batch_size=64"),
    ("model.n_heads=3", "n_heads=3 must divide d_model=128"),
    ("dense.steps=0", "dense.steps=0: input should be greater than 0"),
    ("dense.steps", "write key=value"),
    ("prune.calibration.pth=x", "did you mean path?"),
    ("name.x=1", "name is a value, not a section"),
    ("name=../up", "name='../up'"),
    ("prune.sparsity=[0.5, x]", "prune.sparsity=[0.5, x]: prune.sparsity="),
    ("task.languages=[en]", "task.languages.1 is missing"),
    ("tracking.wandb=5", "tracking.wandb=5: this is a section"),
])
def test_a_mistake_is_one_line_with_value_and_remedy(override, told):
    with pytest.raises(UserError) as error:
        load_config(RunConfig, _DEMO, [override])
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family, task", [("mpt", "arithmetic"), ("llama", "arithmetic"), ("t5", "numbers"),
                                          ("t5-gated", "numbers"), ("whisper", "dialtones")])
def test_the_task_of_a_run_without_one_is_what_its_family_can_do(family, task):
    run = {"model": {"family": family}, "prune": {"sparsity": 0.5}}
    assert RunConfig.model_validate(run).task.name == task
    assert RunConfig.model_validate(run | {"task": {"max_length": 9}}).task == TaskConfig(name=task, max_length=9)
    assert RunConfig.model_validate(run | {"task": {"name": "gsm8k"}}).task.name == "gsm8k"


@pytest.mark.parametrize("text, told", [("- a\n- b\n", "must hold a mapping"), ("a: [1", "is not valid YAML")])
def test_a_file_that_is_no_config(text, told, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        load_config(RunConfig, tmp_path / "bad.yaml")


def test_a_stage_depends_on_its_own_part_of_the_config_only():
    config = load_config(RunConfig, _DEMO)
    ids = [stage.id for stage in select(build_stages(config), ["finetune"])]
    assert ids == ["finetune/ce", "finetune/squarehead"]
    known = yaml.safe_load(_DEMO.read_text())["finetune"]["losses"]
    assert list(known) == ["ce", "squarehead"]
