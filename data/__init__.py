"""The data engine: robots, tasks, the environment, the expert, and what is recorded from them."""
