"""Memory running out as the libraries say it, and errors that only sound like it."""

from __future__ import annotations

import torch

_DRIVER = getattr(torch, "AcceleratorError", RuntimeError)  # since torch 2.8

OVERFLOWS: dict[str, RuntimeError] = {
    "allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity …"),
    "driver": _DRIVER("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other …"),
    "driver-api": RuntimeError("CUDA driver error: out of memory"),
    "old-torch": RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn-9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "rocm": RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 17.57 GB, other allocations: 2.00 MB)"),
    "nccl": RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:2, unhandled cuda error\nCuda failure 2 'out of memory'"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 16 bytes."),
}
OTHERS: dict[str, BaseException] = {
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x32 and 48x32)"),
    "assert": _DRIVER("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously …"),
    "cublas-context": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    "cudnn-no-kernel": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if …"),
    "triton-shared-memory": RuntimeError("out of resource: shared memory, Required: 180224, Hardware limit: 101376"),
    "another-device": RuntimeError("the sandboxed program ran out of memory"),
    "far-apart": RuntimeError("CUDA is fine\nthe reward server is out of memory"),
    "no-runtime-error": ValueError("CUDA out of memory"),
    "interrupt": KeyboardInterrupt("CUDA out of memory"),
}
