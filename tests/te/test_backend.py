"""Which modules a layer is made of, and what a user is told when Transformer Engine cannot be used."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tepatch.errors import BackendError
from tepatch.te import TeStatus, backend, judge, modules, probe, resolve, use_backend
from tepatch.te.backend import Modules
from tepatch.te.nvidia.engine import placement

without_te = pytest.mark.skipif(probe().usable, reason="Transformer Engine can be used on this machine")


def verdict(
    te_version: str | None = "2.20.2",
    import_error: str | None = None,
    cuda_available: bool = True,
    capability: tuple[int, int] | None = (9, 0),
) -> TeStatus:
    return judge(
        te_version=te_version,
        import_error=import_error,
        cuda_available=cuda_available,
        capability=capability,
    )


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_a_recent_te_on_a_recent_gpu_is_usable() -> None:
    assert verdict() == TeStatus(usable=True, version="2.20.2", reason="", device="cuda")
    assert verdict(capability=(8, 0)).usable
    assert verdict(te_version="2.11.0+cu12").usable


def test_a_failed_import_is_the_reason_given_before_any_other() -> None:
    status = verdict(te_version=None, import_error="no such module", cuda_available=False, capability=None)
    assert status == TeStatus(usable=False, version=None, reason="no such module", device="cpu")


def test_a_te_without_a_gpu_is_not_usable() -> None:
    assert "no CUDA GPU" in verdict(cuda_available=False, capability=None).reason


def test_a_gpu_before_ampere_is_not_usable() -> None:
    expected = "GPU too old: compute capability 7.5, TE needs 8.0 (Ampere)"
    assert verdict(capability=(7, 5)).reason == expected


@pytest.mark.parametrize("version", ["2.10.0", "1.13", "0.0.1"])
def test_a_te_before_2_9_is_not_usable(version: str) -> None:
    assert f"{version} is too old" in verdict(te_version=version).reason


@pytest.mark.parametrize("version", [None, "unknown"])
def test_a_te_whose_version_cannot_be_read_is_not_usable(version: str | None) -> None:
    assert "cannot be read" in verdict(te_version=version).reason


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TeStatus]]:
    """Put a package of Transformer Engine's name on the path, and probe for it afresh."""

    def install(pytorch: str) -> TeStatus:
        package = tmp_path / "transformer_engine"
        package.mkdir()
        (package / "__init__.py").write_text("__version__ = '2.20.2'\n")
        (package / "pytorch.py").write_text(pytorch)
        monkeypatch.syspath_prepend(tmp_path)
        return probe.__wrapped__()

    yield install
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules.pop(name, None)


@without_te
@pytest.mark.parametrize(
    ("pytorch", "reason"),
    [
        ("raise OSError('libnccl.so.2: cannot open')", "cannot be imported: OSError: libnccl.so.2"),
        ("raise RuntimeError('built for another torch')", "cannot be imported: RuntimeError: built for"),
        ("assert False, 'versions differ'", "cannot be imported: AssertionError: versions differ"),
        ("raise ImportError('undefined symbol')", "cannot be imported: ImportError: undefined symbol"),
        ("import a_module_that_is_missing", "not installed completely: No module named 'a_module"),
        ("", "a placeholder without any layers"),
    ],
)
def test_a_te_that_cannot_be_imported_is_not_usable_and_says_why(
    installed: Callable[..., TeStatus], pytorch: str, reason: str
) -> None:
    status = installed(pytorch)
    assert not status.usable
    assert reason in status.reason


@without_te
def test_a_warning_that_te_issues_when_imported_is_not_taken_for_a_failure(
    installed: Callable[..., TeStatus], recwarn: pytest.WarningsRecorder
) -> None:
    warnings.simplefilter("error")
    status = installed("import warnings\nwarnings.warn('a new name')\nTransformerLayer = object")
    assert [str(warning.message) for warning in recwarn] == ["a new name"]
    assert status.version == "2.20.2"
    assert "import" not in status.reason


@without_te
def test_a_machine_without_te_is_told_so() -> None:
    assert probe().reason == "Transformer Engine is not installed"


@without_te
def test_asking_for_te_where_it_cannot_be_used_names_the_cause_and_the_fix() -> None:
    with pytest.raises(BackendError) as caught:
        resolve("te")
    assert probe().reason in str(caught.value)
    assert 'pip install "tepatch[te]"' in str(caught.value)
    assert 'backend="reference"' in str(caught.value)


@without_te
def test_the_fall_back_of_auto_is_announced_once_a_process_with_its_reason() -> None:
    code = (
        "from tepatch.te import modules, resolve, use_backend\n"
        "assert resolve('auto').name == modules().name == 'reference'\n"
        "with use_backend('auto'): pass\n"
    )
    lines = run_python(code).stderr.splitlines()
    assert len(lines) == 1
    assert lines[0] == f"using the reference modules instead of Transformer Engine: {probe().reason}"


@without_te
def test_the_reference_is_not_announced_when_it_was_asked_for() -> None:
    code = "from tepatch.te import modules, use_backend\nwith use_backend('reference'): modules()\n"
    assert run_python(code).stderr == ""


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"(?s)'cuda'.*auto, te, reference"):
        resolve("cuda")  # type: ignore[arg-type]


def test_blocks_nest_and_every_exit_restores_what_was_in_force_before() -> None:
    # Without Transformer Engine all names give the same modules, so this looks at the variable itself.
    assert backend._active.get() is None
    with use_backend("reference") as outer:
        assert modules() is outer
        assert outer.name == "reference"
        with pytest.raises(RuntimeError), use_backend("auto") as inner:  # noqa: PT012
            assert modules() is inner
            raise RuntimeError
        assert backend._active.get() is outer
        with pytest.raises(BackendError), use_backend("nonsense"):  # type: ignore[arg-type]
            pass
        assert backend._active.get() is outer
    assert backend._active.get() is None


def test_another_thread_does_not_see_the_backend_of_this_one() -> None:
    seen: list[Modules | None] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend._active.get()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_choosing_a_backend_imports_no_torch() -> None:
    assert run_python("import sys, tepatch.te\nprint('torch' in sys.modules)").stdout.strip() == "False"


def test_the_reference_builds_on_the_default_device_and_dtype() -> None:
    kind = resolve("reference")
    assert kind.default_device == "cpu"
    assert kind.Linear(4, 4).weight.dtype == torch.float32
    with torch.device("meta"):
        assert kind.LayerNormMLP(4, 4).fc1_weight.is_meta


def test_te_is_given_the_string_meta_and_otherwise_the_device_asked_for_or_a_gpu() -> None:
    assert placement(None) == "cuda"
    assert placement("cuda:1") == "cuda:1"
    assert placement(torch.device("cuda", 1)) == torch.device("cuda", 1)
    with torch.device("cpu"):
        assert placement(None) == "cuda"
    with torch.device("meta"):
        # Transformer Engine compares with the string, and torch.device("meta") does not equal it.
        assert type(placement(None)) is str
        assert placement(None) == placement("cuda") == "meta"
    assert type(placement(torch.device("meta"))) is str
