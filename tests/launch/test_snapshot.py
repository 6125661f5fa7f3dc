"""Jobs run the code as it was at submission, also below the checkout and with an editable install."""

import os
import subprocess
import sys
from pathlib import Path

from sparse_train.launch.run.snapshot import freeze_code


def test_a_job_takes_the_copy_of_the_code(tmp_path):
    code = freeze_code(tmp_path)
    (code / "sparse_train" / "jobs" / "report.py").write_text("FROZEN = True\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.of_the_site = 'kept'\n")
    shown = subprocess.run(
        [sys.executable, "-c", "from sparse_train import launch, kernels as k; from sparse_train.jobs import report; "
         "print(launch.__file__, k._native.__file__, report.FROZEN, k.backend(), __import__('sys').of_the_site)"],
        env={**os.environ, "PYTHONPATH": f"{code}:{tmp_path / 'site'}", "PYTHONSAFEPATH": "1"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout.split()
    assert all(Path(file).is_relative_to(code) for file in shown[:2]) and shown[2] == "True"
    assert shown[-1] == "kept"


def test_a_new_submission_replaces_the_copy(tmp_path):
    (freeze_code(tmp_path) / "stale.py").touch()
    assert not (freeze_code(tmp_path) / "stale.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["code"]
