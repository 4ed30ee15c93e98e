"""The simulated arm, driven by a policy on another machine: an example client for serve.py.

    python serve.py                                        in one terminal
    python client.py --task StackCube --episodes 3         in another

Draws each episode as sample.py does. A client for a real robot looks the same, with cameras and
servos instead of TabletopEnv. Before those are connected, you can send recorded frames instead:

    python client.py --data out/mine                       what would the policy have done?
"""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from cli import UserError, at_least, choose, parse, run
from data.env import TabletopEnv
from data.record import load_episodes
from data.robots import ROBOTS
from data.tasks import TASKS
from files import writable
from rollout import EXECUTE_STEPS, draw_episode
from serve import read_api_key
from wire import pack, require_extras, unpack


@dataclass
class ClientConfig:
    server: str = "ws://127.0.0.1:8000"  # address that serve.py prints
    api_key_file: str = ""  # text file with the server's key
    robot: str = "widowx"  # panda, xarm6, xarm7 or widowx
    task: str = "PickCube"  # what to do
    seed: int = 1_000_001  # layout of the first episode
    episodes: int = 1  # episodes, with seeds counting up
    out: str = "out"  # folder for the GIFs
    data: str = ""  # folder of episodes: show the server their frames instead of driving the arm


class RemotePolicy:
    """A policy at the other end of a connection. Has BLM's `act`, so `rollout` accepts it."""

    def __init__(self, connection):
        self.connection = connection
        self.metadata = unpack(connection.recv())

    def act(self, observation, robot):
        """(T, dof + 1) float32. UserError with the server's message if it refuses."""
        self.connection.send(pack({**observation, "robot": robot}))
        reply = self.connection.recv()
        # actions arrive as bytes; text is an error message for people
        if isinstance(reply, str):
            raise UserError(f"the server says: {reply}")
        return unpack(reply)["actions"]


@contextmanager
def connected(address, api_key=""):
    """A RemotePolicy for the duration of the block. UserError if the server is missing or lost."""
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
    # ignore the environment's proxy: it would not reach a server on the local network
    options = {"compression": None, "proxy": None, "additional_headers": headers}
    try:
        with connect(address, **options) as connection:
            yield RemotePolicy(connection)
    except (OSError, WebSocketException) as error:
        advice = "is that where `python serve.py` runs?"
        raise UserError(f"{address}: {str(error) or type(error).__name__}; {advice}") from None


def show_recordings(policy, episodes):
    """Send recorded frames instead of live ones; print the error of each chunk against the record.

    Frames are EXECUTE_STEPS control steps apart, as often as a robot observes.
    """
    for episode in episodes:
        errors = []
        for step in range(0, len(episode), EXECUTE_STEPS):
            chunk = policy.act(episode.observation(step), episode.robot)  # (T, A)
            done = episode.action[step : step + EXECUTE_STEPS]
            errors.append(np.abs(chunk[: len(done)] - done))
        mean = ", ".join(f"{error:.3f}" for error in np.concatenate(errors).mean(0))
        print(f"{episode.path.name}: {len(errors)} chunks, mean error of each number: {mean}")


def main():
    config = parse(ClientConfig, description="Drive the simulated arm through a policy server.")
    require_extras()
    at_least(config, 1, "episodes")
    if config.data:
        episodes = load_episodes(config.data)
        with connected(config.server, read_api_key(config.api_key_file)) as policy:
            show_recordings(policy, episodes[: config.episodes])
        return
    choose(config.robot, ROBOTS, "robot")
    choose(config.task, TASKS, "task")
    at_least(config, 0, "seed")
    writable(config.out)
    # the simulator runs on this side, the weights on the other
    env = TabletopEnv(config.robot, config.task, render=False, wordings="held_out")
    with connected(config.server, read_api_key(config.api_key_file)) as policy:
        for seed in range(config.seed, config.seed + config.episodes):
            path, outcome = draw_episode(policy, env, seed, config.out, execute_steps=EXECUTE_STEPS)
            print(f"{env.robot.display_name}: {env.instruction}\n  {outcome}, drawn in {path}")


if __name__ == "__main__":
    run(main)
