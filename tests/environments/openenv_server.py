"""OpenEnv servers for test_openenv.py: `python openenv_server.py PORT SESSIONS tools` lists tools, else has one action.

The second one is the library's own template (`openenv init`), which pays 0.1 for each letter of a message.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def with_tools(sessions: int) -> Any:
    from fastmcp import FastMCP
    from openenv.core.env_server import Observation, State, create_app
    from openenv.core.env_server.mcp_environment import MCPEnvironment
    from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation

    class Adding(MCPEnvironment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            self.total = self.wanted = 0
            server = FastMCP("adding")

            @server.tool()
            def add(number: int, times: int = 1) -> str:
                """Add a number to the total."""
                if number < 0:
                    raise ValueError("below 0")
                self.total += number * times
                return f"total {self.total}"

            super().__init__(server)

        def reset(self, seed: int | None = None, episode_id: str | None = None, wanted: int = 6, **_: Any) -> Any:
            self.total, self.wanted = 0, wanted
            return Observation(done=False, reward=0.0)

        async def step_async(self, action: Any, timeout_s: float | None = None, **more: Any) -> Any:
            observation = await super().step_async(action, timeout_s=timeout_s, **more)
            if isinstance(action, CallToolAction):
                observation.done = self.total >= self.wanted
                observation.reward = float(self.total == self.wanted)
            return observation

        def _step_impl(self, action: Any, timeout_s: float | None = None, **_: Any) -> Any:
            return Observation(done=False, reward=0.0)

        @property
        def state(self) -> Any:
            return State()

    return create_app(Adding, CallToolAction, CallToolObservation, max_concurrent_envs=sessions)


def of_the_template(sessions: int, folder: Path) -> Any:
    from openenv.cli.commands.init import init
    from openenv.core.env_server import create_app

    init("echoing", str(folder))
    sys.path.insert(0, str(folder))
    from echoing.models import EchoingAction, EchoingObservation
    from echoing.server.echoing_environment import EchoingEnvironment

    return create_app(EchoingEnvironment, EchoingAction, EchoingObservation, max_concurrent_envs=sessions)


if __name__ == "__main__":
    import uvicorn

    port, sessions, kind, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    app = with_tools(sessions) if kind == "tools" else of_the_template(sessions, folder)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
