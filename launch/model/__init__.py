"""Use a model folder. What is computed is in the library; here are its commands.

    generate.py       `generate`: answers to prompts
    export.py         `export`: the model in a format of other software
    import_model.py   `import`: a sparse folder of a model that other software made sparse
    push.py           `push`: to the hub, with the model card that card.py writes
"""
