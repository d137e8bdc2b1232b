"""Run a model over calibration text and gather the second moments that data-aware fitting needs.

Inputs of every site: H = Σ x xᵀ. With gradients also G = Σ g gᵀ at every site's outputs, where g is the gradient of the
loss on targets drawn from the model's own predictions: the Fisher information, not the empirical one (Martens 2020,
arXiv 1412.1193, section 5).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import DataError, InputError, NotFiniteError
from kronfold.base.files import explain_write_errors, write_json
from kronfold.models.families import family_of
from kronfold.models.finite import check_finite, listed, not_finite
from kronfold.models.linear_view import LinearView, is_tied, sites
from kronfold.models.statistics import MomentFiles, Statistics

Progress = Callable[[str, int, int], None]


def calibrate(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    gradient_windows: int | None = None,
    seed: int = 0,
    blocks_per_pass: int | None = None,
    directory: str | Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of every site of `model` on `windows`.

    Args:
        model: a causal language model with weights; left as it was.
        windows: (n, window) token ids.
        gradient_windows: how many of them, from the first, are also run backwards; None is all, 0 none.
        seed: of the drawn targets.
        blocks_per_pass: keep the sums of so many transformer blocks in memory at a time, and run the text once for each
            group of blocks; needs `directory`, where each group's sums are written in place of older ones. None keeps
            all in memory.

    Raises:
        DataError: no windows, or windows of fewer than 2 tokens. InputError: ids beyond the vocabulary, windows beyond
            the model's context, a model of several dtypes. NotFiniteError: logits or sums that are not finite.
            OutputError: the directory cannot be written.
    """
    check_windows(model, windows)
    _check(model, gradient_windows, blocks_per_pass, directory)
    views = [view for view in sites(model).values() if view.kind == "linear"]
    with_gradients = len(windows) if gradient_windows is None else min(gradient_windows, len(windows))
    gatherer = _Gatherer(model, views)
    groups = _groups(views, blocks_per_pass)
    place = None if directory is None or blocks_per_pass is None else _cleared(Path(directory))
    reads: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    with _measuring(model):
        for i, group in enumerate(groups):
            found = gatherer.run(group, windows, with_gradients, seed, i == 0, _part(progress, i, len(groups)))
            reads |= gatherer.reads
            check_finite(found.items(), what="The calibration statistics")
            if place is None:
                tensors |= found
            else:
                with explain_write_errors(place):
                    save_file(found, place / f"moments-{i:04d}.safetensors")
    about = {"model": fingerprint(model), "text": tokens_fingerprint(windows), "window": windows.shape[1], "seed": seed}
    counts = (windows.numel(), with_gradients * windows.shape[1], is_tied(model, family_of(model)))
    if place is None:
        return Statistics(tensors, reads, *counts, about)
    statistics = Statistics(MomentFiles(sorted(place.glob("moments-*.safetensors"))), reads, *counts, about)
    write_json(place / "statistics.json", statistics.header())
    return statistics


