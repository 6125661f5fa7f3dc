"""Private interfaces of DeepSpeed, transformers and submitit: a file per library, a function per interface.

Each file says with which release it was tested. The tests tests/test_compat*.py fail when a release changes one.
"""
