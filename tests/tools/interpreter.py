"""Triton's interpreter, made quicker for tests and for sanitize.py on a CPU.

A kernel's operation on a small block takes numpy microseconds and the interpreter's own book-keeping a hundred times as
long: it searches its language for builtins, makes types and shapes anew, and widens integers for a check of overflow
that nothing reads. What a kernel computes stays the same to the bit, but for bfloat16 below 2^-126, which the
interpreter reads as other numbers than a GPU does. What is not covered here takes Triton's own way.
"""

from __future__ import annotations

from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np


def quicken() -> None:
    """Patch the interpreter, once in a process."""
    from dataclasses import replace

    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if getattr(builder, "quick", False):
        return
    builder.quick = True
    if not builder.options.debug:  # else an overflow is an error
        builder.options = replace(builder.options, sanitize_overflow=False)
    _patch_the_language_once(interpreter)
    _types(interpreter)
    _numpy(interpreter)
    _bfloat16(interpreter)
    _operands(interpreter)
    _operators(interpreter)


def _patch_the_language_once(interpreter: Any) -> None:
    """Instead of at each launch and at each call of a kernel's function; nothing is compiled in this process."""
    from triton import language

    patch, semantic = interpreter._patch_lang, interpreter.interpreter_semantic
    every = SimpleNamespace(__globals__={"tl": language, "core": language.core})
    scope = SimpleNamespace(restore=lambda: None)

    def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        inner = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return inner(*args, **kwargs)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch_attr
    patch(every)
    interpreter._patch_lang = lambda fn: scope


def _types(interpreter: Any) -> None:
    """Shapes and what is known of them are made once; a block's name, which is a text, when it is asked for."""
    from triton.language import core

    unwrap, compare = core._unwrap_if_constexpr, core.dtype.__eq__
    plain = {int, float, bool, str, type(None), core.tensor, core.dtype}

    def unwrapped(value: Any) -> Any:
        kind = type(value)
        return value.value if kind is core.constexpr else value if kind in plain else unwrap(value)

    @cache
    def shape_of(numbers: tuple[int, ...]) -> tuple[Any, Any, tuple[Any, Any]]:
        shape = core.tuple(numbers)
        if not numbers:
            raise TypeError("0d block_type is forbidden")
        numel = core.validate_block_shape(numbers)
        return shape, numel, (core.tuple([core.constexpr(n) for n in numbers]), core.constexpr(numel))

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        self.numbers = tuple([unwrapped(n) for n in unwrapped(shape)])
        self.shape, self.numel, self.extent = shape_of(self.numbers)

    empty = core.tuple([]), core.constexpr(1)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.extent if type.is_block() else empty

    def same(self: Any, other: Any) -> bool:
        return self is other or (self.name == other.name if type(other) is core.dtype else compare(self, other))

    def same_block(self: Any, other: Any) -> bool:
        return type(other) is core.block_type and self.numbers == other.numbers and self.element_ty == other.element_ty

    integers = frozenset(core.dtype.SINT_TYPES + core.dtype.UINT_TYPES)
    core._unwrap_if_constexpr = unwrapped
    core.block_type.__init__, core.block_type.__eq__ = block, same_block
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tensor.__init__, core.dtype.__eq__ = tensor, same
    core.dtype.is_int = lambda self: self.name in integers