class _Gatherer:
    """Hooks that add up moments while the model runs."""

    def __init__(self, model: PreTrainedModel, views: Sequence[LinearView]) -> None:
        self.model = model
        self.views = views
        self.reads: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}

    def run(
        self, views: Sequence[LinearView], windows: Tensor, gradients: int, seed: int, whole: bool, progress: Any
    ) -> dict[str, Tensor]:
        """Sums for `views`, and those of the embedding and head if `whole`."""
        self.sums, self.reads = {}, {}
        modules = {view.module_name: view.module for view in views}
        handles = [module.register_forward_hook(self._inputs(name)) for name, module in modules.items()]
        handles += [view.module.register_forward_hook(self._outputs(view)) for view in views if view.role != "head"]
        embedding = self.model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(self._embedded(whole)))
        if whole:
            handles.append(self.model.get_output_embeddings().register_forward_hook(self._predictions))
        generator = torch.Generator().manual_seed(seed)
        try:
            for i, window in enumerate(windows):
                progress(i, len(windows))
                self._one(window[None].to(self.model.device), i < gradients, generator)
            progress(len(windows), len(windows))
        finally:
            for handle in handles:
                handle.remove()
        return self.sums

    def _one(self, ids: Tensor, backward: bool, generator: torch.Generator) -> None:
        self._seen: dict[int, tuple[Tensor, str]] = {}
        with torch.set_grad_enabled(backward):
            logits = self.model(input_ids=ids, use_cache=False).logits[0].float()
            if not torch.isfinite(logits).all():
                faults = listed(not_finite(self.model.named_parameters()))
                raise NotFiniteError(
                    "The model gives NaN or infinite logits on the calibration text; it cannot be calibrated. "
                    "Load it in float32 and check the checkpoint."
                    + (f" Weights that are not finite:{faults}" if faults.strip() else "")
                )
            if backward:
                with torch.no_grad():
                    drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.contiguous()

    def _inputs(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()
            # Layers that are handed the very same tensor share one entry; keeping it alive keeps its id its own.
            _, key = self._seen.setdefault(id(args[0]), (args[0], name))
            self.reads[name] = key
            if key == name:
                flat = x.flatten(0, -2).float()
                self._add(f"input/{key}/second", (flat.T @ flat).cpu())
                self._add(f"input/{key}/first", flat.sum(0).cpu())

        return hook

    def _outputs(self, view: LinearView) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(collect)

        def collect(gradient: Tensor) -> None:
            flat = gradient[..., view.rows[0] : view.rows[1]].detach().flatten(0, -2).float()
            self._add(f"output/{view.name}", (flat.T @ flat).cpu())

        return hook

    def _embedded(self, whole: bool) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            output = output.detach().requires_grad_()  # the parameters are frozen, so the graph starts here
            if whole:
                output.register_hook(collect)
            return output

        def collect(gradient: Tensor) -> None:
            flat = gradient.detach().flatten(0, -2).float()
            self._add("embedding", (flat.T @ flat).cpu())

        return hook

    def _predictions(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        hidden = args[0].detach().flatten(0, -2).float()
        self._add("head", (hidden.T @ hidden).cpu())
        self._add("predicted", output.detach().flatten(0, -2).float().softmax(-1).sum(0).cpu())


@contextlib.contextmanager
def _measuring(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode and frozen parameters, undone afterwards."""
    training = [module for module in model.modules() if module.training]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _groups(views: Sequence[LinearView], blocks: int | None) -> list[list[LinearView]]:
    """Sites in runs of `blocks` transformer blocks; what stands outside the blocks goes with the first run."""
    if blocks is None:
        return [list(views)]
    groups: dict[int, list[LinearView]] = {0: []}
    for view in views:
        groups.setdefault((view.block or 0) // blocks, []).append(view)
    return [group for group in groups.values() if group]


def _part(progress: Progress | None, i: int, n: int) -> Callable[[int, int], None]:
    what = "calibrate" if n == 1 else f"calibrate (pass {i + 1} of {n})"
    return (lambda done, total: None) if progress is None else (lambda done, total: progress(what, done, total))


def _cleared(directory: Path) -> Path:
    """The directory, without what an earlier run left there: it may have had more groups."""
    with explain_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for old in (directory / "statistics.json", *directory.glob("moments*.safetensors")):
            old.unlink(missing_ok=True)
    return directory


def check_windows(model: PreTrainedModel, windows: Tensor) -> None:
    """Raises DataError or InputError unless `windows` (n, window) are token ids that the model can be run on."""
    if windows.dim() != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise DataError(
            f"Calibration needs windows (n, window) of at least 2 tokens; got {tuple(windows.shape)}. "
            "Give more text, or a shorter window."
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(windows.max()) >= vocabulary or int(windows.min()) < 0:
        raise InputError(
            f"Calibration ids run from {int(windows.min())} to {int(windows.max())}, but the model knows 0 to "
            f"{vocabulary - 1}. Tokenise with the model's own tokenizer."
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and windows.shape[1] > context:
        raise InputError(
            f"Calibration windows of {windows.shape[1]} tokens are beyond the model's context of {context}. "
            f"Draw windows of at most {context} tokens."
        )


def _check(
    model: PreTrainedModel, gradient_windows: int | None, blocks_per_pass: int | None, directory: str | Path | None
) -> None:
    if gradient_windows is not None and gradient_windows < 0:
        raise InputError(f"gradient_windows is {gradient_windows}; give 0 for none, or None for all windows.")
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    if len(dtypes) > 1:
        raise InputError(f"The model mixes {', '.join(dtypes)}; bring it to one dtype first, e.g. model.float().")
    if blocks_per_pass is not None and (blocks_per_pass < 1 or directory is None):
        raise InputError("blocks_per_pass must be at least 1 and needs a directory to write the sums to.")


def fingerprint(model: PreTrainedModel) -> str:
    """Names, shapes and up to 4,096 evenly spread numbers of every tensor of the model: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def tokens_fingerprint(windows: Tensor) -> str:
    """16 hexadecimal digits for the token windows, shape included."""
    content = windows.to("cpu", torch.int64).contiguous().numpy().tobytes()
    return hashlib.sha256(f"{tuple(windows.shape)}".encode() + content).hexdigest()[:16]
