from __future__ import annotations

import abc
import asyncio
import contextvars
import copy
import functools
import gc
import inspect
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer as AnotherName

from tepatch.errors import ReplaceError
from tepatch.replace import replace_layers

NUM_LAYERS = 2


class Ours(LlamaDecoderLayer):
    """A replacement as plugins write them: torch's `__init__` only."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.layer_idx = layer_idx
        self.marker = nn.Parameter(torch.full((3,), float(layer_idx)))


class Cooperative(LlamaDecoderLayer):
    """A replacement that builds the original and adds to it."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.extra = nn.Linear(2, 2)


class Failing(LlamaDecoderLayer):
    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        if layer_idx == 1:
            raise RuntimeError("no second layer")


class Child(LlamaDecoderLayer):
    """A subclass of the target without an `__init__` of its own."""


# Plain classes, where a model would only stand in the way.
class Base:
    def __init__(self, value: int = 0) -> None:
        self.value = value


class Inherits(Base):
    pass


class Other(Base):
    def __init__(self, value: int = 0) -> None:
        super().__init__(value)
        self.is_other = True


class Third(Base):
    pass


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    classes = [LlamaDecoderLayer, Ours, Cooperative, Failing, Child, Base, Inherits, Other, Third, nn.Linear]
    before = {kind: dict(vars(kind)) for kind in classes}
    yield
    for kind, attributes in before.items():
        assert dict(vars(kind)) == attributes, kind
        assert all(vars(kind)[name] is value for name, value in attributes.items())


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Let threads take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def config(num_layers: int = NUM_LAYERS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


def kinds(model: LlamaForCausalLM) -> list[type]:
    return [type(layer) for layer in model.model.layers]


def run_together(*functions: Callable[[], None]) -> None:
    with ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(function) for function in functions]:
            future.result(timeout=120)


def test_a_model_built_inside_has_our_layers_and_one_built_outside_does_not() -> None:
    with replace_layers({LlamaDecoderLayer: Ours}) as replaced:
        model = LlamaForCausalLM(config())
    assert kinds(model) == [Ours, Ours]
    assert [layer.marker.tolist() for layer in model.model.layers] == [[0.0] * 3, [1.0] * 3]
    assert replaced.counts == {LlamaDecoderLayer: 2}
    assert replaced.total == 2
    assert str(replaced) == "2 x LlamaDecoderLayer -> Ours"
    assert kinds(LlamaForCausalLM(config())) == [LlamaDecoderLayer] * 2


def test_the_class_is_exactly_as_before_afterwards() -> None:
    own = LlamaDecoderLayer.__init__
    attributes, order = dict(vars(LlamaDecoderLayer)), list(vars(LlamaDecoderLayer))
    with replace_layers({LlamaDecoderLayer: Ours}):
        assert LlamaDecoderLayer.__init__ is not own
        LlamaForCausalLM(config())
    assert LlamaDecoderLayer.__init__ is own
    assert dict(vars(LlamaDecoderLayer)) == attributes
    assert list(vars(LlamaDecoderLayer)) == order


def test_an_inherited_init_is_not_left_on_the_class() -> None:
    with replace_layers({Inherits: Other}):
        assert "__init__" in vars(Inherits)
        assert Inherits(3).value == 3
        assert type(Inherits(3)) is Other
        assert contextvars.Context().run(Inherits, 4).value == 4
    assert "__init__" not in vars(Inherits)


def test_the_names_and_the_signature_of_the_class_do_not_change_inside() -> None:
    signature = inspect.signature(LlamaDecoderLayer)
    with replace_layers({LlamaDecoderLayer: Ours}, require=False):
        assert modeling_llama.LlamaDecoderLayer is LlamaDecoderLayer is AnotherName
        assert isinstance(LlamaDecoderLayer(config(), 0), LlamaDecoderLayer)
        assert inspect.signature(LlamaDecoderLayer) == signature


def test_a_class_imported_under_another_name_is_replaced() -> None:
    with replace_layers({LlamaDecoderLayer: Ours}):
        assert type(AnotherName(config(), layer_idx=0)) is Ours


