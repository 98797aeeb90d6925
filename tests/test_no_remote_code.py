"""Nothing of a checkpoint is ever run, and nothing asks on the terminal whether it may be.

The first half hands folders that name code to everything that reads folders. The second half reads the project's own
source: each call by which transformers, or a pickle, could run a file has to say no.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner, Result

import tepatch
from tepatch.cli import app
from tepatch.errors import CheckpointError

CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor")
AUTO_MAP = dict.fromkeys(CLASSES, "evil.Evil")
OF_TOKENIZER = {
    "a list": {"tokenizer_class": "Evil", "auto_map": ["evil.Evil", None]},
    "a table": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}},
    "another repository": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["them/evil--evil.Evil", None]}},
    "by way of AutoProcessor": {"tokenizer_class": "AutoProcessor"},
    "by way of AutoFeatureExtractor": {"tokenizer_class": "AutoFeatureExtractor"},
}
"""Each a tokenizer_config.json for which transformers would run code. The last two ask for a ``trust_remote_code`` of
their own: AutoTokenizer does not hand its one on."""


@dataclass
class Trap:
    """A folder that names code, and what became of it."""

    folder: Path
    marker: Path
    """Exists if a file of the folder was run."""
    questions: list[str] = field(default_factory=list)
    """What was asked on the terminal; each was answered with yes."""

    def write(self, name: str, fields: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(fields))

    def add(self, name: str, fields: dict[str, Any]) -> None:
        self.write(name, {**json.loads((self.folder / name).read_text()), **fields})

    def check(self) -> None:
        assert self.questions == []
        assert not self.marker.exists()


@pytest.fixture
def trap(
    tiny_llama: Callable[..., Any],
    save_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Trap]:
    """A Llama that works, in a folder where every file that may name code does."""
    out = Trap(save_checkpoint(tiny_llama(), name="trap"), tmp_path / "was-run")
    run = f"import pathlib\n\npathlib.Path({str(out.marker)!r}).touch()\n"
    (out.folder / "evil.py").write_text(run)
    (out.folder / "custom_generate").mkdir()
    (out.folder / "custom_generate" / "generate.py").write_text(run)
    (out.folder / "tokenizer.json").write_text("{}")
    out.write("tokenizer_config.json", OF_TOKENIZER["a table"])
    for name in ("processor_config.json", "preprocessor_config.json"):
        out.write(name, {"processor_class": "Evil", "feature_extractor_type": "Evil", "auto_map": AUTO_MAP})
    out.add("config.json", {"auto_map": AUTO_MAP, "trust_remote_code": True})
    asked = {"auto_map": AUTO_MAP, "trust_remote_code": True, "custom_generate": str(out.folder)}
    out.add("generation_config.json", asked)

    def answer(prompt: str = "") -> str:
        out.questions.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    # Where transformers puts code before it runs it: not into the home of whoever runs the tests.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield out
    out.check()


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], prog_name="tepatch", catch_exceptions=False)


def succeed(*arguments: str | Path) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr


def token_file(folder: Path) -> Path:
    path = folder / "ids.txt"
    path.write_text("5 6 7 8")
    return path


# What reads a folder -------------------------------------------------------------------------------------------------


def test_the_trap_is_one(trap: Trap) -> None:
    """Transformers does run the file for a caller who lets it, so that the other tests are about something."""
    from transformers import AutoTokenizer

    with pytest.raises(AttributeError, match="Evil"):  # the file is run, and has no such class
        AutoTokenizer.from_pretrained(trap.folder)
    assert len(trap.questions) == 1
    assert trap.marker.exists()
    trap.questions.clear()
    trap.marker.unlink()


def test_a_loaded_model_runs_no_code_of_its_folder_and_neither_does_generate(trap: Trap) -> None:
    model = tepatch.load("auto", trap.folder, progress=False)
    out: Any = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    assert out.shape == (1, 5)


def test_the_config_of_such_a_folder_builds_a_model(trap: Trap) -> None:
    config = AutoConfig.from_pretrained(trap.folder, trust_remote_code=False)
    assert config.auto_map == AUTO_MAP
    assert type(tepatch.build("auto", config)).__name__ == "LlamaForCausalLM"


def test_commands_that_read_the_model_alone_do_their_work(trap: Trap, tmp_path: Path) -> None:
    succeed("plan", "auto", trap.folder)
    succeed("convert", "llama", trap.folder, tmp_path / "te", "--quiet")
    succeed("certify", "llama", trap.folder, tmp_path / "te", "--quiet")
    succeed("verify", "llama", trap.folder, "--tokens", token_file(tmp_path))
    succeed("bench", "load", trap.folder, "--with-transformers", "--quiet", "--rounds", "1")


@pytest.mark.parametrize("fields", OF_TOKENIZER.values(), ids=OF_TOKENIZER)
def test_a_tokenizer_that_is_code_is_refused_with_what_to_do(trap: Trap, fields: dict[str, Any]) -> None:
    trap.write("tokenizer_config.json", fields)
    result = run("verify", "llama", trap.folder)
    assert result.exit_code == 1
    assert "asks to run code of the checkpoint, and tepatch never runs any" in result.stderr
    assert "evil" in result.stderr
    assert "pass them with --tokens FILE to tepatch verify" in result.stderr


def test_the_refusal_is_an_error_of_ours_in_json_too(trap: Trap) -> None:
    result = run("verify", "llama", trap.folder, "--json")
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "CheckpointError"
    assert error["problems"][0]["found"].startswith("auto_map = {'AutoTokenizer'")


def test_certify_refuses_such_a_tokenizer_where_neither_side_has_another(trap: Trap, tmp_path: Path) -> None:
    tepatch.convert("llama", trap.folder, tmp_path / "te", progress=False)
    result = run("certify", "llama", trap.folder, tmp_path / "te", "--verify", "--quiet")
    assert result.exit_code == 1
    assert "asks to run code of the checkpoint" in result.stderr
    assert "--tokens FILE to tepatch verify" in result.stderr


@pytest.mark.parametrize("command", ["plan", "verify", "convert", "certify", "bench"])
def test_a_model_type_that_only_code_knows_is_refused(trap: Trap, tmp_path: Path, command: str) -> None:
    trap.add("config.json", {"model_type": "evil", "architectures": ["EvilForCausalLM"]})
    rest: dict[str, tuple[str | Path, ...]] = {
        "verify": ("--tokens", token_file(tmp_path)),
        "convert": (tmp_path / "out", "--quiet"),
        "certify": (shutil.copytree(trap.folder, tmp_path / "other"), "--quiet"),
    }
    if command == "bench":
        result = run("bench", "load", trap.folder, "--with-transformers", "--quiet")
    else:
        result = run(command, "llama", trap.folder, *rest.get(command, ()))
    assert result.exit_code == 1
    assert "transformers can not read this config" in result.stderr


def test_load_and_build_refuse_it_as_well(trap: Trap) -> None:
    trap.add("config.json", {"model_type": "evil", "architectures": ["EvilForCausalLM"]})
    with pytest.raises(CheckpointError, match="transformers can not read this config"):
        tepatch.load("auto", trap.folder, progress=False)


@pytest.mark.parametrize("command", ["plan", "convert", "load"])
def test_a_part_of_a_model_that_is_code_is_refused(trap: Trap, tmp_path: Path, command: str) -> None:
    """Llava calls ``AutoModel.from_config(config.vision_config)``, which asks where the type has no such model."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {"num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=64, **sizes), vision_config=CLIPVisionConfig(image_size=8, **sizes)
    )
    LlavaForConditionalGeneration(config).save_pretrained(trap.folder)
    fields = json.loads((trap.folder / "config.json").read_text())
    part = {"model_type": "idefics_vision", "auto_map": AUTO_MAP, "_name_or_path": str(trap.folder)}
    trap.add("config.json", {"vision_config": {**fields["vision_config"], **part}})
    if command == "load":
        with pytest.raises(CheckpointError, match="asks to run code"):
            tepatch.load("auto", trap.folder, progress=False)
    else:
        result = run(command, "llama", trap.folder, *((tmp_path / "out",) if command == "convert" else ()))
        assert result.exit_code == 1
        assert "asks to run code of the checkpoint" in result.stderr


