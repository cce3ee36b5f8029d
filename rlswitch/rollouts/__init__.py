"""How a step's rollouts are sampled from the engine: one completion each, or a conversation."""
