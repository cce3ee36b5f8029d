"""The errors that rlswitch raises on purpose."""


class RLSwitchError(Exception):
    """Root of every error that rlswitch raises on purpose."""


class ConfigError(RLSwitchError, ValueError):
    """The configuration or the input is wrong: one line per problem, exit code 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class SwitchError(RLSwitchError, RuntimeError):
    """A verb was called in the wrong order, or a tenant did not give the device back."""


class EngineError(RLSwitchError, RuntimeError):
    """The rollout engine died, hung, or answered with something that is not a rollout."""


class EngineLost(EngineError):
    """The engine's process is gone, does not answer, or never came: only a new one will do."""


class ProofError(RLSwitchError, RuntimeError):
    """A push could not be proven: the engine does not hold the weights it was given. Exit code 3."""


class RewardError(RLSwitchError, RuntimeError):
    """Reward functions could not be called at all, or failed on too many rollouts of a step."""


class SaveError(RLSwitchError, RuntimeError):
    """A checkpoint could not be written; the ones before it are intact. Exit code 1."""


class Preempted(RLSwitchError):
    """A signal asked the run to stop; what was learned is saved. Exit code 75: run again to go on."""
