"""Train a language model with reinforcement learning: the command line of rlswitch.

    python train.py recipe=ppo                           one run
    python train.py recipe=grpo num_steps=20 seed=1      with other settings
    python train.py recipe=ppo mode=plan                 what would be parked, and stop
    python train.py recipe=ppo mode=rewards              what the rewards say, and stop
    python train.py -m recipe=ppo,grpo seed=1,2          a sweep, a process per job
    python train.py --help                               every choice and every setting

Exit codes: 0 done; 1 a crash; 2 wrong configuration or input; 3 a push could not be proven;
75 preempted, with a checkpoint saved: run the same command again; 130 interrupted.
"""

from rlswitch.command.cli import main
from rlswitch.processes.exit import leave

if __name__ == "__main__":
    leave(main())