def test_subclasses_of_the_target_are_not_replaced() -> None:
    with replace_layers({LlamaDecoderLayer: Ours}, require=False) as replaced:
        child = Child(config(), 0)
    assert type(child) is Child
    assert hasattr(child, "self_attn")
    assert replaced.total == 0


@pytest.mark.parametrize("direct", [False, True])
def test_a_replacement_may_call_the_init_of_the_target(direct: bool) -> None:
    class Direct(LlamaDecoderLayer):
        def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
            LlamaDecoderLayer.__init__(self, config, layer_idx)

    replacement = Direct if direct else Cooperative
    with replace_layers({LlamaDecoderLayer: replacement}) as replaced:
        layer = LlamaDecoderLayer(config(), 0)
    assert type(layer) is replacement
    assert type(layer.self_attn) is modeling_llama.LlamaAttention
    assert replaced.total == 1


def test_a_replacement_may_hold_an_original() -> None:
    class Holder(Base):
        def __init__(self, value: int = 0) -> None:
            self.inner = Base(value)
            self.part = Inherits(value)

    with replace_layers({Base: Holder, Inherits: Third}) as replaced:
        holder = Base(5)
        assert type(Base(5)) is Holder
    assert type(holder.inner) is Base
    assert holder.inner.value == 5
    assert type(holder.part) is Third
    assert replaced.counts == {Base: 2, Inherits: 2}


def test_an_object_is_replaced_once_even_where_its_new_class_is_a_target() -> None:
    class First(Base):
        pass

    class Second(Base):
        pass

    with replace_layers({First: Second, Second: First}) as replaced:
        assert type(First()) is Second
        assert type(Second()) is First
    assert replaced.counts == {First: 1, Second: 1}


def test_several_classes_are_replaced_and_counted_apart() -> None:
    class Norm(modeling_llama.LlamaRMSNorm):
        pass

    with replace_layers({LlamaDecoderLayer: Ours, modeling_llama.LlamaRMSNorm: Norm}) as replaced:
        model = LlamaForCausalLM(config())
    assert type(model.model.norm) is Norm
    assert replaced.counts == {LlamaDecoderLayer: 2, modeling_llama.LlamaRMSNorm: 1}
    assert str(replaced) == "2 x LlamaDecoderLayer -> Ours, 1 x LlamaRMSNorm -> Norm"


def test_a_replacement_of_the_same_name_is_told_apart_in_the_report() -> None:
    same_name = type("LlamaDecoderLayer", (Ours,), {"__module__": "elsewhere"})
    with replace_layers({LlamaDecoderLayer: same_name}) as replaced:
        LlamaDecoderLayer(config(), 0)
    assert str(replaced) == "1 x LlamaDecoderLayer -> elsewhere:LlamaDecoderLayer"


def test_classes_may_be_given_by_name() -> None:
    name = "transformers.models.llama.modeling_llama:LlamaDecoderLayer"
    with replace_layers({name: f"{__name__}:Ours"}) as replaced:
        assert type(LlamaDecoderLayer(config(), 0)) is Ours
    assert replaced.classes == {LlamaDecoderLayer: Ours}


def test_layers_are_replaced_on_the_meta_device() -> None:
    with replace_layers({LlamaDecoderLayer: Ours}), torch.device("meta"):
        model = LlamaForCausalLM(config())
    assert kinds(model) == [Ours, Ours]
    assert model.model.layers[0].marker.device.type == "meta"


def test_layers_are_replaced_while_from_pretrained_builds_the_model(tmp_path: Any) -> None:
    LlamaForCausalLM(config()).save_pretrained(tmp_path)
    with replace_layers({LlamaDecoderLayer: Cooperative}) as replaced:
        model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert kinds(model) == [Cooperative, Cooperative]
    assert replaced.total == 2


def test_a_replaced_layer_can_be_copied_and_pickled() -> None:
    with replace_layers({LlamaDecoderLayer: Ours}) as replaced:
        layer = LlamaDecoderLayer(config(), 1)
        copied = copy.deepcopy(layer)
    pickled = pickle.loads(pickle.dumps(layer))
    assert type(copied) is type(pickled) is Ours
    assert torch.equal(copied.marker, layer.marker)
    assert torch.equal(pickled.marker, layer.marker)
    assert replaced.total == 1


