"""DeepSpeed's private names still do what sparse_train/compat/deepspeed.py uses them for."""

import deepspeed
import torch

from sparse_train.compat import deepspeed as compat
from sparse_train.config import TrainConfig, ZeroConfig
from sparse_train.training.engine import build_student, step_engine, student_settings
from sparse_train.training.fragments import own_fragments
from tests.models import tiny_mpt
from tests.ranks import run_ranks


def test_deepspeed_is_the_release_that_compat_names():
    assert f"DeepSpeed {deepspeed.__version__}." in compat.__doc__


def _engine(stage, precision="bf16"):
    """After one step, and the fp32 values that the model started from."""
    torch.manual_seed(0)
    model = tiny_mpt()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(batch_size=1, precision=precision, zero=ZeroConfig(stage=stage))
    engine = build_student(model, config)
    ids = torch.arange(6)[None]
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    step_engine(engine)  # at a learning rate of 0
    return engine, start


def _check_replicated():
    for precision in ("bf16", "fp32"):
        engine, start = _engine(0, precision)
        masters = {id(master) for master in compat.flat_masters(engine)}
        for name, parameter in engine.module.named_parameters():
            master = compat.replicated_master(engine, parameter)
            assert id(master) in masters and (master is parameter) == (precision == "fp32")
            torch.testing.assert_close(master.float(), start[name].bfloat16().float(), rtol=0.01, atol=0)


def _check_flat():
    for stage in (1, 2):
        engine, start = _engine(stage)
        masters = compat.flat_masters(engine)
        assert [master.ndim for master in masters] == [1, 1]
        for name, parameter in engine.module.named_parameters():
            place = compat.flat_range(parameter)
            assert place.parameter_start == 0 and place.numel == parameter.numel()
            values = masters[place.group][place.flat_start:][:place.numel]
            torch.testing.assert_close(values, start[name].flatten(), rtol=0.01, atol=0)
        assert sum(fragment.tensors["exp_avg"].numel() for fragment in own_fragments(engine)) == sum(
            p.numel() for p in start.values())


def _check_partitioned():
    engine, start = _engine(3)
    num_values = sum(p.numel() for p in start.values())
    assert compat.gradient_buffer(engine).numel() >= num_values
    assert sum(master.numel() for master in compat.flat_masters(engine)) >= num_values
    for name, parameter in engine.module.named_parameters():
        assert compat.is_partitioned(parameter) and compat.full_shape(parameter) == start[name].shape
        assert compat.local_part(parameter).numel() == start[name].numel()
    small = engine.optimizer.persistent_parameters
    assert small and all(p.shape == p.ds_shape for p in small)
    for parameter in small:
        parameter.ds_tensor.fill_(2.0)
    compat.gather_persistent_parameters(engine)
    assert all((p == 2.0).all() for p in small)


def _check_conversion():
    init = deepspeed.zero.Init(config_dict_or_path=student_settings(TrainConfig()), dtype=torch.float32)
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    assert not compat.is_partitioned(parameter) and compat.full_shape(parameter) == (2, 3)
    assert compat.local_part(parameter) is parameter
    compat.convert_to_partitioned(init, parameter)
    assert parameter.shape == (2, 3)
    parameter.partition()
    assert parameter.numel() == 0 and compat.full_shape(parameter) == (2, 3)
    assert compat.local_part(parameter).tolist() == list(range(6))


def _check_shared_memory():
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False  # dist.start has called compat


def _check_all():
    failures = {}
    for check in (_check_shared_memory, _check_conversion, _check_replicated, _check_flat, _check_partitioned):
        try:
            check()
        except Exception as error:
            failures[check.__name__] = f"{type(error).__name__}: {error}"
    return failures


def test_engines_of_all_stages_have_what_compat_reads():
    assert run_ranks(_check_all, 1)[0] == {}
