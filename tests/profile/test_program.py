"""What belongs to which part, and the bytes it moves: on a text made by hand, and against XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from sparse_lm.profile.program import Scope, parse_computations, parse_scope, read_program

# A loop of 3 rounds that slices a stack of matrices; a fusion with a product of the experts in the backward pass whose
# last instruction is the optimizer's; a copy that the compiler put in before a product of attention.
TEXT = """HloModule jit_step, is_scheduled=true

%inside (param_0: f32[8,8], param_1: f32[8,8]) -> f32[8,8] {
  %param_0 = f32[8,8]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[8,8]{1,0} parameter(1)
  %dot.1 = f32[8,8]{1,0} dot(%param_0, %param_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/transpose(jvp(experts))/dot_general"}
  ROOT %multiply.1 = f32[8,8]{1,0} multiply(%dot.1, %dot.1), metadata={op_name="jit(step)/optimizer/mul"}
}

%sliced (param_2: f32[3,8,8], param_3: s32[]) -> f32[1,8,8] {
  %param_2 = f32[3,8,8]{2,1,0} parameter(0)
  %param_3 = s32[] parameter(1)
  ROOT %dynamic-slice.1 = f32[1,8,8]{2,1,0} dynamic-slice(%param_2, %param_3, %param_3, %param_3), dynamic_slice_sizes={1,8,8}, metadata={op_name="jit(step)/jvp(while)/body/router/dynamic_slice"}
}

%body (arg: (s32[], f32[3,8,8])) -> (s32[], f32[3,8,8]) {
  %arg = (s32[], f32[3,8,8]{2,1,0}) parameter(0)
  %index = s32[] get-tuple-element(%arg), index=0
  %stack = f32[3,8,8]{2,1,0} get-tuple-element(%arg), index=1
  %slice_fusion = f32[1,8,8]{2,1,0} fusion(%stack, %index), kind=kLoop, calls=%sliced, metadata={op_name="jit(step)/jvp(while)/body/router/dynamic_slice"}
  ROOT %tuple.1 = (s32[], f32[3,8,8]{2,1,0}) tuple(%index, %stack)
}

%condition (arg.1: (s32[], f32[3,8,8])) -> pred[] {
  %arg.1 = (s32[], f32[3,8,8]{2,1,0}) parameter(0)
  ROOT %constant.1 = pred[] constant(true)
}

ENTRY %main (p: f32[8,8], q: f32[8,8], s: (s32[], f32[3,8,8])) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0), metadata={op_name="state"}
  %q = f32[8,8]{1,0} parameter(1)
  %s = (s32[], /*index=1*/f32[3,8,8]{2,1,0}) parameter(2)
  %copy.1 = f32[8,8]{0,1} copy(%q)
  %while.1 = (s32[], f32[3,8,8]{2,1,0}) while(%s), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp(while)"}, backend_config={"known_trip_count":{"n":"3"}}
  %dot.2 = bf16[8,8]{1,0} dot(%p, %copy.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/jvp(attention)/dot_general"}
  %add.1 = f32[8,8]{1,0} add(%p, %q), metadata={op_name="jit(step)/jvp()/add"}
  ROOT %fusion.1 = f32[8,8]{1,0} fusion(%p, %copy.1), kind=kOutput, calls=%inside, metadata={op_name="jit(step)/optimizer/mul"}
}
"""  # noqa: E501
MATRIX = 4 * 8 * 8


def test_an_instruction_belongs_to_the_innermost_part_it_mentions():
    assert parse_scope("jit(step)/jvp(feed_forward)/router/dot_general") == Scope("router", False)
    assert parse_scope("jit(f)/transpose(jvp(while))/body/attention/transpose") == Scope("attention", True)
    assert parse_scope("jit(step)/jvp()/closed_call/experts/transpose") == Scope("experts", False)
    assert parse_scope("jit(step)/jvp()/add") == Scope("rest", False)
    assert parse_scope("router_bias") is None


def test_places_of_a_text_made_by_hand():
    places = read_program(TEXT).scopes
    assert places["fusion.1"] == Scope("experts", True)  # most of its work, though it ends in the optimizer
    assert places["slice_fusion"] == Scope("router", False)
    assert places["dot.2"] == Scope("attention", False)
    assert places["copy.1"] == Scope("attention", False)  # who uses it first
    assert places["add.1"] == Scope("rest", False)


def test_bytes_of_a_text_made_by_hand():
    index = 4
    assert read_program(TEXT).bytes == {
        Scope("attention", False): 2 * MATRIX + (2 * MATRIX + MATRIX / 2),  # the copy; the product, to bfloat16
        Scope("experts", True): 3 * MATRIX,
        Scope("router", False): 3 * (2 * MATRIX + index),  # in 3 rounds a slice is read and written
        Scope("rest", False): 3 * MATRIX,
    }


def test_a_loop_is_read_with_its_rounds():
    computations, entry = parse_computations(TEXT)
    assert entry is computations["main"]
    assert entry.instructions["while.1"].trip_count == 3
    assert entry.instructions["while.1"].called == (computations["condition"], computations["body"])


def test_bytes_agree_with_those_that_xla_counts():
    """On a program without loops, in which both know the same shapes."""

    def step(x, w, v):
        with jax.named_scope("attention"):
            x = jnp.tanh(x @ w)
        with jax.named_scope("output"):
            return (x @ v).sum()

    shapes = [(64, 128), (128, 256), (256, 32)]
    compiled = jax.jit(jax.grad(step, (0, 1, 2))).lower(*(jax.ShapeDtypeStruct(s, "float32") for s in shapes)).compile()
    counted = read_program(compiled.as_text()).bytes
    assert sum(counted.values()) == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.02)
    assert {place.part for place in counted} <= {"attention", "output", "rest"}
    assert counted[Scope("attention", True)] > counted[Scope("attention", False)] > 0
