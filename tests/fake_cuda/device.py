"""A simulated CUDA device on the CPU build of torch: real numbers under CUDA's rules. Import it before torch.

A tensor on it is an `OnCuda`, which holds its numbers in a CPU tensor, `host`. Mixing devices raises, autocast("cuda")
and GradScaler are on, CUDA has a random state of its own, kernel launches and waits of the host for the device are
counted, and CUDA graphs are recorded and replayed: during a capture nothing runs, whatever a graph cannot hold is an
error, and a replay repeats the recorded kernels on the same storage, none of the Python around them.

It counts the bytes of live tensors, and memory runs out beyond a limit that a scenario sets. It cannot see which kernel
a card would choose or what that takes for itself, cuDNN, Triton, asynchronous faults or the overflow of tensor cores.
Written against torch 2.13, transformers 5.23 and bitsandbytes 0.50.2.
"""

from __future__ import annotations

import collections
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import tempfile
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TORCH = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]


def build() -> Path:
    """Compile device.cpp against this torch, once per source and torch (some seconds); needs g++."""
    source = Path(__file__).with_name("device.cpp")
    of_torch = str(TORCH).encode() + (TORCH / "version.py").read_bytes()  # it is linked to the libraries at this place
    key = hashlib.sha256(source.read_bytes() + of_torch).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"grpo_lite_fake_cuda_{os.getuid()}_{key}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        include = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
        link = [f"-L{TORCH}/lib", f"-Wl,-rpath,{TORCH}/lib", "-lc10", "-ltorch_cpu"]
        command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", *include, str(source), "-o", str(part), *link]
        subprocess.run(command, check=True)
        part.replace(library)
    return library


ctypes.CDLL(f"{TORCH}/lib/libtorch_global_deps.so", mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)  # before libtorch_cpu, whose getAccelerator it replaces

import bitsandbytes  # noqa: E402, F401  it must look around before it hears of CUDA
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import rms_norm, scaled_dot_product_attention  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from tests.fake_cuda.kernels import KERNELS, launches_kernel  # noqa: E402

MIXES = {"copy_", "_to_copy", "to", "index", "index_put_", "_index_put_impl_", "set_"}  # take operands of both devices
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "bincount", "equal", "repeat_interleave"}
FUSED = {scaled_dot_product_attention: "attention", rms_norm: "rms_norm"}  # one kernel on CUDA, several operators here

waits: collections.Counter[tuple[str, str]] = collections.Counter()  # (operator, "file:line" of grpo_lite)
launches: collections.Counter[str] = collections.Counter()
failures: dict[str, int] = {}  # operator -> after how many of its launches memory runs out, once
memory = {"now": 0, "peak": 0, "limit": 1 << 62}  # bytes of the tensors that lie there, and beyond which it runs out

_on_the_way: list[tuple[Tensor, Tensor]] = []  # copies to the host that nobody waited for
_random_state = torch.Generator().manual_seed(0).get_state()
_recording: CUDAGraph | None = None
_inside_fused = False
_mode: FakeCuda | None = None
_sync_debug_mode: Any = 0


class OnCuda(Tensor):
    """A tensor whose numbers lie in `host` and which says that it is on `cuda:0`."""

    host: Tensor

    def __new__(cls, host: Tensor) -> OnCuda:
        made = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device("cuda", 0),
        )
        made.host = host.detach()
        _allocate(made.host.untyped_storage())
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.storage, Tensor.untyped_storage, Tensor.data_ptr):
            if func is Tensor.tolist:
                _wait("tolist")
            return func(args[0].host)
        with torch._C.DisableTorchFunctionSubclass(), _one_kernel(FUSED.get(func)):
            out = func(*args, **(kwargs or {}))
        if func is Tensor.data.__set__:
            args[0].host = args[1].host
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_allocated: dict[int, int] = {}  # storage -> bytes


def _allocate(storage: Any) -> None:
    key, size = storage._cdata, storage.nbytes()
    if key not in _allocated:
        _allocated[key] = size
        weakref.finalize(storage, _free, key)
        memory["now"] += size
        memory["peak"] = max(memory["peak"], memory["now"])


def _free(key: int) -> None:
    memory["now"] -= _allocated.pop(key)


class FakeCuda(TorchDispatchMode):
    """Sends every operator that makes a CUDA tensor here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class CUDAGraph:
    """The kernels launched during a capture, to be repeated on the same storage."""

    def __init__(self) -> None:
        self.kernels: list[tuple[Any, Any, Any, Any]] = []  # operator, arguments, keyword arguments, what it returned
        self.pool: list[CUDAGraph] = [self]
        self.replays = 0

    def replay(self) -> None:
        """Run the kernels again. What other graphs of the pool computed is overwritten, as in memory they share."""
        global _random_state
        for other in self.pool:
            if other is not self:
                other.spoil()
        self.replays += 1
        launches["graph"] += 1
        for func, args, kwargs, made in self.kernels:
            out, _random_state = _execute(func, args, kwargs, _random_state)
            if not _writes(func):
                for new, old in zip(tree_leaves(out), tree_leaves(made), strict=True):
                    old.host.copy_(new)

    def spoil(self) -> None:
        """Make what lies in the graph's own memory unusable."""
        for func, _, _, made in self.kernels:
            if not _writes(func):
                for tensor in tree_leaves(made):
                    tensor.host.fill_(float("nan") if tensor.dtype.is_floating_point else 0)

    def reset(self) -> None:
        """Forget the kernels."""
        self.kernels.clear()

    def pool_id(self) -> list[CUDAGraph]:
        """Return what `pool=` takes."""
        return self.pool


