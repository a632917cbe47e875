import pytest
from pictures import drawn


@pytest.fixture(autouse=True, scope="module")
def drawn_pictures():
    with drawn():
        yield
