"""Finds accesses out of bounds and races between programs, in Triton's interpreter.

The interpreter performs every masked load and store on raw addresses and checks none of them, and
runs the programs of a grid one after the other, so a race goes unseen. `Checker` looks at each
access first:

- an active lane must lie on an element of a tensor that the launch was given; what lies between the
  elements of a strided view, or beside a slice of a larger tensor, is out of bounds;
- in one launch no two programs may store to the same place, and none may load what another one
  stores, in whichever order the interpreter happens to run them;
- two lanes of one store must not write different values to one place.

Lanes that are out of bounds are reported and masked off, so the process survives. Atomics are
checked for bounds only. Not seen: uninitialised reads (tests fill fresh memory with NaN instead),
and a stray access that happens to hit another tensor of the same launch.
"""

import inspect
from dataclasses import dataclass, field

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

MOST_SHOWN = 10
MANY = -1  # loaded by more than one program


class MemoryFaultError(AssertionError):
    """At least one access was out of bounds or part of a race."""


@dataclass
class Region:
    """One storage that a launch was given, in units of its smallest element size."""

    start: int  # address
    unit: int  # bytes
    names: list[str] = field(default_factory=list)
    valid: np.ndarray = None  # bool: some argument has an element here
    writer: np.ndarray = None  # program that stored here, counted from 1; 0 none
    reader: np.ndarray = None  # program that loaded here; 0 none, MANY several

    @property
    def end(self) -> int:
        return self.start + self.unit * len(self.valid)


