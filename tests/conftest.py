"""Ranks of the tests are CPU processes, also where there is a GPU; the tests marked gpu ask for it."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
