"""What the parts of a layer's arithmetic cost on this machine, for choosing between ways to compute the same thing.

Seconds, by device, dtype and number of threads. Built-in figures serve until `kronfold tune` has measured the machine
(`measure_rates`); a saved measurement is read once, at the first question. Nothing is ever measured unasked.

Another machine, or another measurement, may choose another order of the same sums: results then differ by rounding.
With `KRONFOLD_RATES=builtin` the built-in figures are used whatever is saved.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kronfold.base.files import cache_directory, explain_write_errors, write_json
from kronfold.base.output import Lock
from kronfold.structures.permutations import permuted

FORMAT_VERSION = 1
NEVER = 0.5  # seconds
BACKWARD_PRODUCTS = 3.0  # a product with gradients is three: outputs, gradients of the inputs, of the weight
FEW, FEW_INNER = 4, 1536  # with more rows, or longer ones, weight first was slower on one thread
BACKWARD_MOVES = 2.0  # what is moved forward is moved back


@dataclass(frozen=True)
class Rates:
    """Seconds. `mac`: one multiply-accumulate of a large product. `read`: one number of a weight that a product reads,
    whatever the number of tokens. `gather`: one element picked by an index along the last dimension. `row`: one element
    of a row picked by an index. `copy`: one element of a transposition. `mix`: one element into or out of a batch of
    products with a small matrix. `launch`: one operation, however small. `few`: one number of a weight in a product of
    up to FEW rows, weight first (`linear`).
    """

    mac: float
    read: float
    gather: float
    row: float
    copy: float
    mix: float
    launch: float
    few: float

    def product(self, rows: float, inner: float, columns: float, in_one: bool = True) -> float:
        """(rows, inner) times a weight (inner, columns); not `in_one` where it is summed from several products."""
        rate = self.few if in_one and is_few(rows, inner, self) else rows * self.mac + self.read
        return self.launch + inner * columns * rate

    def moved(self, rate: float, elements: float) -> float:
        """`elements` at one of the rates above: gather, row, copy or mix."""
        return self.launch + elements * rate if elements else 0.0


def is_few(rows: float, inner: float, rates: Rates) -> bool:
    """Whether a product of so many rows with a weight (out, inner) is faster weight first."""
    return 0 < rows <= FEW and inner <= FEW_INNER and rates.few < rates.read


# Measured on one core of an AMD EPYC (Zen 4, AVX-512 with bf16), one thread. Products of 512 x 768 x 768.
_CPU_SINGLE = Rates(2.3e-11, 1.2e-10, 6e-10, 3e-10, 7e-10, 2.5e-10, 3e-6, 7e-11)
_CPU_HALF = Rates(1.05e-11, 6e-11, 1.2e-9, 2e-10, 7e-10, 5e-10, 4e-6, NEVER)
# From data sheets, not measured: 40e12 and 300e12 multiply-accumulates a second, 2e12 bytes a second.
_GPU_SINGLE = Rates(2.5e-14, 2e-12, 6e-12, 5e-12, 6e-12, 5e-12, 6e-6, NEVER)
_GPU_HALF = Rates(3.3e-15, 1e-12, 4e-12, 2.5e-12, 4e-12, 2.5e-12, 6e-6, NEVER)
BUILT_IN: dict[tuple[str, bool], Rates] = {
    ("cpu", False): _CPU_SINGLE,
    ("cpu", True): _CPU_HALF,
    ("gpu", False): _GPU_SINGLE,
    ("gpu", True): _GPU_HALF,
}


def built_in(device: str, dtype: torch.dtype) -> Rates:
    """The figures that come with the package, for a type of device ("cpu", "cuda", ...; "meta" counts as cpu)."""
    return BUILT_IN["cpu" if device in ("cpu", "meta") else "gpu", dtype.itemsize <= 2]


def device_name(device: str) -> str:
    """What a measurement is filed under: the processor's or the accelerator's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device != "cpu":
        return device
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def rates_path() -> Path:
    """Where measurements are saved: `rates.json` in `$KRONFOLD_CACHE` (`~/.cache/kronfold`)."""
    return cache_directory() / "rates.json"