@pytest.mark.parametrize("stdin", ["yes", "closed"])
def test_a_program_neither_waits_for_an_answer_nor_takes_one(
    trap: Trap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdin: str
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-m", "tepatch", "verify", "llama", str(trap.folder)]
    if stdin == "closed":
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    answers = "y\n" * 10 if stdin == "yes" else ""
    done = subprocess.run(command, input=answers, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "asks to run code of the checkpoint" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr


# The project's own source --------------------------------------------------------------------------------------------

SOURCES = ("tepatch", "plugins/*/src", "examples", "scripts", "benchmarks")
ASKING = {
    *("from_pretrained", "from_config", "pipeline", "load_custom_generate"),
    *("get_class_from_dynamic_module", "get_cached_module_file"),
}
"""Functions of transformers that can run code of a folder, by their names: each has to be told no."""
HARMLESS = {"GenerationConfig.from_pretrained": "it reads a JSON file; nothing in it makes generate() load code"}
SWITCHES = ("custom_generate", "use_kernels", "allow_all_kernels")
"""Arguments by which a caller lets transformers load code: nobody passes them."""
UNSAFE = {
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler"), "a pickle runs code"),
    **dict.fromkeys(("marshal.load", "marshal.loads", "shelve.open", "joblib.load"), "it runs or makes code"),
    **dict.fromkeys(("dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads"), "a pickle runs code"),
    **dict.fromkeys(("torch.jit.load", "torch.export.load", "torch.hub.load"), "it loads code"),
    **dict.fromkeys(("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"), "use yaml.safe_load"),
    **dict.fromkeys(("eval", "exec", "compile", "__import__"), "it runs text"),
    **dict.fromkeys(("runpy.run_path", "runpy.run_module"), "it runs a file"),
    **dict.fromkeys(
        ("importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader"), "a file's code"
    ),
}
REVIEWED = {
    ("scripts/run_docs.py", "exec"): "runs the blocks of the project's own pages",
    ("scripts/run_docs.py", "compile"): "the same",
    ("scripts/run_docs.py", "importlib.import_module"): "names that stand there",
    ("scripts/mutants.py", "importlib.import_module"): "names that stand there",
    ("scripts/mutants.py", "compile"): "the project's own code, with a line changed",
    ("tepatch/__init__.py", "importlib.import_module"): "names of a table beside it",
    ("tepatch/cli/diagnosing.py", "importlib.import_module"): "two names that stand there",
    ("tepatch/patch.py", "importlib.import_module"): "names that a plugin's Patch gives",
    ("tepatch/proven.py", "importlib.import_module"): "the modules of a patch's classes, and names that stand there",
    ("plugins/tepatch-llama/src/tepatch_llama/__init__.py", "importlib.import_module"): "names of a table beside it",
}
"""Calls that are as they should be, and why no name in them comes from a checkpoint."""


def findings(text: str) -> list[tuple[int, str, str]]:
    """Each call that could run code which a file names: its line, its name, and what is wrong with it."""
    tree = ast.parse(text)
    names = _imports(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _dotted(node.func, names)
            out += [(node.lineno, name, what) for what in _of_call(name, node)]
        elif isinstance(node, ast.Attribute | ast.Name) and id(node) not in called and isinstance(node.ctx, ast.Load):
            # Handed on, it is called where nobody sees with what.
            last = _dotted(node, names).rpartition(".")[2]
            if last in ASKING - {"pipeline"}:
                out.append((node.lineno, last, "is used without being called here"))
        elif isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            out += [(node.lineno, str(key), "is in a table") for key in keys & {"trust_remote_code", *SWITCHES}]
        elif isinstance(node, ast.Constant) and node.value in ASKING - {"pipeline"}:
            out.append((node.lineno, str(node.value), "is named by a string"))
    return sorted(out)


def _of_call(name: str, node: ast.Call) -> Iterator[str]:
    keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    last = name.rpartition(".")[2]
    if last in ASKING and name not in HARMLESS and "trust_remote_code" not in keywords:
        yield "does not pass trust_remote_code=False"
    if "trust_remote_code" in keywords and not _is(keywords["trust_remote_code"], False):
        yield "passes another trust_remote_code than False"
    yield from (f"passes {switch}" for switch in SWITCHES if switch in keywords)
    if name in UNSAFE:
        yield UNSAFE[name]
    if name == "torch.load" and not _is(keywords.get("weights_only"), True):
        yield "does not pass weights_only=True"
    if name == "numpy.load" and "allow_pickle" in keywords and not _is(keywords["allow_pickle"], False):
        yield "allows pickles"
    if name == "importlib.import_module" and not (node.args and isinstance(node.args[0], ast.Constant)):
        yield "imports what a variable says"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _imports(tree: ast.AST) -> dict[str, str]:
    """What names stand for: ``np`` for ``numpy``, ``load`` for ``torch.load``."""
    out = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            short = node.module.startswith("transformers")
            out.update({a.asname or a.name: a.name if short else f"{node.module}.{a.name}" for a in node.names})
    return out


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """``a.b.c`` as written, with what was imported in full; what comes out of a call is left out."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value, names)
        return f"{before}.{node.attr}" if before else f"().{node.attr}"
    return ""


def sources(root: Path) -> Iterator[Path]:
    for place in SOURCES:
        for folder in sorted(root.glob(place)):
            yield from sorted(folder.rglob("*.py"))


def test_no_call_of_the_project_can_run_code_of_a_checkpoint(pytestconfig: pytest.Config) -> None:
    root = pytestconfig.rootpath
    paths = list(sources(root))
    found, reviewed = [], set()
    for path in paths:
        file = path.relative_to(root).as_posix()
        for line, name, what in findings(path.read_text(encoding="utf-8")):
            if (file, name) in REVIEWED:
                reviewed.add((file, name))
            else:
                found.append(f"{file}:{line}: {name}: {what}")
    assert found == []
    assert reviewed == set(REVIEWED), "a call that was reviewed is gone: take it off the list"
    assert {path.relative_to(root).parts[0] for path in paths} == {place.partition("/")[0] for place in SOURCES}


@pytest.mark.parametrize(
    "snippet",
    [
        "AutoTokenizer.from_pretrained(folder)",
        "transformers.AutoConfig.from_pretrained(folder, local_files_only=True)",
        "type(model).from_pretrained(folder, dtype=torch.float32)",
        "stock = cls.from_pretrained(folder, **arguments)",
        "AutoModel.from_config(config)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=trusted)",
        "AutoModel.from_pretrained(folder, **{'trust_remote_code': True})",
        "from transformers import pipeline\npipeline('text-generation', folder)",
        "from transformers import pipeline as made\nmade(model=folder)",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module as get\nget('a.B', folder)",
        "load = functools.partial(AutoModel.from_pretrained, folder)",
        "getattr(AutoModel, 'from_pretrained')(folder)",
        "model.generate(ids, custom_generate=folder)",
        "AutoModel.from_pretrained(folder, trust_remote_code=False, use_kernels=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load as read\nread(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "pickle.load(file)",
        "from pickle import loads\nloads(text)",
        "import pickle as p\np.Unpickler(file)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "exec(path.read_text())",
        "importlib.import_module(config['module'])",
        "from importlib import import_module\nimport_module(config.name)",
        "importlib.util.spec_from_file_location('evil', path)",
    ],
)
def test_a_new_call_is_found(snippet: str) -> None:
    assert findings(snippet)


@pytest.mark.parametrize(
    "snippet",
    [
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=False)",
        "model.eval()",
        "re.compile(pattern)",
        "torch.load(path, map_location='cpu', weights_only=True)",
        "import numpy as np\nnp.load(path)",
        "yaml.safe_load(text)",
        "importlib.import_module('transformer_engine.pytorch')",
        "GenerationConfig.from_pretrained(folder)",
        "torch.compile(model)",
        "TELlamaForCausalLM.from_pretrained_local(folder)",
        "import pickle\npickle.UnpicklingError",
    ],
)
def test_what_can_run_nothing_is_let_be(snippet: str) -> None:
    assert findings(snippet) == []
