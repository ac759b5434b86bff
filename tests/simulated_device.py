"""A simulated accelerator, "sim": two devices that compute what the CPU computes, and refuse what a
GPU refuses.

Each of its tensors wraps a tensor of the CPU, so its results are the CPU's, bit for bit. Like a
GPU, each device has a memory and a random generator of its own, and raises an error if tensors of
several devices meet, if numpy asks for its memory, or if that memory is full. Like Apple's, it may
have no float64.

PyTorch reserves the device type PrivateUse1 for backends that it does not know, and lets a process
register one, once and for good. While nobody uses the simulated device (`simulate`), it reports
that it is not available. In the process of a command that a test starts, it is available from the
start if `for_children` prepared the environment.
"""

import atexit
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

KIND = "sim"
DEVICES = 2
BLOCK = 512
"""Memory is allocated in multiples of so many bytes, as on CUDA."""

_CPU = torch.device("cpu")
_SETTINGS = "SIMULATED_DEVICE"
_aten = torch.ops.aten


@dataclass
class _Device:
    """The state of one device.

    Its allocator keeps what was freed until it is told to empty its cache.
    """

    allocated: int = 0
    reserved: int = 0
    peak: int = 0
    rng: Tensor = field(default_factory=lambda: torch.Generator().manual_seed(0).get_state())


class _Allocation:
    """The memory that one storage takes on its device; every tensor on the storage holds it."""

    def __init__(self, device: _Device, size: int) -> None:
        free = backend.memory - device.allocated
        if size > free:
            text = f"{KIND.upper()} out of memory. Tried to allocate {size} bytes; {free} are free."
            backend.refuse(torch.OutOfMemoryError(text))
        self._device = device
        self.size = size
        device.allocated += size
        device.reserved = max(device.reserved, device.allocated)
        device.peak = max(device.peak, device.allocated)

    def __del__(self) -> None:
        if hasattr(self, "size"):  # otherwise there was no memory for it
            self._device.allocated -= self.size


class Backend:
    """The module `torch.sim`, with the functions that `torch.cuda` has under these names.

    `memory` is how many bytes each device has, and `float64` whether it has that data type.
    """

    def __init__(self) -> None:
        self.available = False
        self.memory = 0
        self.float64 = True
        self.devices = [_Device() for _ in range(DEVICES)]
        self._allocations: WeakValueDictionary[int, _Allocation] = WeakValueDictionary()
        self._refused: list[Exception] | None = None

    def refuse(self, error: Exception) -> None:
        """Raise an error; in a backward pass, raise it at the end."""
        if self._refused is None:
            raise error
        self._refused.append(error)

    def run_backward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a backward pass.

        Torch would end the process if one of our operations raised an error in it.
        """
        self._refused = refused = []
        try:
            result = run(*args, **kwargs)
        finally:
            self._refused = None
        if refused:
            raise refused[0]
        return result

    def allocation(self, payload: Tensor, device: torch.device) -> _Allocation:
        """Return the allocation of a tensor's storage, made if this is the first tensor on it."""
        storage = payload.untyped_storage()
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        found = self._allocations.get(storage._cdata)
        if found is None or found.size < size:
            found = self._allocations[storage._cdata] = _Allocation(self.of(device), size)
        return found

    def of(self, device: Any = None) -> _Device:
        """Return the state of a device, given in any way that torch knows."""
        index = device if isinstance(device, int) else torch.device(device or KIND).index
        return self.devices[index or 0]

    def is_available(self) -> bool:
        return self.available

    def is_initialized(self) -> bool:
        return self.available

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return DEVICES if self.available else 0

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "Simulated device"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        self.of(device)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.memory - self.of(device).reserved, self.memory

    def memory_allocated(self, device: Any = None) -> int:
        return self.of(device).allocated

    def memory_reserved(self, device: Any = None) -> int:
        return self.of(device).reserved

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.of(device).peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.of(device).peak = self.of(device).allocated

    def empty_cache(self) -> None:
        for device in self.devices:
            device.reserved = device.allocated

    def manual_seed_all(self, seed: int) -> None:
        for device in self.devices:
            device.rng = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self.of(device).rng.clone()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self.of(device).rng = state.clone()


backend = Backend()


