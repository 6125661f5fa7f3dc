"""Which linears a level of pruning concerns, and how many weights of each survive."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from sparse_train.config import PruneLevel
from sparse_train.errors import UserError

_NUM_EXAMPLES = 3  # names in the message about a pattern that matches none


def choose_layers(shapes: Mapping[str, tuple[int, int]], level: PruneLevel) -> dict[str, PruneLevel]:
    """The linears that are pruned, by name, each with its settings; those of `shapes` that are left out stay dense.

    `shapes`: (R, C) of every prunable linear. Raises UserError for a pattern of names that matches none, where no
    linear is left, where N:M does not divide a width, and where nothing of a weight would be kept: ZeRO-3 cannot
    partition a parameter without entries.
    """
    for key, patterns in (("targets", level.targets or ()), ("ignore", level.ignore),
                          ("layer_sparsity", level.layer_sparsity)):
        _require_matches(key, patterns, shapes)
    layers = {name: level.model_copy(update={"sparsity": _sparsity(name, level)}) for name in shapes
              if (level.targets is None or _matches(name, level.targets)) and not _matches(name, level.ignore)}
    if not layers:
        raise UserError("prune.targets and prune.ignore leave no linear to prune; let at least one be pruned")
    for name, layer in layers.items():
        _check_shape(name, shapes[name], layer, _source(layer, level))
    return layers


def require_fewer(specs: Mapping[str, PruneLevel], level: PruneLevel, sizes: Mapping[str, int],
                  num_alive: Callable[[str], int | None]) -> None:
    """Raises UserError where an earlier pruning has left a linear fewer weights than its settings, made from `level`,
    keep. `sizes`: number of weights by name; `num_alive`: how many are left, None: all."""
    for name, spec in specs.items():
        alive = num_alive(name)
        if alive is not None and alive < num_kept(sizes[name], spec.sparsity):
            below, remedy = (f"prune.pattern={spec.pattern} keeps more", "a sparser pattern") if spec.group else (
                f"prune.{_source(spec, level)}={spec.sparsity:g} is below", "a higher one")
            raise UserError(f"{name} has {1 - alive / sizes[name]:.4g} zeros from an earlier pruning, which stay, and "
                            f"{below}; choose {remedy}, or a denser model")


def num_kept(num_weights: int, sparsity: float) -> int:
    """Weights that survive of `num_weights`, exactly."""
    return round((1 - sparsity) * num_weights)


def _matches(name: str, patterns: Iterable[str]) -> list[str]:
    return [pattern for pattern in patterns if fnmatchcase(name, pattern)]


def _require_matches(key: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"prune.{key}: {pattern} matches no prunable linear of the model; their names are such as "
                            f"{', '.join(_examples(list(names)))}")


def _examples(names: Sequence[str]) -> list[str]:
    """The first name of each kind, the last part of a name being the kind."""
    first = {name.rpartition(".")[2]: name for name in reversed(names)}
    return list(reversed(first.values()))[:_NUM_EXAMPLES]


def _sparsity(name: str, level: PruneLevel) -> float:
    """That of the longest pattern that matches, so that the order of a mapping's keys means nothing."""
    patterns = _matches(name, level.layer_sparsity)
    if not patterns:
        return level.sparsity
    return level.layer_sparsity[max(patterns, key=lambda pattern: (len(pattern), pattern))]


def _source(layer: PruneLevel, level: PruneLevel) -> str:
    """The key of `prune` where the layer's sparsity comes from."""
    return "sparsity" if layer.sparsity == level.sparsity else "layer_sparsity"


def _check_shape(name: str, shape: tuple[int, int], layer: PruneLevel, key: str) -> None:
    """`key`: of `prune`, where the layer's sparsity comes from."""
    num_rows, num_columns = shape
    if layer.group and num_columns % layer.group[1]:
        raise UserError(f"pattern {layer.pattern} does not divide {name}, which is {num_columns} wide; choose an M "
                        f"that divides {num_columns}, or prune.pattern=unstructured with prune.sparsity")
    if not layer.group and not num_kept(num_rows * num_columns, layer.sparsity):
        raise UserError(f"prune.{key}={layer.sparsity} keeps none of the {num_rows} x {num_columns} weights of "
                        f"{name}, and a sparse layer needs at least one; choose a lower sparsity")