def key(device: str, dtype: torch.dtype, threads: int) -> tuple[str, str, int]:
    """(device name, dtype, threads); the threads of the processor count only where it computes."""
    return device_name(device), str(dtype).removeprefix("torch."), threads if device == "cpu" else 0


def read_rates(path: Path) -> dict[tuple[str, str, int], Rates]:
    """Saved measurements by `key`. A file that is missing holds none; one that is damaged neither, with a warning."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {document['format_version']}, this kronfold reads {FORMAT_VERSION}")
        return {(row["device"], row["dtype"], row["threads"]): _rates_from(row["rates"]) for row in document["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path} cannot be read ({type(error).__name__}: {error}); the built-in rates are used. "
            "Run `kronfold tune` to measure anew, or delete the file.",
            stacklevel=2,
        )
        return {}


def _rates_from(values: Mapping[str, Any]) -> Rates:
    rates = Rates(**{field.name: float(values[field.name]) for field in fields(Rates)})
    wrong = [name for name, value in asdict(rates).items() if not 0 < value < 1]
    if wrong:
        raise ValueError(f"rates out of range: {', '.join(wrong)}")
    return rates


@functools.lru_cache(maxsize=1)
def _saved() -> dict[tuple[str, str, int], Rates]:
    return {} if os.environ.get("KRONFOLD_RATES") == "builtin" else read_rates(rates_path())


@functools.lru_cache(maxsize=64)
def _rates(device: str, dtype: torch.dtype, threads: int) -> Rates:
    saved = _saved()
    return saved.get(key(device, dtype, threads), built_in(device, dtype)) if saved else built_in(device, dtype)


def forget() -> None:
    """Read the saved measurements again at the next question."""
    _saved.cache_clear()
    _rates.cache_clear()


def rates_of(device: str, dtype: torch.dtype) -> Rates:
    """The rates for a type of device and a dtype, with as many threads as torch uses now; of a compiled graph, as
    they were when it was traced."""
    return Rates(*_values(device, dtype)) if torch.compiler.is_compiling() else _rates_now(device, dtype)


def _rates_now(device: str, dtype: torch.dtype) -> Rates:
    return _rates(device, dtype, torch.get_num_threads())


@torch.compiler.assume_constant_result
def _values(device: str, dtype: torch.dtype) -> tuple[float, ...]:
    return astuple(_rates_now(device, dtype))  # numbers: torch.compile takes them for constants


def rates_for(x: Tensor) -> Rates:
    """The rates for a call with input x: those of the dtype its products run in."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return rates_of(device, torch.get_autocast_dtype(device) if autocast else x.dtype)


def tokens_of(x: Tensor) -> int:
    """How many vectors x (..., features) holds."""
    return x.shape[:-1].numel()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, weight first where there are few rows and this machine's rates say it is faster.

    `F.linear` hands one row to the matrix-vector product of BLAS and two to four rows to a matrix product that is made
    for many. Weight first, `weight @ rows.T`, the same numbers come from a product with few columns, which reads the
    weight faster: on one processor (AMD EPYC, Zen 4, MKL) 13 to 27 GB/s where the others read 3 to 12
    (benchmarks/few_rows.py).

    x (..., in), weight (out, in), bias (out,) or None; returns (..., out). With gradients, and compiled, it is
    `F.linear` itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    count = tokens_of(x)
    if not is_few(count, weight.shape[1], rates_for(x)) or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    rows = x.reshape(count, -1)
    rows = rows if count > 1 else rows.expand(2, -1).contiguous()  # one alone would be the matrix-vector product again
    y = (weight @ rows.t())[:, :count].t().contiguous()
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, here and in threads begun inside.

    For work made of many short tensor operations: a second thread gains little, and on a busy machine costs tenfold.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def mix(small: Tensor, x: Tensor) -> Tensor:
    """small (p, q) times every x[i] of x (n, q, width): (n, p, width). The width lies in one piece throughout."""
    p, q = small.shape
    if x.device.type == "cpu" and x.dtype.itemsize == 2 and p * q < 4:
        # two-byte products this small run at a third of the rate of single precision
        return torch.bmm(small.float().expand(x.shape[0], p, q), x.float()).to(x.dtype)
    return torch.bmm(small.expand(x.shape[0], p, q), x)


