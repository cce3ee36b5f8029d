"""Built-in tasks: models and a dataset made on the spot, so that the whole loop runs with no download.

Named `builtin:NAME` in data.path and wherever a model is named. To add one: a module with `load_datasets`
and a line in TASKS; for each model one with `ensure_model` and `build_model` and a line in MODELS.
"""

TASKS = {"addition": "rlswitch.tasks.addition"}
MODELS = {
    "addition": "rlswitch.tasks.addition",
    "addition-judge": "rlswitch.tasks.addition_judge",
    "addition-reward-model": "rlswitch.tasks.addition_reward_model",
}