def test_nested_blocks_of_different_classes_work_together() -> None:
    with replace_layers({LlamaDecoderLayer: Ours}), replace_layers({Base: Other}):
        assert type(LlamaDecoderLayer(config(), 0)) is Ours
        assert type(Base()) is Other


def test_of_nested_blocks_the_inner_one_counts_until_it_ends() -> None:
    with replace_layers({LlamaDecoderLayer: Ours}) as outer:
        assert type(LlamaDecoderLayer(config(), 0)) is Ours
        with replace_layers({LlamaDecoderLayer: Cooperative}) as inner:
            assert type(LlamaDecoderLayer(config(), 0)) is Cooperative
        assert type(LlamaDecoderLayer(config(), 0)) is Ours
    assert (outer.total, inner.total) == (2, 1)


def test_blocks_that_end_in_another_order_end_only_themselves() -> None:
    first, second = replace_layers({Base: Other}), replace_layers({Base: Third})
    first.__enter__()
    second.__enter__()
    assert type(Base()) is Third
    with pytest.raises(ReplaceError, match="no layer was replaced"):
        first.__exit__(None, None, None)
    assert type(Base()) is Third
    second.__exit__(None, None, None)
    assert type(Base()) is Base


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_in_the_block_restores_the_class_and_goes_through(kind: type[BaseException]) -> None:
    own = LlamaDecoderLayer.__init__
    error = kind("stop")
    with pytest.raises(kind) as caught, replace_layers({LlamaDecoderLayer: Ours}):
        raise error
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert LlamaDecoderLayer.__init__ is own
    assert type(LlamaDecoderLayer(config(), 0)) is LlamaDecoderLayer


def test_a_failing_replacement_restores_the_class_and_is_not_counted() -> None:
    with (
        pytest.raises(RuntimeError, match="no second layer"),
        replace_layers({LlamaDecoderLayer: Failing}) as r,
    ):
        LlamaForCausalLM(config())
    assert r.counts == {LlamaDecoderLayer: 1}
    assert kinds(LlamaForCausalLM(config())) == [LlamaDecoderLayer] * 2


@pytest.mark.parametrize("how", ["close", "collect"])
def test_a_generator_that_is_given_up_restores_the_class(how: str) -> None:
    def building() -> Iterator[type]:
        with replace_layers({Base: Other}):
            while True:
                yield type(Base())

    own = Base.__init__
    generator = building()
    assert next(generator) is Other
    if how == "close":
        generator.close()
    del generator
    gc.collect()
    assert Base.__init__ is own
    assert type(Base()) is Base


def test_a_generator_may_be_closed_in_another_context_than_it_was_started_in() -> None:
    def building() -> Iterator[None]:
        with replace_layers({Base: Other}):
            yield

    own = Base.__init__
    generator = building()
    contextvars.copy_context().run(next, generator)
    generator.close()
    assert Base.__init__ is own


def test_zero_replaced_layers_are_an_error_that_names_the_class() -> None:
    with pytest.raises(ReplaceError) as caught, replace_layers({LlamaDecoderLayer: Ours, Base: Other}):
        LlamaForCausalLM(config())
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].where == f"{__name__}:Base"
    assert "no layer was replaced" in str(caught.value)


def test_zero_replaced_layers_are_no_error_when_allowed() -> None:
    with replace_layers({Base: Other}, require=False) as replaced:
        pass
    assert replaced.total == 0
    assert str(replaced) == "0 x Base -> Other"


def test_the_error_for_zero_layers_tells_of_another_class_of_that_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with te_llama, which assigns its class to the attribute of transformers' module."""
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", Ours)
    with pytest.raises(ReplaceError) as caught, replace_layers({LlamaDecoderLayer: Cooperative}):
        assert kinds(LlamaForCausalLM(config())) == [Ours, Ours]
    expected = f"somebody has made {modeling_llama.__name__}.LlamaDecoderLayer another class: {__name__}:Ours"
    assert expected in caught.value.problems[0].details


