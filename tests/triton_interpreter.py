"""Triton's interpreter, made fit to test kernels.

As it comes, it computes with the bits of bfloat16 numbers, reads and writes wherever a pointer
leads, and runs one program after another, so that one which waits for another never ends. Here
bfloat16 is right, 16 bits are for storage and operands only, every access must be to an array of
the launch, and programs run at the same time, their stores late, in an order drawn from a seed.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

PATIENCE = 20_000  # times that programs look in vain for what they wait for


def floats(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers of bfloat16's bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bits(x: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers rounded to bfloat16, to nearest and ties to even."""
    given = x.astype(np.float32).view(np.uint32)
    rounded = (given + 0x7FFF + ((given >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def convert(_: object, src: TensorHandle, dst_type: tl.dtype, *__: object) -> TensorHandle:
    have, want = src.dtype.scalar, dst_type.scalar
    data = floats(src.data) if have == tl.bfloat16 else src.data
    data = bits(data) if want == tl.bfloat16 else data.astype(interpreter._get_np_dtype(want))
    return TensorHandle(data, want)


def dot(_: object, a: TensorHandle, b: TensorHandle, d: TensorHandle, *__: object) -> TensorHandle:
    x, y = (floats(t.data) if t.dtype.scalar == tl.bfloat16 else t.data for t in (a, b))
    return TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def only_wide(operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def run(self: InterpreterBuilder, x: TensorHandle, *others: Any) -> TensorHandle:
        assert x.dtype.scalar not in (tl.bfloat16, tl.float16), "arithmetic in 16 bits"
        return operation(self, x, *others)

    return run


def passed(given: Any) -> Any:
    """An argument as a kernel finds it, where all its numbers with a point are of 64 bits."""
    if isinstance(given, float):
        return tl.tensor(TensorHandle(np.array([given]), tl.float64), tl.float64)
    return interpreter._implicit_cvt(given)


class Launch:
    """One launch: its arrays, and its programs as threads of which one runs at a time.

    Who goes on after an access to memory is drawn. Some programs are starved, others run as long
    as they can; and stores may stay with a program until it releases them.
    """

    def __init__(self, arrays: list[torch.Tensor], programs: int, seed: int) -> None:
        spans = sorted((a.data_ptr(), a.data_ptr() + a.nbytes) for a in arrays if a.numel())
        self.begins, self.ends = (np.array(s, np.uint64) for s in zip(*spans, strict=True))
        self.draw = random.Random(seed)
        self.gates = [threading.Semaphore(0) for _ in range(programs)]
        self.alive = list(range(programs))
        self.starved = set(self.draw.sample(self.alive, self.draw.randint(0, programs // 2)))
        self.often = self.draw.choice([0.02, 0.2, 1.0])
        self.late = self.draw.choice([0.0, 0.5, 1.0])
        self.stores: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(programs)]
        self.vain = 0
        self.error: BaseException | None = None
        self.local = threading.local()

    def run(self, program: Callable[[], None]) -> None:
        def body(i: int) -> None:
            self.local.index = i
            self.gates[i].acquire()
            try:
                if self.error is None:
                    with np.errstate(over="ignore", invalid="ignore"):
                        program()
                self.publish()
            except BaseException as error:
                self.error = self.error or error
            self.alive.remove(i)
            self.let_one_go_on()

        threads = [threading.Thread(target=body, args=(i,)) for i in self.alive]
        for thread in threads:
            thread.start()
        self.let_one_go_on()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def let_one_go_on(self) -> None:
        if self.alive:
            preferred = [i for i in self.alive if i not in self.starved]
            self.gates[self.draw.choice(preferred or self.alive)].release()

    def switch(self, waits: bool = False) -> None:
        """Another may go on; after one that only waits any other, even if it is starved."""
        assert self.error is None, "another program failed"
        self.vain = self.vain + 1 if waits else 0
        assert self.vain < PATIENCE, "programs wait in vain"
        if waits or self.draw.random() < self.often:
            if waits:
                self.gates[self.draw.choice(self.alive)].release()
            else:
                self.let_one_go_on()
            self.gates[self.local.index].acquire()

    def check(self, pointers: np.ndarray, mask: np.ndarray, width: int) -> None:
        used = np.broadcast_to(pointers, mask.shape)[mask.astype(bool)]
        i = np.searchsorted(self.begins, used, side="right") - 1
        outside = (i < 0) | (used + np.uint64(width) > self.ends[i])
        assert not outside.any(), f"{outside.sum()} of {used.size} accesses are beyond all arrays"

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype):
        self.check(pointers, mask, dtype.itemsize)
        mine = self.stores[self.local.index]
        if any(np.isin(pointers, p).any() for p, _, _ in mine):
            self.publish()
        self.switch()
        return interpreter._interpreter.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        self.check(pointers, mask, values.dtype.itemsize)
        self.switch()
        self.stores[self.local.index].append((pointers, values, mask))
        if self.draw.random() >= self.late:
            self.publish()

    def publish(self) -> None:
        """Every store of this program is there for all."""
        mine = self.stores[self.local.index]
        for pointers, values, mask in mine:
            interpreter._interpreter.store(pointers, values, mask)
        mine.clear()


class Interpreter:
    """All kernels that are launched while it is installed run here."""

    def __init__(self, monkeypatch: Any) -> None:
        self.seed = 0
        self.short = "", ""  # a kernel, and an array of it that is to lack its last element
        self.launches: list[dict[str, Any]] = []  # the arguments of each
        self.launch: Launch | None = None
        self.scopes: dict[str, Any] = {}  # by module

        def run(function: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any):
            self.run(function, grid, kwargs)

        def call(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
            self.prepare(function)
            return function.rewrite()(*args, **kwargs)

        def program_id(_: object, axis: int) -> TensorHandle:
            index = self.launch.local.index if axis == 0 else 0
            return TensorHandle(np.array([index], dtype=np.int32), tl.int32)

        def load(_: object, ptrs: TensorHandle, mask: TensorHandle, other: Any, *__: object):
            element = ptrs.get_element_ty()
            dtype = interpreter._get_np_dtype(element)
            data = np.zeros(ptrs.data.shape, dtype) if other is None else other.data
            return TensorHandle(self.launch.load(ptrs.data, mask.data, data, dtype), element)

        def store(_: object, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *__: Any):
            self.launch.store(ptrs.data, value.data, mask.data)

        def atomic(builder: object, op: Any, ptr: TensorHandle, value: TensorHandle, mask, sem, _):
            self.launch.check(ptr.data, mask.data, 4)
            if "release" in str(sem).lower():
                self.launch.publish()
            result = atomic_itself(builder, op, ptr, value, mask, sem, _)
            self.launch.switch(waits=not value.data.any())
            return result

        atomic_itself = InterpreterBuilder.create_atomic_rmw
        for name, replacement in {
            "create_get_program_id": program_id,
            "create_masked_load": load,
            "create_masked_store": store,
            "create_atomic_rmw": atomic,
            "create_dot": dot,
            "cast_impl": convert,
            "create_fp_to_fp": convert,
            "binary_op": only_wide(InterpreterBuilder.binary_op),
            "unary_op": only_wide(InterpreterBuilder.unary_op),
        }.items():
            monkeypatch.setattr(InterpreterBuilder, name, replacement)
        monkeypatch.setattr(InterpretedFunction, "run", run)
        monkeypatch.setattr(InterpretedFunction, "__call__", call)

    def run(self, function: InterpretedFunction, grid: tuple[int], given: dict[str, Any]) -> None:
        names = inspect.getfullargspec(function.fn).args
        self.launches.append(given)
        kernel = function.rewrite()
        constants = interpreter.GridExecutor(kernel, function.arg_names, grid).constexprs
        arguments = {
            name: given[name] if name in constants else passed(given[name]) for name in names
        }
        arrays = {n: t for n, t in given.items() if isinstance(t, torch.Tensor)}
        if self.short[0] == function.fn.__name__:
            arrays[self.short[1]] = arrays[self.short[1]].flatten()[:-1]
        interpreter.interpreter_builder.set_grid_dim(*grid, 1, 1)
        self.launch = Launch(list(arrays.values()), grid[0], self.seed)
        try:
            self.prepare(function)
            self.launch.run(lambda: kernel(**arguments))
        finally:
            while self.scopes:
                self.scopes.popitem()[1].restore()

    def prepare(self, function: InterpretedFunction) -> None:
        """Makes the language that a function's module sees the interpreter's, once a launch: at
        every call, as Triton itself does, it would take most of the time."""
        module, sees = function.fn.__module__, function.fn.__globals__.values()
        if module not in self.scopes and any(value in (tl, tl.core) for value in sees):
            self.scopes[module] = interpreter._patch_lang(function.fn)
