"""Change bytes and values of checkpoints at random, and see that nothing but an error of tepatch's comes of it.

    make fuzz MINUTES=2
    python scripts/fuzz.py --mutations 5000 --seed 7
    python scripts/fuzz.py --seed 7 --only 1234        # one of them again

Every mutation is of one small checkpoint in one of its forms (safetensors, shards with an index, ``.bin``, converted)
and follows from the seed and its number alone. What must not be: an exception that is not a ``TepatchError``, a raw
control character in its text, a wait of more than ten seconds, more than 2 GB of memory, and an accepted change that a
digest, a checksum or a length of the files tells. The exit code is 1 if any of it was, with what repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TEPATCH_PROVE"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

MAX_SECONDS = 10
MAX_BYTES = 2 << 30
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MAPPING = """version: 1
extends: tepatch_llama:llama.tepatch.yaml
captures: {layer: num_hidden_layers}
sizes: {ffn: intermediate_size, heads: num_attention_heads}
ignore:
  - "model.layers.{layer}.mlp.unused": "nobody needs it"
parameters:
  model.layers.{layer}:
    mlp.fc1_weight: {concat: [mlp.gate_proj.weight, mlp.up_proj.weight], sizes: [ffn, ffn], dim: 0}
    mlp.fc2_weight: {of: mlp.down_proj.weight}
"""
HOSTILE_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        3,
        1e308,
        float("nan"),
        float("inf"),
        10**6,
        10**9,
        2**63,
        10**30,
        "",
        "x",
        "\x1b[2J",
        "\ud800",
    ),
    *("\u202e", "../../etc/passwd", [], [[]], {}, {"a": 1}, [None] * 9, {"model_type": "llama"}, ["LlamaForCausalLM"]),
)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"
FOREIGN = (
    b"",
    LFS,
    b"<!DOCTYPE html><html>",
    bytes(5000),
    b"GGUF\3\0\0\0",
    b'{"error": "x"}',
    b"\x80\x04N.",
    b"PK\x03\x04",
)


@dataclass(frozen=True)
class Case:
    """A form of the checkpoint, and the files in it that are changed."""

    form: str
    file: str


CASES = (
    *(Case("safetensors", file) for file in ("model.safetensors", "config.json", "generation_config.json")),
    *(Case("sharded", file) for file in ("model.safetensors.index.json", "model-00001-of-00002.safetensors")),
    *(Case("bin", file) for file in ("pytorch_model.bin", "pytorch_model.bin")),
    *(Case("te", file) for file in ("tepatch.safetensors", "tepatch.json", "config.json")),
    Case("mapped", "my.tepatch.yaml"),
)


class SlowError(BaseException):
    """A mutation took too long. Not an ``Exception``: nothing may catch it."""


def make_checkpoints(folder: Path) -> None:
    """The small checkpoint in all its forms."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    import tepatch

    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, dtype=torch.float32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder / "safetensors")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for form in ("sharded", "bin", "mapped"):
        shutil.copytree(folder / "safetensors", folder / form)
    (folder / "mapped" / "my.tepatch.yaml").write_text(MAPPING)
    (folder / "bin" / "model.safetensors").unlink()
    torch.save(tensors, folder / "bin" / "pytorch_model.bin")
    (folder / "sharded" / "model.safetensors").unlink()
    weight_map = {}
    for index in range(2):
        file = f"model-{index + 1:05}-of-00002.safetensors"
        part = {name: tensor for position, (name, tensor) in enumerate(tensors.items()) if position % 2 == index}
        save_file(part, folder / "sharded" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "sharded" / "model.safetensors.index.json").write_text(text)
    tepatch.convert("llama", folder / "safetensors", folder / "te", progress=False)


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes that were flipped, cut off, added, moved, or are those of something else."""
    if chance.random() < 0.05:
        return chance.choice(FOREIGN)
    out = bytearray(data)
    # The headers are where most of the decisions are.
    reach = len(out) if chance.random() < 0.5 else min(len(out), 4000)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        if not out:
            break
        at, kind = chance.randrange(min(reach, len(out))), chance.randrange(6)
        if kind <= 1:
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            out[at] = chance.randrange(256)
        elif kind == 3:
            del out[at : at + chance.choice((1, 8, 1000, len(out)))]
        elif kind == 4:
            out[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 8, 100))))
        else:
            size, other = chance.choice((1, 4, 64, 1024)), chance.randrange(len(out))
            out[at : at + size], out[other : other + size] = out[other : other + size], out[at : at + size]
    return bytes(out)


def change_json(data: bytes, chance: random.Random) -> bytes:
    """JSON in which values were replaced, removed, exchanged, doubled or nested."""
    value = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            break
        holder, key = chance.choice(places)
        kind = chance.randrange(7)
        if kind <= 2:
            holder[key] = chance.choice(HOSTILE_VALUES)
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            other, other_key = chance.choice(places)
            with contextlib.suppress(KeyError, IndexError):
                holder[key], other[other_key] = other[other_key], holder[key]
        elif kind == 5 and isinstance(holder, dict):
            holder[chance.choice(("\x1b[31m", "text_config", "auto_map", "configuration_files", "architectures"))] = (
                holder[key]
            )
        else:
            for _ in range(chance.choice((1, 40, 100))):
                holder[key] = [holder[key]]
    text = json.dumps(_plain(value))
    if chance.random() < 0.05:
        text = text.replace('{"', '{"a": 1, "a": 2, "', 1)
    elif chance.random() < 0.05:
        text = text.replace(": ", ": " + "[" * chance.choice((500, 100_000)), 1)
    return text.encode("utf-8", "surrogatepass")


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy without what was exchanged into itself."""
    if depth > 120:
        return None
    if isinstance(value, dict):
        return {key: _plain(each, depth + 1) for key, each in value.items()}
    return [_plain(each, depth + 1) for each in value] if isinstance(value, list) else value


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        if depth < 40:
            yield from _places(inner, depth + 1)


