"""What a completion is worth: reward functions with TRL's signature, and models that use the device.

rewards.py     Rewards.score(groups, switch): functions, models, their weighted sum, the tolerated error rate
functions.py   the built-in functions
metrics.py     what a step's metrics say about its rewards
models/        tenant.py says how to add one; judge.py and template.py; reward_model.py and classifier.py
workers/       the processes that functions run in: pool.py and process.py outside, worker.py inside
sandbox/       isolation for programs that a model wrote; supervisor.py ends all that a process started

To add a built-in function, write `def name(prompts, completions, **columns)` in functions.py, which returns a
number (or None: not applicable) per completion, and name it in the table of workers/resolve.py.
"""
