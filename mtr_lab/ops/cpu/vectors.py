"""Vectors of neighbouring channels in numba kernels: loads, stores and arithmetic as LLVM instructions."""

import operator
from typing import Any

import numba
from llvmlite import ir
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic, models, overload, register_model

_intrinsic: Any = intrinsic  # its calls have other arguments than its definition

BLOCK = 64
CACHE_LINE = 16  # floats


class _Vector(numba.types.Type):
    """BLOCK neighbouring channels, the operands of vector instructions of the machine's width."""

    def __init__(self) -> None:
        super().__init__("Vector")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.FloatType(), BLOCK))


VECTOR = _Vector()
FLAGS = ("nsz", "contract")  # allow max and fused multiply-add, do not affect infinities, NaN or order


def _lanes(builder: Any, kind: Any, value: Any) -> Any:
    """A vector, or a scalar in all lanes."""
    if kind is VECTOR:
        return value
    vector = ir.VectorType(ir.FloatType(), BLOCK)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), None))


def _operands(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Floats; if one of them is a vector, all are."""
    if VECTOR in signature.args:
        return [_lanes(builder, kind, value) for kind, value in zip(signature.args, args, strict=True)]
    return list(args)


def _result(*kinds: Any) -> Any:
    return VECTOR if VECTOR in kinds else numba.float32


def _operator(operation: Any, name: str) -> None:
    """Overload an operation of scalars for vectors."""

    @_intrinsic
    def of_vectors(typing_context, x, y):
        def generate(context, builder, signature, args):
            return getattr(builder, name)(*_operands(context, builder, signature, args), flags=FLAGS)

        return VECTOR(x, y), generate

    @overload(operation)
    def choose(x, y):
        return (lambda x, y: of_vectors(x, y)) if VECTOR in (x, y) else None


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """To the vector that begins at a place of contiguous memory, of floats or of the bits of bfloat16."""
    start = context.make_array(kind)(context, builder, array).data
    element = ir.FloatType() if kind.dtype == numba.float32 else ir.IntType(16)
    return builder.bitcast(builder.gep(start, [at]), ir.VectorType(element, BLOCK).as_pointer())


def _integers(number: int) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), [number] * BLOCK)


def _from_bfloat16(builder: Any, bits: Any) -> Any:
    """Floats whose upper half these bits are."""
    whole = builder.shl(builder.zext(bits, _integers(0).type), _integers(16))
    return builder.bitcast(whole, ir.VectorType(ir.FloatType(), BLOCK))


def _to_bfloat16(builder: Any, x: Any) -> Any:
    """The bits of floats rounded to the nearest, of two equally near ones to the even."""
    bits = builder.bitcast(x, _integers(0).type)
    odd = builder.and_(builder.lshr(bits, _integers(16)), _integers(1))
    rounded = builder.add(builder.add(bits, _integers(0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, _integers(16)), ir.VectorType(ir.IntType(16), BLOCK))


def _first_lanes(builder: Any, count: Any) -> Any:
    """A mask of the first ``count`` lanes."""
    number = ir.IntType(64)
    lanes = ir.Constant(ir.VectorType(number, BLOCK), list(range(BLOCK)))
    one = builder.insert_element(ir.Constant(lanes.type, ir.Undefined), count, ir.IntType(32)(0))
    counts = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), None))
    return builder.icmp_signed("<", lanes, counts)


@_intrinsic
def load(typing_context, array, at, count):
    """The vector of the channels from ``at`` on, float32 or bits of bfloat16; zero behind the first ``count``."""

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        vector, align = pointer.type.pointee, ir.IntType(32)(2)
        whole = builder.icmp_signed(">=", args[2], args[2].type(BLOCK))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                plain, plain_block = builder.load(pointer, align=2), builder.block
            with otherwise:
                mask = _first_lanes(builder, args[2])
                kind = ir.FunctionType(vector, (pointer.type, align.type, mask.type, vector))
                name = f"llvm.masked.load.v{BLOCK}{vector.element.intrinsic_name}.p0"
                load = get_or_insert_function(builder.module, kind, name)
                masked = builder.call(load, [pointer, align, mask, ir.Constant(vector, None)])
                masked_block = builder.block
        result = builder.phi(vector)
        result.add_incoming(plain, plain_block)
        result.add_incoming(masked, masked_block)
        return result if vector.element == ir.FloatType() else _from_bfloat16(builder, result)

    return VECTOR(array, at, numba.int64), generate


@_intrinsic
def store(typing_context, array, at, value, count):
    """Write the first ``count`` channels of a vector, as float32 or the bits of bfloat16."""

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        vector, align = pointer.type.pointee, ir.IntType(32)(2)
        value = args[2] if vector.element == ir.FloatType() else _to_bfloat16(builder, args[2])
        whole = builder.icmp_signed(">=", args[3], args[3].type(BLOCK))
        with builder.if_else(whole) as (then, otherwise):
            with then:
                builder.store(value, pointer, align=2)
            with otherwise:
                mask = _first_lanes(builder, args[3])
                kind = ir.FunctionType(ir.VoidType(), (vector, pointer.type, align.type, mask.type))
                name = f"llvm.masked.store.v{BLOCK}{vector.element.intrinsic_name}.p0"
                builder.call(get_or_insert_function(builder.module, kind, name), [value, pointer, align, mask])
        return context.get_dummy_value()

    return numba.none(array, at, value, numba.int64), generate


@_intrinsic
def choose_below(typing_context, x, limit, below, otherwise):
    """``below if x < limit else otherwise``, of scalars and vectors."""

    def generate(context, builder, signature, args):
        x, limit, below, otherwise = _operands(context, builder, signature, args)
        return builder.select(builder.fcmp_ordered("<", x, limit), below, otherwise)

    return _result(x, limit, below, otherwise)(x, limit, below, otherwise), generate


@_intrinsic
def multiply_add(typing_context, x, y, z):
    """x · y + z, in one instruction if the machine has it, so that kernels with the same operations have equal bits."""

    def generate(context, builder, signature, args):
        x, y, z = _operands(context, builder, signature, args)
        kind = ir.FunctionType(x.type, (x.type,) * 3)
        return builder.call(get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{BLOCK}f32"), [x, y, z])

    return VECTOR(x, y, z), generate


@_intrinsic
def sum_of_lanes(typing_context, x):
    """The sum of all lanes, in the order that vectorises."""

    def generate(context, builder, signature, args):
        start = ir.Constant(ir.FloatType(), 0.0)
        kind = ir.FunctionType(start.type, (start.type, args[0].type))
        add = get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{BLOCK}f32")
        return builder.call(add, [start, args[0]], fastmath=("reassoc",))

    return numba.float32(x), generate


@_intrinsic
def times_power_of_2(typing_context, x, rounded):
    """x · 2^n for ``rounded`` = ROUND + n: n is added to the exponent bits."""

    def generate(context, builder, signature, args):
        float_kind = args[0].type
        bits = ir.IntType(32)
        bits = ir.VectorType(bits, BLOCK) if signature.args[0] is VECTOR else bits
        shift = ir.Constant(bits, [23] * BLOCK if signature.args[0] is VECTOR else 23)
        n = builder.shl(builder.bitcast(args[1], bits), shift)
        return builder.bitcast(builder.add(builder.bitcast(args[0], bits), n), float_kind)

    return _result(x, rounded)(x, rounded), generate


@_intrinsic
def prefetch(typing_context, x, at):
    """Fetch a block of channels from ``at`` on into the L1 cache."""

    def generate(context, builder, signature, args):
        start = context.make_array(signature.args[0])(context, builder, args[0]).data
        number = ir.IntType(32)
        pointer = builder.bitcast(builder.gep(start, [args[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
        for line in range(0, BLOCK, CACHE_LINE):  # lines behind the last channel may be fetched, too: it does no harm
            address = builder.gep(pointer, [ir.IntType(64)(4 * line)])
            builder.call(prefetch, [address, number(0), number(3), number(1)])  # read, into the L1 cache, data
        return context.get_dummy_value()

    return numba.none(x, at), generate
