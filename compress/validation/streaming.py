"""A transformers model whose weights come and go: structure on the meta device, tensors in a Checkpoint.

The model's own ``forward`` runs, so masks, rotary embeddings, residuals and anything a family does between its layers
are transformers' code and not a copy of it. Only three places are intercepted, and none by a family's name: the token
embedding holds just the rows that the text uses (ids are renumbered), each layer is filled before it runs and emptied
after it, and the output head runs on a few thousand rows of the vocabulary at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from compress.contracts import Checkpoint
from compress.errors import SourceError, UnsupportedModelError
from compress.validation import by_rows

#: Runs a block on some windows ``[some, length, hidden]``, whose places in the batch the slice tells (masks have rows).
Call = Callable[[torch.Tensor, slice], torch.Tensor]
#: Given a block's index, its filled module, how to run it, and its inputs ``[windows, length, hidden]``: its outputs.
Visit = Callable[[int, torch.nn.Module, Call, torch.Tensor], torch.Tensor]

BLOCK_BYTES = 64 << 20
LAYER_TOKENS = 512


class _EmptyOnMeta(TorchFunctionMode):
    """Create parameters (``torch.empty``) without memory, and buffers, which are computed, for real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class StreamedModel:
    """A causal language model of a checkpoint, in float32.

    ``by_rows`` runs blocks whose weights are read a band of rows at a time; see :mod:`compress.validation.by_rows`.

    Attributes:
        model: The transformers model, parameters on the meta device.
        vocab_size: Rows of the output head.

    Raises:
        UnsupportedModelError: transformers has no such model, or its layers or embeddings cannot be found.
    """

    def __init__(self, checkpoint: Checkpoint, attention: str = "sdpa", *, by_rows: bool = False) -> None:
        self._checkpoint = checkpoint
        self._tensors = checkpoint.tensors()
        self._by_rows = by_rows
        self.model = _build(checkpoint, attention)
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._decoder = self.model.get_decoder()
        self._embedding = self.model.get_input_embeddings()
        self._head = self.model.get_output_embeddings()
        self._layers = _find_layers(self._decoder, int(self.model.config.num_hidden_layers))
        if self._embedding is None or self._head is None:
            raise UnsupportedModelError("the model has no token embedding or no output head", where=self._kind())
        self.vocab_size = int(self._embedding.weight.shape[0])

    def parameters(self) -> int:
        """Return the number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fill_all(self) -> None:
        """Read every weight into memory: an ordinary model from then on."""
        self._fill(self.model)
        if self.model.config.tie_word_embeddings:
            self._head.weight = self._embedding.weight

    @torch.no_grad()
    def hidden_states(self, windows: npt.NDArray[np.int64], progress: Any = None) -> torch.Tensor:
        """Return the last hidden states (after the final norm), float32 ``[windows, length, hidden]``.

        Args:
            windows: Token ids int64 ``[windows, length]``.
            progress: Called with the fraction of the layers that are done.
        """

        def visit(index: int, layer: torch.nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
            result = torch.empty_like(hidden)  # not in place: a family may look back at what it fed in
            for rows in chunks(hidden):
                result[rows] = call(hidden[rows], rows)
            return result

        return self.visit_blocks(windows, visit, progress)

    def visit_blocks(
        self,
        windows: npt.NDArray[np.int64],
        visit: Visit,
        progress: Any = None,
        known: tuple[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Go through the blocks in order, each filled while it is visited; return the last hidden states.

        Args:
            windows: Token ids int64 ``[windows, length]``.
            visit: Gives a block's outputs; it may change the block's weights, which are dropped afterwards.
            progress: Called with the fraction of the blocks that are done, when their weights are dropped.
            known: How many blocks need not be visited, and the outputs of the last of them.
        """
        for module in self._resident():
            self._fill(module, recurse=False)
        used, renumbered = np.unique(windows, return_inverse=True)
        rows = self._rows(used)
        self._embedding.weight = torch.nn.Parameter(torch.from_numpy(rows), requires_grad=False)
        for index, layer in enumerate(self._layers):
            if known is not None and index < known[0]:
                layer.forward = _answering(known[1])
            else:
                layer.forward = self._streamed(layer, index, visit, progress)
        ids = torch.from_numpy(renumbered.reshape(windows.shape))
        hidden: torch.Tensor = self._decoder(input_ids=ids, use_cache=False).last_hidden_state
        for layer in self._layers:
            del layer.forward
        self._embedding.weight = _empty(self._embedding.weight)
        return hidden

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield (first vocabulary row, float32 logits ``[tokens, rows]``) for ``hidden`` ``[windows, length, hidden]``.

        The model's own forward applies the head and whatever it does to logits (scales, soft caps: elementwise), with
        the head's weight replaced by some of its rows.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

        tokens, size = hidden.shape[0] * hidden.shape[1], hidden.shape[2]
        step = max(64, BLOCK_BYTES // (4 * max(tokens, size)))
        weight_name = self._tensor_name(f"{self._names[id(self._head)]}.weight", self._tied_name())
        bias_name = f"{self._names[id(self._head)]}.bias"
        has_bias = getattr(self._head, "bias", None) is not None
        self._decoder.forward = lambda *_, **__: Output(last_hidden_state=hidden)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        for start in range(0, self.vocab_size, step):
            stop = min(self.vocab_size, start + step)
            block = torch.from_numpy(self._checkpoint.read(weight_name, start, stop))
            self._head.weight = torch.nn.Parameter(block, requires_grad=False)
            if has_bias:
                bias = torch.from_numpy(self._checkpoint.read(self._tensor_name(bias_name), start, stop))
                self._head.bias = torch.nn.Parameter(bias, requires_grad=False)
            logits = self.model(input_ids=ids, use_cache=False).logits
            del block  # before the next one is read
            self._head.weight = _empty(self._head.weight)
            yield start, logits.reshape(tokens, stop - start).numpy()
        del self._decoder.forward

    def head(self) -> torch.Tensor:
        """Return the output head's weight, float32 ``[vocab, hidden]``.

        Raises:
            UnsupportedModelError: The head does more than multiply by a weight.
        """
        if type(self._head) is not torch.nn.Linear or getattr(self._head, "bias", None) is not None:
            raise UnsupportedModelError("the output head is not a matrix alone", where=self._kind())
        name = self._tensor_name(f"{self._names[id(self._head)]}.weight", self._tied_name())
        return torch.from_numpy(self._checkpoint.read(name))

    def _streamed(self, layer: torch.nn.Module, index: int, visit: Visit, progress: Any) -> Any:
        """Return a forward that fills ``layer``, lets it be visited, and empties it."""
        run = type(layer).forward

        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            batch = hidden.shape[0]

            def call(some: torch.Tensor, rows: slice) -> torch.Tensor:
                out = run(layer, some, *sliced(args, rows, batch), **sliced(kwargs, rows, batch))
                first: torch.Tensor = out[0] if isinstance(out, tuple) else out
                return first

            self._prepare(layer)
            result = visit(index, layer, call, hidden)
            self._leave(layer)
            if progress is not None:
                progress((index + 1) / len(self._layers))
            return result

        return forward

    def _prepare(self, layer: torch.nn.Module) -> None:
        """Read a block's weights, or only those that are not read by rows."""
        products = list(by_rows.products(layer)) if self._by_rows else []
        large = {id(module) for module in products}
        for module in layer.modules():
            self._fill(module, recurse=False, skip=frozenset({"weight"}) if id(module) in large else frozenset())
        for module in products:
            full = f"{self._names[id(module)]}.weight"
            name = self._tensor_name(full)
            _check_shape(full, self._tensors[name].shape, module.get_parameter("weight").shape)
            by_rows.install(module, partial(self._checkpoint.read, name))

    def _leave(self, layer: torch.nn.Module) -> None:
        for module in by_rows.products(layer) if self._by_rows else ():
            by_rows.remove(module)
        empty(layer)

    def each(self, visit: Callable[[int, torch.nn.Module], None]) -> None:
        """Call ``visit`` with every block's index and filled module; nothing is run."""
        for index, layer in enumerate(self._layers):
            self.fill(layer)
            visit(index, layer)
            empty(layer)

    def fill(self, layer: torch.nn.Module) -> None:
        """Read a block's weights; :func:`empty` drops them again."""
        self._fill(layer)

    def parameters_of(self, layer: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
        """Return where a block keeps each of the checkpoint's tensors: module and parameter, by tensor name."""
        return {
            self._tensor_name(f"{self._names[id(module)]}.{name}"): (module, name)
            for module in layer.modules()
            for name, _ in module.named_parameters(recurse=False)
        }

    def module_of(self, tensor: str) -> torch.nn.Module:
        """Return the module of a block that keeps a tensor of the checkpoint.

        Raises:
            SourceError: None does.
        """
        for layer in self._layers:
            found = self.parameters_of(layer).get(tensor)
            if found is not None:
                return found[0]
        raise SourceError("transformers' model keeps a linear's weight elsewhere", where=tensor)

    def _resident(self) -> Iterator[torch.nn.Module]:
        """Yield the modules that are small and stay: all but layers, token embedding and head."""
        streamed = {id(module) for layer in self._layers for module in layer.modules()}
        for module in self.model.modules():
            if id(module) not in streamed and module is not self._embedding and module is not self._head:
                yield module

    def _fill(self, root: torch.nn.Module, recurse: bool = True, skip: frozenset[str] = frozenset()) -> None:
        """Read the parameters of a module (and of those inside it) from the checkpoint, but for those to ``skip``."""
        for module in root.modules() if recurse else [root]:
            prefix = self._names[id(module)]
            for name, parameter in list(module.named_parameters(recurse=False)):
                full = f"{prefix}.{name}" if prefix else name
                if name in skip or (module is self._head and self.model.config.tie_word_embeddings):
                    continue
                tensor = torch.from_numpy(self._checkpoint.read(self._tensor_name(full)))
                _check_shape(full, tensor.shape, parameter.shape)
                setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))

    def _rows(self, used: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the embedding's rows ``used`` (sorted), reading the table in blocks."""
        if used.size and not 0 <= used[0] <= used[-1] < self.vocab_size:
            raise SourceError(f"token ids {used[0]} to {used[-1]} are outside the vocabulary of {self.vocab_size}")
        name = self._tensor_name(f"{self._names[id(self._embedding)]}.weight")
        width = int(self._embedding.weight.shape[1])
        step = max(1, BLOCK_BYTES // (4 * width))
        rows = np.empty((len(used), width), np.float32)
        for start in range(0, self.vocab_size, step):
            inside = (used >= start) & (used < start + step)
            if inside.any():
                block = self._checkpoint.read(name, start, min(self.vocab_size, start + step))
                rows[inside] = block[used[inside] - start]
        return rows

    def _tied_name(self) -> str | None:
        return f"{self._names[id(self._embedding)]}.weight" if self.model.config.tie_word_embeddings else None

    def _tensor_name(self, parameter: str, tied: str | None = None) -> str:
        """Return the checkpoint's name of a parameter; the base model's prefix may be missing or extra there."""
        prefix = f"{self.model.base_model_prefix}."
        for name in (tied, parameter) if tied else (parameter,):
            for candidate in (name, name.removeprefix(prefix), prefix + name):
                if candidate in self._tensors:
                    return candidate
        raise SourceError(f"the checkpoint has no tensor for the parameter {parameter!r}", where=self._kind())

    def _kind(self) -> str:
        return str(self._checkpoint.config.get("model_type"))


def _check_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise SourceError(f"tensor has shape {list(found)}, the config asks for {list(wanted)}", where=name)


def _build(checkpoint: Checkpoint, attention: str) -> Any:
    """Return the transformers model of a checkpoint's config, float32, in evaluation mode, parameters on meta."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(checkpoint.config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(f"transformers has no model type {kind!r}", where="config.json")
    config = CONFIG_MAPPING[kind].from_dict(dict(checkpoint.config))
    config.pad_token_id = None  # ids are renumbered; none of them is padding
    with _EmptyOnMeta():
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )
    stuck = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if stuck:
        raise UnsupportedModelError(f"the buffer {stuck[0]!r} cannot be computed from the config", where=kind)
    return model.eval()


def _find_layers(decoder: torch.nn.Module, count: int) -> list[torch.nn.Module]:
    """Return the decoder's blocks: its one child list of as many modules as the config has layers."""
    lists = [child for child in decoder.children() if isinstance(child, torch.nn.ModuleList) and len(child) == count]
    if len(lists) != 1:
        raise UnsupportedModelError(
            f"{len(lists)} lists of {count} blocks where one was expected", where=type(decoder).__name__
        )
    return list(lists[0])


def chunks(hidden: torch.Tensor) -> Iterator[slice]:
    """Yield slices of the windows of ``hidden`` ``[windows, length, hidden]``, a few hundred tokens each."""
    step = max(1, LAYER_TOKENS // hidden.shape[1])
    for start in range(0, hidden.shape[0], step):
        yield slice(start, min(hidden.shape[0], start + step))


def empty(layer: torch.nn.Module) -> None:
    """Drop a block's weights."""
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, _empty(parameter))


def sliced(value: Any, rows: slice, batch: int) -> Any:
    """Return ``value`` with every tensor in it that has a batch dimension cut to ``rows``."""
    if isinstance(value, torch.Tensor):
        return value[rows] if batch > 1 and value.ndim > 1 and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: sliced(item, rows, batch) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(sliced(item, rows, batch) for item in value)
    return value


def _answering(hidden: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda *_, **__: hidden


def _empty(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False)
