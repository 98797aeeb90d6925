"""Memory on the host that a GPU copies from by itself, while the CPU goes on."""

from __future__ import annotations

import contextlib
import mmap
from types import TracebackType
from typing import Any

import torch

from tepatch.errors import LoadError, Problem

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class HostMemory:
    """``nbytes`` of memory, in huge pages where the system has them, and pinned for CUDA if ``is_pinned``.

    Registering memory of one's own takes a tenth of the time of ``torch.empty(pin_memory=True)``, which also keeps
    what it once had. Where the system does not let that much be pinned, the memory is ordinary: copies from it work,
    and are slower; ``is_pinned`` says so. Raises ``LoadError`` with ``where`` it was needed if there is no memory.
    """

    def __init__(self, nbytes: int, *, is_pinned: bool, where: str = "a buffer") -> None:
        try:
            self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise LoadError(
                Problem(
                    where=where,
                    what="out of memory on the host for a buffer to read into",
                    expected=f"{nbytes:,} bytes",
                    found=str(error),
                    fix="give this process more (ulimit -v, or the container's limit), or have fewer and smaller ones:"
                    " Reading(threads=1, buffers=1, piece_bytes=1 << 20)",
                )
            ) from error
        with contextlib.suppress(OSError, AttributeError):  # a kernel without them refuses
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        """The memory as a tensor."""
        self.is_pinned = is_pinned and self._register(nbytes)

    def _register(self, nbytes: int) -> bool:
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        try:
            return int(cudart.cudaHostRegister(self.bytes.data_ptr(), nbytes, _PORTABLE)) == 0
        except RuntimeError:
            return False

    def close(self) -> None:
        """Unpin and free it. No copy from it may be under way, and no tensor of it in use."""
        if self.is_pinned:
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            cudart.cudaHostUnregister(self.bytes.data_ptr())
            self.is_pinned = False
        self.view.release()
        del self.bytes  # with the last tensor of it, the map goes

    def __enter__(self) -> HostMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
