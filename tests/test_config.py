"""Configs: closed, validated, one line per mistake; every recipe that is shipped loads."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from sparse_train.config import RunConfig, RunTaskConfig, Section
from sparse_train.config.load import dump_config, load_config, load_points
from sparse_train.config.yaml_core import read_yaml, write_yaml
from sparse_train.errors import UserError
from sparse_train.launch.run.cluster import UNDER, ClusterConfig, load_cluster
from sparse_train.launch.run.stages import build_stages, select

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
    assert [stage.kind for stage in build_stages(config)][-1] == "report"


@pytest.mark.parametrize("path", sorted((CONFIGS / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_cluster_file_loads(path):
    load_config(ClusterConfig, path)


def test_the_resolved_config_reads_back_equal(tmp_path):
    config = load_config(RunConfig, _DEMO, ["prune.pattern=2:4", "prune.sparsity=null",
                                            "tracking.wandb={mode: offline}"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(RunConfig, tmp_path / "config.yaml") == config
    assert config.prune.sparsity == 0.5 and config.prune.group == (2, 4)


def test_a_rounded_sparsity_beside_its_pattern_is_the_one_that_the_pattern_makes():
    rounded, exact = (load_config(RunConfig, _DEMO, ["prune.pattern=2:3", f"prune.sparsity={sparsity}"])
                      for sparsity in ("0.3333333333", "null"))
    assert rounded == exact and exact.prune.sparsity == 1 - 2 / 3


def test_overrides_are_typed_and_nested():
    config = load_config(RunConfig, _DEMO, ["finetune.losses.kd.logit_weight=0.5", "finetune.learning_rate=1e-4",
                                            "name=a.b", "model.path=null"])
    assert config.finetune.losses["kd"].logit_weight == 0.5
    assert config.finetune.learning_rate == 1e-4 and config.name == "a.b" and config.model.path is None


def test_an_override_that_is_null_drops_a_loss_and_a_sweep():
    path = CONFIGS / "smollm2" / "gsm8k.yaml"
    points = load_points(path, ["sweep=null", "finetune.losses.kd=null"])
    assert [list(config.finetune.losses) for _, config in points] == [["ce", "squarehead", "token"]]


@pytest.mark.parametrize("override, told", [
    ("finetune.stepz=3", "there is no key finetune.stepz; did you mean finetune.steps?"),
    ("finetune.losses.ce.feature_wait=1", "did you mean finetune.losses.ce.feature_weight?"),
    ("tracking.wandb.mod=offline", "did you mean tracking.wandb.mode?"),
    ("sparsity=0.5", "did you mean prune.sparsity?"),
    ("sparsty=0.5", "did you mean prune.sparsity?"),
    ("learning_rate=1", "did you mean dense.learning_rate or finetune.learning_rate?"),
    ("finetune.stage=2", "did you mean finetune.zero.stage?"),
    ("nodes=4", "did you mean cluster.nodes?"),
    ("frobnicate=4", "there is no key frobnicate; valid here: about,"),
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
    ("finetune.losses.SquareHead={}", "a loss is called 'SquareHead'; take small letters, digits, _ and -"),
    ("evaluate.texts={My books: {path: x}}", "a set of texts is called 'My books'; take small letters"),
    ("evaluate.texts.books.pth=x", "did you mean evaluate.texts.books.path?"),
    ("finetune.losses={kd: {logit_weight: 1}}", "compress.loss=squarehead is none of finetune.losses: kd"),
    ("compress={loss: null}", "compress.loss is missing: finetune.losses has ce, squarehead; give the one"),
    ("compress.rounding=best", "compress.rounding=best: "),
    ("compress={loss: ce, precisions: [bf16], rounding: compensated}", "rounding=compensated is for int8 and int4"),
    ("dense.steps=0", "dense.steps=0: input should be greater than 0"),
    ("dense.steps=true", "dense.steps=true: give a whole number"),
    ("dense.steps=1.5", "dense.steps=1.5: give a whole number"),
    ("dense.steps=0x10", "dense.steps=0x10: give a whole number"),
    ("task.prompt=12", "task.prompt=12: give text"),
    ("task.system=Hi", "system is given without chat=true"),
    ("finetune.zero.offload_optimizer=yes", "finetune.zero.offload_optimizer=yes: give true or false"),
    ("dense.steps", "write key=value"),
    ("prune.calibration.pth=x", "did you mean prune.calibration.path?"),
    ("name.x=1", "name is a value, not a section"),
    ("name=../up", "name=../up: a run's name is letters, digits"),
    ("name=my run", "name=my run: a run's name is letters, digits"),
    ("prune.sparsity=75%", "prune.sparsity=75%: give a number, such as 0.5"),
    ("prune.sparsity=[0.5, x]", "prune.sparsity=[0.5, x]: prune.sparsity.1=x: give a number"),
    ("task={name: text, name: gsm8k}", "the key name is given 2 times"),
    ("task={5: 1}", "there is no key task.5; valid here"),
    ("task={? [a] : 1}", "a key must be one word"),
    ("sweep={seed: [*seeds]}", "aliases (*seeds) are not supported"),
    ("task.prompt=!!python/name:os.system x", "could not determine a constructor"),
    ("seed=" + 5000 * "9", "not valid YAML: Exceeds the limit"),
    ("sweep=" + 1000 * "[", "nested more than 50 deep"),
    ("task.languages=[en]", "task.languages.1 is missing"),
    ("tracking.wandb=5", "tracking.wandb=5: this is a section"),
])
def test_a_mistake_is_one_line_with_value_and_remedy(override, told):
    with pytest.raises(UserError) as error:
        load_config(RunConfig, _DEMO, [override], others={UNDER: ClusterConfig})
    message = str(error.value)
    assert told in message and "\n" not in message and message.count(override) == 1


@pytest.mark.parametrize("override, told", [
    ("cluster.nodes=4", "cluster.nodes=4: this machine is one node; use --on slurm"),
    ("cluster.nods=4", "there is no key cluster.nods; did you mean cluster.nodes?"),
    ("cluster.ranks_per_node=true", "cluster.ranks_per_node=true: give a whole number"),
])
def test_a_mistake_in_an_override_of_the_cluster_names_it_and_no_file(override, told):
    with pytest.raises(UserError) as error:
        load_cluster("local", [override])
    assert told in str(error.value) and str(error.value).startswith(override) and ".yaml" not in str(error.value)


def test_the_override_that_is_named_is_at_fault_not_the_last_of_its_section():
    with pytest.raises(UserError, match=r"^model.n_heads=3 must divide d_model=128$"):
        load_config(RunConfig, _DEMO, ["model.n_heads=3", "model.vocab_size=300"])


def _floats(section, above=""):
    for name, field in section.model_fields.items():
        if isinstance(inner := field.annotation, type) and issubclass(inner, Section):
            yield from _floats(inner, f"{above}{name}.")
        elif inner is not Any and float in (inner, *get_args(inner)):
            yield f"{above}{name}", inner


@pytest.mark.parametrize("value", [".inf", "-.Inf", ".NaN", "1e999"])
def test_no_number_of_a_config_is_infinite(value):
    keys = list(_floats(RunConfig))
    assert len(keys) > 10
    for key, kind in keys:
        with pytest.raises(UserError, match="infinity and NaN are no settings"):
            load_config(RunConfig, _DEMO, [f"{key}=" + (f"[0.5, {value}]" if kind == tuple[float, float] else value)])
    with pytest.raises(UserError, match="infinity and NaN"):
        load_config(RunConfig, _DEMO, [f"prune.sparsity=[0.5, {value}]"])


@pytest.mark.parametrize("text, value", [
    ("no", "no"), ("on", "on"), ("Yes", "Yes"), ("true", True), ("False", False), ("~", None), ("", None),
    ("12:30:00", "12:30:00"), ("2:4", "2:4"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("0x1F", "0x1F"),
    ("010", 10), ("-3", -3), ("1e3", 1000), ("1e-4", 1e-4), ("1E+2", 100), ("1e30", 1e30), (".5", 0.5), ("1.", 1.0),
    ("-2.5e3", -2500.0), ("<<", "<<"), ("=", "="), ("[en, no]", ("en", "no")), ("{a: 1}", {"a": 1}),
])
def test_yaml_is_that_of_the_core_schema(text, value):
    found = read_yaml(text)
    assert found == value and type(found) is type(value)
    assert read_yaml(write_yaml({"x": list(found) if isinstance(found, tuple) else found}))["x"] == value


@pytest.mark.parametrize("text", ["no", "1e3", "010", "12:30:00", "2024-01-01", "true", "~", "", "1_000", "é", "a: b"])
def test_text_is_written_so_that_both_versions_of_yaml_read_text(text):
    written = write_yaml({"x": text})
    assert read_yaml(written) == yaml.safe_load(written) == {"x": text}


def test_what_a_file_says_about_its_run_is_not_said_of_another(tmp_path):
    def about(*overrides, path=_DEMO):
        return [config.about for _, config in load_points(path, overrides)]

    (tmp_path / "mine.yaml").write_text(f"extends: {_DEMO}\nmodel: {{d_model: 64}}\n", encoding="utf-8")
    [told] = about()
    assert told.startswith("The dense model plays") and about("name=x", "folder=y") == [told]
    assert about("name=x", "dense.path=owner/name") == about("seed=18") == about(path=tmp_path / "mine.yaml") == [""]
    assert about("seed=18", "about=mine") == ["mine"]
    assert len(set(about(path=CONFIGS / "claim" / "arithmetic.yaml"))) == 1  # its combinations are its own
    assert about("sweep={seed: [1, 2]}") == ["", ""]


def test_which_loss_is_compressed_does_not_depend_on_their_order(tmp_path):
    def sources(config):
        return {stage.kind: tuple(source.id for source in stage.inputs) for stage in build_stages(config)
                if stage.kind in ("compress", "benchmark")}

    claim = load_config(RunConfig, CONFIGS / "claim" / "arithmetic.yaml")
    more = load_config(RunConfig, _DEMO, ["finetune.losses.kd.logit_weight=1"])
    assert list(more.finetune.losses)[-1] == "kd"
    for config in (claim, more):
        assert sources(config) == {"compress": ("finetune/squarehead",),
                                   "benchmark": ("dense", "finetune/squarehead", "compress")}
    chain = load_config(RunConfig, _DEMO, ["compress.loss=ce", "prune.sparsity=[0.5, 0.75]"])
    assert sources(chain)["compress"] == ("finetune/75/ce",)
    alone = load_config(RunConfig, CONFIGS / "gsm8k" / "small.yaml")
    assert alone.compress.loss is None and sources(alone)["compress"] == ("finetune/squarehead",)


@pytest.mark.parametrize("family, task", [("mpt", "arithmetic"), ("llama", "arithmetic"), ("t5", "numbers"),
                                          ("t5-gated", "numbers"), ("whisper", "dialtones")])
def test_the_task_of_a_run_without_one_is_what_its_family_can_do(family, task):
    run = {"model": {"family": family}, "prune": {"sparsity": 0.5}}
    assert RunConfig.model_validate(run).task.name == task
    assert RunConfig.model_validate(run | {"task": {"max_length": 9}}).task == RunTaskConfig(name=task, max_length=9)
    assert RunConfig.model_validate(run | {"task": {"name": "gsm8k"}}).task.name == "gsm8k"


@pytest.mark.parametrize("text, told", [
    (b"- a\n- b\n", "must hold a mapping"), (b"a: [1", "is not valid YAML: line 1"),
    (b"name: x\nname: y\n", "line 2: the key name is given 2 times"),
    ("name: Größe".encode("latin-1"), r"is not UTF-8 text \(byte 8\); save it as UTF-8"),
    (b"extends: [a, b]", "extends must be the path of one file"),
    (b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9) or b"x") for i in range(1, 9)),
     r"line 1: aliases \(\*a0\) are not supported"),
    (b"{a: " * 100_000, "nested more than 50 deep"), (b"a: \0", "is not valid YAML"),
    (b'a: "\\ud800"', "surrogates not allowed"),
])
def test_a_file_that_is_no_config(text, told, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(text)
    with pytest.raises(UserError, match=told):
        load_config(RunConfig, tmp_path / "bad.yaml")


def test_a_stage_depends_on_its_own_part_of_the_config_only():
    config = load_config(RunConfig, _DEMO)
    ids = [stage.id for stage in select(build_stages(config), ["finetune"])]
    assert ids == ["finetune/ce", "finetune/squarehead"]
    known = yaml.safe_load(_DEMO.read_text())["finetune"]["losses"]
    assert list(known) == ["ce", "squarehead"]
