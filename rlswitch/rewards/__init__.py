"""What a completion is worth: functions with TRL's signature, models that take their turn on the device.

scorer.py, pool.py are the trainer's side; worker.py, resolve.py, builtin.py run in the worker processes,
keeper.py around them; sandbox.py runs what a model wrote. To add a built-in function, write
`def name(prompts, completions, **columns)` in functions.py, one number (or None: not applicable) per
completion, and name it in builtin.py's table.

judge.py and reward_model.py are tenants of the switch (tenants.py); template.py is what a judge is asked.
"""
