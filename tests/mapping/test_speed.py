"""A plan is made in a moment, for the largest models that there are.

What is measured is the time of a processor: other tests may keep the machine busy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

MAX_SECONDS_DENSE = 1.5
MAX_SECONDS_EXPERTS = 6.0
MAX_MEGABYTES_EXPERTS = 400


def test_a_model_of_126_layers_is_planned_in_a_moment(llama: Callable[..., Any]) -> None:
    # The shape of Llama-3.1-405B.
    case = llama(layers=126, hidden=16384, inner=53248, heads=128, groups=8, d=128, vocab=128256)
    started = time.process_time()
    plan = case.plan()
    seconds = time.process_time() - started
    assert plan.source_bytes == 2 * 405_853_388_800
    assert len(plan.copies) == 1137
    assert seconds < MAX_SECONDS_DENSE


EXPERTS = '''
import json, sys, time
from tepatch.planning import Spec, make_plan
from tepatch.mapping import parse_mapping

text = """version: 1
captures: {layer: num_hidden_layers, expert: num_experts}
sizes: {d: head_dim, g: num_key_value_heads}
parameters:
  model.embed_tokens.weight: same
  model.layers.{layer}:
    self_attn.qkv.weight:
      interleave: [self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight]
      over: g
      sizes: [num_attention_heads * d // g, d, d]
    self_attn.proj.weight: self_attn.o_proj.weight
    mlp.gate.weight: same
    mlp.experts_gate_up:
      any_of:
        - mlp.experts.gate_up_proj
        - stack: {concat: ["mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"]}
          over: expert
    mlp.experts_down:
      any_of:
        - mlp.experts.down_proj
        - {stack: "mlp.experts.{expert}.down_proj.weight", over: expert}
"""
layers, experts, hidden, inner, heads, groups, d = 94, 128, 4096, 1536, 64, 4, 128
sources = {"model.embed_tokens.weight": (151936, hidden)}
targets = dict(sources)
for layer in range(layers):
    at = f"model.layers.{layer}."
    sources |= {
        at + "self_attn.q_proj.weight": (heads * d, hidden),
        at + "self_attn.k_proj.weight": (groups * d, hidden),
        at + "self_attn.v_proj.weight": (groups * d, hidden),
        at + "self_attn.o_proj.weight": (hidden, heads * d),
        at + "mlp.gate.weight": (experts, hidden),
    }
    targets |= {
        at + "self_attn.qkv.weight": ((heads + 2 * groups) * d, hidden),
        at + "self_attn.proj.weight": (hidden, heads * d),
        at + "mlp.gate.weight": (experts, hidden),
        at + "mlp.experts_gate_up": (experts, 2 * inner, hidden),
        at + "mlp.experts_down": (experts, hidden, inner),
    }
    for expert in range(experts):
        one = f"{at}mlp.experts.{expert}."
        sources |= {one + "gate_proj.weight": (inner, hidden), one + "up_proj.weight": (inner, hidden)}
        sources[one + "down_proj.weight"] = (hidden, inner)
config = {
    "num_hidden_layers": layers,
    "num_experts": experts,
    "head_dim": d,
    "num_key_value_heads": groups,
    "num_attention_heads": heads,
}
specs = [{name: Spec(shape, "BF16") for name, shape in each.items()} for each in (sources, targets)]
started = time.process_time()
plan = make_plan(parse_mapping(text), config=config, sources=specs[0], targets=specs[1])
seconds = time.process_time() - started
# Not ru_maxrss: a child begins with that of the process which started it.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({
    "copies": len(plan.copies),
    "layouts": len(plan.to_json()["layouts"]),
    "seconds": seconds,
    "megabytes": peak / 1024,
    "torch": "torch" in sys.modules,
}))
'''


def test_a_model_of_36_000_experts_is_planned_in_seconds_and_little_memory() -> None:
    # The shape of Qwen3-235B-A22B, in a process of its own: what is measured is the peak of a whole process.
    done = subprocess.run([sys.executable, "-c", EXPERTS], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["copies"] == 1 + 94 * (5 + 3 * 128)
    assert found["layouts"] < 500
    assert found["seconds"] < MAX_SECONDS_EXPERTS
    assert found["megabytes"] < MAX_MEGABYTES_EXPERTS
    assert not found["torch"]