def _numpy(interpreter: Any) -> None:
    """The builder's operations without a check of each result's size, which no operation of numpy's below exceeds."""
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    np_dtype, shift_right = interpreter._get_np_dtype, builder.create_ashr
    known: dict[str, Any] = {}

    def quick_np_dtype(kind: Any) -> Any:
        kind = kind.scalar
        if kind.is_ptr():
            return np.dtype(np.uint64)
        if kind.name not in known:
            known[kind.name] = np_dtype(kind)
        return known[kind.name]

    def init(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr

    wide = builder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        kind = lhs.dtype.scalar
        if lhs.data.dtype == np.bool_ or kind.is_ptr():
            return wide(self, lhs, rhs, op)
        out = op(lhs.data, rhs.data)
        if out.itemsize * 8 > max(kind.primitive_bitwidth, 8):
            out = out.astype(quick_np_dtype(kind))
        return handle(out, kind)

    def ashr(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.data.dtype.kind == "i" and rhs.data.dtype.kind == "i":
            return binary_op(self, lhs, rhs, np.right_shift)
        return shift_right(self, lhs, rhs)

    interpreter._get_np_dtype = quick_np_dtype
    handle.__init__ = init
    builder.binary_op, builder.create_ashr = binary_op, ashr


def _bfloat16(interpreter: Any) -> None:
    """bfloat16 is float32's upper half: float32 of it is exact, and the way back cuts off, as the interpreter does."""
    from triton import language

    convert = interpreter._convert_float

    def quick_convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == language.bfloat16 and target == language.float32:
            return data.astype(np.uint32) << np.uint32(16)
        return convert(data, source, target, rounding)

    interpreter._convert_float = quick_convert


def _operands(interpreter: Any) -> None:
    """Two operands of one type, or a number beside a block of a kind that holds it, need no conversion."""
    from triton.language import core

    semantic = type(interpreter.interpreter_semantic)
    check, check_bits = semantic.binary_op_type_checking_impl, semantic.bitwise_op_type_checking_impl
    constant, broadcast = _constants(interpreter), _broadcast(interpreter)

    def checked(self: Any, lhs: Any, rhs: Any, *rules: bool, **named: bool) -> tuple[Any, Any]:
        """rules: whether the left and the right one may be pointers, and whether types are to be those of arithmetic
        and of a division; the first two are of no matter here."""
        left, right = type(lhs) is core.tensor, type(rhs) is core.tensor
        if rules[2:] in ((), (True,), (True, False)) and not named:
            if left and right:
                if lhs.dtype is rhs.dtype and not lhs.dtype.is_ptr():
                    return broadcast(self, lhs, rhs)
            elif left and (made := constant(rhs, lhs)) is not None:
                return lhs, made
            elif right and (made := constant(lhs, rhs)) is not None:
                return made, rhs
        return check(self, lhs, rhs, *rules, **named)  # type: ignore[no-any-return]

    def checked_bits(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = checked(self, lhs, rhs)
        same = left.dtype == right.dtype and left.dtype.is_int()
        return (left, right) if same else check_bits(self, left, right)

    semantic.binary_op_type_checking_impl, semantic.bitwise_op_type_checking_impl = checked, checked_bits
    semantic.broadcast_impl_value = broadcast


def _full(interpreter: Any, one: Any, numbers: tuple[int, ...]) -> Any:
    """A scalar as a block."""
    from triton.language import core

    kind = one.handle.dtype
    data = np.full(numbers, one.handle.data, dtype=interpreter._get_np_dtype(kind))
    return core.tensor(interpreter.TensorHandle(data, kind.scalar), core.block_type(one.dtype, numbers))


def _constants(interpreter: Any) -> Any:
    """(number, tensor beside it) -> the number as a tensor, or None where Triton must decide on its type."""
    from triton.language import core

    ranks = {bool: 0, int: 1, float: 2}

    @lru_cache(maxsize=1024)
    def constant(kind: type, text: str, name: str, numbers: tuple[int, ...]) -> Any:
        value = float.fromhex(text) if kind is float else kind(int(text))
        one = interpreter.interpreter_semantic.scalar_constant(value, core.dtype(name))
        return _full(interpreter, one, numbers) if numbers else one

    def number(value: Any, beside: Any) -> Any:
        kind, dtype = type(value), beside.dtype
        if kind not in ranks or dtype.is_ptr() or ranks[kind] > dtype.kind().value:
            return None
        if dtype.is_int() and not dtype.get_int_min_value() <= value <= dtype.get_int_max_value():
            return None
        text = value.hex() if kind is float else str(int(value))
        return constant(kind, text, dtype.name, beside.type.numbers if beside.type.is_block() else ())

    return number


def _broadcast(interpreter: Any) -> Any:
    """Two tensors of one shape."""
    from triton.language import core

    handle, spread = interpreter.TensorHandle, type(interpreter.interpreter_semantic).broadcast_impl_value

    def widened(one: Any, numbers: tuple[int, ...]) -> Any:
        if one.type.numbers == numbers:
            return one
        data = np.broadcast_to(one.handle.data, numbers)
        return core.tensor(handle(data, one.handle.dtype.scalar), core.block_type(one.dtype, numbers))

    def broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = lhs.type.is_block(), rhs.type.is_block()
        if left and right:
            a, b = lhs.type.numbers, rhs.type.numbers
            if a == b:
                return lhs, rhs
            if len(a) != len(b) or any(m != n and 1 not in (m, n) for m, n in zip(a, b, strict=True)):
                return spread(self, lhs, rhs)  # type: ignore[no-any-return]
            both = tuple([max(pair) for pair in zip(a, b, strict=True)])
            return widened(lhs, both), widened(rhs, both)
        if left:
            return lhs, _full(interpreter, rhs, lhs.type.numbers)
        return (_full(interpreter, lhs, rhs.type.numbers) if right else lhs), rhs

    return broadcast


def _operators(interpreter: Any) -> None:
    """x + y and the like go to the semantics at once."""
    from triton.language import core

    here = interpreter.interpreter_semantic

    def arithmetic(name: str, method: Any) -> None:
        setattr(core.tensor, f"__{name}__", lambda x, y: method(x, core._unwrap_if_constexpr(y), False))
        setattr(core.tensor, f"__r{name}__", lambda x, y: method(core._unwrap_if_constexpr(y), x, False))

    def bits(name: str, method: Any) -> None:
        setattr(core.tensor, f"__{name}__", lambda x, y: method(x, core._unwrap_if_constexpr(y)))
        setattr(core.tensor, f"__r{name}__", lambda x, y: method(core._unwrap_if_constexpr(y), x))

    for name, method in (("add", here.add), ("sub", here.sub), ("mul", here.mul)):
        arithmetic(name, method)
    for name, method in (("and", here.and_), ("or", here.or_), ("xor", here.xor_)):
        bits(name, method)