def test_the_error_for_zero_layers_does_not_point_at_the_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    same_name = type("Base", (Base,), {"__module__": "elsewhere"})
    module = types.ModuleType("elsewhere")
    module.Base = same_name  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    with pytest.raises(ReplaceError) as caught, replace_layers({Base: same_name}):
        pass
    assert "elsewhere" not in str(caught.value)
    assert "somebody has made" not in str(caught.value)
    with pytest.raises(ReplaceError, match="class of that name: elsewhere:Base"), replace_layers({Base: Other}):
        pass


def test_a_later_patch_of_the_module_attribute_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", LlamaDecoderLayer)
    with replace_layers({LlamaDecoderLayer: Ours}):
        LlamaForCausalLM(config())
        modeling_llama.LlamaDecoderLayer = Cooperative
    assert modeling_llama.LlamaDecoderLayer is Cooperative


def wrap_init(kind: type) -> Callable[..., None]:
    """Patch a class as libraries do that want to know of each module built."""
    inner = kind.__init__

    @functools.wraps(inner)
    def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
        inner(self, *args, **kwargs)

    type.__setattr__(kind, "__init__", theirs)
    return theirs


def test_a_later_patch_of_init_is_not_restored_over() -> None:
    class Layer(Base):
        def __init__(self, value: int = 0) -> None:
            super().__init__(value)

    block = replace_layers({Layer: Other})
    block.__enter__()
    theirs = wrap_init(Layer)
    assert type(Layer()) is Other
    with pytest.raises(ReplaceError, match="changed by somebody else") as caught:
        block.__exit__(None, None, None)
    assert caught.value.problems[0].where.endswith("Layer")
    assert Layer.__init__ is theirs
    assert type(Layer()) is Layer
    assert Layer(3).value == 3


def test_a_later_patch_of_init_is_a_note_on_the_exception_of_the_block() -> None:
    class Layer(Base):
        pass

    block, error = replace_layers({Layer: Other}), RuntimeError("stop")
    block.__enter__()
    theirs = wrap_init(Layer)
    assert not block.__exit__(RuntimeError, error, None)
    assert "changed by somebody else" in "".join(error.__notes__)
    assert Layer.__init__ is theirs


def test_a_patch_of_init_that_is_undone_inside_the_block_is_no_trouble() -> None:
    with replace_layers({Base: Other}):
        dispatcher = Base.__init__
        wrap_init(Base)
        assert type(Base()) is Other
        Base.__init__ = dispatcher  # type: ignore[method-assign]
        assert type(Base()) is Other


def test_an_inner_block_does_not_undo_a_patch_of_init() -> None:
    with replace_layers({Base: Other}):
        dispatcher = Base.__init__
        theirs = wrap_init(Base)
        with replace_layers({Base: Third}):
            assert Base.__init__ is theirs
            assert type(Base()) is Third
        assert type(Base()) is Other
        Base.__init__ = dispatcher  # type: ignore[method-assign]


def test_a_class_that_somebody_restored_already_is_no_trouble() -> None:
    own = Base.__init__
    with replace_layers({Base: Other}, require=False):
        Base.__init__ = own  # type: ignore[method-assign]
    assert Base.__init__ is own


class Abstract(Base, abc.ABC):
    @abc.abstractmethod
    def compute(self) -> None: ...


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1


class OwnNew(Base):
    def __new__(cls, value: int = 0) -> OwnNew:
        return super().__new__(cls)


class NoInit:
    pass


@pytest.mark.parametrize(
    ("target", "replacement", "reason"),
    [
        (Base, Base, "it is the same class"),
        (Base, Abstract, r"it is abstract \(compute\)"),
        (Abstract, Base, "Python cannot turn one into the other"),
        (Base, Slotted, "object layout differs"),
        (Base, int, "its __new__ would never be called"),
        (int, Base, "no __init__ to redirect|its __new__ would never be called"),
        (Base, OwnNew, "its __new__ would never be called"),
        (NoInit, Base, "has no __init__ to redirect"),
        (Base, 3, "not a class\n  expected: a class or 'module:Name'\n  found:    3"),
        (None, Base, "not a class"),
        (Base, "no_such_module:Layer", "'no_such_module' cannot be imported"),
        ("collections:Nope", Base, "has no 'Nope'"),
        ("Base", Other, "does not name a class"),
    ],
)
def test_classes_that_cannot_stand_in_for_each_other_are_refused(target: Any, replacement: Any, reason: str) -> None:
    with pytest.raises(ReplaceError, match=reason), replace_layers({target: replacement}):
        pytest.fail("the block must not run")


