"""Nothing that is not finite is saved, and nothing that is not finite is started from: every writer and reader."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import kronfold as kf
import pico
from kronfold.base.errors import CheckpointError, DataError, DivergedError, InputError, NotFiniteError
from kronfold.base.files import write_json
from kronfold.export.checkpoint import write_model
from kronfold.jobs.compare import CompareOptions, compare
from kronfold.jobs.compress import compress_to
from kronfold.jobs.export import export_dense
from kronfold.jobs.finetune import finetune
from kronfold.jobs.heal import heal_to
from kronfold.jobs.import_tq import import_tq
from kronfold.jobs.pretrain import pretrain
from kronfold.jobs.run import RunOptions, run
from kronfold.jobs.stream import compress_streaming
from kronfold.jobs.teach import teach_to
from kronfold.models.calibrate import calibrate
from kronfold.models.finite import check_finite, not_finite
from kronfold.models.load import load_classifier, load_model
from kronfold.options.finetune import FineTuneConfig, FineTuneOptions
from kronfold.options.healing import HealConfig, HealOptions, TeachOptions
from kronfold.train import store_teacher
from test_pretrain import settings
from test_pretrain import text as rows  # noqa: F401  (a fixture)
from train_examples import Blocks

NORM = "transformer.h.1.ln_2.weight"  # of no site: no fit ever looks at it
WIDE = 7.1e4  # above 65,504, where float16 ends
FIT = HealConfig(tokens=2048, batch_size=2)


def changed(place: Path, name: str = NORM, value: float = math.nan) -> Path:
    """A model directory with one number replaced."""
    pico.model_directory(place, n_layer=2)
    held = load_file(place / "model.safetensors")
    held[name].view(-1)[3] = value
    save_file(held, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Model directories: good, of a NaN, of a number beyond float16, of a teacher whose finite weights overflow."""
    place = tmp_path_factory.mktemp("finite")
    pico.model_directory(place / "good", n_layer=2)
    changed(place / "nan")
    changed(place / "wide", value=WIDE)
    changed(place / "overflow")
    held = load_file(place / "overflow" / "model.safetensors")
    held[NORM].fill_(3e38)
    held["transformer.h.1.mlp.c_fc.weight"].fill_(3e38)
    save_file(held, place / "overflow" / "model.safetensors", {"format": "pt"})
    (place / "text.txt").write_text(pico.TEXT * 200)
    return place


# --- the check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 517, 1030])
def test_one_bad_number_anywhere_is_found(dtype, value, at):
    tensor = torch.randn(1031, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert not_finite([("good", tensor)]) == []
    tensor[at] = value
    assert not_finite([("bad", tensor)]) == ["bad: 1 of 1,031 numbers are NaN or infinite"]


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [
        (65504.0, torch.float16, True),
        (65519.0, torch.float16, True),  # rounds down to 65,504
        (65520.0, torch.float16, False),
        (-7.1e4, torch.float16, False),
        (7.1e4, torch.bfloat16, True),
        (3.4e38, torch.bfloat16, False),  # float32 reaches a little further
        (1e300, torch.float32, False),
        (3.4e38, None, True),
    ],
)
def test_what_fits_a_dtype_is_what_the_cast_says(value, dtype, fits):
    tensor = torch.tensor([0.0, value, 1.0], dtype=torch.float64)
    assert fits == bool(tensor.to(dtype or tensor.dtype).isfinite().all())  # the oracle
    assert fits == (not_finite([("x", tensor)], dtype) == [])


def test_what_is_no_number_is_passed_by():
    tensors = {"empty": torch.zeros(0), "ids": torch.arange(3), "meta": torch.zeros(3, device="meta")}
    check_finite(tensors.items(), torch.float16)
    check_finite([("eight bits", torch.ones(4).to(torch.float8_e4m3fn))])