@contextmanager
def graph(cuda_graph: CUDAGraph, pool: list[CUDAGraph] | None = None, **_: Any) -> Iterator[None]:
    """Capture: nothing that runs inside has an effect outside of the graph's own memory."""
    global _recording, _random_state
    if pool is not None:
        pool.append(cuda_graph)
        cuda_graph.pool = pool
    before, _recording = _random_state.clone(), cuda_graph
    undo.clear()
    try:
        yield
    finally:
        _recording, _random_state = None, before
        for tensor, numbers in reversed(undo):
            tensor.copy_(numbers)
        cuda_graph.spoil()


undo: list[tuple[Tensor, Tensor]] = []  # what a capture wrote to, and the numbers before


def on_cuda(value: Any) -> Any:
    """Return a CPU tensor as one of the device, sharing its storage."""
    return OnCuda(value) if isinstance(value, Tensor) and not isinstance(value, OnCuda) else value


def _host(value: Any) -> Any:
    if isinstance(value, OnCuda):
        return value.host
    return torch.device("cpu") if isinstance(value, torch.device) else value


@contextmanager
def _one_kernel(name: str | None) -> Iterator[None]:
    global _inside_fused
    if name is None or _inside_fused:
        yield
        return
    launches[name] += 1
    _inside_fused = True
    try:
        yield
    finally:
        _inside_fused = False


def arrive() -> None:
    """Let what was copied to the host without waiting be there."""
    for tensor, numbers in _on_the_way:
        tensor.copy_(numbers)
    _on_the_way.clear()


def _wait(name: str) -> None:
    if _sync_debug_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation ({name})")
    arrive()
    if _recording is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {name} waits for the device")
    ours = [frame for frame in traceback.extract_stack() if "/grpo_lite/" in frame.filename]
    waits[name, f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""] += 1


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run one operator under CUDA's rules."""
    global _random_state
    name = func._schema.name.split("::")[1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnCuda)]
    device = next((torch.device(x) for x in [*args, *kwargs.values()] if isinstance(x, torch.device)), None)
    if name == "_pin_memory" or func is torch.ops.aten.pin_memory.default:
        return args[0]
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    if not ours and (device is None or device.type != "cuda"):
        return func(*args, **kwargs)
    strays = [x for x in tensors if not isinstance(x, OnCuda) and x.dim() > 0]
    if ours and strays and name not in MIXES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {name}")
    leaves = device is not None and device.type == "cpu"
    by_mask = "index" in name and any(x.dtype == torch.bool for x in ours[1:])
    unsized = name != "repeat_interleave" or kwargs.get("output_size") is None
    if ours and ((name in WAITS and unsized) or leaves or by_mask):
        _wait(name)
    to_host = name == "copy_" and bool(ours) and not isinstance(args[0], OnCuda)
    waits_not = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    if to_host and not waits_not:
        _wait("copy_ to the host")
    elif strays:  # which may be such a copy, and the stream keeps the order
        arrive()
    if strays and _recording is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {name} copies from the host")
    is_kernel = launches_kernel(func)
    if is_kernel and not _inside_fused:
        launches[name] += 1
    if name in failures and is_kernel:
        failures[name] -= 1
        if failures[name] < 0:
            del failures[name]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (simulated)")
    written = _written(func, args, kwargs)
    if _recording is not None and is_kernel:
        undo.extend((tensor.host, tensor.host.clone()) for tensor in written.values() if isinstance(tensor, OnCuda))
    out, _random_state = _execute(func, args, kwargs, _random_state)
    if to_host and waits_not:
        _on_the_way.append((args[0], args[0].clone()))
        args[0].fill_(float("nan") if args[0].dtype.is_floating_point else 0)
    returns = func._schema.returns
    if written and all(r.alias_info and r.alias_info.is_write for r in returns):
        same = [written[frozenset(r.alias_info.before_set)] for r in returns]
        made = same[0] if len(same) == 1 else tuple(same) or None
    else:
        made = out if leaves else tree_map(on_cuda, out)
    if _recording is not None and is_kernel:
        _recording.kernels.append((func, args, kwargs, made))
    if memory["now"] > memory["limit"]:
        raise torch.OutOfMemoryError(f"CUDA out of memory. {name} takes {memory['now']} bytes. (simulated)")
    return made