class Checker:
    """`with Checker() as checker:` runs kernels under watch; leaving it raises MemoryFaultError.

    `kernels` is the set of names of the kernels that ran; `faults` lists what was found.
    """

    def __init__(self):
        self.kernels: set[str] = set()
        self.faults: list[str] = []
        self._regions: list[Region] = []
        self._kernel = ""

    def __enter__(self):
        names = ("create_masked_load", "create_masked_store", "create_atomic_cas")
        self._original = {name: getattr(InterpreterBuilder, name) for name in names}
        self._original["create_atomic_rmw"] = InterpreterBuilder.create_atomic_rmw
        self._launch = GridExecutor.__call__
        original, checker = self._original, self

        def masked_load(builder, ptrs, mask, other, *rest):
            mask = checker._look("load", ptrs, mask)
            return original["create_masked_load"](builder, ptrs, mask, other, *rest)

        def masked_store(builder, ptrs, value, mask, *rest):
            mask = checker._look("store", ptrs, mask, value)
            return original["create_masked_store"](builder, ptrs, value, mask, *rest)

        def atomic_rmw(builder, operation, ptrs, value, mask, *rest):
            mask = checker._look("atomic", ptrs, mask)
            return original["create_atomic_rmw"](builder, operation, ptrs, value, mask, *rest)

        def atomic_cas(builder, ptrs, *rest):
            everywhere = TensorHandle(np.ones_like(ptrs.data, dtype=bool), interpreter.tl.int1)
            if not checker._look("atomic", ptrs, everywhere).data.all():
                raise MemoryFaultError(checker.faults[-1])
            return original["create_atomic_cas"](builder, ptrs, *rest)

        def launch(executor, *arguments, **keywords):
            checker._begin(executor, arguments, keywords)
            try:
                return checker._launch(executor, *arguments, **keywords)
            finally:
                checker._regions = []

        InterpreterBuilder.create_masked_load = masked_load
        InterpreterBuilder.create_masked_store = masked_store
        InterpreterBuilder.create_atomic_rmw = atomic_rmw
        InterpreterBuilder.create_atomic_cas = atomic_cas
        GridExecutor.__call__ = launch
        return self

    def __exit__(self, kind, error, trace):
        for name, function in self._original.items():
            setattr(InterpreterBuilder, name, function)
        GridExecutor.__call__ = self._launch
        if kind is None and self.faults:
            shown = "\n".join(self.faults[:MOST_SHOWN])
            more = len(self.faults) - MOST_SHOWN
            raise MemoryFaultError(f"{shown}\n... and {more} more" if more > 0 else shown)

    # one launch

    def _begin(self, executor, arguments, keywords):
        """Note the tensors of a launch; nothing has been loaded or stored yet."""
        self._kernel = executor.fn.__name__
        self.kernels.add(self._kernel)
        parameters = inspect.signature(executor.fn).parameters
        given = dict(zip(parameters, arguments, strict=False))
        given |= {name: value for name, value in keywords.items() if name in parameters}
        tensors = list(_tensors(given))
        for _, tensor in tensors:
            assert tensor.device.type == "cpu", "the interpreter would copy it: addresses change"
        by_storage: dict[int, list] = {}
        for name, tensor in tensors:
            if tensor.numel():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(
                    (name, tensor)
                )
        self._regions = [_region(start, group) for start, group in sorted(by_storage.items())]

    def _look(self, action, ptrs, mask, value=None):
        """Check one access of the running program; the mask without what is out of bounds."""
        size = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
        shape = np.broadcast_shapes(ptrs.data.shape, mask.data.shape)
        address = np.broadcast_to(ptrs.data, shape).astype(np.int64)
        active = np.broadcast_to(mask.data, shape).astype(bool)
        inside = np.zeros(shape, dtype=bool)
        for region in self._regions:
            here = active & (address >= region.start) & (address + size <= region.end)
            if here.any():
                inside |= self._in_region(action, region, address, here, size, value)
        if (active & ~inside).any():
            self._report_stray(action, address[active & ~inside], size)
        return mask if inside[active].all() else TensorHandle(active & inside, mask.dtype)

    def _in_region(self, action, region, address, here, size, value):
        """Check the lanes `here`, all within `region`; those that hit an element of a tensor."""
        first = (address[here] - region.start) // region.unit
        aligned = (address[here] - region.start) % region.unit == 0
        places = first[:, None] + np.arange(max(size // region.unit, 1))
        good = aligned & region.valid[places].all(1)
        inside = np.zeros(address.shape, dtype=bool)
        inside[here] = good
        places = places[good]
        if not len(places) or action == "atomic":
            return inside
        program = self._program()
        other = region.writer[places]
        self._report_race(action, "stored", region, places, (other != 0) & (other != program))
        if action == "load":
            seen = region.reader[places]
            region.reader[places] = np.where((seen == 0) | (seen == program), program, MANY)
            return inside
        seen = region.reader[places]
        self._report_race(action, "loaded", region, places, (seen != 0) & (seen != program))
        region.writer[places] = program
        self._report_lanes(region, places[:, 0], np.broadcast_to(value.data, here.shape)[inside])
        return inside

    def _program(self):
        """Number of the running program in its grid, counted from 1."""
        builder = interpreter.interpreter_builder
        x, y, z = builder.grid_idx
        _, height, depth = builder.grid_dim
        return 1 + (x * height + y) * depth + z

    # reports

    def _say(self, action, what):
        where = interpreter.interpreter_builder.grid_idx
        self.faults.append(f"{self._kernel}, program {tuple(where)}: {action} {what}")

    def _report_stray(self, action, addresses, size):
        address = int(addresses[0])
        if not self._regions:
            self._say(action, f"of {len(addresses)} lanes, but the launch was given no tensor")
            return
        nearest = min(
            self._regions, key=lambda r: max(r.start - address, address + size - r.end, 0)
        )
        names = "/".join(nearest.names)
        if address < nearest.start:
            place = f"{nearest.start - address} bytes before {names}"
        elif address + size > nearest.end:
            place = f"{address + size - nearest.end} bytes past the end of {names}"
        else:
            place = f"between the elements of {names}"
        self._say(action, f"out of bounds in {len(addresses)} lanes, the first {place}")

    def _report_race(self, action, verb, region, places, clash):
        if clash.any():
            place = int(places[clash][0]) * region.unit
            names = "/".join(region.names)
            self._say(action, f"races: another program {verb} byte {place} of {names}")

    def _report_lanes(self, region, places, values):
        order = np.argsort(places, kind="stable")
        same = places[order][1:] == places[order][:-1]
        bits = np.ascontiguousarray(values[order]).view(np.uint8).reshape(len(places), -1)
        if (same & (bits[1:] != bits[:-1]).any(1)).any():
            names = "/".join(region.names)
            self._say("store", f"writes two values to one place of {names}")


def _tensors(given):
    """(name, tensor) of every tensor among the arguments, those inside tuples included."""
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (tuple, list)):
            yield from _tensors({f"{name}[{i}]": one for i, one in enumerate(value)})


def _region(start, group):
    """The region of the storage at `start`, of which `group` are the tensors passed."""
    unit = min(tensor.element_size() for _, tensor in group)
    length = -(-group[0][1].untyped_storage().nbytes() // unit)
    valid = np.zeros(length, dtype=bool)
    for _, tensor in group:
        place = np.array(tensor.storage_offset())
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            place = place[..., None] + stride * np.arange(size)
        each = tensor.element_size() // unit
        valid[(place.reshape(-1, 1) * each + np.arange(each)).ravel()] = True
    program = np.zeros((2, length), dtype=np.int32)
    return Region(start, unit, [name for name, _ in group], valid, program[0], program[1])