def test_a_mask_of_infinities_in_a_buffer_is_meant_and_a_nan_is_not():
    model = pico.gpt2(n_layer=1)
    model.register_buffer("mask", torch.full((4, 4), torch.finfo(torch.float32).min).triu(1))
    check_finite(model, torch.float16)
    model.mask.fill_(-math.inf)
    check_finite(model)
    model.mask[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="mask: 16 of 16"):
        check_finite(model)


def test_many_faults_are_counted():
    bad = [(f"t{index}", torch.tensor([math.nan])) for index in range(9)]
    with pytest.raises(NotFiniteError, match=r"t0: 1 of 1(.|\n)*… and 5 more tensors"):
        check_finite(bad)


def test_a_refused_model_is_as_it_was(tmp_path):
    model = pico.gpt2(n_layer=1)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = WIDE
    with pytest.raises(NotFiniteError, match="become infinite in float16"):
        write_model(model, pico.tokenizer(), tmp_path / "out", torch.float16)
    assert model.dtype == torch.float32
    assert not (tmp_path / "out").exists()
    write_model(model, pico.tokenizer(), tmp_path / "out", torch.bfloat16)
    assert load_file(tmp_path / "out" / "model.safetensors")["transformer.ln_f.weight"].dtype == torch.bfloat16


def test_documents_name_the_number(tmp_path):
    document = {"stages": [{"loss": 1.0}, {"loss": math.inf}], "perplexity": math.nan}
    with pytest.raises(NotFiniteError, match=r"stages\[1\]\.loss is inf, perplexity is nan"):
        write_json(tmp_path / "results.json", document)
    with pytest.raises(NotFiniteError, match="the document is nan"):
        write_json(tmp_path / "results.json", math.nan)
    assert list(tmp_path.iterdir()) == []


# --- what is damaged is not started from ------------------------------------------------------------------------------


def heal(places, tmp_path, student, teacher, **options):
    return heal_to(
        HealOptions(
            model=places / student, teacher=places / teacher, train_text=places / "text.txt", output=tmp_path / "out",
            healing=FIT, device="cpu", **options,
        )
    )  # fmt: skip


def comparison(places, model):
    text = str(places / "text.txt")
    return CompareOptions(
        model=str(places / model), recipes=["tqcompressor"], train_text=text, eval_texts={"t": text}, heal_tokens=6144
    )


def whole_run(places, model):
    text = str(places / "text.txt")
    return RunOptions(
        model=str(places / model), recipe="tqcompressor", train_text=text, eval_text=text, heal_tokens=6144
    )


STARTS = {
    "compress": lambda p, t, m: compress_to(str(p / m), t / "out", "tqcompressor"),
    "compress auto": lambda p, t, m: compress_to(
        str(p / m), t / "out", "auto", calibration=[str(p / "text.txt")], changes={"windows": 2, "window": 16}
    ),
    "heal, teacher": lambda p, t, m: heal(p, t, "good", m),
    "teach": lambda p, t, m: teach_to(
        TeachOptions(model=p / m, train_text=p / "text.txt", output=t / "out", tokens=512, top_k=4, device="cpu")
    ),
    "run": lambda p, t, m: run(whole_run(p, m), t / "out"),
    "compare": lambda p, t, m: compare(comparison(p, m), t / "out"),
    "heal, student": lambda p, t, m: heal(p, t, m, "good"),
    "export": lambda p, t, m: export_dense(str(p / m), t / "out"),
}


@pytest.mark.parametrize("start", STARTS)
def test_a_checkpoint_with_a_nan_is_named_before_any_work(places, tmp_path, start):
    with pytest.raises(CheckpointError, match=rf"not finite:\n  {NORM}: 1 of 32 numbers"):
        STARTS[start](places, tmp_path, "nan")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("start", ["compress auto", "heal, teacher", "teach", "run", "compare"])
