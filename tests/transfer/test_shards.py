"""Clipping a step to a shard, against the same slices of real tensors."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from tepatch.planning.bind import IDENTITY
from tepatch.planning.plan import Step
from tepatch.transfer.shards import Cut, clip, shard_shape


def shards_of(step: Step, source: torch.Tensor, shape: tuple[int, ...], cuts: list[Cut]) -> torch.Tensor:
    """The shard, filled by the clipped steps; what none of them writes is -1, and nothing is written twice."""
    out = torch.full(shard_shape(shape, cuts), -1)
    written = torch.zeros_like(out)
    for part in clip(step, shape, cuts):
        seen = source.as_strided(part.sizes, part.read_strides, part.read_offset)
        out.as_strided(part.sizes, part.write_strides, part.write_offset).copy_(seen)
        written.as_strided(part.sizes, part.write_strides, part.write_offset).add_(1)
    assert not (written > 1).any()
    return out


def random_step(rng: random.Random) -> tuple[Step, torch.Tensor, tuple[int, ...]]:
    """A view of a parameter: its dimensions cut into blocks, some narrowed, in another order; and a source for it."""
    shape = tuple(rng.choice([1, 2, 3, 4, 6, 8]) for _ in range(rng.randint(1, 3)))
    atoms, offset, stride = [], 0, prod(shape)
    for size in shape:
        stride //= size
        block = rng.choice([d for d in range(1, size + 1) if size % d == 0])
        for n, s in ((size // block, stride * block), (block, stride)):
            kept = rng.randint(1, n) if rng.random() < 0.3 else n
            start = rng.randint(0, n - kept)
            offset += start * s
            atoms.append((kept, s))
    if rng.random() < 0.5:
        rng.shuffle(atoms)
    merged: list[tuple[int, int]] = []  # as plans merge what is contiguous on both sides
    for n, s in atoms:
        if n == 1:
            continue
        if merged and merged[-1][1] == n * s:
            merged[-1] = (merged[-1][0] * n, s)
        else:
            merged.append((n, s))
    merged = merged or [(1, 1)]
    sizes = tuple(n for n, _ in merged)
    reads = tuple(prod(sizes[i + 1 :]) for i in range(len(sizes)))
    step = Step("s", sizes, reads, 0, tuple(s for _, s in merged), offset, IDENTITY, False)
    return step, torch.arange(prod(sizes)), shape


@pytest.mark.parametrize("seed", range(40))
def test_any_cut_of_any_step_is_the_slice_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        step, source, shape = random_step(rng)
        cuts, left, expected = [], list(shape), shards_of(step, source, shape, [])
        for _ in range(rng.randint(1, 2)):
            dim = rng.randrange(len(shape))
            start = rng.randint(0, left[dim])
            size = rng.randint(0, left[dim] - start)
            cuts.append(Cut(dim, start, size))
            left[dim] = size
            expected = expected.narrow(dim, start, size)
        assert torch.equal(shards_of(step, source, shape, cuts), expected), (step, shape, cuts)


def test_a_run_stays_a_run_when_rows_are_cut() -> None:
    step = Step("s", (64 * 48,), (1,), 0, (1,), 0, IDENTITY, False)
    (part,) = clip(step, (64, 48), [Cut(0, 10, 7)])
    assert part == Step("s", (7 * 48,), (1,), 480, (1,), 0, IDENTITY, False)


def test_cut_columns_are_one_view() -> None:
    step = Step("s", (64 * 48,), (1,), 0, (1,), 0, IDENTITY, False)
    (part,) = clip(step, (64, 48), [Cut(1, 12, 12)])
    assert (part.sizes, part.read_strides, part.read_offset, part.write_strides) == ((64, 12), (48, 1), 12, (12, 1))


def test_a_column_parallel_fused_projection_takes_its_heads_of_each_part() -> None:
    """Query, key and value one below the other: a rank's rows are three ranges of the parameter, so three of clips."""
    rows = {"q": (0, 16), "k": (16, 8), "v": (24, 8)}
    weights = {name: torch.randn(size, 4) for name, (_, size) in rows.items()}
    whole = torch.cat(list(weights.values()))
    for rank in range(2):
        local = torch.zeros(16, 4)
        at = 0
        for begin, size in rows.values():
            for name, (offset, count) in rows.items():
                step = Step(name, (count * 4,), (1,), 0, (1,), offset * 4, IDENTITY, False)
                for part in clip(step, (32, 4), [Cut(0, begin + rank * size // 2, size // 2)]):
                    seen = weights[name].as_strided(part.sizes, part.read_strides, part.read_offset)
                    local.as_strided(part.sizes, part.write_strides, part.write_offset + at * 4).copy_(seen)
            at += size // 2
        expected = torch.cat([part.chunk(2)[rank] for part in whole.split([16, 8, 8])])
        assert torch.equal(local, expected)
