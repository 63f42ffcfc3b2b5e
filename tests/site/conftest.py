import fakes
import pytest
from starlette.testclient import TestClient

from deltax.site import server


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    """A site that tests only read."""
    return fakes.site(tmp_path_factory.mktemp("site"))


@pytest.fixture
def mine(tmp_path):
    """A site that a test may change."""
    return fakes.site(tmp_path, papers=6, notes=12)


@pytest.fixture
def client(fake):
    return TestClient(server.app(fake), base_url="http://127.0.0.1:8753")
