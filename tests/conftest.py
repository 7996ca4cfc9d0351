"""What all tests share."""

import sys

import pytest


@pytest.fixture(autouse=True)
def one_thread(request):
    """Tiny tensors: threads cost more than they give. Tests of real models keep theirs."""
    torch = sys.modules.get("torch")
    if torch is None or any(request.node.get_closest_marker(name) for name in ("data", "local")):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
