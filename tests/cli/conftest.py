"""What the tests of the command line share: running it, a site for plugins of their own, and a tiny checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tepatch.cli import app

Run = Callable[..., Result]
WORDS = ("three", "ships", "had", "been", "lost")


@pytest.fixture
def run() -> Run:
    """Runs the command line in this process."""

    def run(*arguments: str | Path) -> Result:
        # A TepatchError or a bug would otherwise end as a mere exit code 1.
        return CliRunner().invoke(app, [*map(str, arguments)], prog_name="tepatch", catch_exceptions=False)

    return run


class Site:
    """A folder of plugins for programs that are started from a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, code: str) -> None:
        """Installs ``code`` as a module, with an entry point ``name`` in a distribution ``tepatch-NAME`` 1.0."""
        (self.folder / f"plugin_{name}.py").write_text(code)
        info = self.folder / f"tepatch_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tepatch-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[tepatch]\n{name} = plugin_{name}\n")

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs ``python -m tepatch`` where these plugins are installed as well."""
        return self.python("-m", "tepatch", *arguments, **environment)

    def python(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folder = tmp_path / "site"
    folder.mkdir()
    return Site(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers in float32, with a tokenizer that knows a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        dtype="float32",
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def llama_mapping() -> str:
    """The text of the mapping that Llama's extends: all that it is for a model without biases."""
    return (resources.files("tepatch.te") / "decoder.tepatch.yaml").read_text(encoding="utf-8")
