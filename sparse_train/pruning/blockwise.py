"""Prune a model block by block, each block's inputs computed by the blocks already pruned.

    per stack: one forward pass of the model; hooks record what each block is called with (calls.py)
    per block: run it on the recorded arguments to collect the method's statistics (collect.py) -> prune its linears ->
               train what is left (reconstruction.py, if asked for) -> run it again, which computes the next block's
               hidden states

The decoder's arguments are recorded after the encoder is pruned, so its cross-attention learns from pruned states.

Over ranks: each has its share of the batches, statistics are summed, and each prunes some of a block's linears, or some
rows of a large one (rows.py), which it sends to the others. A model may be without data: a block's tensors are then
read while they are needed.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train import dist
from sparse_train.config import PruneConfig, PruneLevel
from sparse_train.config.pruning import ReconstructionConfig
from sparse_train.models import block_output, family_of
from sparse_train.models.filled import Read, filled, filled_when_called
from sparse_train.pruning.allocation import InputNorms, allocate, outlier_share
from sparse_train.pruning.backward import require_decoder_only, visit_backwards
from sparse_train.pruning.calls import Call, record_calls
from sparse_train.pruning.collect import Visit, collect, warn_of_few_tokens
from sparse_train.pruning.layers import choose_layers, require_fewer
from sparse_train.pruning.pruner import Collects, Layer, Pruner, build_pruner
from sparse_train.pruning.reconstruction import Reconstruction
from sparse_train.pruning.rows import Piece, divide
from sparse_train.pruning.statistics import ColumnNorms, Gradients
from sparse_train.sparse import BitmaskTensor
from sparse_train.tasks import Batch

Progress = Callable[[int, int, str], None]
Earlier = Callable[[str], torch.Tensor | None]
"""Name of a linear -> keep (R, C) of a model that was pruned before; what it dropped stays dropped."""


def prune(model: PreTrainedModel, batches: Iterable[Batch], spec: PruneConfig, progress: Progress | None = None,
          earlier: Mapping[str, torch.Tensor] | None = None) -> dict[str, BitmaskTensor]:
    """The sparse weight of every linear that is pruned, by module name. The model's weights become the pruned ones.

    `batches` are on the model's device; a method without calibration does not read them. Raises UserError as
    choose_specs and prune_layers do.
    """
    (level,) = spec.levels  # those of a chain are pruned one by one
    batches, kept = list(batches), (earlier or {}).get
    specs = choose_specs(model, batches, level, kept)
    weights: dict[str, BitmaskTensor] = {}
    num_blocks = len(family_of(model).blocks(model))
    for done, (block, pruned) in enumerate(prune_layers(model, build_pruner(level), specs, batches, kept), 1):
        weights |= pruned
        if progress:
            progress(done, num_blocks, block)
    return weights


@torch.no_grad()
def choose_specs(model: PreTrainedModel, batches: Iterable[Batch], level: PruneLevel, earlier: Earlier,
                  read: Read | None = None) -> dict[str, PruneLevel]:
    """The linears that are pruned, by module name, each with its settings. Collective; `batches` are this rank's share.

    `read` gives the tensors of a model without data. Raises UserError for settings that do not fit the model's linears
    (see choose_layers), or are below the sparsity that an earlier pruning left.
    """
    linears, blocks = family_of(model).dense_linears(model), list(family_of(model).blocks(model))
    specs = choose_layers({name: (linear.out_features, linear.in_features) for name, linear in linears.items()}, level)
    sizes = {name: linears[name].weight.numel() for name in specs}

    def num_alive(name: str) -> int | None:
        keep = earlier(name)
        return None if keep is None else int(keep.sum())

    if level.allocation == "uniform":
        require_fewer(specs, level, sizes, num_alive)
        return specs
    shares = {}
    if level.allocation == "owl":
        for visit in visit_blocks(model, InputNorms(), specs, batches, read):
            if visit.linears:
                layers = [Layer(name, linear.weight, specs[name]) for name, linear in visit.linears.items()]
                norms = cast(dict[str, ColumnNorms], visit.statistics)
                shares[visit.block] = outlier_share(layers, norms, level.outlier_factor)
    return allocate(specs, sizes, blocks, level, shares, num_alive)


def prune_layers(model: PreTrainedModel, pruner: Pruner, specs: Mapping[str, PruneLevel], batches: Iterable[Batch],
                 earlier: Earlier, read: Read | None = None, num_done: int = 0,
                 begin: Callable[[], None] | None = None) -> Iterator[tuple[str, dict[str, BitmaskTensor]]]:
    """For each block in turn: its name, and the sparse weights of its linears among `specs`, by module name.

    Collective; `batches` are this rank's share, on the model's device. `read` gives the tensors of a model without
    data: pruned ones of the first `num_done` blocks, which are not pruned again, and of those that this has given out;
    where `pruner` collects Gradients, those of the model as it was.
    `begin` is called when the inputs of the first block that is pruned are there, in each stack.
    Raises UserError where a method that prunes by inputs gets no token.
    """
    config = next((spec.reconstruction for spec in specs.values()), ReconstructionConfig())
    if not pruner.Statistics and not config.steps:
        batches = ()
    for visit in visit_blocks(model, pruner, specs, batches, read, num_done, begin):
        reconstruction = Reconstruction(visit.block, visit.run) if config.steps and visit.linears else None
        weights = _prune_linears(visit, pruner, specs, earlier)
        yield visit.block, reconstruction.fit(model, weights, config) if reconstruction else weights


@torch.no_grad()
def visit_blocks(model: PreTrainedModel, method: Collects, names: Iterable[str], batches: Iterable[Batch],
                 read: Read | None = None, num_done: int = 0,
                 begin: Callable[[], None] | None = None) -> Iterator[Visit]:
    """The blocks in turn but for the first `num_done`; a block's outputs are computed once the caller has changed its
    weights. A method of Gradients has them from the last to the first, none of which sees a change of another.
    `names`: the linears whose inputs count. Otherwise as prune_layers."""
    family = family_of(model)
    if method.Statistics is Gradients:
        require_decoder_only(model)
    blocks, chosen = family.blocks(model), set(names)
    linears = {name: linear for name, linear in family.dense_linears(model).items() if name in chosen}
    batches = list(batches)
    was_training = model.training
    model.eval()
    try:
        with filled_when_called(blocks, read) if read else nullcontext():
            for stack in family.stacks:
                mine = {prefix: block for prefix, block in blocks.items() if prefix.startswith(f"{stack.blocks}.")}
                if num_done < len(mine):
                    records = _record(model, list(mine.values()), batches, read, method.Statistics is Gradients)
                    if method.Statistics is Gradients:
                        yield from visit_backwards(model, mine, linears, records, batches, read, num_done, begin)
                    else:
                        yield from _visit_stack(method, mine, linears, records, batches, stack.side, read, num_done,
                                                begin)
                num_done = max(0, num_done - len(mine))
    finally:
        model.train(was_training)


def _record(model: PreTrainedModel, blocks: list[nn.Module], batches: list[Batch], read: Read | None,
            for_gradients: bool) -> list[list[Call]]:
    """As record_calls. Collective."""
    records: list[list[Call]] = []

    def run() -> None:
        if batches:
            without = [*family_of(model).blocks(model).values(), *_untied_head(model)]
            with filled(model, read, without=without) if read else nullcontext():
                records.extend(record_calls(model, blocks, batches, for_gradients))

    dist.agree(run)
    return records


def _visit_stack(method: Collects, blocks: dict[str, nn.Module], linears: dict[str, nn.Linear],
                 records: list[list[Call]], batches: list[Batch], side: str, read: Read | None, num_done: int,
                 begin: Callable[[], None] | None) -> Iterator[Visit]:
    hidden = [record[0].hidden for record in records]
    for record in records:
        record[0] = record[0].with_hidden(None)

    def calls(index: int) -> Iterator[Call]:
        return (record[index].with_hidden(states) for record, states in zip(records, hidden, strict=True))

    def outputs(index: int) -> Iterator[torch.Tensor]:
        block = list(blocks.values())[index]
        for call, batch in zip(calls(index), batches, strict=True):
            yield block_output(block(*call.args, **call.kwargs))[batch.attends[side]]

    for index, (prefix, block) in enumerate(blocks.items()):
        if begin and index == num_done:
            begin()
        with filled(block, read, prefix) if read else nullcontext():
            if index >= num_done:
                here = {name: linear for name, linear in linears.items() if name.startswith(f"{prefix}.")}
                statistics = {}
                if method.Statistics and here:
                    statistics = collect(method, block, here, calls(index), batches, side)
                    if index == num_done:
                        warn_of_few_tokens(here, statistics)
                yield Visit(prefix, here, statistics, functools.partial(outputs, index))
                statistics.clear()  # the caller's loop still holds them while the next ones are collected
            if index < len(blocks) - 1:
                for number, call in enumerate(calls(index)):
                    hidden[number] = block_output(block(*call.args, **call.kwargs))


def _untied_head(model: PreTrainedModel) -> list[nn.Module]:
    """The output head, which no recorded pass reaches, unless it is the embedding as well."""
    head = model.get_output_embeddings()
    if head is None or any(head.weight is embedding.weight for embedding in model.modules()
                           if isinstance(embedding, nn.Embedding)):
        return []
    return [head]


@torch.no_grad()
def _prune_linears(visit: Visit, pruner: Pruner, specs: Mapping[str, PruneLevel],
                   earlier: Earlier) -> dict[str, BitmaskTensor]:
    """Each rank prunes its pieces of the linears, and has the weights of all in the end. Collective."""
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in visit.linears.items()}
    pieces = divide(shapes, dist.world_size(), pruner.divides_rows)
    made: dict[Piece, BitmaskTensor] = {}

    def prune_mine() -> None:
        is_collective = pruner.Statistics is Gradients
        for piece in (piece for piece in pieces if is_collective or piece.rank == dist.rank()):
            name, rows, num_rows = piece.name, slice(piece.start, piece.stop), shapes[piece.name][0]
            weight, alive = visit.linears[name].weight[rows], earlier(name)
            layer = Layer(name, weight, specs[name], None if alive is None else alive[rows],
                          None if len(weight) == num_rows else num_rows)
            pruned, keep = pruner.prune(layer, visit.statistics.get(name))
            made[piece] = BitmaskTensor.from_dense(pruned.to(weight.dtype), keep)

    dist.agree(prune_mine)
    num_values = dist.gather_objects({piece: weight.values.numel() for piece, weight in made.items()})
    weights = {}
    for name, shape in shapes.items():
        weight = visit.linears[name].weight
        parts = [_on_all_ranks(piece, made.pop(piece, None), num_values[piece.rank][piece], weight)
                 for piece in pieces if piece.name == name]
        weights[name] = parts[0] if len(parts) == 1 else BitmaskTensor(
            torch.cat([part.values for part in parts]), torch.cat([part.bitmask for part in parts]), shape)
        weight.data.copy_(weights[name].to_dense())
    return weights


def _on_all_ranks(piece: Piece, mine: BitmaskTensor | None, num_values: int, weight: torch.Tensor) -> BitmaskTensor:
    """`mine` of the rank that has it. Collective."""
    if mine is None:
        rows, columns = piece.stop - piece.start, weight.shape[1]
        mine = BitmaskTensor(weight.new_empty(num_values), weight.new_empty(
            rows, 8 * -(-columns // 64), dtype=torch.uint8), (rows, columns))
    dist.broadcast(mine.values, piece.rank)
    dist.broadcast(mine.bitmask, piece.rank)
    return mine
