"""What a completion is worth: functions with TRL's signature, and the Scorer that calls them.

functions.py holds the built-in ones. To add one, write `def name(prompts, completions, **columns)`
there, one number (or None: not applicable) per completion, and name it in its BUILTIN table.
"""
