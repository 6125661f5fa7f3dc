"""What an exporter reads, and `export`, which runs one."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from sparse_train import artifacts
from sparse_train.models import ModelFolder, Processor, family_of, load_processor, open_model
from sparse_train.registry import EXPORTERS
from sparse_train.sparse import densify
from sparse_train.sparse.header import PRECISIONS


@dataclass(frozen=True)
class Source:
    folder: str
    """As the user named it, for messages."""
    model: PreTrainedModel
    """Without data. All of its linears are dense, and a head with codes of its own is not tied to the embedding."""
    tensors: ModelFolder
    """`get_dense` has every tensor of the model by its name, zeros in place and codes multiplied out."""
    processor: Processor
    precision: str
    """fp32, bf16, fp16, int8 or int4: of the sparse weights but the head's, where there are any."""
    head: str | None
    """Module name of the output head."""

    def linears(self) -> list[str]:
        """Module names of the sparse weights but the head's; in a dense folder those that pruning would choose."""
        sparse = [name for name in self.tensors.shapes if name != self.head]
        return sparse or list(family_of(self.model).prunable_linears(self.model))


def open_source(folder: str | Path) -> Source:
    """Of a model folder, dense or sparse, a hub name or a GGUF file. Raises UserError where there is no such model."""
    model, tensors = open_model(folder, quantised=True)
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if head in tensors.shapes:
        model.config.tie_word_embeddings = False
    stored = [tensors.spec(f"{name}.values")[1] for name in tensors.shapes if name != head]
    stored += [tensors.spec(name)[1] for name in tensors.names]
    precision = next(PRECISIONS[dtype] for dtype in stored if dtype in PRECISIONS)
    return Source(str(folder), densify(model), tensors, load_processor(folder), precision, head)


def export(folder: str | Path, to: str, out: Path, type_: str | None = None) -> None:
    """Write the model of `folder` to `out`, a path where there is nothing, by the exporter `to`, a name of EXPORTERS.

    `type_`: how weights are stored, one of the exporter's types; None: as in `folder`, as closely as the format can.
    Raises UserError where the format does not hold the model.
    """
    write = EXPORTERS.load(to)
    with artifacts.written_aside(out) as aside:
        write(open_source(folder), aside, type_)