def _execute(func: Any, args: Any, kwargs: Any, random_state: Tensor) -> tuple[Any, Tensor]:
    """Run an operator on the CPU tensors, drawing from CUDA's random state; returns its result and the new state."""
    given = tree_map(_host, args)
    named = {key: tree_map(_host, value) for key, value in kwargs.items()}
    if func is torch.ops.aten.addmm.dtype_out:  # exists on CUDA alone
        func, named, given = torch.ops.aten.addmm.out, {"out": named["out"]}, [x.float() for x in given[:3]]
    if func._schema.name in KERNELS:
        if "varlen" in func._schema.name and torch.cuda.get_device_capability() < (8, 0):
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
        return KERNELS[func._schema.name](*given, **named), random_state
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return func(*given, **named), random_state
    before = torch.get_rng_state()
    torch.set_rng_state(random_state)
    try:
        return func(*given, **named), torch.get_rng_state()
    finally:
        torch.set_rng_state(before)


def _written(func: Any, args: Any, kwargs: Any) -> dict[frozenset[str], Any]:
    arguments = func._schema.arguments
    values = [args[i] if i < len(args) else kwargs.get(argument.name) for i, argument in enumerate(arguments)]
    return {
        frozenset(argument.alias_info.before_set): value
        for argument, value in zip(arguments, values, strict=True)
        if argument.alias_info and argument.alias_info.is_write
    }


def _writes(func: Any) -> bool:
    return any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)


def move(module: nn.Module) -> nn.Module:
    """Put a module there, 4-bit layers included; parameters that are there stay the same objects."""
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is None or isinstance(parameter, OnCuda):
                continue
            moved = nn.Parameter(OnCuda(parameter.data), requires_grad=parameter.requires_grad)
            part._parameters[key] = moved
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                state.to("cuda")
                kept = ("quant_type", "blocksize", "compress_statistics", "quant_storage", "module")
                facts = {name: getattr(parameter, name) for name in kept}
                moved.__dict__.update(facts, quant_state=state, bnb_quantized=True)
        part._buffers.update({key: on_cuda(buffer) for key, buffer in part._buffers.items()})
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module


def install(capability: tuple[int, int] = (7, 5), size: int = int(14.56 * 2**30)) -> FakeCuda:
    """Make torch believe in one card of this compute capability and size (bytes); returns the entered mode."""
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)

    def to(self: nn.Module, *args: Any, plain: Any = nn.Module.to, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is None and device is not None and device.type == "cuda":
            return move(self)
        return plain(self, *args, **kwargs)

    def put(state: Any, device: Any = None) -> None:
        global _random_state
        _random_state = (state[0] if isinstance(state, list) else state).clone()

    def seed(number: int) -> None:
        put(torch.Generator().manual_seed(int(number)).get_state())

    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    name = f"simulated sm_{capability[0]}{capability[1]}"
    card = types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], total_memory=size, multi_processor_count=40
    )
    stream = types.SimpleNamespace(
        **dict.fromkeys(("wait_stream", "synchronize", "record_event", "wait_event"), nothing)
    )
    stand_ins: dict[str, Any] = dict.fromkeys(("_lazy_init", "set_device", "empty_cache", "ipc_collect"), nothing)
    stand_ins |= dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *_, **__: memory["now"])
    stand_ins |= dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda *_, **__: memory["peak"])
    stand_ins |= {
        "current_device": lambda: 0,
        "reset_peak_memory_stats": lambda *_: memory.update(peak=memory["now"]),
        "synchronize": lambda *_: arrive(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda *_: True,
        "mem_get_info": lambda device=None: (size - 2**29 - memory["now"], size),
        "get_device_properties": lambda device=None: card,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: name,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90"],
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_rng_state": lambda device=None: _random_state.clone(),
        "get_rng_state_all": lambda: [_random_state.clone()],
        "set_rng_state": put,
        "set_rng_state_all": put,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": list,
        "is_current_stream_capturing": lambda: _recording is not None,
        "device": lambda _: _nothing_entered(),
        "get_sync_debug_mode": lambda: _sync_debug_mode,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "Stream": lambda *_, **__: stream,
        "current_stream": lambda *_, **__: stream,
        "stream": lambda _: _nothing_entered(),
    }
    for place in (torch.cuda, torch.cuda.random):
        for key, value in stand_ins.items():
            setattr(place, key, value)

    def load(file: Any, map_location: Any = None, *, plain: Any = torch.load, **kwargs: Any) -> Any:
        to_card = map_location is not None and "cuda" in str(map_location)
        loaded = plain(file, "cpu" if to_card else map_location, **kwargs)
        return tree_map(on_cuda, loaded) if to_card else loaded

    torch.load = load
    nn.Module.to = to  # type: ignore[method-assign, assignment]
    torch.inference_mode = lambda mode=True: torch.no_grad()  # type: ignore[misc, assignment]
    global _mode
    _mode = FakeCuda()
    _mode.__enter__()
    return _mode


@contextmanager
def off() -> Iterator[None]:
    """Make plain CPU tensors inside the context."""
    assert _mode is not None
    _mode.__exit__(None, None, None)
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        _mode.__enter__()


def is_installed() -> bool:
    """Return whether torch believes in the card."""
    return _mode is not None


def _set_sync_debug_mode(mode: Any) -> None:
    global _sync_debug_mode
    _sync_debug_mode = mode


@contextmanager
def _nothing_entered() -> Iterator[None]:
    yield
