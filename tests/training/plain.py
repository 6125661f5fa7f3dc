"""Plain training, the oracle of this room, and how its tests state tolerances.

train_plain is one process, dense weights in torch alone, masked after every step, with the formulas written out again.
It runs in float64, which counts as exact, and in the precision under test: how far that is from float64 is what the
precision costs on this CPU, with its instructions and its threads. Ours sums in another order, so it may be FACTOR
times as far; a fault is farther by orders of magnitude. No tolerance is what one CPU once gave.

Distances are counted in rounding errors: what one in the precision under test makes of an entry. Of a trained tensor
that is not one number. Adam divides each gradient by its own size, so that an entry whose gradient is a thousandth of
the tensor's moves a thousand times as far for the same error in it, and so much more is allowed. Counted like this the
errors of all entries, tensors and precisions are alike (about one), and no single entry decides.
"""

import contextlib
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from sparse_train.models import block_output, family_of
from sparse_train.sparse import densify, sparse_linears
from sparse_train.training.run import TrainingRun
from sparse_train.training.schedule import learning_rate

FACTOR = 4
_ADAM_DECAY, _ADAM_EPS = 0.999, 1e-8


class Float64(TorchFunctionMode):
    """Models and losses ask for float32 by name, in softmax, norms and sums: while this is open they get float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


class Trained(NamedTuple):
    lines: torch.Tensor
    """(steps, 2) float64: loss and gradient norm."""
    tensors: dict[str, torch.Tensor]
    """Float64; of a sparse weight its kept values."""
    sizes: dict[str, torch.Tensor]
    """As `tensors`: an entry's own size and that of its moves, each as large as Adam makes the tensor's mean gradient
    there. What a relative error of the gradients makes of the entry is so large times the error."""
    dtype: torch.dtype


def train_plain(run: TrainingRun, dtype) -> Trained:
    config, loss = run.config, run.loss
    bits = {f"{name}.weight": module.weight.keep for name, module in sparse_linears(run.student).items()}
    student, teacher = densify(run.student).to(dtype).train(), run.teacher.to(dtype).eval()
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    masters = {name: p.detach().to(torch.promote_types(dtype, torch.float32)).clone() for name, p in parameters.items()}
    moves = {name: torch.zeros_like(p) for name, p in masters.items()}
    optimizer = torch.optim.AdamW([
        {"params": [p for p in masters.values() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in masters.values() if p.ndim == 1], "weight_decay": 0.0}])
    lines = []
    for step in range(1, config.steps + 1):
        total = 0.0
        for micro_step in range(config.accumulation):
            batch = run.fetch(run.order.indices(step - 1, micro_step))
            with Float64() if dtype == torch.float64 else contextlib.nullcontext():
                share = _loss(student, teacher, batch, loss) / config.accumulation
            share.backward()
            total += share.item()
        for name, parameter in parameters.items():
            masters[name].grad = parameter.grad.to(masters[name].dtype) * bits.get(name, 1)
            parameter.grad = None
        norm = torch.stack([p.grad.norm() for p in masters.values()]).norm()
        if config.clip and norm > config.clip:
            for p in masters.values():
                p.grad.mul_(config.clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        for name, p in masters.items():
            own_size = optimizer.state[p]["exp_avg_sq"].div(1 - _ADAM_DECAY**step).sqrt() + _ADAM_EPS
            moves[name] += learning_rate(config, step) * p.grad.square().mean().sqrt() / own_size
            p.mul_(bits.get(name, 1))
            parameters[name].data.copy_(p)
        lines.append([total, norm.item()])

    def kept(name, tensor):
        return (tensor[bits[name]] if name in bits else tensor).double()

    tensors = {name: kept(name, p.detach()) for name, p in student.named_parameters()}
    sizes = {name: p.abs() + (kept(name, moves[name]) if name in moves else 0) for name, p in tensors.items()}
    return Trained(torch.tensor(lines, dtype=torch.float64), tensors, sizes, dtype)


class Lines:
    """A tracker that keeps (loss, gradient norm) of every step."""

    def __init__(self):
        self.found = []

    def rewind(self, step):
        pass

    def log(self, step, metrics):
        self.found.append([metrics["loss"], metrics["gradient_norm"]])


def _loss(student, teacher, batch, loss):
    inputs = {name: tensor.to(student.dtype) if tensor.is_floating_point() else tensor
              for name, tensor in batch.inputs().items()}
    logits, states = states_of(student, inputs)
    with torch.no_grad():
        teacher_logits, teacher_states = states_of(teacher, inputs)
    if loss.features == "norms":
        states, teacher_states = _normed(student, states), _normed(teacher, teacher_states)
    rows, places = (batch.labels != -100).nonzero(as_tuple=True)
    targets = batch.labels[rows, places]
    if batch.encoder is None:  # a label stands at its own place, and is predicted at the one before
        rows, places, targets = rows[places > 0], places[places > 0] - 1, targets[places > 0]
    chosen = logits[rows, places].float()
    task = -chosen.log_softmax(-1)[torch.arange(len(targets)), targets].mean()
    t = (teacher_logits[rows, places].float() / loss.temperature).softmax(-1)
    logit = (t * (t.log() - (chosen / loss.temperature).log_softmax(-1))).sum(-1).mean() * loss.temperature**2
    feature = sum(squarehead_of(s, teacher_states[name], batch.attends["encoder" if "encoder." in name else "decoder"])
                  for name, s in states.items())
    return loss.task_weight * task + loss.logit_weight * logit + loss.feature_weight * feature


def _normed(model, states):
    """The outputs of an MPT's blocks, through the norm that reads each."""
    norms = [*(block.norm_1 for block in model.transformer.blocks[1:]), model.transformer.norm_f]
    return {name: norm(state) for norm, (name, state) in zip(norms, states.items(), strict=True)}


