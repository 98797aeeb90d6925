"""Putting tensors together as a plan says, in the plan's direction, one at a time.

Whatever is read (files, a model's parameters) is a function from a name to a tensor; whatever is written goes
through a function that takes bytes and a position. So one executor serves saving and both directions of a
conversion, and its memory is one tensor for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping
from math import prod

import torch
import xxhash

from tepatch.checkpoint.writing import tensor_bytes
from tepatch.dtypes import ITEM_SIZES, torch_dtype
from tepatch.errors import CheckpointError, LoadError, Problem, SaveError
from tepatch.mapping.names import fold
from tepatch.planning.bind import IDENTITY
from tepatch.planning.plan import Plan, Step

Read = Callable[[str], torch.Tensor]
"""From a name of ``plan.reads`` to its tensor, of that shape; it is not written to."""
WriteAt = Callable[[memoryview, int], None]
"""Write bytes at a position of the file (in bytes)."""
Digests = MutableMapping[str, str]
"""xxh3_128 over the bytes of a tensor that was read, by name, in hexadecimal digits."""
Pieces = Callable[[str, int, int], Iterator[memoryview]]
"""From a name of ``plan.reads``, a start and a length (in bytes) to these bytes of it, a piece at a time."""
PIECE_BYTES = 1 << 20
"""What a processor's cache holds: between reading and writing it, a digest of it costs next to nothing."""


def assemble(plan: Plan, name: str, read: Read) -> torch.Tensor:
    """One tensor of ``plan.writes``: new, contiguous, on the device of what it is made of.

    Memory: that tensor and the one that is read; and, where values are scaled, a float64 copy of the part. Raises
    ``LoadError``, or ``SaveError`` when the plan is reversed, for a value that the written dtype can not hold.
    """
    spec, steps = plan.writes[name], plan.steps[name]
    out: torch.Tensor | None = None
    for step in steps:
        source = read(step.read)
        if out is None:
            out = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=source.device)
        put(step, source, out)
    if out is None:
        out = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    if not plan.is_reversed:
        for fill in plan.constants.get(name, ()):
            pair = fill.pair
            out.as_strided(pair.sizes, pair.target_strides, pair.target_offset).fill_(fill.value)
    return out


def write_tensor(
    plan: Plan,
    name: str,
    read: Read,
    write: WriteAt,
    position: int,
    *,
    pieces: Pieces | None = None,
    digests: Digests | None = None,
) -> None:
    """Write one tensor of ``plan.writes`` at ``position``.

    What is made of runs of bytes (plain concatenation, in either direction) goes from where it is read to where it
    is written without being put together in memory: with ``pieces``, a piece at a time. ``digests`` gets those of
    the tensors that so pass by whole.
    """
    spec, steps = plan.writes[name], plan.steps[name]
    dtype = torch_dtype(spec.dtype)
    has_constants = not plan.is_reversed and name in plan.constants
    if has_constants or not all(step.is_run for step in steps):
        write(tensor_bytes(assemble(plan, name, read).cpu()), position)
        return
    for step in steps:
        size = ITEM_SIZES[spec.dtype]
        at = position + step.write_offset * size
        given = plan.reads[step.read]
        if pieces is None or given.dtype != spec.dtype:
            run = read(step.read).contiguous().view(-1)[step.read_offset : step.read_offset + step.numel]
            if run.dtype != dtype:
                given_run, run = run, run.to(dtype)
                _check_range(step, given_run, run)
            write(tensor_bytes(run.cpu()), at)
            continue
        digest = xxhash.xxh3_128() if digests is not None and step.numel == prod(given.shape) else None
        for piece in pieces(step.read, step.read_offset * size, step.numel * size):
            if digest is not None:
                digest.update(piece)
            write(piece, at)
            at += len(piece)
        if digests is not None and digest is not None:
            digests[step.read] = digest.hexdigest()


def check_constants(plan: Plan, read: Read) -> None:
    """Before saving: what the plan calls a constant has no place in what is written, and must still be one.

    Raises ``SaveError`` naming every parameter in which it is not.
    """
    changed: dict[str, str] = {}
    for name, fills in plan.constants.items() if plan.is_reversed else ():
        tensor = read(name).contiguous()
        for fill in fills:
            part = tensor.as_strided(fill.pair.sizes, fill.pair.target_strides, fill.pair.target_offset)
            if not bool((part == fill.value).all()):
                changed[name] = f"{name}: {fill.value} expected, values from {float(part.min())} to {float(part.max())}"
    if changed:
        raise SaveError(
            Problem(
                where=plan.location,
                what=f"{len(changed)} parameters have parts that the checkpoint's layout has no place for, "
                "and they no longer are the constants that they were",
                details=tuple(changed.values())[:10],
                fix="set these parts back, or freeze them while you train",
            )
        )


