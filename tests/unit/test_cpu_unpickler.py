"""PyTorch's tensors of a GPU are unpickled on the CPU, and JAX's arrays as NumPy's; without a GPU, or torch's leave."""

from __future__ import annotations

import copyreg
import importlib.util
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gpu_launcher.processes import cpu_unpickler, pickling

# In a process of its own: importing torch starts threads, and then the tests after it could not fork.
PRELUDE = """
import json, pickle, sys, traceback
import torch
from gpu_launcher.processes import cpu_unpickler, pickling

torch.serialization.location_tag = lambda storage: "cuda:0"  # as of one that is there

def there(thing):
    '''It comes back on the CPU, where plain pickle looks for the GPU.'''
    for dumped, load in (
        (pickle.dumps(thing), cpu_unpickler.loads),
        (pickling.dump(thing), lambda dumped: pickling.load(dumped, on_cpu=True)),
    ):
        try:
            pickle.loads(dumped)
        except RuntimeError as error:
            assert "CUDA" in str(error), error
        else:
            raise AssertionError("this is no test")
        back = load(dumped)
        assert not torch.cuda.is_initialized()
        yield back

class Sub(torch.Tensor):
    pass

class Holder:
    def __init__(self, tensor):
        self.tensor = tensor

numbers = torch.arange(6.0).reshape(2, 3)
outcomes = {}
for name, code in json.loads(sys.argv[1]).items():
    try:
        exec(code)
        outcomes[name] = ""
    except Exception:
        outcomes[name] = traceback.format_exc()
print(json.dumps(outcomes))
"""
CASES = {
    "a tensor": """
for back in there(numbers):
    assert back.device.type == "cpu" and torch.equal(back, numbers)
""",
    "a view with strides and an offset": """
for back in there(numbers.t()[1:]):
    assert back.device.type == "cpu" and torch.equal(back, numbers.t()[1:])
""",
    "half precision that requires a gradient": """
for back in there(torch.ones(3, dtype=torch.bfloat16, requires_grad=True)):
    assert back.dtype is torch.bfloat16 and back.requires_grad and back.device.type == "cpu"
""",
    "a parameter in containers": """
for back in there({"w": [torch.nn.Parameter(numbers)]}):
    (w,) = back["w"]
    assert isinstance(w, torch.nn.Parameter) and torch.equal(w, numbers)
""",
    "a module": """
net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
for back in there(net):
    assert all(torch.equal(one, other) for one, other in zip(back.state_dict().values(), net.state_dict().values()))
    assert back.eval()(numbers).device.type == "cpu"
""",
    "a module's state and an optimizer's": """
net = torch.nn.Linear(3, 2)
optimizer = torch.optim.Adam(net.parameters())
net(numbers).sum().backward()
optimizer.step()
for back in there((net.state_dict(), optimizer.state_dict())):
    assert torch.equal(back[1]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
""",
    "a sparse tensor": """
for back in there(torch.eye(3).to_sparse()):
    assert torch.equal(back.to_dense(), torch.eye(3))
""",
    "a subclass, and an object that holds a tensor": """
for sub, holder in there((numbers.as_subclass(Sub), Holder(numbers))):
    assert type(sub) is Sub and torch.equal(holder.tensor, numbers)
""",
    "an exception with a tensor": """
from gpu_launcher.processes.exceptions import PortableException
for back in there(ValueError("loss is", numbers)):
    assert torch.equal(back.args[1], numbers)
carried = PortableException.of(ValueError("loss is", numbers), {})
assert torch.equal(carried.load().args[1], numbers)
""",
    "a generator": """
class Of(torch.Generator):
    def __reduce__(self):
        return torch.Generator, (torch.device("cuda", 0),)
generator = torch.Generator().manual_seed(3)
assert cpu_unpickler.loads(pickle.dumps(generator)).initial_seed() == 3
try:
    cpu_unpickler.loads(pickle.dumps(Of()))
except pickle.UnpicklingError as error:
    assert "get_state() instead" in str(error)
else:
    raise AssertionError("it was not refused")
""",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What came of each case: nothing, or a traceback."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    command = [sys.executable, "-c", PRELUDE, json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_torch_had_on_a_gpu_is_on_the_cpu(outcomes: dict[str, str], case: str) -> None:
    assert outcomes[case] == ""


@pytest.fixture
def jax_array(monkeypatch: pytest.MonkeyPatch) -> Callable[[np.ndarray], object]:
    """An object that is pickled as JAX's array of those numbers is."""
    module = ModuleType("jax._src.array")

    def rebuild(*arguments: object) -> object:
        raise AssertionError("this starts JAX's backend")

    rebuild.__module__, rebuild.__qualname__ = module.__name__, "_reconstruct_array"
    vars(module)["_reconstruct_array"] = rebuild
    for name in ("jax", "jax._src", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)

    class Array:
        def __init__(self, numbers: np.ndarray) -> None:
            self.numbers = numbers

    def reduce(array: Array) -> Any:
        function, arguments, state = array.numbers.__reduce__()  # type: ignore[misc]
        return rebuild, (function, arguments, state, {"weak_type": False})

    monkeypatch.setitem(copyreg.dispatch_table, Array, reduce)
    return Array


@pytest.mark.parametrize("numbers", [np.arange(6).reshape(2, 3), np.array(1.5, dtype=np.float32), np.zeros((0, 3))])
def test_arrays_of_jax_become_arrays_of_numpy(jax_array: Callable[[np.ndarray], object], numbers: np.ndarray) -> None:
    for back in (
        cpu_unpickler.loads(pickle.dumps([jax_array(numbers)])),
        pickling.load(pickling.dump([jax_array(numbers)]), on_cpu=True),
    ):
        assert type(back[0]) is np.ndarray
        assert back[0].dtype == numbers.dtype
        assert np.array_equal(back[0], numbers)