def squarehead_of(student, teacher, attend):
    student, teacher, real = student.float(), teacher.float(), attend[..., None].expand_as(student)
    return ((student - teacher)[real] ** 2).sum() / (teacher[real] ** 2).sum()


def states_of(model, inputs):
    """(logits, block name -> its output)."""
    states = {}
    handles = [block.register_forward_hook(lambda m, i, o, name=name: states.update({name: block_output(o)}))
               for name, block in family_of(model).blocks(model).items()]
    logits = model(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, states


def assert_as_exact(name, found, plain, exact, dtype=torch.float32, sizes=None):
    """The root mean square of found - exact, in rounding errors, is at most FACTOR times that of plain.

    Plain counts as half a rounding error at least, the most that one number's own rounding makes: of few numbers it may
    be nearer to float64 by luck.
    A rounding error is that of `dtype` at `sizes`, by default at the root mean square of `exact`.
    """
    found, plain, exact = (torch.as_tensor(tensor, dtype=torch.float64) for tensor in (found, plain, exact))
    unit = torch.finfo(dtype).eps * (_rms(exact) if sizes is None else sizes).clamp(min=1e-300)
    error, cost = (_rms((tensor - exact) / unit) for tensor in (found, plain))
    allowed = FACTOR * max(cost, 0.5)
    assert error <= allowed, f"{name}: {error:.3g} rounding errors from float64, allowed {allowed:.3g}"


def assert_trained_as_exact(lines, tensors, plain, exact):
    """`lines` and `tensors` are ours, with `.values` for the kept values of a `.weight`."""
    for column, what in enumerate(("losses", "gradient norms")):
        assert_as_exact(what, torch.as_tensor(lines)[:, column], plain.lines[:, column], exact.lines[:, column],
                        plain.dtype)
    ours = {name.removesuffix("values") + "weight" if name.endswith(".values") else name: tensor
            for name, tensor in tensors.items() if not name.endswith(".bitmask")}
    assert ours.keys() == exact.tensors.keys()
    for name, tensor in exact.tensors.items():
        assert_as_exact(name, ours[name], plain.tensors[name], tensor, plain.dtype, exact.sizes[name])


def _rms(tensor):
    return tensor.square().mean().sqrt()