class SimulatedTensor(Tensor):
    """A tensor on a simulated device; `payload` holds its values on the CPU."""

    payload: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, payload: Tensor, device: torch.device | None = None, *, requires_grad: bool = False
    ) -> "SimulatedTensor":
        # accelerate makes a parameter of a parameter's class, wherever the values are.
        if device is None:
            return torch.nn.Parameter(payload, requires_grad)
        if payload.dtype is torch.float64 and not backend.float64:
            text = "Cannot convert a MPS Tensor: the MPS framework doesn't support float64."
            backend.refuse(TypeError(text))
        layout = {
            "strides": payload.stride(),
            "storage_offset": payload.storage_offset(),
            "dtype": payload.dtype,
        }
        made = Tensor._make_wrapper_subclass(cls, payload.size(), device=device, **layout)
        made.payload = payload
        made._allocation = backend.allocation(payload, device)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # The rest is refused to every tensor that wraps another one, though a GPU's tensors can do it.

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def data_ptr(self) -> int:
        return self.payload.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.payload.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made = SimulatedTensor(self.payload.clone(), self.device)
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(made) if is_parameter else made
            memo[id(self)].requires_grad_(self.requires_grad)
        return memo[id(self)]

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first."
            )
        return self.detach().cpu().numpy()

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)
        self.payload, self._allocation = value.payload, value._allocation


def _placed(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(device.type, device.index or 0) if device.type == KIND else device


_ACROSS = {"aten::copy_", "aten::_to_copy"}
_INDEXED = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
}
_MOVING = {"aten::to", "aten::type_as", "aten::_to_cpu", "aten::_has_compatible_shallow_copy_type"}