def change_text(data: bytes, chance: random.Random) -> bytes:
    """A mapping with words exchanged, numbers made large, lines doubled or moved."""
    lines = data.decode().splitlines()
    for _ in range(chance.choice((1, 1, 2, 3))):
        at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
        kind = chance.randrange(5)
        if kind == 0:
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 1:
            lines.insert(at, lines[other])
        elif kind == 2:
            words = ("layer", "ffn", "num_hidden_layers", "concat", "dim: 0", "1", "intermediate_size", "of", "weight")
            news = (
                "99999999",
                "range(100000)",
                "stack",
                "layer",
                '"\\e[2J"',
                "hidden_size * 1000000",
                "any_of",
                "{}",
                "-1",
            )
            lines[at] = lines[at].replace(chance.choice(words), chance.choice(news))
        elif kind == 3:
            lines[at] = "  " * chance.randrange(4) + lines[at].strip()
        else:
            lines[at] = lines[at].replace(
                "captures: {layer: num_hidden_layers}", "captures: {layer: 100000, b: 100000}"
            )
    return "\n".join(lines).encode()


def changed(case: Case, data: bytes, chance: random.Random) -> bytes:
    """``data`` of a case's file, changed."""
    if chance.random() < 0.6:
        if case.file.endswith(".json"):
            return change_json(data, chance)
        if case.file.endswith(".yaml"):
            return change_text(data, chance)
        if case.file.endswith(".safetensors") and chance.random() < 0.5:
            length = int.from_bytes(data[:8], "little")
            header = change_json(data[8 : 8 + length], chance)
            return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return change_bytes(data, chance)