COPIES = 16  # weights in turn, more than most caches hold: in a model every layer reads one of its own
SHORTEST = 1e-16  # seconds; what noise leaves below is no rate


def measure_rates(device: str, dtype: torch.dtype, *, rounds: int = 7, tokens: int = 512, width: int = 768) -> Rates:
    """The rates of this machine for a device and dtype, with the threads torch uses now.

    Args:
        rounds: interleaved rounds, whose median counts, after one of warm-up. tokens, width: the shapes measured are
            those of a layer (width, width) and (4·width, width).

    Raises RuntimeError as torch does for a device that is not there or a dtype it cannot multiply.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, square, tall = random(tokens, width), random(width, width), random(4 * width, width)
    one, two = random(1, width), random(2, width)
    weights = itertools.cycle([tall, *(random(4 * width, width) for _ in range(COPIES - 1))])
    tiny, few, half = random(1, 8), random(8, 8), width // 2
    pairs, terms = x.view(tokens, 2, half), random(width, 4, half)
    small, wide = random(1, 2), random(8, 4)
    features = torch.randperm(width, generator=generator).to(device, torch.int32)
    rows = torch.randperm(4 * width, generator=generator).to(device, torch.int32)
    jobs: dict[str, Callable[[], object]] = {
        "launch": lambda: F.linear(tiny, few),
        "product": lambda: F.linear(x, square),
        "read": lambda: F.linear(one, next(weights)),
        "few": lambda: next(weights) @ two.t(),
        "gather": lambda: permuted(x, features),
        "row": lambda: permuted(tall, rows, 0),
        "copy": lambda: x.view(tokens, half, 2).transpose(1, 2).contiguous(),
        "mix": lambda: mix(small, pairs),
        "build": lambda: mix(wide, terms),
    }
    with torch.no_grad():
        took = interleaved(jobs, device, rounds)
    launch = took["launch"]
    left = {name: max(seconds - launch, 0.0) for name, seconds in took.items()}
    mac = left["product"] / (tokens * width * width)
    found = {
        "mac": mac,
        "read": left["read"] / tall.numel() - mac,
        "gather": left["gather"] / x.numel(),
        "row": left["row"] / tall.numel(),
        "copy": left["copy"] / x.numel(),
        "mix": (left["mix"] + left["build"]) / (1.5 * x.numel() + 3 * terms.numel()),
        "launch": launch,
        "few": left["few"] / tall.numel(),
    }
    return Rates(**{name: max(value, SHORTEST) for name, value in found.items()})


def interleaved(jobs: Mapping[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each job over `rounds` rounds in which all take turns; short jobs are repeated in a turn.

    The first calls of a job are not counted: they load libraries, start threads and build what is kept.
    """
    repeats = {}
    for name, job in jobs.items():
        _seconds(job, device, 2)
        repeats[name] = max(1, int(2e-3 / max(_seconds(job, device, 2), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            times[name].append(_seconds(job, device, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(job: Callable[[], object], device: str, repeats: int) -> float:
    """Seconds of one run, over `repeats` in a row."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        job()
    wait()
    return (time.perf_counter() - started) / repeats


def save_rates(path: Path, measured: Mapping[tuple[str, str, int], Rates]) -> None:
    """Write measurements by `key`; those of other devices, dtypes and numbers of threads stay.

    Raises OutputError.
    """
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(path.with_name(path.name + ".lock"), wait=True):  # two that tune at once must not lose one another's
            rows = [
                {"device": device, "dtype": dtype, "threads": threads, "rates": asdict(rates)}
                for (device, dtype, threads), rates in {**read_rates(path), **measured}.items()
            ]
            write_json(path, {"format_version": FORMAT_VERSION, "unit": "seconds", "rows": rows})
    forget()
