"""Ways around PyTorch's check of saved tensors, noticed where they begin.

These are aliases with their own version counter, memory shared with something outside PyTorch, and saved-tensor hooks.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from ampcheck.observe.autograd import active_hooks, is_pytorchs_hook, saved_slots, slot_value
from ampcheck.observe.probes.call_sites import CallSite, CallSites
from ampcheck.observe.probes.containment import contained, own_frame_hidden
from ampcheck.observe.probes.graph_log import unchecked_save
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modes import alone, tracing
from ampcheck.observe.probes.modules import ModuleProbe
from ampcheck.observe.tensors import PLAIN, tensors_in
from ampcheck.trace import UncheckedSave

_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr
_storage: Any = torch.UntypedStorage
_TENSOR: Any = torch.Tensor
# A step that makes more aliases than this makes them routinely: the rest go unrecorded.
_MOST = 10_000


class _Held:
    """A storage by its address. The weak reference keeps the address from being reused, but lets the memory go."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage: Any = tensor.untyped_storage()
        self.key: int = storage._cdata
        self._reference = storage._weak_ref()

    @property
    def storage(self) -> Any:
        return _storage._new_with_weak_ptr(self._reference)

    def __del__(self) -> None:
        # If `__init__` failed, there is none.
        if "_reference" in vars(self):
            _storage._free_weak_ref(self._reference)


class _Alias:
    """An alias of a storage.

    If ``version()`` has changed, the alias was written to: before the node numbered ``until``, or up to now if that is
    ``None``.
    """

    def __init__(self, held: _Held, version: Callable[[], float], total: Callable[[], Any] | None = None) -> None:
        self.held = held
        self.until: int | None = None
        self._version = version
        self._begun = version()
        self._total = total
        self._total_before = total() if total is not None else None

    @property
    def written(self) -> bool:
        return self.until is not None or self._version() != self._begun

    @property
    def changed_content(self) -> bool:
        """Whether a write changed the content, where that is compared."""
        if self._total is None or not self.written:
            return False
        now, before = self._total(), self._total_before
        return bool(now != before and (now == now or before == before))

    def died(self) -> None:
        """Record that the alias is gone. If it was not written to, views of it may still exist."""
        with contextlib.suppress(Exception):
            if self.written:
                self.until = _sequence_nr()


class _Packed:
    """A tensor that a saved-tensor hook was given.

    If the hook is not PyTorch's own, ``hooks`` is the hook and ``call_site`` the line that saved the tensor.
    """

    def __init__(self, tensor: torch.Tensor, call_site: CallSite | None, module: str | None, hooks: Any) -> None:
        self.held = _Held(tensor)
        self.module = module
        self.version = tensor._version
        self.call_site = call_site
        self.hooks = hooks


