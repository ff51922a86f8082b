"""Memory of CUDA arenas: allocations with POSIX descriptors, which outlive the process that made them.

cuda.bindings is imported when first needed: a machine without a GPU has no use for it.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch

from tpmodel_worker.arenas.errors import ArenaError, ArenaMemoryError, ArenaSizeError


class DeviceMemory:
    """A range of device addresses backed by shareable memory; given back with its last tensor.

    torch keeps this object alive through every tensor made from `__cuda_array_interface__`, so no
    view can outlive the mapping.
    """

    def __init__(self, address: int, size: int, handle: Any, device: torch.device) -> None:
        self.address = address
        self.size = size
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        # atexit would run after the driver has shut down; the driver gives the mapping back by itself then.
        weakref.finalize(self, _unmap, address, size, handle, device).atexit = False

    def tensor(self, device: torch.device) -> torch.Tensor:
        """The whole memory as uint8, without a copy."""
        view = torch.as_tensor(self, device=device)
        if view.data_ptr() != self.address:
            raise ArenaError(f"torch copied device memory at {self.address:#x} instead of viewing it on {device}")
        return view


def rounded_size(size: int, device: torch.device) -> int:
    """The least multiple of the device's allocation granularity that holds size bytes."""
    driver = _driver()
    _enter_context(device)
    flag = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    granularity = int(_checked(driver.cuMemGetAllocationGranularity(_properties(device), flag)))
    return max(-(-size // granularity), 1) * granularity


def create_device_memory(what: str, size: int, device: torch.device) -> tuple[int, DeviceMemory]:
    """Makes device memory of size bytes (a multiple of the granularity), unset; returns descriptor and mapping.

    Raises:
        ArenaMemoryError: less than size bytes are free on the device.
        ArenaError: any other refusal of the driver.
    """
    driver = _driver()
    _enter_context(device)
    result, handle = driver.cuMemCreate(size, _properties(device), 0)
    if result == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        free, _ = torch.cuda.mem_get_info(device)
        raise ArenaMemoryError(f"{what} on {device}", needed_bytes=size, free_bytes=free)
    _checked((result, handle))
    try:
        descriptor = int(_checked(driver.cuMemExportToShareableHandle(handle, _posix_handle_type(), 0)))
    except ArenaError:
        driver.cuMemRelease(handle)
        raise
    try:
        return descriptor, _map(what, handle, size, device)
    except ArenaError:
        os.close(descriptor)
        raise


def map_device_memory(what: str, descriptor: int, size: int, device: torch.device) -> DeviceMemory:
    """Maps memory that another process made (or this one, before).

    Raises:
        ArenaSizeError: the memory is smaller than size bytes (a multiple of the granularity).
        ArenaError: any other refusal of the driver.
    """
    driver = _driver()
    _enter_context(device)
    return _map(what, _checked(driver.cuMemImportFromShareableHandle(descriptor, _posix_handle_type())), size, device)


def _map(what: str, handle: Any, size: int, device: torch.device) -> DeviceMemory:
    """Gives the allocation an address; takes the handle over, also when it fails."""
    driver = _driver()
    address = None
    mapped = False
    try:
        address = _checked(driver.cuMemAddressReserve(size, 0, 0, 0))
        (result,) = driver.cuMemMap(address, size, 0, handle, 0)
        # What drivers answer when more is mapped than was allocated: the second where the memory was imported.
        if result in (driver.CUresult.CUDA_ERROR_INVALID_VALUE, driver.CUresult.CUDA_ERROR_NOT_SUPPORTED):
            raise ArenaSizeError(f"{what}: its manifest says {size} bytes, which its descriptor does not have")
        _checked((result,))
        mapped = True
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = _index(device)
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        _checked(driver.cuMemSetAccess(address, size, [access], 1))
    except ArenaError:
        if mapped:
            driver.cuMemUnmap(address, size)
        if address is not None:
            driver.cuMemAddressFree(address, size)
        driver.cuMemRelease(handle)
        raise
    return DeviceMemory(int(address), size, handle, device)


def _unmap(address: int, size: int, handle: Any, device: torch.device) -> None:
    driver = _driver()
    # Kernels that were launched on the memory may still run.
    torch.cuda.synchronize(device)
    driver.cuMemUnmap(address, size)
    driver.cuMemAddressFree(address, size)
    driver.cuMemRelease(handle)


def _driver() -> Any:
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue] (a compiled module without stubs)

    return driver


def _enter_context(device: torch.device) -> None:
    """Makes the device's primary context, which torch uses, the current one of this thread."""
    torch.cuda.set_device(device)
    torch.cuda.synchronize(device)


def _properties(device: torch.device) -> Any:
    driver = _driver()
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = _index(device)
    properties.requestedHandleTypes = _posix_handle_type()
    return properties


def _posix_handle_type() -> Any:
    return _driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _index(device: torch.device) -> int:
    if device.index is None:
        raise ValueError(f"device {device} has no index: a rank names its device, for example cuda:0")
    return device.index


def _checked(results: tuple[Any, ...]) -> Any:
    """The value of a driver call, which returns (result,) or (result, value)."""
    if results[0] != _driver().CUresult.CUDA_SUCCESS:
        raise ArenaError(f"the CUDA driver answered {results[0]!r}")
    return results[1] if len(results) > 1 else None
