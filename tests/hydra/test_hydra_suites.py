"""Runs Hydra's own test suites for launchers, with forked jobs and with jobs in fresh interpreters."""

from __future__ import annotations

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite

Plugins.instance()  # Hydra 1.4: before the first test, whose fixture saves and restores Hydra's singletons

# The suites use Hydra 1.1's defaults, and Hydra 1.3 warns about these.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:\s*Future Hydra versions will no longer change working directory:UserWarning"
)

FORK, SPAWN = (
    ["hydra.launcher.devices=simulated:2", f"hydra.launcher.start_method={method}"] for method in ("fork", "spawn")
)


def test_hydra_discovers_the_launcher() -> None:
    assert "GpuPoolLauncher" in [found.__name__ for found in Plugins.instance().discover(Launcher)]


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [pytest.param("gpu_pool", FORK, id="fork"), pytest.param("gpu_pool", SPAWN, id="spawn")],
)
class TestLauncher(LauncherTestSuite):
    pass


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [
        pytest.param("gpu_pool", [*FORK, "hydra.sweeper.max_batch_size=2"], id="fork"),
        pytest.param("gpu_pool", [*SPAWN, "hydra.sweeper.max_batch_size=2"], id="spawn"),
    ],
)
class TestLauncherInBatches(BatchedSweeperTestSuite):
    pass


INTEGRATION = ["-m", "hydra/job_logging=disabled", "hydra/launcher=gpu_pool"]


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [pytest.param({}, [*INTEGRATION, *FORK], id="fork"), pytest.param({}, [*INTEGRATION, *SPAWN], id="spawn")],
)
class TestIntegration(IntegrationTestSuite):
    pass
