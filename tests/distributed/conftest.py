import pytest
from engines import environment
from processes import run
from training import train


@pytest.fixture(scope="session")
def ddp(tmp_path_factory):
    """Two processes of DDP: what every other engine and number of processes is compared with."""
    return run(train, 2, environment("ddp"), output_dir=str(tmp_path_factory.mktemp("ddp")))
