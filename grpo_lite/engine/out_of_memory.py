"""`is_out_of_memory`: one decision for PyTorch's allocator, the CUDA driver, cuBLAS, cuDNN, Triton and NCCL.

Torch-free. Used wherever a phase is repeated with less at once; every other error is raised.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re

_SAID = re.compile(
    # "CUDA error: out of memory" (torch.AcceleratorError), "CUDA driver error: …", "Triton Error [CUDA]: …",
    # "MPS backend out of memory", NCCL's "Cuda failure 2 'out of memory'"
    r"\b(?:CUDA|HIP|ROCm|XPU|MPS|NCCL)\b[^\n]{0,80}\bout of memory\b"
    r"|\bOUT_OF_(?:DEVICE_|HOST_)?MEMORY\b|cudaErrorMemoryAllocation|hipErrorOutOfMemory"
    # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED, CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED …
    r"|\b(?:CU|HIP|ROC)[A-Z]+_STATUS_[A-Z_]*ALLOC(?:ATION)?_FAILED\b"
    r"|DefaultCPUAllocator: (?:can't allocate memory|not enough memory)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device, or the main memory of a CPU run, is full.

    As in `accelerate.utils.memory.should_reduce_batch_size`, but by type first, and without what only may mean it:
    `CUDNN_STATUS_NOT_SUPPORTED` (a kernel that does not exist) and `CUBLAS_STATUS_NOT_INITIALIZED` (as often a broken
    context) would be retried in vain. Triton's "out of resource" is about a kernel's shared memory, which smaller
    batches do not change.
    """
    if not isinstance(error, RuntimeError):
        return False
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__) or bool(_SAID.search(str(error)))


def free_memory() -> None:
    """Give what no tensor needs back to the device; call it outside the handler, whose traceback holds tensors."""
    import torch

    gc.collect()
    trim_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim_heap() -> None:
    """Give what glibc keeps of freed blocks back to the system: it would stay in the process's resident set."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
