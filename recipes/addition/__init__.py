"""The built-in task: two-digit additions, and models that learn them on the spot."""
