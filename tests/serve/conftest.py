"""vLLM runs in an environment of its own (`make test-serve`); tests and what they compare with run in this one."""

import json
import os
import subprocess
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[2] / "build" / "serve" / "bin" / "python"
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
               "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("serve")
            if not (PYTHON.parents[1] / "ready").exists():
                item.add_marker(pytest.mark.skip(reason=f"vLLM is not installed in {PYTHON.parents[1]}; run "
                                                        "make test-serve"))


@pytest.fixture(scope="session")
def ask(tmp_path_factory):
    """Runs offline.py with requests, one model after the other in a process: -> what it answers to each."""
    def run(requests, timeout=900, **environment):
        out = tmp_path_factory.mktemp("answers") / "answers.json"
        done = subprocess.run([PYTHON, Path(__file__).with_name("offline.py"), json.dumps(requests), out],
                              env=os.environ | ENVIRONMENT | environment, cwd=out.parent, timeout=timeout,
                              capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return json.loads(out.read_text(encoding="utf-8"))

    return run
