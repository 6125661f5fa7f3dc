"""The work of each kind of stage, a file each. It reads the folders of finished stages and writes a new one.

    dense -> prune -> finetune/LOSS -> evaluate -> compress -> benchmark -> report

    job.py      what every stage gets: config, inputs, the folder to write, progress, deadline
    stage.py    a stage as data: its kind, its inputs, the keys of the config that its result depends on
    ledger.py   work that the ranks of a stage share, and that is kept when it is stopped

Stages share folders on disk and nothing in memory.
"""
