"""What kronfold 0.3 wrote still loads and reads: checkpoints of every structure, a plan, result documents.

Made once by 0.3.0 with seed 3: the demo model compressed and healed with 20,000 tokens, pico models by `auto` (llama)
and by the shipped recipes. Logits are those that 0.3.0 computed; on one processor they are equal bit for bit, another
one may add up in another order.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import kronfold as kf  # registers the loader
from kronfold.planner.plan import Plan
from kronfold.planner.planning import check_plan

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


def test_a_plan_of_0_3_reads_and_counts_the_same(tmp_path):
    """Its rows hold head and init inside their specs; both become fields, and every key of the document stays."""
    old = json.loads((GOLDEN / "plan.json").read_text())
    made = Plan.load(GOLDEN / "plan.json")
    new = made.to_dict()
    for was, now in zip(old["rows"], new["rows"], strict=True):
        assert {key: now[key] for key in was} == was
    assert [row.head for row in made.rows if row.name == "transformer.wte"] == ["tied", "tied"]
    assert {row.storage for row in made.rows} == {"model"}
    assert {key: new[key] for key in ("held_parameters", "macs_per_token", "bytes_fp16", "gathers")} == {
        key: old[key] for key in ("held_parameters", "macs_per_token", "bytes_fp16", "gathers")
    }
    config = AutoConfig.from_pretrained(GOLDEN / "demo-healed")
    del config.quantization_config
    config.tie_word_embeddings = True
    assert check_plan(made, config) == made.cost
