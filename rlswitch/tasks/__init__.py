"""Built-in tasks: a model and a dataset made on the spot, so that the whole loop runs with no download.

Named `builtin:<module>` in model.path and data.path. To add one: a module with `load_datasets`,
`ensure_model` and `build_model`, and a line in BUILTIN.
"""

BUILTIN = {"addition": "rlswitch.tasks.addition"}
