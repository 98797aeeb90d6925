"""The route of a third party, end to end: an architecture that tepatch has never heard of, in packages of its own.

One package is the architecture: a config and a model in Hugging Face's style, not like Llama in anything (no attention,
other names, matrices lying the other way). The other is the plugin: a layer, a mapping, an entry point. Both are
installed by pip, and a process that imports them does what users do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rounding

FILES = {
    "toy-arch/pyproject.toml": """
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"

        [project]
        name = "toy-arch"
        version = "1.0"
    """,
    "toy-arch/toy_arch/__init__.py": '''
        """A model that mixes each token with the one before it."""

        import torch
        from torch import nn
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
        from transformers.modeling_outputs import CausalLMOutput


        class ToyConfig(PreTrainedConfig):
            model_type = "toy"

            def __init__(self, width=16, depth=3, vocab_size=40, tie_word_embeddings=False, **kwargs):
                self.width, self.depth, self.vocab_size = width, depth, vocab_size
                super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


        class ToyBlock(nn.Module):
            def __init__(self, config):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(config.width))
                self.now = nn.Parameter(torch.empty(config.width, 2 * config.width))
                self.before = nn.Parameter(torch.empty(config.width, 2 * config.width))
                self.out = nn.Linear(2 * config.width, config.width, bias=False)

            def forward(self, x):
                normed = nn.functional.rms_norm(x, x.shape[-1:], self.scale, 1e-6)
                before = nn.functional.pad(normed, (0, 0, 1, 0))[:, :-1]
                return x + self.out(torch.tanh(normed @ self.now + before @ self.before))


        class ToyForCausalLM(PreTrainedModel):
            config_class = ToyConfig
            base_model_prefix = "toy"
            _no_split_modules = ["ToyBlock"]

            def __init__(self, config):
                super().__init__(config)
                self.embed = nn.Embedding(config.vocab_size, config.width)
                self.blocks = nn.ModuleList(ToyBlock(config) for _ in range(config.depth))
                self.head = nn.Linear(config.width, config.vocab_size, bias=False)
                self.post_init()

            def _init_weights(self, module):
                for name, parameter in module.named_parameters(recurse=False):
                    if name != "scale":
                        nn.init.normal_(parameter, std=0.3)

            def forward(self, input_ids, labels=None, **kwargs):
                x = self.embed(input_ids)
                for block in self.blocks:
                    x = block(x)
                logits = self.head(x)
                loss = None
                if labels is not None:
                    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
                return CausalLMOutput(loss=loss, logits=logits)


        AutoConfig.register("toy", ToyConfig)
        AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
    ''',
    "tepatch-toy/pyproject.toml": """
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"

        [project]
        name = "tepatch-toy"
        version = "1.0"

        [project.entry-points.tepatch]
        toy = "tepatch_toy"
    """,
    "tepatch-toy/tepatch_toy/__init__.py": '''
        """Toy, for tepatch."""

        import tepatch


        @tepatch.hookimpl
        def tepatch_patches():
            yield tepatch.Patch(
                name="toy",
                model_types=("toy",),
                replace={"toy_arch:ToyBlock": "tepatch_toy.layer:ToyBlock"},
                mapping="tepatch_toy:toy.tepatch.yaml",
            )
    ''',
    "tepatch-toy/tepatch_toy/layer.py": '''
        """One product of both tokens in the place of two, with the norm in it."""

        import toy_arch
        import torch
        from tepatch.te import modules
        from tepatch.te.layer import AcceleratedLayer
        from torch import nn


        class ToyBlock(AcceleratedLayer, toy_arch.ToyBlock):
            def __init__(self, config):
                nn.Module.__init__(self)
                width = config.width
                self.mix = modules().LayerNormLinear(
                    width, 4 * width, eps=1e-6, bias=False, normalization="RMSNorm"
                )
                self.out = modules().Linear(2 * width, width, bias=False)
                self.mark_as_initialized()

            def forward(self, x):
                now, before = self.mix(x).chunk(2, dim=-1)
                before = nn.functional.pad(before, (0, 0, 1, 0))[:, :-1]
                return x + self.out(torch.tanh(now + before))
    ''',
    "tepatch-toy/tepatch_toy/toy.tepatch.yaml": """
        version: 1
        captures: {block: depth}
        parameters:
          embed.weight: same
          head.weight: same
          blocks.{block}:
            mix.layernorm_weight: scale
            mix.weight:
              concat: [{of: now, transpose: true}, {of: before, transpose: true}]
            out.weight: same
    """,
    "use.py": """
        import sys
        from pathlib import Path

        import tepatch
        import toy_arch
        import torch
        from rounding import assert_close
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        out = Path(sys.argv[1])
        torch.manual_seed(0)
        stock = toy_arch.ToyForCausalLM(toy_arch.ToyConfig())
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        stock.save_pretrained(out / "stock", max_shard_size="8KB")
        original = {}
        for path in sorted((out / "stock").glob("*.safetensors")):
            original |= load_file(path)
        assert len(list((out / "stock").glob("*.safetensors"))) > 2

        # found by its type, and the same model
        model = tepatch.load("auto", out / "stock", backend="reference")
        assert type(model) is toy_arch.ToyForCausalLM
        assert type(model.blocks[0]).__module__ == "tepatch_toy.layer"
        ids = torch.randint(0, 40, (2, 9))
        stock.eval()
        # in each of three layers a norm, two products in one, tanh, a product back, what is added; then the head
        terms = 3 * (16 + 2 * 16 + 32 + 8) + 16
        with torch.no_grad():
            assert_close(model(ids).logits, stock(ids).logits, terms=terms)

        # saved back, bit for bit
        tepatch.save(model, out / "back")
        again = {}
        for path in (out / "back").glob("*.safetensors"):
            again |= load_file(path)
        assert original.keys() == again.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in original.items())

        # a step of training is the same step, and what it gives is a stock checkpoint
        for each in (model, stock):
            optimizer = torch.optim.SGD(each.train().parameters(), lr=0.5)
            each(ids, labels=ids).loss.backward()
            optimizer.step()
        model.save_pretrained(out / "trained")
        trained, info = AutoModelForCausalLM.from_pretrained(out / "trained", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name, tensor in stock.state_dict().items():
            assert not torch.equal(tensor, original[name]), name
            # forth and back, over the vocabulary and 18 tokens
            assert_close(trained.state_dict()[name], tensor, terms=3 * terms + 40 + 18, name=name)

        # a rule that is wrong is seen before a weight is read
        from tepatch.plugins import default_host
        mapping = default_host().patch("toy").mapping_path().read_text()
        wrong = out / "wrong.yaml"
        wrong.write_text(mapping.replace("{of: before, transpose: true}", "{of: before}"))
        try:
            tepatch.load("toy", out / "stock", backend="reference", mapping=wrong)
        except tepatch.errors.PlanError as error:
            assert "blocks.{0..2}.before" in str(error), error
        else:
            raise SystemExit("the wrong mapping passed")
        print("all of it")
    """,
}


def test_a_third_partys_architecture_loads_trains_and_saves_back(tmp_path: Path) -> None:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        path.write_text("\n".join(line[indent:] for line in lines) + "\n")
    pytest.importorskip("hatchling", reason="packages are built with it")
    site = tmp_path / "site"
    _run(
        *("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"),
        *(
            "--disable-pip-version-check",
            "--target",
            str(site),
            str(tmp_path / "toy-arch"),
            str(tmp_path / "tepatch-toy"),
        ),
    )
    (tmp_path / "out").mkdir()
    paths = os.pathsep.join([str(site), str(Path(rounding.__file__).parent)])
    said = _run("-W", "error", str(tmp_path / "use.py"), str(tmp_path / "out"), PYTHONPATH=paths)
    assert said.strip().endswith("all of it")


def _run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
