"""An accelerator with two devices, "sim:0" and "sim:1", made of CPU tensors.

Its numbers are the CPU's. What CUDA refuses, it refuses: an operation that mixes devices, `.numpy()`, a CPU generator; and
float64, which Apple's GPUs refuse. The current device belongs to the thread, as CUDA's does. Call [`install`] before
anything else touches an accelerator, in a process of its own, and end that process with `os._exit`: PyTorch's shutdown
does not expect a device in Python. There is no backward on "sim:1", no autocast and no random numbers of its own.
"""

import functools
import threading

import torch
import torch.utils.backend_registration as registration

COUNT = 2
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten.set_.source_Tensor}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_thread = threading.local()


class Backend(registration._DummyBackendModule):
    """`torch.sim`."""

    def device_count(self) -> int:
        return COUNT

    def current_device(self) -> int:
        return getattr(_thread, "index", 0)

    def set_device(self, device) -> None:
        _thread.index = device if isinstance(device, int) else torch.device(device).index or 0

    def manual_seed(self, seed: int) -> None: ...

    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state, device=None) -> None: ...

    def synchronize(self, device=None) -> None: ...

    def empty_cache(self) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class SimTensor(torch.Tensor):
    """A tensor of device "sim:{index}" whose numbers lie in the CPU tensor `raw`."""

    has_float64 = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, index: int):
        if raw.dtype == torch.float64 and not cls.has_float64:
            raise TypeError(
                "Cannot convert a tensor to float64 on device 'sim': it has no float64, as Apple's have none."
            )
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device("sim", index),
        )

    def __init__(self, raw: torch.Tensor, index: int):
        self.raw = raw

    def __repr__(self) -> str:
        return f"{self.raw} on {self.device}"

    def untyped_storage(self):
        return self.raw.untyped_storage()

    def storage(self):
        return self.raw.storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self):
        return self.raw.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __reduce_ex__(self, protocol):  # `torch.load` gives it back on the CPU
        return self.raw.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, dict(kwargs or {}))


def _run(func, args: tuple, kwargs: dict):
    tensors: list[torch.Tensor] = []
    _map(lambda leaf: tensors.append(leaf) if isinstance(leaf, torch.Tensor) else None, (*args, *kwargs.values()))
    simulated = [tensor for tensor in tensors if isinstance(tensor, SimTensor)]
    index = simulated[0].device.index if simulated else None
    if func not in COPIES:
        _refuse_mixed(func, args, kwargs, tensors, simulated)
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted = torch.device(wanted)
        if wanted.type == "sim":
            index = torch.sim.current_device() if wanted.index is None else wanted.index
        else:
            index = None
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    result = func(*_map(_raw, args), **{name: _map(_raw, value) for name, value in kwargs.items()})
    target = kwargs.get("out", args[0] if args else None)
    if func._schema.is_mutable and isinstance(target, torch.Tensor) and isinstance(result, torch.Tensor):
        raw = _raw(target)
        if result is raw or result.data_ptr() == raw.data_ptr():
            return target
    if index is None or not isinstance(result, (torch.Tensor, tuple, list)):
        return result
    return _map(lambda leaf: SimTensor(leaf, index) if type(leaf) is torch.Tensor else leaf, result)


def _map(function, value):
    """As PyTorch's `tree_map`, which takes most of the time of a run: operators have lists of tensors, and nothing deeper."""
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, each) for each in value])
    return function(value)


def _refuse_mixed(func, args: tuple, kwargs: dict, tensors: list, simulated: list) -> None:
    if not simulated:
        return
    if func in INDEXING and isinstance(args[0], SimTensor):  # may be indexed by tensors on the CPU
        tensors = [args[0], *args[2:3], *(i for i in args[1] if isinstance(i, SimTensor))]
    lists = [leaf for arg in args if isinstance(arg, (list, tuple)) for leaf in arg if isinstance(leaf, torch.Tensor)]
    in_list = set() if func in INDEXING else set(map(id, lists))  # concatenated, say: not even a number may differ
    devices = {str(t.device) for t in tensors if isinstance(t, SimTensor) or t.dim() > 0 or id(t) in in_list}
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(devices))}! ({func})"
        )
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "sim":
        raise RuntimeError(f"Expected a 'sim' device type for generator but found '{generator.device.type}' ({func})")


def _raw(value):
    return value.raw if isinstance(value, SimTensor) else value


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    raw = torch.empty(
        size, dtype=dtype or torch.get_default_dtype(), memory_format=memory_format or torch.contiguous_format
    )
    return SimTensor(raw, _index(device))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return SimTensor(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()), _index(device))


def _copy_from(source, target, non_blocking=False):
    _raw(target).copy_(_raw(source))
    return target


def _index(device) -> int:
    found = None if device is None else torch.device(device).index
    return torch.sim.current_device() if found is None else found


def _with_index(method):
    """`x.to("sim")` goes to the thread's current device; in C++ a device in Python is always the first."""

    @functools.wraps(method)
    def to(self, *args, **kwargs):
        def complete(value):
            if isinstance(value, (str, torch.device)) and str(value) == "sim":
                return torch.device("sim", torch.sim.current_device())
            return value

        return method(self, *map(complete, args), **{key: complete(value) for key, value in kwargs.items()})

    return to


def _on_the_cpu_first(function):
    """In C++, `arange` resizes an empty tensor, which a wrapped one cannot follow."""

    @functools.wraps(function)
    def made(*args, device=None, **kwargs):
        tensor = function(*args, **kwargs)
        return tensor if device is None else tensor.to(device)

    return made


@functools.cache
def install() -> None:
    """Make "sim" the accelerator of this process."""
    registration._setup_privateuseone_for_python_backend("sim", backend_module=Backend())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("_copy_from_and_resize", _copy_from, "PrivateUse1")
    install.library = library  # what it registered goes when it goes
    torch.accelerator.current_device_index = lambda: torch.sim.current_device()
    torch.accelerator.set_device_index = lambda device: torch.sim.set_device(device)
    torch.accelerator.empty_cache = lambda: torch.sim.empty_cache()
    torch.Tensor.to = _with_index(torch.Tensor.to)
    torch.arange = _on_the_cpu_first(torch.arange)
    torch.inference_mode = lambda mode=True: torch.set_grad_enabled(not mode)  # a wrapped tensor cannot be made in it
    # Moving a module must not make new parameters, which an optimizer would not know.
    torch.__future__.set_swap_module_params_on_conversion(True)
