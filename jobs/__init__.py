"""One file per stage: config + finished artifacts -> a new artifact. What a stage shares with another is on disk.

    dense -> prune -> finetune/LOSS -> evaluate -> compress -> benchmark -> report
"""
