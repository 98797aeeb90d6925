"""A real Llama with tepatch's layers inside: loaded, proven equal to Hugging Face's, generating text, and saved again.

    python examples/demo.py [CHECKPOINT] [--device cuda]

The checkpoint is SmolLM2-135M-Instruct, which ``make demo`` puts into ``.demo/``. Without a GPU the layers are
tepatch's reference modules: the same names, shapes and mathematics in plain PyTorch.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk: never wait for a network

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".demo" / "SmolLM2-135M-Instruct"
TOKENS = 1024
BOUNDS = {"cpu": 2e-5, "cuda": 5e-3}
"""Largest allowed difference in float32, as a share of the largest logit. GPUs multiply float32 in TF32."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=FOLDER, type=Path)
    parser.add_argument("--device", default=None, help="cpu or cuda (default: the GPU with Transformer Engine)")
    arguments = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import tepatch
    from tepatch.verify import compare_logits

    logging.disable_progress_bar()
    folder, device = arguments.checkpoint, arguments.device

    print("1. The plan, from headers alone\n")
    print(tepatch.plan("llama", folder, dtype=torch.float32))

    print("\n2. Loading\n")
    model = tepatch.load("llama", folder, dtype=torch.float32, device=device)
    print("\n".join(str(model.tepatch).splitlines()[:5]))

    print(f"\n3. The same logits as Hugging Face's, float32, {TOKENS} tokens of real text\n")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = (ROOT / "LICENSE").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS].to(model.device)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    stock.to(model.device).eval()
    with torch.no_grad():
        agreement = compare_logits(model(ids).logits, stock(ids).logits)
    print(f"   largest difference {agreement.max_error:.2e} ({agreement.max_error_relative:.1e} of the largest logit)")
    print(f"   same most likely token at {agreement.top1_agreement:.1%} of the positions")

    print("\n4. Generating, beside Hugging Face\n")
    chat = [{"role": "user", "content": "Name three primary colors and something that has each of them."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = prompt.to(model.device)
    settings = {"max_new_tokens": 64, "do_sample": False}
    ours, theirs = (m.generate(**prompt, **settings)[0, prompt.input_ids.shape[1] :] for m in (model, stock))
    print("   " + tokenizer.decode(ours, skip_special_tokens=True).replace("\n", "\n   "))
    same = torch.equal(ours, theirs)
    print(f"\n   {'the same' if same else 'NOT the same'} {len(ours)} tokens as Hugging Face's model")
    bound = BOUNDS[model.device.type]
    if not same or agreement.max_error_relative > bound:
        print(f"\nthe models differ (allowed: {bound:.0e} of the largest logit)", file=sys.stderr)
        return 1

    print("\n5. And back: saved as an ordinary checkpoint, which plain transformers loads\n")
    with tempfile.TemporaryDirectory() as place:
        saved = Path(place) / "saved"
        tepatch.save(tepatch.load("llama", folder, device=device), saved)  # in the checkpoint's own dtype
        again = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, trust_remote_code=False)
        again.to(model.device)
    before, after = dict(stock.named_parameters()), dict(again.named_parameters())
    equal = sum(name in after and torch.equal(tensor, after[name]) for name, tensor in before.items())
    if before.keys() != after.keys() or equal != len(before):
        print(f"   only {equal} of {len(before)} tensors are equal to the original's", file=sys.stderr)
        return 1
    print(f"   {equal} tensors, all equal to the original's bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