def _histc(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Count whole numbers too, as GPUs do; mixtures of experts ask them to."""
    return torch.histc(values.float(), *args, **kwargs).to(values.dtype)


_INSTEAD = {"aten::histc": _histc}


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU, and return its result where a GPU would."""
    name = func._schema.name
    # In inference mode, torch hands them over whole; otherwise as a copy, or not at all.
    if name in _MOVING:
        return func.decompose(*args, **kwargs)
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if name not in _ACROSS:
        _require_one_device(name, tensors)
    mine = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    device = _placed(kwargs["device"]) if kwargs.get("device") is not None else mine[0].device
    if "device" in kwargs:
        kwargs = kwargs | {"device": _CPU}
    if kwargs.get("generator") is not None:
        text = f"Expected a '{KIND}' device type for generator but found 'cpu'"
        backend.refuse(RuntimeError(text))
    known = {id(tensor.payload): tensor for tensor in mine}

    def placed(value: Tensor) -> Tensor:
        own = known.get(id(value))
        if own is None:
            return SimulatedTensor(value, device) if device.type == KIND else value.to(device)
        if own.shape != value.shape:  # the operation resized what it was to write to
            own.data = SimulatedTensor(value, device)
        return own  # operations in place return the tensor that they were given

    draws = device.type == KIND and torch.Tag.nondeterministic_seeded in func.tags
    # Views of tensors made outside inference mode are no inference tensors; to make none at all is
    # simplest.
    with torch.inference_mode(False), _generator_of(device) if draws else nullcontext():
        args, kwargs = tree_map_only(SimulatedTensor, _payload, (args, kwargs))
        return tree_map_only(Tensor, placed, _INSTEAD.get(name, func)(*args, **kwargs))


def _payload(tensor: SimulatedTensor) -> Tensor:
    return tensor.payload


def _require_one_device(name: str, tensors: list[Tensor]) -> None:
    """Raise torch's error if tensors of several devices meet; only numbers of the CPU may, and its
    indices.
    """
    if name in _INDEXED and tensors[0].device.type == KIND:
        tensors = [tensors[0], *(tensor for tensor in tensors[1:] if tensor.device.type != "cpu")]
    devices = set()
    for tensor in tensors:
        if tensor.dim() or tensor.device.type != "cpu":
            devices.add(str(tensor.device))
    if len(devices) > 1:
        found = " and ".join(sorted(devices))
        text = f"Expected all tensors to be on the same device, but found {found}! (in {name})"
        backend.refuse(RuntimeError(text))


@contextmanager
def _generator_of(device: torch.device) -> Iterator[None]:
    """Let a random operation draw from the generator of its device."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(backend.of(device).rng)
        yield
        backend.of(device).rng = torch.get_rng_state()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention by the kernel that the CPU would choose; torch chooses another for devices
    unknown to it.
    """
    options = {"scale": scale, "enable_gqa": enable_gqa}
    states = (query, key, value)
    settings = (dropout_p, is_causal)
    needs_gradient = torch.is_grad_enabled() and any(state.requires_grad for state in states)
    if not needs_gradient:
        with torch._C._AutoDispatchBelowAutograd():
            compute = _aten.scaled_dot_product_attention
            return compute(*states, attn_mask, *settings, **options)
    mask = None if attn_mask is None else attn_mask.payload
    payloads = [state.payload for state in states]
    is_flash = torch._fused_sdp_choice(*payloads, mask, *settings, **options) == 1
    if not is_flash:
        plain = _aten._scaled_dot_product_attention_math
        return plain(*states, attn_mask, *settings, **options)[0]
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        added = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = added.masked_fill_(~attn_mask, -torch.inf)
    flash = _aten._scaled_dot_product_flash_attention_for_cpu
    return flash(*states, *settings, attn_mask=attn_mask, scale=scale)[0]


def _empty(
    size: Any, *strides: Any, dtype: Any = None, device: Any = None, **options: Any
) -> Tensor:
    """Make a tensor: what every other way of making one on a device leads to."""
    with torch.inference_mode(False):
        if strides:
            made = torch.empty_strided(size, *strides, dtype=dtype)
        else:
            made = torch.empty(size, dtype=dtype)
        return SimulatedTensor(made, _placed(device or KIND))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    into, values = tree_map_only(SimulatedTensor, _payload, (target, source))
    into.copy_(values)
    return target


def _whole(name: str) -> Callable[..., Any]:
    """Return a kernel that runs an operation as it is."""
    base, _, overload = name.removeprefix("aten::").partition(".")
    func = getattr(getattr(_aten, base), overload or "default")
    return lambda *args, **kwargs: _run(func, args, kwargs)


_ENGINE = torch.autograd._engine_run_backward
_library: list[torch.library.Library] = []


def register() -> None:
    """Register the device with torch, unavailable until it is used."""
    if _library:
        return
    backend_registration._setup_privateuseone_for_python_backend(KIND, backend_module=backend)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    # What the CPU computes by a kernel of its own, and torch would take apart for a device without
    # one.
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        is_ours = name.startswith("aten::") and has_kernel(name, "CPU")
        if is_ours and has_kernel(name, "CompositeImplicitAutograd"):
            library.impl(name, _whole(name), "PrivateUse1")
    _library.append(library)  # its kernels last as long as it does


def why_not() -> str | None:
    """Return why this process cannot simulate a device, or None if it can."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return f"torch {torch.__version__} has no backends in Python"
    if not _library and torch.accelerator.is_available():
        return "this machine has a real accelerator, which a registered one would replace"
    return None


@contextmanager
def simulate(*, memory: int = 2**33, float64: bool = True) -> Iterator[Backend]:
    """Make the devices available, empty and of this kind, while the body runs."""
    register()
    backend.available = True
    backend.memory = memory
    backend.float64 = float64
    backend.devices[:] = [_Device() for _ in range(DEVICES)]
    # Torch starts a thread for each device that computes gradients, but takes ours to be a single
    # one.
    with_one_thread = torch.autograd.set_multithreading_enabled(False)
    run = partial(backend.run_backward, _ENGINE)
    with_our_errors = mock.patch.object(torch.autograd, "_engine_run_backward", run)
    # A module that moves to the device keeps its parameters, as on a GPU: tied weights stay tied.
    name = "_swap_module_params_on_conversion"
    with_ties = mock.patch.object(torch.__future__, name, True)
    # Torch would ask an allocator that a backend in Python cannot have.
    with_our_cache = mock.patch.object(torch.accelerator, "empty_cache", backend.empty_cache)
    try:
        with with_one_thread, with_our_errors, with_ties, with_our_cache:
            yield backend
    finally:
        backend.available = False


def for_children(folder: Path, patch: Any, **settings: Any) -> None:
    """Let every new process find the device, by the entry point through which torch loads backends.

    Args:
        folder: an empty folder, for the description of a package.
        patch: pytest's MonkeyPatch.
        settings: those of `simulate`.
    """
    package = folder / "simulated_device-0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: simulated-device\nVersion: 0\n")
    (package / "entry_points.txt").write_text("[torch.backends]\nsim = simulated_device:start\n")
    patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    # Processes that multiprocessing starts take over the path of this one.
    patch.syspath_prepend(folder)
    patch.setenv(_SETTINGS, json.dumps(settings))


def start() -> None:
    """Make the devices available in this process until it ends, with the settings in the
    environment.
    """
    lasting = ExitStack()
    lasting.enter_context(simulate(**json.loads(os.environ[_SETTINGS])))
    atexit.register(lasting.close)