class Fuzzer:
    """Runs mutations and counts what came of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        import torch
        from safetensors.torch import load_file

        self.folder = folder
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest = 0.0
        make_checkpoints(folder)
        self.original = load_file(folder / "safetensors" / "model.safetensors")
        self.equal = torch.equal

    def run(self, number: int) -> None:
        """One mutation: it follows from the seed and ``number``."""
        chance = random.Random(f"{self.seed} {number}")
        case = chance.choice(CASES)
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.folder / case.form, work / "checkpoint")
        path = work / "checkpoint" / case.file
        data = path.read_bytes()
        mutated = changed(case, data, chance)
        path.write_bytes(mutated)
        started = time.perf_counter()
        outcome = self._outcome(case, work, is_same=mutated == data)
        seconds = time.perf_counter() - started
        self.slowest = max(self.slowest, seconds)
        self.counts[f"{case.form}/{case.file}: {outcome.splitlines()[0]}"] += 1
        if not outcome.startswith(("refused", "accepted")):
            self.failures.append(f"--seed {self.seed} --only {number}  ({case.form}/{case.file})\n{outcome}")

    def _outcome(self, case: Case, work: Path, *, is_same: bool) -> str:
        from tepatch.errors import TepatchError

        previous = signal.signal(signal.SIGALRM, _too_slow)
        signal.alarm(MAX_SECONDS)
        try:
            wrong = self._try(case, work)
        except TepatchError as error:
            text = str(error)
            if any(not char.isprintable() and char not in "\n\t" for char in text):
                return f"an error with a raw control character: {text!a}"
            return "refused" if not is_same else f"refused, and nothing was changed:\n{text}"
        except SlowError:
            return f"took more than {MAX_SECONDS} s\n{traceback.format_exc()}"
        except BaseException:
            return f"not an error of ours\n{traceback.format_exc()}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        return f"accepted a change that the files tell: {wrong}" if wrong else "accepted"

    def _try(self, case: Case, work: Path) -> str:
        """Load, or convert back; what is wrong with the result and could have been known."""
        import tepatch

        where: Path = work / "checkpoint"
        if case.form == "te":
            tepatch.convert("auto", where, work / "back", progress=False)
            return self._differing(work / "back", case)
        mapping = where / case.file if case.form == "mapped" else None
        model = tepatch.load("auto", where, backend="reference", progress=False, mapping=mapping)
        str(model.tepatch)
        if case.form == "bin":  # its entries have checksums, and so has its pickle
            state = model.state_dict()
            return ", ".join(n for n, t in self.original.items() if n not in state or not self.equal(state[n], t))
        return ""

    def _differing(self, back: Path, case: Case) -> str:
        from safetensors.torch import load_file

        found: dict[str, Any] = {}
        for file in back.glob("*.safetensors"):
            found |= load_file(file)
        wrong = [
            name for name, tensor in self.original.items() if name not in found or not self.equal(found[name], tensor)
        ]
        return ", ".join(wrong)


def _too_slow(*_: object) -> None:
    raise SlowError


def peak() -> int:
    """Bytes that the process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: list[str] | None = None) -> int:
    """Run, print what came of it, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="how long; with --mutations, at most")
    parser.add_argument("--mutations", type=int, default=0, help="how many; 0 for as many as there is time for")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--only", type=int, default=None, help="run this one mutation, and show what it raises")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    _quiet()
    done = 0
    with tempfile.TemporaryDirectory(prefix="tepatch-fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder), seed)
        before = peak()
        until = time.monotonic() + options.minutes * 60
        numbers = _numbers(options.only, options.mutations)
        run: Callable[[int], None] = fuzzer.run
        for number in numbers:
            if options.only is None and not options.mutations and time.monotonic() > until:
                break
            run(number)
            done += 1
            if done % 500 == 0:
                print(f"{done:,} mutations, {len(fuzzer.failures)} failures", flush=True)
        memory = peak()
    for line, count in sorted(fuzzer.counts.items()):
        print(f"{count:6,}  {line}")
    for failure in fuzzer.failures[:20]:
        print(f"\nFAILED {failure}")
    failed = len(fuzzer.failures)
    if memory > MAX_BYTES:
        failed += 1
        print(f"FAILED --seed {seed}: {memory / 1e9:.2f} GB of memory at once")
    print(
        f"{done:,} mutations with seed {seed}: {failed} failures; the slowest took {fuzzer.slowest:.1f} s; "
        f"{memory / 1e9:.2f} GB at most ({before / 1e9:.2f} before the first)"
    )
    return 1 if failed else 0


def _numbers(only: int | None, mutations: int) -> Iterator[int]:
    if only is not None:
        yield only
        return
    number = 0
    while not mutations or number < mutations:
        yield number
        number += 1


def _quiet() -> None:
    """Others' warnings about what was changed are not what is looked for."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
