import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def collected_quickly():
    """Spare each training's end half a second, for which the Trainer collects garbage among all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()
