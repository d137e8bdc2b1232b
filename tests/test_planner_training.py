"""What healing takes: hand numbers for GPT-2 small, and what autograd really keeps of a pico model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import pico
from kronfold.base.errors import InputError
from kronfold.planner import planning
from kronfold.planner.training import TrainingJob, TrainingShape, training_cost, training_of

GPT2 = TrainingShape(width=768, hidden=3072, layers=12, vocabulary=50257)


def test_hand_numbers_on_one_device():
    found = training_cost(81_336_388, 124_439_808, GPT2, TrainingJob(tokens=10_000_000, precision="fp32"))
    n = 16 * 1024
    assert found["memory"] == {
        "weights": 325_345_552,
        "gradients": 325_345_552,
        "optimiser": 650_691_104,
        "buckets": 0,
        "gathered": 0,
        "copies": 0,
        "teacher": 497_759_232,
        # per token and block 8 x 768 + 5 x 3072 = 21,504 numbers
        "activations": n * (12 * 21_504 * 4 + 9_216),
        "logits": 617_558_016,  # 3 x 1024 x 50257 x 4
    }
    assert found["memory_per_device"] == sum(found["memory"].values())
    assert (found["tokens_per_step"], found["steps"], found["tokens_trained"]) == (16384, 611, 10_010_624)


def test_hand_numbers_on_many_devices():
    spread = {"tokens": 2_000_000_000, "batch": 512, "micro_batch": 4, "processes": 64}
    copied = training_cost(1_000, 2_000, GPT2, TrainingJob(**spread))
    assert (copied["micro_batch"], copied["accumulate"]) == (4, 2)
    assert (copied["tokens_per_step"], copied["tokens_per_device_and_step"]) == (524_288, 8_192)
    assert copied["steps"] == 3815  # 2e9 / 524,288 = 3814.7
    memory = copied["memory"]
    assert (memory["weights"], memory["gradients"], memory["optimiser"]) == (4_000, 4_000, 8_000)
    assert (memory["buckets"], memory["copies"]) == (4_000, 2_000)
    assert memory["teacher"] == 8_000 + 2 * 50_257 * 768
    assert memory["activations"] == 4096 * (12 * (20 * 768 + 10 * 3072) + 9_216)
    sharded = training_cost(1_000, 0, GPT2, TrainingJob(**spread, sharded=True))["memory"]
    assert (sharded["weights"], sharded["optimiser"], sharded["buckets"]) == (63, 125, 0)  # 62.5 rounded up, 125
    assert sharded["teacher"] == 0
    assert (memory["gathered"], sharded["gathered"]) == (0, 8_000)  # all of so small a student counts as embedding
    embedding = 50_257 * 768
    whole = training_cost(embedding + 12 * 70, 0, GPT2, TrainingJob(**spread, sharded=True))["memory"]
    assert whole["gathered"] == 8 * (embedding + 140)  # two of the twelve blocks
    assert sharded["logits"] == memory["logits"] * 2 // 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(precision):
    """Bytes that a block of GPT-2 adds to what is saved for the backward pass, parameters and their copies left out."""
    rows, length, width = 3, 50, 64
    ids = torch.zeros(rows, length, dtype=torch.long)

    def saved(layers: int) -> int:
        config = GPT2Config(
            vocab_size=61, n_positions=length, n_embd=width, n_layer=layers, n_head=2,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        sizes, kept = {p.untyped_storage().data_ptr(): 0 for p in [*model.parameters(), *model.buffers()]}, []

        def pack(tensor):
            kept.append(tensor)  # alive, so that no address is used twice
            copy = tensor.dtype == torch.bfloat16 and tensor.dim() == 2 and tensor.shape[0] in (width, 4 * width)
            sizes.setdefault(tensor.untyped_storage().data_ptr(), 0 if copy else tensor.untyped_storage().nbytes())
            return tensor

        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            model(ids, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        return sum(sizes.values())

    job = TrainingJob(tokens=1, block=length, batch=rows, precision=precision)
    one, two = (
        training_cost(0, 0, TrainingShape(width, 4 * width, n, 61), job)["memory"]["activations"] for n in (1, 2)
    )
    assert two - one == pytest.approx(saved(2) - saved(1), rel=0.01)


def test_of_a_plan():
    plan = planning.plan_of_shapes(pico.config(), "tqcompressor")
    found = training_of(plan, pico.config(), tokens=6400, batch=4, processes=2)
    assert found["memory"]["weights"] == 4 * plan.held_parameters
    assert found["memory"]["teacher"] == 4 * plan.teacher.held_parameters + 2 * 101 * 32
    assert (found["block"], found["steps"]) == (64, 25)  # no longer than the context
    default = training_of(plan, pico.config())
    assert default["tokens"] == sum(stage.heal.tokens for stage in plan.stages)
    assert default["batch"] == max(stage.heal.batch_size for stage in plan.stages)


def test_faults():
    with pytest.raises(InputError, match="16 blocks .* 3 process.*multiple of 15"):
        TrainingJob(tokens=1, processes=3)
    with pytest.raises(InputError, match="micro-batches of 3"):
        TrainingJob(tokens=1, micro_batch=3)
    with pytest.raises(InputError, match="tokens is -1"):
        TrainingJob(tokens=-1)
    with pytest.raises(InputError, match="'int8' is unknown"):
        TrainingJob(tokens=1, precision="int8")


def test_command(call):
    arguments = ["plan", "config:gpt2", "-r", "tqcompressor", "--train", "--processes", "8", "--micro-batch", "1"]
    training = json.loads(call(*arguments, "--json")[1])["training"]
    assert training["memory_per_device"] == sum(training["memory"].values())
    assert training["processes"] == 8
    shown = call(*arguments)[1]
    assert "the teacher" in shown
    assert f"{training['steps']:,} steps" in " ".join(shown.split())
