"""Numbers as text, the same in the terminal and on the page: thousands separators, units, nothing hidden."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NOT_MEASURED = "–"


def known(value: Any) -> bool:
    """A finite number (a result that overflowed is stored as null, NaN or inf)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def count(value: Any) -> str:
    """A whole number with thousands separators: `81,336,388`."""
    return f"{round(value):,}" if known(value) else NOT_MEASURED


def perplexity(value: Any) -> str:
    """Two decimals below 1,000, none below ten million, powers of ten above: `32.41`, `18,204`, `2.1e+08`."""
    if not known(value):
        return NOT_MEASURED
    if value >= 1e7:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def share(part: Any, whole: Any) -> str:
    """`part` as a percentage of `whole`: `65.4 %`."""
    return f"{100 * part / whole:.1f} %" if known(part) and known(whole) and whole else NOT_MEASURED


def signed_percent(value: Any) -> str:
    """A relative change with its sign: 0.238 is `+23.8 %`; powers of ten from a million percent on."""
    if not known(value):
        return NOT_MEASURED
    number = f"{100 * value:+,.1f}" if abs(value) < 1e4 else f"{100 * value:+.1e}"
    return f"{number} %".replace("-", "\N{MINUS SIGN}", 1)


def smaller(before: Any, after: Any) -> str:
    """How many times fewer: `1.53 × smaller`; for growth, `1.20 × larger`; `same size` when equal."""
    if not (known(before) and known(after) and before > 0 and after > 0):
        return NOT_MEASURED
    if before == after:
        return "same size"
    return f"{before / after:.2f} × smaller" if before > after else f"{after / before:.2f} × larger"


def rate(value: Any) -> str:
    """A learning rate as people write it: `5e-4`, `2.5e-5`."""
    if not known(value) or value <= 0:
        return NOT_MEASURED
    power = math.floor(math.log10(value) + 1e-9)
    return f"{value / 10**power:.3g}e{power}"


def error(value: Any) -> str:
    """A relative error (Frobenius, unitless) to four decimals."""
    return f"{value:.4f}" if known(value) else NOT_MEASURED


def size(value: Any) -> str:
    """Bytes in decimal units: `6.6 MB`."""
    if not known(value):
        return NOT_MEASURED
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:,} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value = value / 1000
    return f"{value:.2f} GB"


def duration(seconds: Any) -> str:
    """`42.3 s`, `3 min 12 s` or `2 h 05 min`."""
    if not known(seconds):
        return NOT_MEASURED
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "×".join(str(item) for item in value)  # a shape: separators would hide it
    if isinstance(value, Mapping):
        return pairs(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, str) and not value.isprintable():
        return repr(value)  # a join of "\n\n" must not break the line it is told on
    return f"{value:,}" if isinstance(value, int) else str(value)


def pairs(mapping: Mapping[str, Any]) -> str:
    """A small mapping on one line: `window 256, stride 128`."""
    return ", ".join(f"{str(key).replace('_', ' ')} {_value(value)}" for key, value in mapping.items())


def protocol(settings: Mapping[str, Any]) -> str:
    """The protocol's name first, then its settings: `sliding (window 256, stride 128)`."""
    name = str(settings.get("name", "unnamed"))
    rest = pairs({key: value for key, value in settings.items() if key != "name"})
    return f"{name} ({rest})" if rest else name


def protocol_short(settings: Mapping[str, Any]) -> str:
    """Name, window and stride only, for headings: `sliding (window 256, stride 128)`."""
    return protocol({key: settings[key] for key in ("name", "window", "stride") if key in settings})


def shape(row: Mapping[str, Any]) -> str:
    """What became of a matrix: a Kronecker spec in full, any other structure by its label, e.g. `rank 20 of 256`."""
    if row["structure"] == "kronecker" or not row.get("label"):
        return spec(row["spec"])
    return f"{row['label']}, head {row['spec']['head']}" if row["spec"].get("head") else str(row["label"])


def spec(settings: Mapping[str, Any]) -> str:
    """A spec for tables. Kronecker shapes read `4 × (192×384 ⊗ 4×2)`; any other spec lists its fields.

    The name of the structure is left out: it has a column of its own.
    """
    settings = {key: value for key, value in settings.items() if key != "structure"}
    if "a" not in settings or "b" not in settings:
        return pairs(settings)
    text = f"{settings.get('rank', 1)} × ({_value(settings['a'])} ⊗ {_value(settings['b'])})"
    rest = {key: value for key, value in settings.items() if key not in ("a", "b", "rank")}
    searched = [key for key in ("permute_in", "permute_out") if rest.pop(key, True)]
    if len(searched) == 1:
        rest["permuted"] = searched[0].removeprefix("permute_") + " only"
    elif not searched:
        rest["permuted"] = "no"
    return f"{text}, {pairs(rest)}" if rest else text


def kept_layers(layers: Mapping[str, Any]) -> str:
    """The `layers` entry of a document, which blocks are kept: `6 of 12 (alt), number 0, 2, 4, 6, 8, 10`."""
    by = f" ({layers['strategy']})" if layers.get("strategy") else ""
    return f"{len(layers['kept'])} of {layers['depth']}{by}, number {', '.join(map(str, layers['kept']))}"
