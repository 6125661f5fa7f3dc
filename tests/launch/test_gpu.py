"""The small pipeline on CUDA: the same stages, the device taken from DeepSpeed's accelerator."""

import pytest
import torch

from sparse_train import artifacts
from tests.launch.test_pipeline import RECIPE, STAGES, _cli


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_pipeline_runs_on_cuda(precision, tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    _cli("run", RECIPE, f"folder={tmp_path}", "--on", "local", f"dense.precision={precision}",
         f"finetune.precision={precision}")
    for stage in STAGES:
        assert artifacts.damage(tmp_path / "tiny" / stage) is None
