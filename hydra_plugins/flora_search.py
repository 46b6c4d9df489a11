"""Where Hydra looks for sweepers: `hydra/sweeper=search`. Hydra imports this at every start, so it imports little."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Search(Sweeper):
    """A sweeper that searches (``flora.launch.search``); arguments as in configs/hydra/sweeper/search.yaml."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives a sweeper."""
        from hydra.core.plugins import Plugins

        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Search; ``arguments``: the overrides as typed."""
        from flora.launch.search import search

        assert self.config is not None, "Hydra calls setup first"
        assert self.launcher is not None, "Hydra calls setup first"
        return search(self.config, self.launcher, arguments, **self.settings)
