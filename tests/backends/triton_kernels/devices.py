"""Where the Triton kernels run: in the interpreter, or with `-m gpu` on a card."""

import pytest
import torch

CUDA = torch.cuda.is_available()
on_host = pytest.mark.skipif(CUDA, reason="the interpreter is off where there is a card")
on_card = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
