"""The tables of what can be added, one line per entry: config, help, errors and docs read them.

Another package adds an entry by an entry point, and needs no change here:

    [project.entry-points."sparse_train.pruners"]
    mine = "my_package.pruning:Mine"

Nothing is imported until an entry is used, so that commands which only read runs start fast. Facts that are needed
before the import are fields of the entry; those of an entry point have their defaults.
"""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from sparse_train.errors import UserError
from sparse_train.extras import require


@dataclass(frozen=True)
class Entry:
    target: str
    """MODULE:ATTRIBUTE."""
    extra: str | None = None
    """The optional dependencies that the target imports."""


E = TypeVar("E", bound=Entry)


class Registry(Generic[E]):
    """Entries of one kind by name. `group` is the group of the entry points."""

    def __init__(self, kind: str, group: str, make_entry: type[E], entries: Mapping[str, E]):
        self.kind, self.group = kind, group
        self._make_entry, self.built_in = make_entry, dict(entries)

    @functools.cached_property
    def entries(self) -> Mapping[str, E]:
        """Ours, then those of other packages. Raises UserError where one of theirs takes a name that is in use."""
        entries = dict(self.built_in)
        for point in entry_points(group=self.group):
            if point.name in entries:
                raise UserError(f"{_origin(point)} adds a {self.kind} called {point.name}, which is in use; uninstall "
                                "it, or rename its entry point")
            entries[point.name] = self._make_entry(point.value)
        return entries

    def check(self, name: str) -> str:
        """`name` itself, for validators of the config. Raises ValueError where it is not registered."""
        if name not in self.entries:
            raise ValueError(f"there is no {self.kind} {name}; choose from: {', '.join(self.entries)}")
        return name

    def load(self, name: str) -> Any:
        """Import the entry's target. Raises UserError where an optional dependency is missing, or where the entry is of
        another package and cannot be imported."""
        target, extra = self.entries[name].target, self.entries[name].extra
        if extra is not None:
            require(extra)
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if name in self.built_in:
                raise
            raise UserError(f"the {self.kind} {name} ({target}) cannot be imported: {error}; fix or uninstall its "
                            "package") from error


