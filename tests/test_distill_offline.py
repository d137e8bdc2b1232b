"""The offline teacher: k likeliest tokens and a bucket. Its loss, its files, and healing from them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pico
from kronfold.base.errors import CheckpointError, InputError, OutputError
from kronfold.cli.main import main
from kronfold.distill import IGNORE, METHODS, ObjectiveConfig, chunked_loss, head_parameters
from kronfold.distill.losses import IDS, LOG_PROBS, TopK, bucketed_kl, top_k
from kronfold.distill.stored import Manifest, StoredTeacher
from kronfold.train import heal, store_teacher
from kronfold.train.trainer import ShuffledStream
from train_examples import VOCABULARY, Blocks, Stop, gpt2

SIZES = {"top_k": 8, "batch_size": 2, "shard_bytes": 1}  # shards of one batch


def logits(seed: int, tokens: int = 11, vocabulary: int = 53, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def full_kl(student, teacher, temperature):
    mine, other = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    return (other.exp() * (other - mine)).sum(-1)


# The loss


def test_by_hand():
    """p = (1/2, 1/4, 1/8, 1/8) against a uniform student, two tokens kept: outcomes 1/2, 1/4, 1/4."""
    kept = top_k(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), 2)
    assert kept.ids.tolist() == [[0, 1]]
    torch.testing.assert_close(kept.log_probs.exp(), torch.tensor([[0.5, 0.25, 0.25]]))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.25 * np.log(0.25 / 0.25) + 0.25 * np.log(0.25 / 0.5)
    assert bucketed_kl(torch.zeros(1, 4), kept).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_the_whole_vocabulary_it_is_the_full_divergence(temperature):
    student, teacher = logits(0).requires_grad_(), logits(1)
    found = bucketed_kl(student, top_k(teacher, 53, temperature), temperature)
    true = full_kl(student, teacher, temperature)
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-13)
    weights = torch.rand(11, dtype=torch.float64)
    gradients = [torch.autograd.grad((weights * value).sum(), student)[0] for value in (found, true)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_a_smaller_k_never_gives_more():
    student, teacher = logits(2, tokens=200), logits(3, tokens=200)
    values = [bucketed_kl(student, top_k(teacher, k)) for k in (1, 2, 5, 20, 52, 53)]
    assert all((less <= more + 1e-12).all() for less, more in itertools.pairwise(values))
    assert (values[0] >= 0).all()
    assert values[0].mean() < 0.7 * values[-1].mean()  # and it really is another number


@pytest.mark.parametrize("k", [1, 4, 52, 53])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_by_finite_differences(k, temperature):
    teacher = top_k(logits(4, tokens=3), k, temperature)
    student = logits(5, tokens=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bucketed_kl(x, teacher, temperature), student)


def test_equal_distributions_and_empty_tails_are_finite():
    teacher = torch.tensor([[200.0, 0, 0, 0], [1, 2, 3, 4]])
    student = teacher.clone().requires_grad_()
    loss = bucketed_kl(student, top_k(teacher, 2))
    torch.testing.assert_close(loss, torch.zeros(2), atol=1e-6, rtol=0)
    assert torch.autograd.grad(loss.sum(), student)[0].abs().max() < 1e-6
    certain = torch.tensor([[300.0, 0, 0, 0]], requires_grad=True)  # the bucket underflows, the teacher wants it
    loss = bucketed_kl(certain, top_k(torch.zeros(1, 4), 1))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(torch.autograd.grad(loss.sum(), certain)[0]).all()


def test_small_tails_keep_their_digits_in_float16():
    """A tail of 2e-6: as one minus the others it would be noise, even before rounding."""
    teacher = torch.tensor([[16.0, 15.0, *[0.0] * 10]])
    kept = top_k(teacher, 2)
    true = F.log_softmax(teacher.double(), -1)[0, 2:].logsumexp(0).item()
    assert kept.log_probs.half()[0, -1].item() == pytest.approx(true, abs=2**-7)


@pytest.mark.parametrize("chunk", [4, 100])
def test_chunked_loss_with_a_stored_teacher(chunk):
    """k = vocabulary: equal to the loss with the teacher itself, values and gradients, labels ignored alike."""
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(6, 53, bias=False).double(), nn.Linear(7, 53).double()
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    taught, labels = torch.randn(11, 7, dtype=torch.float64), torch.randint(53, (11,))
    labels[::4] = IGNORE
    common = (hidden, head, head_parameters(head), labels, {"kl": 0.7, "ce": 0.3})
    options = {"temperature": 2.0, "chunk_tokens": chunk}
    online, sums = chunked_loss(*common, teacher_hidden=taught, teacher_head=teacher_head, **options)
    with torch.no_grad():
        kept = top_k(teacher_head(taught), 53, 2.0)
    offline, found = chunked_loss(*common, teacher_top=kept, **options)
    torch.testing.assert_close(found, sums, rtol=1e-12, atol=0)
    wanted = [hidden, head.weight]
    pairs = zip(*(torch.autograd.grad(total, wanted) for total in (offline, online)), strict=True)
    for mine, true in pairs:
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-13)
    with pytest.raises(InputError, match="'logit_mse' compares all logits"):
        chunked_loss(*common[:-1], {"logit_mse": 1.0}, teacher_top=kept)


# The files


def contents(place):
    return {path.name: path.read_bytes() for path in sorted(place.iterdir()) if path.name != ".kronfold.json"}


def test_what_is_stored(tmp_path):
    teacher, data = gpt2(1).train(), Blocks(5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    seen = []
    stored = store_teacher(teacher, data, tmp_path / "t", temperature=2.0, progress=lambda *s: seen.append(s), **SIZES)
    assert teacher.training
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
    assert (seen[0], seen[-1]) == ((2, 5), (5, 5))
    arrays = [f"{kind}-0000{shard}.npy" for kind in ("ids", "log_probs") for shard in range(3)]
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [".kronfold.json", *arrays, "manifest.json"]
    assert stored.manifest.bytes_per_token == 8 * 2 + 9 * 2
    teacher.eval()
    for block in range(5):
        rows = stored.rows(block)
        with torch.no_grad():
            kept = top_k(teacher(data.ids[block][None]).logits[0], 8, 2.0)
        assert rows[IDS].dtype == torch.int32
        assert torch.equal(rows[IDS].long(), kept.ids)
        torch.testing.assert_close(rows[LOG_PROBS].float(), kept.log_probs, rtol=2**-10, atol=1e-5)
    assert StoredTeacher(tmp_path / "t").manifest == stored.manifest


def test_large_vocabularies_take_four_bytes():
    facts = ["a", "b", 10, 16, 1 << 16, 8, 1.0, 4, 2, False]
    assert Manifest(*facts).id_type == np.uint16
    facts[4] += 1
    assert (Manifest(*facts).id_type, Manifest(*facts).bytes_per_token) == (np.uint32, 8 * 4 + 9 * 2)
    assert [list(shard) for shard in Manifest(*facts).shards] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def peaked(seed: int = 1):
    """A teacher that is sure of something, as random weights are not."""
    teacher = gpt2(seed, dropout=0.0).eval()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20)
    return teacher


@pytest.mark.parametrize("torn", [False, True])
def test_killed_and_resumed_it_is_the_same_to_the_byte(tmp_path, torn):
    teacher, data = gpt2(1), Blocks(7)
    store_teacher(teacher, data, tmp_path / "whole", **SIZES)

    def kill(done, total):
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        store_teacher(teacher, data, tmp_path / "t", progress=kill, **SIZES)
    work = tmp_path / "t.partial" / "result"
    assert not (tmp_path / "t").exists()
    if torn:
        (work / "ids-00000.npy").write_bytes(b"\x93NUMPY")
        (work / ".log_probs-00001.npy.abc.tmp").write_bytes(b"half")
    kept = (work / "log_probs-00000.npy").stat().st_mtime_ns
    with pytest.raises(OutputError, match="unfinished run .* --resume"):
        store_teacher(teacher, data, tmp_path / "t", **SIZES)
    with pytest.raises(CheckpointError, match=r"top_k was 8 and is now 9"):
        store_teacher(teacher, data, tmp_path / "t", resume=True, **{**SIZES, "top_k": 9})
    with pytest.raises(CheckpointError, match=r"teacher was '\w{16}' and is now '\w{16}'; temperature was 1.0 and is"):
        store_teacher(gpt2(2), data, tmp_path / "t", resume=True, temperature=2.0, **SIZES)
    with pytest.raises(CheckpointError, match="holds no offline teacher: manifest.json is missing"):
        StoredTeacher(work)
    stored = store_teacher(teacher, data, tmp_path / "t", resume=True, **SIZES)
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")
    assert not work.parent.exists()
    assert ((stored.place / "log_probs-00000.npy").stat().st_mtime_ns == kept) is not torn  # not done again
    with pytest.raises(OutputError, match="exists already"):
        store_teacher(teacher, data, tmp_path / "t", **SIZES)
    store_teacher(teacher, data, tmp_path / "t", overwrite=True, **{**SIZES, "top_k": 3})
    assert StoredTeacher(tmp_path / "t").manifest.top_k == 3


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"top_k=62 must lie from 1 to the 61 .*; temperature=0 must be above 0"):
        store_teacher(gpt2(1), Blocks(), tmp_path / "t", top_k=62, temperature=0)
    with pytest.raises(InputError, match="blocks of 40 tokens are longer than the 32 positions of the teacher"):
        store_teacher(gpt2(1), Blocks(length=40), tmp_path / "t", top_k=8)
    assert not list(tmp_path.iterdir())
    (tmp_path / "t.partial" / "checkpoint-2").mkdir(parents=True)  # of another job altogether
    with pytest.raises(CheckpointError, match="t.partial is not one that this version can resume"):
        store_teacher(gpt2(1), Blocks(), tmp_path / "t", top_k=8, resume=True)
    assert [path.name for path in (tmp_path / "t.partial").iterdir()] == ["checkpoint-2"]


def test_damaged_files_are_named(tmp_path):
    place = store_teacher(gpt2(1), Blocks(5), tmp_path / "t", **SIZES).place
    shard = place / "log_probs-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"log_probs-00001.npy cannot be read"):
        StoredTeacher(place)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"log_probs-00001.npy is missing"):
        StoredTeacher(place)
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**manifest, "format_version": 9}))
    with pytest.raises(CheckpointError, match="has format 9, and this version of kronfold reads 1"):
        StoredTeacher(place)
    with pytest.raises(CheckpointError, match="holds no offline teacher"):
        StoredTeacher(tmp_path)


# Healing


def test_every_item_has_its_own_rows_in_any_order(tmp_path):
    data = Blocks(7)
    stored = store_teacher(gpt2(1), data, tmp_path / "t", **SIZES)
    stream = ShuffledStream(stored.beside(data), 20, seed=3)
    for index in range(20):
        item = stream[index]
        block = next(i for i in range(7) if torch.equal(data.ids[i], item["input_ids"]))
        assert torch.equal(item[IDS], stored.rows(block)[IDS])
        assert torch.equal(item[LOG_PROBS], stored.rows(block)[LOG_PROBS])
    assert len({tuple(stored.rows(i)[IDS].flatten().tolist()) for i in range(7)}) == 7


def healed(teacher, data, **options):
    student = gpt2(0, dropout=0.0)
    settings = {"steps": 6, "batch_size": 4, "micro_batch": 2, "bf16": False, "log_every": 1, "learning_rate": 1e-2}
    result = heal(student, teacher, data, **{**settings, **options})
    return student, [(entry["loss"], entry.get("kl"), entry.get("ce")) for entry in result.losses]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_healing_without_the_teacher_is_healing_with_it(tmp_path, temperature):
    """The whole vocabulary stored, two epochs: equal up to the rounding of float16. And the teacher is not run."""
    teacher, data = peaked(), Blocks(11, ignore=3)
    objective = ObjectiveConfig(kl=0.8, ce=0.2, temperature=temperature)
    stored = store_teacher(teacher, data, tmp_path / "t", top_k=VOCABULARY, temperature=temperature, batch_size=4)
    online = healed(teacher, data, objective=objective)
    teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    offline = healed(stored, data, objective=objective)
    np.testing.assert_allclose(offline[1], online[1], rtol=2e-3)
    torch.testing.assert_close(offline[0].state_dict(), online[0].state_dict(), rtol=0, atol=5e-3)
    assert offline[1][-1][1] < offline[1][0][1]


def test_it_heals_from_a_few_tokens_and_resumes_exactly(tmp_path):
    teacher, data = peaked(), Blocks(10)
    stored = store_teacher(teacher, data, tmp_path / "t", **SIZES)
    whole, losses = healed(stored, data)
    assert losses[-1][1] < losses[0][1]
    place, seen = tmp_path / "run", []

    def kill(step, total, logs):
        seen.append(step)
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        healed(stored, data, output_dir=place, save_steps=2, progress=kill)
    with pytest.raises(CheckpointError, match="offline_teacher was .* and is now None"):
        healed(teacher, data, output_dir=place, save_steps=2, resume=True)
    again, _ = healed(stored, data, output_dir=place, save_steps=2, resume=True)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_what_does_not_fit_is_refused_before_training(tmp_path):
    data = Blocks(6)
    stored = store_teacher(gpt2(1), data, tmp_path / "t", **SIZES)
    with pytest.raises(InputError, match=r"of another text: of 6 blocks of 16 .* gives 7 of 16"):
        healed(stored, Blocks(7))
    with pytest.raises(InputError, match="the temperature is 2 and the stored one 1"):
        healed(stored, data, objective=ObjectiveConfig(temperature=2.0))
    with pytest.raises(InputError, match="nothing is compared with a teacher"):
        healed(stored, data, objective=ObjectiveConfig(kl=0, ce=1))
    with pytest.raises(InputError, match="the student predicts 64 tokens and the stored teacher 61"):
        heal(gpt2(0, vocabulary=64), stored, data, steps=1)
    with pytest.raises(InputError, match="of another model: of .* and the teacher given has"):
        stored.check_teacher(gpt2(2))
    stored.check_teacher(gpt2(1))
    others = [name for name in METHODS if name != "kd"]
    assert len(others) > 5
    for name in others:
        with pytest.raises(InputError, match=f"method {name} needs the teacher itself.*choose method kd"):
            heal(gpt2(0), stored, data, steps=1, objective=ObjectiveConfig(ce=1, kl=1, method=name))


def test_the_command_line(tmp_path, capsys):
    model, text = pico.model_directory(tmp_path / "model", n_layer=1), tmp_path / "text.txt"
    text.write_text(pico.TEXT * 60)
    student = pico.model_directory(tmp_path / "student", seed=1, n_layer=1)

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code, *capsys.readouterr()

    taught = tmp_path / "taught"
    code, out, _ = call("teach", model, "--train-text", text, "--tokens", 512, "--top-k", 5, "-o", taught, "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["schema"], document["tokens"], document["bytes_per_token"]) == ("kronfold/teach", 512, 22)
    assert (document["about"]["model"], document["about"]["text"]) == ("model", "text.txt")

    common = ("heal", student, "--teacher", model, "--train-text", text, "--heal-tokens", 2048, "--batch-size", 2)
    code, out, err = call(*common, "--offline-teacher", taught, "-o", tmp_path / "healed", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["stages"][0]["tokens"], found["data"]["heal"]["tokens"]) == (2048, 512)  # four epochs
    assert found["offline_teacher"]["top_k"] == 5
    code, _, err = call(*common, "--offline-teacher", taught, "-o", tmp_path / "no", "--temperature", 2)
    assert (code, "the stored one 1" in err) == (2, True)
    code, _, err = call(*common[:3], student, *common[4:], "--offline-teacher", taught, "-o", tmp_path / "no")
    assert (code, "is of another model: of model" in err) == (2, True)
    other = tmp_path / "other.txt"
    other.write_text("the other dog sleeps . " * 200)
    code, _, err = call(*common[:5], other, *common[6:], "--offline-teacher", taught, "-o", tmp_path / "no")
    assert (code, "is of another text" in err) == (2, True)
    assert not (tmp_path / "no").exists()


def test_top_k_is_cut_into_rows():
    kept = TopK(torch.arange(24).view(2, 3, 4), torch.zeros(2, 3, 5))
    assert kept.flat().ids.shape == (6, 4)
    assert kept.flat()[slice(4, 6)].ids.tolist() == torch.arange(24).view(6, 4)[4:].tolist()
    batch = {"input_ids": 0, IDS: kept.ids, LOG_PROBS: kept.log_probs}
    assert TopK.taken_from(batch) == kept
    assert batch == {"input_ids": 0}
    assert TopK.taken_from(batch) is None
