"""The built-in task: two-digit addition, and models small enough to train on first use."""