def _origin(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


@dataclass(frozen=True)
class FamilyEntry(Entry):
    """An architecture, named by transformers' model_type; variants that share a model_type have separate names."""
    task: str = "arithmetic"
    """The generated task of a run whose config names none."""
    has_kv_heads: bool = False
    """Whether model.n_kv_heads may be smaller than n_heads."""
    has_ffn_width: bool = True
    """Whether model.d_ff may be anything but 4 * d_model."""
    audio_step_s: float | None = None
    """Seconds of audio per state of the encoder; None where the model reads text."""


FAMILIES = Registry("family", "sparse_train.families", FamilyEntry, {
    "mpt": FamilyEntry("sparse_train.models.families.mpt:Mpt", has_ffn_width=False),
    "t5": FamilyEntry("sparse_train.models.families.t5:T5", task="numbers"),
    "t5-gated": FamilyEntry("sparse_train.models.families.t5:GatedT5", task="numbers"),
    "whisper": FamilyEntry("sparse_train.models.families.whisper:Whisper", task="dialtones", audio_step_s=0.02),
    "llama": FamilyEntry("sparse_train.models.families.llama:Llama", has_kv_heads=True),
    "mistral": FamilyEntry("sparse_train.models.families.llama:Mistral", has_kv_heads=True),
    "qwen3": FamilyEntry("sparse_train.models.families.llama:Qwen3", has_kv_heads=True),
    "olmo2": FamilyEntry("sparse_train.models.families.llama:Olmo2", has_kv_heads=True),
    "gpt_neox": FamilyEntry("sparse_train.models.families.gpt_neox:GPTNeoX"),
    "opt": FamilyEntry("sparse_train.models.families.opt:Opt"),
})
"""model.family. The target is a subclass of sparse_train.models.Family."""


@dataclass(frozen=True)
class TaskEntry(Entry):
    reads_both_splits: bool = True
    """Whether its training examples depend on task.test_split too, as where we divide data that has no test split."""


TASKS = Registry("task", "sparse_train.tasks", TaskEntry, {
    # Generated; these need no data.
    "arithmetic": TaskEntry("sparse_train.tasks.arithmetic:Arithmetic", reads_both_splits=False),
    "numbers": TaskEntry("sparse_train.tasks.numbers:Numbers", "translation", reads_both_splits=False),
    "dialtones": TaskEntry("sparse_train.tasks.dialtones:DialTones", "speech", reads_both_splits=False),
    # Read from task.path.
    "gsm8k": TaskEntry("sparse_train.tasks.gsm8k:Gsm8k", reads_both_splits=False),
    "translation": TaskEntry("sparse_train.tasks.translation:Translation", "translation"),
    "speech": TaskEntry("sparse_train.tasks.speech:Speech", "speech", reads_both_splits=False),
    "text": TaskEntry("sparse_train.tasks.text:Text"),
    "chat": TaskEntry("sparse_train.tasks.chat:Chat"),
})
"""task.name. The target is a subclass of sparse_train.tasks.Task."""


KERNELS = Registry("kernel", "sparse_train.kernels", Entry, {
    "cpu": Entry("sparse_train.kernels.native:KERNELS"),
    "cuda": Entry("sparse_train.kernels.triton_moves:KERNELS", "cuda"),
})
"""By the device's type. The CPU's instruction sets are lines of kernels/csrc/tiers.h."""


@dataclass(frozen=True)
class PrunerEntry(Entry):
    calibrates: bool = True
    """Whether it reads training examples, to prune by the inputs of each linear."""
    refits: bool = False
    """Whether its values are refitted unless prune.refit says otherwise."""
    keys: tuple[str, ...] = ()
    """Keys of `prune` that this method reads and not every other; further settings of a method are prune.options."""


PRUNERS = Registry("pruning method", "sparse_train.pruners", PrunerEntry, {
    "magnitude": PrunerEntry("sparse_train.pruning.magnitude:Magnitude", calibrates=False),
    "sparsegpt": PrunerEntry("sparse_train.pruning.sparsegpt:SparseGPT", keys=("damping", "block_size")),
    "wanda": PrunerEntry("sparse_train.pruning.wanda:Wanda"),
    "admm": PrunerEntry("sparse_train.pruning.admm:Admm", refits=True, keys=("damping",)),
    "alps": PrunerEntry("sparse_train.pruning.alps:Alps", refits=True, keys=("damping",)),
    "obert": PrunerEntry("sparse_train.pruning.obert:Obert", keys=("damping",)),
})
"""prune.method. The target is a subclass of sparse_train.pruning.Pruner."""


IMPORTERS = Registry("importer", "sparse_train.importers", Entry, {
    "dense": Entry("sparse_train.importers.dense:Dense"),
    "gguf": Entry("sparse_train.importers.dense:Gguf"),
    "compressed-tensors": Entry("sparse_train.importers.compressed_tensors:CompressedTensors"),
})
"""import --from: what makes a sparse folder of other code's checkpoints. The target is a subclass of
sparse_train.importers.Importer."""


@dataclass(frozen=True)
class LossTermEntry(Entry):
    needs_teacher: bool = True
    parts_key: str | None = None
    """A term that has several parts logs them under this key, by their index."""


LOSS_TERMS = Registry("loss term", "sparse_train.loss_terms", LossTermEntry, {
    "task": LossTermEntry("sparse_train.training.terms.task:TaskTerm", needs_teacher=False),
    "logit": LossTermEntry("sparse_train.training.terms.logit:LogitTerm"),
    "feature": LossTermEntry("sparse_train.training.terms.feature:FeatureTerm", parts_key="squarehead"),
})
"""finetune.losses.LOSS: NAME_weight for these, terms.NAME for those of other packages. The target is a subclass of
sparse_train.training.terms.LossTerm."""


@dataclass(frozen=True)
class ExporterEntry(Entry):
    types: tuple[str, ...] = ()
    """How it can store weights."""


EXPORTERS = Registry("export format", "sparse_train.exporters", ExporterEntry, {
    "dense": ExporterEntry("sparse_train.exporters.dense:write", types=("fp32", "bf16", "fp16")),
    "compressed-tensors": ExporterEntry("sparse_train.exporters.compressed_tensors:write", types=("w8a8", "w4a16")),
    "gguf": ExporterEntry("sparse_train.exporters.gguf:write", "gguf", ("F32", "BF16", "F16", "Q8_0", "Q4_1", "Q4_0")),
})
"""`sparse-train export --to`. The target is a function (source, path, type or None) that writes a
sparse_train.exporters.Source to a path."""