def test_a_teacher_whose_outputs_overflow_is_named_before_any_work(places, tmp_path, start):
    """Its weights are finite, so only running it tells."""
    said = "gives NaN or infinite logits" if start == "compress auto" else "The teacher's outputs are not finite on the"
    with pytest.raises(NotFiniteError, match=said):
        STARTS[start](places, tmp_path, "overflow")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_classifier_and_a_model_read_as_float16(places):
    with pytest.raises(CheckpointError, match=NORM):
        load_classifier(places / "nan", 2)
    with pytest.raises(CheckpointError, match=rf"read as float16, are not finite:\n  {NORM}"):
        load_model(places / "wide", dtype=torch.float16)
    assert load_model(places / "nan", dtype="auto").dtype == torch.float32  # to look at


# --- what overflows or is damaged on the way is not written -----------------------------------------------------------

WRITES = {
    "compress": lambda p, t, d: compress_to(str(p / "wide"), t / "out", "svd", dtype=d),
    "stream": lambda p, t, d: compress_streaming(str(p / "wide"), t / "out", "kngpt2", dtype=d),
    "heal": lambda p, t, d: heal(p, t, "wide", "good", dtype=d),
    "export": lambda p, t, d: export_dense(str(p / "wide"), t / "out", dtype=d),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_does_not_fit_float16_is_refused_and_fits_bfloat16(places, tmp_path, write):
    said = rf"{NORM}: 1 of 32 numbers become infinite in float16; the largest is 7\.1e\+04, and float16 ends at 65,504"
    with pytest.raises(NotFiniteError, match=said + r"\nUse --dtype bfloat16 or float32"):
        WRITES[write](places, tmp_path, "float16")
    assert not (tmp_path / "out").exists()
    WRITES[write](places, tmp_path / "again", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "out")
    assert model.dtype == torch.bfloat16
    assert not not_finite(model.named_parameters())


def test_a_healing_that_does_not_fit_its_dtype_is_not_lost(places, tmp_path):
    with pytest.raises(NotFiniteError):
        heal(places, tmp_path, "wide", "good", dtype="float16")
    document = heal(places, tmp_path, "wide", "good", dtype="float32", resume=True)
    assert document["stages"][0]["tokens"] == 2048
    assert not not_finite(load_file(tmp_path / "out" / "model.safetensors").items())


def test_streaming_names_what_no_fit_looks_at(places, tmp_path):
    with pytest.raises(NotFiniteError, match=rf"The tensors of model-0000\d-of-0000\d.*not finite.*\n  {NORM}"):
        compress_streaming(str(places / "nan"), tmp_path / "out", "kngpt2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "dtype", "said"), [(math.nan, None, "NaN or infinite"), (WIDE, "float16", "7.1e")])
def test_imported_state_dicts(tmp_path, value, dtype, said):
    state = {key: tensor.clone() for key, tensor in pico.gpt2(n_layer=2).state_dict().items()}
    state[NORM][3] = value
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(InputError, match=said):
        import_tq(tmp_path / "model.pt", tmp_path / "out", heads=4, dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_fine_tuning_writes_no_infinity(places, tmp_path):
    lines = ["sentence\tlabel", *(f"the {word}\t{i % 2}" for i, word in enumerate(["fox", "dog"] * 8))]
    (tmp_path / "task.tsv").write_text("\n".join(lines))
    options = FineTuneOptions(
        model=places / "wide", task="sst2", train_file=tmp_path / "task.tsv", dev_files=[tmp_path / "task.tsv"],
        settings=FineTuneConfig(epochs=1), output=tmp_path / "out", device="cpu", dtype="float16",
    )  # fmt: skip
    with pytest.raises(NotFiniteError, match=f"{NORM}.*become infinite in float16"):
        finetune(options)
    assert not (tmp_path / "out").exists()


def test_pre_training_that_diverges_stops_and_resumes_with_a_lower_rate(rows, tmp_path):  # noqa: F811
    from kronfold.jobs.pretrain import PretrainConfig

    def config(**training):
        return PretrainConfig.model_validate(settings(rows, evaluate_every=1, **training))

    with pytest.raises(DivergedError, match=r"the pre-training has diverged(.|\n)*--resume"):
        pretrain(config(learning_rate=1e30), tmp_path / "out")
    assert (tmp_path / "out.partial" / "trainer" / "diverged.json").is_file()
    with pytest.raises(CheckpointError, match="diverged at step .* with learning rate 1e"):
        pretrain(config(learning_rate=1e30), tmp_path / "out", resume=True)
    with pytest.raises(CheckpointError, match=r"training\.batch_size was 4 and is now 2"):
        pretrain(config(learning_rate=1e-3, batch_size=2), tmp_path / "out", resume=True)
    document = pretrain(config(learning_rate=1e-3), tmp_path / "out", resume=True)
    assert document["perplexity"] < 400
    assert not not_finite(load_file(tmp_path / "out" / "model.safetensors").items())


# --- statistics and stored teachers -----------------------------------------------------------------------------------


def test_statistics_that_overflow_are_not_kept():
    """Activations of 1e25 have squares beyond float32, though the norm after them brings the logits back."""
    model = pico.gpt2(n_layer=1)
    with torch.no_grad():
        model.transformer.h[0].ln_2.weight.fill_(1e25)
        model.transformer.h[0].mlp.c_fc.weight.mul_(1e-25)
    with pytest.raises(
        NotFiniteError, match=r"The calibration statistics are not finite(.|\n)*input/transformer\.h\.0\.mlp"
    ):
        calibrate(model, pico.ids(model), gradient_windows=0)


class Breaks(nn.Module):
    """A head whose logits are NaN from some call on."""

    def __init__(self, head, after):
        super().__init__()
        self.head, self.left = head, after
        self.out_features = head.out_features

    def forward(self, hidden):
        self.left -= 1
        return self.head(hidden) * (math.nan if self.left < 0 else 1.0)


def test_a_teacher_that_breaks_on_some_block_leaves_no_nan_in_its_store(tmp_path):
    teacher = pico.gpt2(n_layer=1)
    teacher.lm_head = Breaks(teacher.lm_head, after=4)  # checks of the head and the first block, then three batches
    with pytest.raises((NotFiniteError, DataError), match="not finite in blocks"):
        store_teacher(teacher, Blocks(12), tmp_path / "out", top_k=4, batch_size=1)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.npy"))


def test_a_store_of_an_older_version_with_nan_in_it_is_named(tmp_path):
    import numpy as np

    teacher, student, data = pico.gpt2(1, n_layer=1), pico.gpt2(2, n_layer=1), Blocks(4)
    stored = store_teacher(teacher, data, tmp_path / "out", top_k=4)
    file = next((tmp_path / "out").glob("log_probs-*.npy"))
    array = np.load(file)
    array[:, 2] = np.nan
    np.save(file, array)
    with pytest.raises(NotFiniteError, match="The offline teacher's outputs are not finite on the batch of step 1"):
        kf.heal(student, type(stored)(tmp_path / "out"), data, steps=2, batch_size=2)


# --- on the command line ----------------------------------------------------------------------------------------------


def test_the_command_of_the_report(places, tmp_path, call):
    """0.3: exit 0, and NaN saved as "healed"."""
    given = (
        "heal", places / "good", "--teacher", places / "good", "--train-text", places / "text.txt",
        "--heal-tokens", 8 * 128, "--batch-size", 2, "--device", "cpu", "-o", tmp_path / "out",
    )  # fmt: skip
    code, _, err = call(*given, "--learning-rate", 1e30)
    said = " ".join(err.split())
    assert code == 2
    assert "the healing has diverged" in said
    assert "--resume" in said
    assert not (tmp_path / "out").exists()
    code, out, err = call(*given, "--learning-rate", 1e-4, "--resume", "--json")
    assert code == 0, err
    assert json.loads(out)["stages"][0]["tokens"] == 8 * 128
    assert not not_finite(load_file(tmp_path / "out" / "model.safetensors").items())