class AliasProbe:
    """Records what can get past PyTorch's check of saved tensors, in the thread that entered the probe.

    ``may_be_stale`` says whether a saved tensor of a graph may have been overwritten unseen, ``unchecked`` which saves
    nothing checks. The probe acts where an alias is made, not where one is written to: a step without aliases costs
    nothing.
    """

    def __init__(self, modules: ModuleProbe) -> None:
        self.error: Exception | None = None
        self._modules = modules
        self.stale_under_hooks = False
        self._aliases: list[_Alias] = []
        self._assigned: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._packed: dict[int, list[_Packed]] = {}
        self._unchecked: dict[Any, UncheckedSave] = {}
        self._under_hooks: list[list[Any]] = []
        self._call_sites = CallSites()
        self._listening = Listening()
        self._finalizers: list[weakref.finalize[Any, Any]] = []
        self._thread = threading.get_ident()

    @property
    def unchecked(self) -> tuple[UncheckedSave, ...]:
        """Saves that hooks other than PyTorch's handed back to backward as the tensor itself, one for each hook."""
        return tuple(self._unchecked.values())

    def __enter__(self) -> AliasProbe:
        self._thread = threading.get_ident()
        listening = self._listening
        listening.to_attribute(_TENSOR, "data", data_property, (self.aliased, self.assigned))
        listening.to_attribute(_TENSOR, "numpy", method_listened_to, self.exported)
        listening.to_attribute(_TENSOR, "set_", method_listened_to, self.aliased)
        listening.to(_TENSOR.__dlpack__, after=self.exported)
        listening.to(saved_tensors_hooks.__enter__, before=self._hooked)
        listening.to(saved_tensors_hooks.__exit__, after=self._unhooked)
        self._under_hooks = [[0, None]] if active_hooks() else []
        self._take_up_hooks()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.end()
        for finalizer in self._finalizers:
            finalizer.detach()

    def may_be_stale(self, nodes: Iterable[Any]) -> bool:
        """Whether one of these nodes may have saved a tensor that was later overwritten, unseen by PyTorch.

        Skips slots under saved-tensor hooks, since reading them runs the hooks.
        """
        written = [alias for alias in self._aliases if alias.written]
        assigned = [(tensor, sequence) for one, sequence in self._assigned if (tensor := one()) is not None]
        if not written and not assigned:
            return False
        with alone():
            for node in nodes:
                made = node._sequence_nr()
                if self._is_under_hooks(made):
                    continue
                late = {one.held.key for one in written if one.until is None or made < one.until}
                for name, _ in saved_slots(node):
                    with contextlib.suppress(RuntimeError):
                        for tensor in tensors_in(slot_value(node, name)):
                            if any(tensor is other and made < sequence for other, sequence in assigned):
                                return True
                            if late and _is_plain(tensor) and tensor.untyped_storage()._cdata in late:
                                return True
        return False

    @property
    def changed_parameters(self) -> frozenset[int]:
        """The storages of parameters that were changed through an alias."""
        with alone():
            return frozenset(one.held.key for one in self._aliases if one.changed_content)

    def _is_under_hooks(self, made: int) -> bool:
        return any(first <= made and (last is None or made < last) for first, last in self._under_hooks)

    def _looks(self) -> bool:
        return threading.get_ident() == self._thread and len(self._finalizers) < _MOST and not tracing()

    @contained
    def aliased(self, alias: Any, tensor: Any, *_: Any, **__: Any) -> None:
        """Record ``alias``, which has its own version counter and may share the memory of ``tensor``."""
        if not self._looks() or not _is_plain(alias):
            return
        with alone():
            # Shares the version counter, but not the memory.
            counter = alias.detach()
            torch._C.TensorBase.data.__set__(counter, alias.new_empty(0))  # type: ignore[attr-defined]
            held = _Held(alias)
            # A replay begins with the parameters as they are now: what a write did to them has to be seen here.
            total = functools.partial(_total, weakref.ref(tensor)) if type(tensor) is torch.nn.Parameter else None
            self._note(_Alias(held, lambda: counter._version, total), alias)

    @contained
    def exported(self, array: Any, tensor: Any, *_: Any, **__: Any) -> None:
        """Record ``array``, through which something outside PyTorch sees, and may write, the memory of ``tensor``."""
        if not self._looks() or type(tensor) is torch.nn.Parameter or not _is_plain(tensor):
            return
        with alone():
            if tensor.is_cpu:
                held = _Held(tensor)
                layout = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
                self._note(_Alias(held, functools.partial(_content, held, tensor.dtype, layout)), array)

    def _note(self, alias: _Alias, owner: Any) -> None:
        self._aliases.append(alias)
        with contextlib.suppress(TypeError):
            finalizer = weakref.finalize(owner, alias.died)
            finalizer.atexit = False
            self._finalizers.append(finalizer)

    @contained
    def assigned(self, tensor: Any, value: Any) -> None:
        """Record that ``tensor`` is about to get other memory."""
        if self._looks() and len(self._assigned) < _MOST:
            self._assigned.append((weakref.ref(tensor), _sequence_nr()))

    @contained
    def _take_up_hooks(self) -> None:
        """Wrap hooks that are already active, if this PyTorch shows them; their own ``with`` block pops ours."""
        autograd: Any = torch._C._autograd
        top = autograd._top_saved_tensors_default_hooks(True) if _TELLS_HOOKS and not tracing() else None
        if top is not None and _is_foreign(top[0]):
            autograd._pop_saved_tensors_default_hooks()
            autograd._push_saved_tensors_default_hooks(self._packing(top[0], True), self._unpacking(top[1]))

    @contained
    def _hooked(self, hooks: Any) -> None:
        if threading.get_ident() != self._thread or tracing():
            return
        self._under_hooks.append([_sequence_nr(), None])
        if hasattr(hooks.pack_hook, "is_watched"):
            return
        foreign = _is_foreign(hooks.pack_hook)
        if foreign or type(hooks).__module__ == "torch.utils.checkpoint":
            hooks.pack_hook = self._packing(hooks.pack_hook, foreign)
            hooks.unpack_hook = self._unpacking(hooks.unpack_hook)

    @contained
    def _unhooked(self, *_: Any) -> None:
        if threading.get_ident() == self._thread and not tracing():
            for span in [span for span in self._under_hooks if span[1] is None][-1:]:
                span[1] = _sequence_nr()

    def _packing(self, pack: Callable[..., Any], foreign: bool) -> Callable[..., Any]:
        @functools.wraps(pack)
        def packing(tensor: Any) -> Any:
            with own_frame_hidden:
                packed = pack(tensor)
            self._pack(tensor, pack if foreign else None)
            return packed

        packing.is_watched = True  # type: ignore[attr-defined]
        return packing

    def _unpacking(self, unpack: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(unpack)
        def unpacking(packed: Any) -> Any:
            with own_frame_hidden:
                tensor = unpack(packed)
            self._unpack(tensor)
            return tensor

        return unpacking

    @contained
    def _pack(self, tensor: Any, foreign: Any) -> None:
        with torch._C.DisableTorchFunction():
            if _is_plain(tensor):
                call_site = self._call_sites.find(sys._getframe(3)) if foreign is not None else None
                one = _Packed(tensor, call_site, self._modules.current, foreign)
                self._packed.setdefault(one.held.key, []).append(one)

    @contained
    def _unpack(self, tensor: Any) -> None:
        with torch._C.DisableTorchFunction():
            if not _is_plain(tensor):
                return
            for one in self._packed.get(tensor.untyped_storage()._cdata, ()):
                self.stale_under_hooks = self.stale_under_hooks or one.version < tensor._version
                if one.call_site is not None and one.hooks not in self._unchecked:
                    node: Any = torch._C._current_autograd_node()
                    self._unchecked[one.hooks] = unchecked_save(one.hooks, node.name(), one.call_site, one.module)


_TELLS_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")


def _is_foreign(pack: Any) -> bool:
    """Whether a pack hook is neither PyTorch's own nor our wrapper around another."""
    return not is_pytorchs_hook(pack) and not hasattr(pack, "is_watched")


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor lies in one storage and counts versions."""
    if type(tensor) not in PLAIN:
        return False
    with torch._C.DisableTorchFunction():
        return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_inference())


def _total(reference: weakref.ref[torch.Tensor]) -> Any:
    """The sum of a parameter's elements, as a tensor, which nobody waits for; zero where it is gone, or has none."""
    parameter = reference()
    # Some dtypes have no kernel for it.
    with contextlib.suppress(RuntimeError), alone():
        return 0 if parameter is None else parameter.detach().sum()
    return 0


def data_property(descriptor: Any, listeners: list[Any]) -> property:
    """A ``Tensor.data`` that calls listeners, which are pairs of functions.

    The first (or ``None``) gets an alias and its tensor, the second a tensor and the value about to be assigned to it.
    """

    def get(tensor: Any) -> Any:
        with own_frame_hidden:
            alias = descriptor.__get__(tensor)
        for _, (aliased, _) in listeners:
            if aliased is not None:
                aliased(alias, tensor)
        return alias

    def assign(tensor: Any, value: Any) -> None:
        for _, (_, assigned) in listeners:
            assigned(tensor, value)
        with own_frame_hidden:
            descriptor.__set__(tensor, value)

    return property(get, assign, None, descriptor.__doc__)


def method_listened_to(original: Any, listeners: list[Any]) -> Any:
    """A method of tensors that then calls listeners with its result and the tensor."""

    @functools.wraps(original)
    def method(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        with own_frame_hidden:
            result = original(tensor, *args, **kwargs)
        for _, noted in listeners:
            noted(result, tensor)
        return result

    return method


def _content(held: _Held, dtype: torch.dtype, layout: tuple[int, tuple[int, ...], tuple[int, ...]]) -> float:
    """A checksum of the memory, since no version counter counts a write from outside PyTorch."""
    storage = held.storage
    if storage is None or 0 in layout[1]:
        return 0.0
    with alone():
        own: Any = torch._C.TensorBase
        offset, shape, strides = layout
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if extent > _SAMPLE:
            # For large memory, sample a few elements.
            step = extent // _SAMPLE
            shape, strides = (extent // step,), (step,)
        seen = own.set_(torch.empty(0, dtype=dtype), storage, offset, shape, strides)
        numbers = (torch.view_as_real(seen) if seen.is_complex() else seen).double().nan_to_num()
        return float(numbers.sum() + numbers.abs().sum() / 3)


_SAMPLE = 65_536