def test_all_unfit_classes_are_reported_at_once_and_none_is_touched() -> None:
    own = Base.__init__
    with pytest.raises(ReplaceError) as caught:
        replace_layers({Base: Other, NoInit: Base, "no_such:A": Base}).__enter__()
    assert len(caught.value.problems) == 2
    assert Base.__init__ is own


def test_no_class_at_all_is_refused() -> None:
    with pytest.raises(ReplaceError, match="no class to replace"):
        replace_layers({}).__enter__()


def test_a_class_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ReplaceError, match="is named twice"):
        replace_layers({Base: Other, f"{__name__}:Base": Third}).__enter__()


def test_another_thread_builds_plain_models_meanwhile(fast_switching: None) -> None:
    rounds = 50
    barrier = threading.Barrier(2)

    def patched() -> None:
        for _ in range(rounds):
            with replace_layers({LlamaDecoderLayer: Ours}) as replaced:
                barrier.wait(60)
                assert kinds(LlamaForCausalLM(config())) == [Ours, Ours]
                barrier.wait(60)
            assert replaced.total == NUM_LAYERS

    def plain() -> None:
        for _ in range(rounds):
            barrier.wait(60)
            assert kinds(LlamaForCausalLM(config())) == [LlamaDecoderLayer] * 2
            barrier.wait(60)

    run_together(patched, plain)


def test_two_threads_replace_one_class_by_their_own_at_overlapping_times(fast_switching: None) -> None:
    def build(replacement: type | None) -> None:
        for _ in range(300):
            if replacement is None:
                assert type(Base()) is Base
                continue
            with replace_layers({Base: replacement}) as replaced:
                assert [type(Base()) for _ in range(5)] == [replacement] * 5
            assert replaced.total == 5
            assert type(Base()) is Base

    run_together(*(functools.partial(build, kind) for kind in (Other, Third, None, Other, Third)))


def test_the_class_is_restored_when_the_last_of_two_threads_leaves() -> None:
    own = Base.__init__
    entered, leave = threading.Event(), threading.Event()

    def long() -> None:
        with replace_layers({Base: Other}):
            Base()
            entered.set()
            assert leave.wait(60)
            assert type(Base()) is Other

    with ThreadPoolExecutor(1) as pool:
        with replace_layers({Base: Third}):
            future = pool.submit(long)
            assert entered.wait(60)
            assert type(Base()) is Third
        assert Base.__init__ is not own
        assert type(Base()) is Base
        leave.set()
        future.result(60)
    assert Base.__init__ is own


def test_threads_that_share_a_context_are_counted_together(fast_switching: None) -> None:
    with replace_layers({Base: Other}) as replaced:
        contexts = [contextvars.copy_context() for _ in range(4)]
        run_together(*(lambda c=c: [c.run(Base) for _ in range(500)] for c in contexts))  # type: ignore[misc]
    assert replaced.total == 2000


def test_a_task_started_inside_inherits_and_one_started_outside_does_not() -> None:
    async def main() -> None:
        inside, done = asyncio.Event(), asyncio.Event()

        async def build(wait_for: asyncio.Event) -> type:
            await wait_for.wait()
            return type(Base())

        outsider = asyncio.create_task(build(inside))
        with replace_layers({Base: Other}) as replaced:
            insider = asyncio.create_task(build(inside))
            straggler = asyncio.create_task(build(done))
            inside.set()
            assert await outsider is Base
            assert await insider is Other
        assert replaced.total == 1
        # The dispatcher is in place once more, but the straggler's block is over.
        with replace_layers({Base: Third}, require=False):
            done.set()
            assert await straggler is Base

    asyncio.run(main())


def test_replacing_needs_only_the_standard_library() -> None:
    code = (
        "import sys, tepatch.replace\n"
        "print([name for name in ('torch', 'transformers', 'pluggy', 'yaml') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
