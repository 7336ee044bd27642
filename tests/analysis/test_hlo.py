"""Parsing HLO text: a hand-written text and compiled programs of known shape."""

import jax
import jax.numpy as jnp
import pytest

from xkd_jax.analysis import hlo

TPU = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%inner (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %neg = bf16[8,128]{1,0:T(8,128)(2,1)} negate(%p), backend_config={"estimated_cycles":"999"}
}

%begin (q: f32[4,2]) -> f32[16,2] {
  %q = f32[4,2]{1,0:T(4,128)} parameter(0)
  ROOT %part.1 = f32[16,2]{1,0:T(8,128)} all-to-all(%q), channel_id=4, dimensions={0}
}

%end (q.1: f32[4,2]) -> f32[16,2] {
  %q.1 = f32[4,2]{1,0:T(4,128)} parameter(0)
  ROOT %part.2 = f32[16,2]{1,0:T(8,128)} all-to-all(%q.1), channel_id=4, dimensions={0}
}

%condition (state: (s32[], bf16[8,128])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (state.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %m = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state.1), index=1
  %f = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%m), kind=kLoop, calls=%inner, backend_config={"a":{"estimated_cycles":"10"}}
  %r = bf16[8,128]{1,0:T(8,128)(2,1)} all-reduce(%f), channel_id=1, replica_groups={{0,1}}, to_apply=%add, metadata={op_name="jit(step)/loop"}
  ROOT %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%n, %r)
}

ENTRY %main (a: s32[], b: bf16[8,128], c: f32[4,2]) -> bf16[8,128] {
  %a = s32[]{:T(128)} parameter(0)
  %b = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[4,2]{1,0:T(4,128)} parameter(2)
  %start = (f32[4,2]{1,0:T(4,128)}, f32[16,2]{1,0:T(8,128)}) all-gather-start(%c), channel_id=2, dimensions={0}
  %done = f32[16,2]{1,0:T(8,128)} all-gather-done(%start)
  %begun = f32[16,2]{1,0:T(8,128)} fusion(%c), kind=kCustom, calls=%begin
  %ended = f32[16,2]{1,0:T(8,128)} fusion(%c), kind=kCustom, calls=%end
  %scattered = f32[1,2]{1,0:T(4,128)} reduce-scatter(%c), channel_id=3, dimensions={0}, to_apply=%add
  %tuple = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%a, %b)
  %while = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%tuple), condition=%condition, body=%body
  %e = bf16[8,128]{1,0:T(8,128)(2,1)} copy(%b), backend_config={"estimated_cycles":"7"}
  ROOT %result = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_collectives_of_a_text():
    assert sorted(hlo.collectives(TPU), key=lambda c: c.kind) == [
        hlo.Collective("all-gather", 16 * 2 * 4, 1, ""),
        hlo.Collective("all-reduce", 8 * 128 * 2, 5, "jit(step)/loop"),
        hlo.Collective("all-to-all", 4 * 2 * 4, 1, ""),  # in two fusions, begun and ended
        hlo.Collective("reduce-scatter", 4 * 2 * 4, 1, ""),
    ]
    assert hlo.total_bytes(hlo.collectives(TPU)) == 128 + 5 * 2048 + 2 * 32


def test_cycles_count_loops_as_often_as_they_run_and_fusions_once():
    assert hlo.cycles(TPU) == 5 * 10 + 7


@pytest.mark.parametrize("length", [1, 6])
def test_compiled_programs_are_read(length):
    @jax.jit
    def loop(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, None, length=length)[0]

    compiled = loop.lower(jnp.zeros((4, 4))).compile()
    assert hlo.collectives(compiled.as_text()) == []
    assert hlo.cycles(compiled.as_text()) == 0  # XLA doesn't estimate cycles for CPUs