def check_copies(plan: Plan, read: Read) -> None:
    """Before converting: a second copy of a tied tensor is dropped, and so must be equal to the parameter.

    Raises ``CheckpointError`` for one that is not. ``plan`` loads.
    """
    for name, entry in plan.sources.items():
        if entry.state == "redundant":
            check_copy(plan, name, read(name), assemble(plan, entry.note, read))


def check_copy(plan: Plan, name: str, copy: torch.Tensor, parameter: torch.Tensor) -> None:
    """Raise ``CheckpointError`` unless ``copy``, a redundant tensor of the checkpoint, is the tied ``parameter``."""
    if not same_bits(copy.to(parameter.device, parameter.dtype), parameter):
        raise differing_copy(plan, name)


def differing_copy(plan: Plan, name: str) -> CheckpointError:
    """The error for a redundant tensor that is not the parameter it should be equal to."""
    return CheckpointError(
        Problem(
            where=plan.location,
            what=f"{name} differs from {plan.sources[name].note}, and the config says that they are one parameter",
            fix="set tie_word_embeddings=False in config.json if both are meant to be kept",
        )
    )


def damaged(location: str, names: Collection[str]) -> CheckpointError:
    """The error for tensors of the original that a converted checkpoint no longer holds, by the digests of them."""
    return CheckpointError(
        Problem(
            where=location,
            what=f"{len(names)} of the original's tensors are not what they were when this checkpoint was converted",
            details=tuple(fold(names, 12)),
            expected="the digests in its manifest",
            fix="copy the converted checkpoint again from where it is whole, or convert the original again",
        )
    )


def put(step: Step, source: torch.Tensor, out: torch.Tensor) -> None:
    """Copy one step's elements from the tensor that is read into the (contiguous) one that is written.

    Raises ``LoadError``, or ``SaveError`` when the plan is reversed, for a value that ``out`` can not hold.
    """
    seen, place = put_unchecked(step, source, out)
    _check_range(step, seen, place)


def put_unchecked(step: Step, source: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``put``, but what is read and where it went is given back: ``overflow`` tells whether all of it could be held."""
    seen = source.to(out.device).contiguous()
    seen = seen.as_strided(step.sizes, step.read_strides, seen.storage_offset() + step.read_offset)
    place = out.as_strided(step.sizes, step.write_strides, out.storage_offset() + step.write_offset)
    if step.affine != IDENTITY:
        # In float64, so that the only rounding is the one to the written dtype.
        scale, offset = step.affine
        seen = seen.to(torch.float64, copy=True)  # what is read stays as it is
        seen = seen.sub_(offset).div_(scale) if step.is_undone else seen.mul_(scale).add_(offset)
    place.copy_(seen)
    return seen, place


def overflow(seen: torch.Tensor, place: torch.Tensor) -> torch.Tensor | None:
    """Whether a number became infinite on its way from ``seen`` to ``place``: one bool, on their device.

    A number beyond what a dtype holds becomes infinite, and the model NaN, without a word from torch. None if the
    dtypes do not let it happen.
    """
    return (torch.isinf(place) > torch.isinf(seen)).any() if _may_overflow(seen, place) else None


def _may_overflow(seen: torch.Tensor, place: torch.Tensor) -> bool:
    are_floats = place.is_floating_point() and seen.is_floating_point()
    return are_floats and torch.finfo(place.dtype).max < torch.finfo(seen.dtype).max


def overflow_error(step: Step, seen: torch.Tensor, dtype: torch.dtype) -> LoadError | SaveError:
    """The error for numbers in ``seen`` that ``dtype`` can not hold: a ``SaveError`` for a step that is undone."""
    name = str(dtype).removeprefix("torch.")
    problem = Problem(
        where=step.read,
        what=f"values that {name} can not hold",
        expected=f"at most {torch.finfo(dtype).max}",
        found=str(float(seen[seen.isfinite()].abs().max())),
        fix="use bfloat16 or float32" if dtype == torch.float16 else "use a wider dtype",
    )
    return SaveError(problem) if step.is_undone else LoadError(problem)


def _check_range(step: Step, seen: torch.Tensor, place: torch.Tensor) -> None:
    """Raise ``LoadError`` (``SaveError`` for a step that is undone) if a number became infinite."""
    if not _may_overflow(seen, place) or not torch.isinf(place).any():  # nearly always, and half the work
        return
    if (flag := overflow(seen, place)) is not None and bool(flag):
        raise overflow_error(step, seen, place.dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype have the same shape and bits: NaN counts, and so does the sign of zero."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(bits_of(one), bits_of(other))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as whole numbers of the same size, contiguous."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(bits)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python means that there is not enough memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
