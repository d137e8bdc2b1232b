"""What kronfold 0.3 wrote still loads and reads: checkpoints of every structure, a plan, result documents.

Made once by 0.3.0 with seed 3: the demo model compressed and healed with 20,000 tokens, pico models by `auto` (llama)
and by the shipped recipes. Logits are those that 0.3.0 computed; on one processor they are equal bit for bit,
another one may add up in another order.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kronfold as kf  # registers the loader

GOLDEN = Path(__file__).parent / "golden" / "v0.3"
CHECKPOINTS = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def test_every_checkpoint_is_found():
    assert len(CHECKPOINTS) == 10


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_0_3_gives_its_logits(name):
    expected = load_file(GOLDEN / f"{name}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits[:, -expected["logits"].shape[1] :]
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2-sums"])
def test_a_checkpoint_of_0_3_folds_and_saves_anew(name, tmp_path):
    expected = load_file(GOLDEN / f"{name}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(expected["input_ids"]).logits, model(expected["input_ids"]).logits)
        folded = kf.to_dense(model)(expected["input_ids"]).logits
    torch.testing.assert_close(folded, expected["logits"], rtol=0, atol=1e-4)
