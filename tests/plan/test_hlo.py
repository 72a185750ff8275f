"""Traffic, collectives and multiply-adds of programs whose numbers are known."""

import jax
import jax.numpy as jnp
import pytest

from dsee_jax.plan import hlo

TEXT = """
HloModule jit_step

%body.1 (p.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p.1), index=1
  %sum = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %i = s32[] get-tuple-element(%p.1), index=0
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %sum)
}

%cond.1 (p.2: (s32[], f32[8,4])) -> pred[] {
  %p.2 = (s32[], f32[8,4]{1,0}) parameter(0)
  %n = s32[] constant(7)
  %j = s32[] get-tuple-element(%p.2), index=0
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (w: bf16[16,4]) -> f32[8,4] {
  %w = bf16[16,4]{1,0} parameter(0)
  %gathered = (bf16[16,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%w), replica_groups=[4,2]<=[4,2]T(1,0), dimensions={0}
  %whole = bf16[64,4]{1,0} all-gather-done(%gathered)
  %loop = (s32[], f32[8,4]{1,0}) while(%whole), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""
MESH = {"data": 2, "fsdp": 4}


def test_bytes_of_shapes():
    assert hlo.nbytes("f32[8,4]{1,0}") == 128
    assert hlo.nbytes("(bf16[2,3], pred[5], s4[4])") == 12 + 5 + 2
    assert hlo.nbytes("f32[]") == 4
    assert hlo.nbytes("token[]") == 0


def test_collective_counts_once_per_iteration():
    first, second = hlo.collectives(TEXT, MESH)
    assert first == hlo.Collective("all-reduce", ("fsdp",), "f32[8,4]", 5, 5 * 128)
    assert (second.kind, second.count, second.bytes) == ("all-gather", 1, 512)


def test_trip_count_comes_from_the_condition():
    """Without a known_trip_count: the limit in the condition; with two constants in the condition it is unknown."""
    without = TEXT.replace(', backend_config={"known_trip_count":{"n":"5"}}', "").replace("%cond,", "%cond.1,")
    assert hlo.collectives(without, MESH)[0].count == 7
    two = without.replace("%n = s32[] constant(7)", "%n = s32[] constant(7)\n  %m = s32[] constant(1)")
    assert {row.count for row in hlo.collectives(two, MESH)} == {1}
    assert hlo.unknown_loops(two) == 1
    assert hlo.unknown_loops(without) == hlo.unknown_loops(TEXT) == 0


def test_overlapped_collective_counts_once():
    """A TPU's compiler repeats one channel in several fusions of a computation."""
    fused = """
%f.1 (p: bf16[4]) -> bf16[16] {
  %p = bf16[4]{0} parameter(0)
  ROOT %g = bf16[16]{0} all-gather(%p), channel_id=9, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}
"""
    entry = TEXT.replace("ENTRY", fused + fused.replace("f.1", "f.2") + "\nENTRY").replace(
        "  ROOT %out", "  %x1 = bf16[16] fusion(%w), calls=%f.1\n  %x2 = bf16[16] fusion(%w), calls=%f.2\n  ROOT %out"
    )
    rows = [row for row in hlo.collectives(entry, MESH) if row.shape == "bf16[16]"]
    assert rows == [hlo.Collective("all-gather", ("fsdp",), "bf16[16]", 1, 32)]


def test_asynchronous_permute_counts_its_result():
    start = "(bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) collective-permute-start(%w)"
    line = f"  %s = {start}, source_target_pairs={{{{0,1}},{{1,0}}}}\n"
    text = TEXT.replace("  ROOT %out", line + "  ROOT %out")
    (row,) = (row for row in hlo.collectives(text, MESH) if row.kind == "collective-permute")
    assert (row.shape, row.count, row.bytes) == ("bf16[8,4]", 1, 64)


def test_arrays_in_the_processor_have_no_memory_bytes():
    assert hlo.nbytes("(f32[8]{0:T(128)S(1)}, f32[4]{0})") == 48
    assert hlo.nbytes("(f32[8]{0:T(128)S(1)}, f32[4]{0})", memory=True) == 16


def test_loop_reads_one_layer_per_iteration():
    """Eight iterations over (8, 64, 64) read each matrix once, not the stack eight times."""
    x, stack = jax.ShapeDtypeStruct((4, 64), jnp.float32), jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)
    run = lambda x, stack: jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]
    traffic = hlo.traffic(jax.jit(run).lower(x, stack).compile().as_text())
    assert 8 * 64 * 64 * 4 <= traffic <= 4 * 8 * 64 * 64 * 4


def test_loop_writes_one_layer_per_iteration():
    """64 iterations that each write (64, 64) of a stack write the stack once, not 64 times."""
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    run = lambda x: jax.lax.scan(lambda x, _: ((y := jnp.sin(x)), y), x, length=64)[1]
    traffic = hlo.traffic(jax.jit(run).lower(x).compile().as_text())
    assert 64 * 64 * 64 * 4 <= traffic <= 8 * 64 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("attributes", "axes"),
    [
        ("replica_groups=[2,4]<=[8]", ("fsdp",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp")),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", ("fsdp",)),
        ("replica_groups={}", ("data", "fsdp")),
    ],
)
def test_mesh_axes_of_device_groups(attributes, axes):
    assert hlo._axes(attributes, MESH) == axes


def test_bytes_sent_on_a_ring():
    row = hlo.Collective("all-reduce", ("fsdp",), "f32[8,4]", 5, 640)
    assert hlo.bytes_sent(row, MESH) == 2 * 640 * 3 / 4
    assert hlo.bytes_sent(row._replace(kind="all-gather"), MESH) == 640 * 3 / 4
    assert hlo.bytes_sent(row._replace(kind="reduce-scatter"), MESH) == 640 * 3
    assert hlo.bytes_sent(row._replace(kind="collective-permute"), MESH) == 640


def test_multiply_adds_count_every_iteration():
    """Three iterations of (4, 8) @ (8, 8) with gradients for both operands, and one product outside."""
    w = jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def run(w):
        x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), jnp.ones((4, 8)), length=3)[0]
        return jnp.sum(x @ jnp.ones((8, 2)))

    assert hlo.multiply_adds(run, w) == 3 * 4 * 8 * 8 + 4 * 8 * 2
    assert hlo.multiply_adds(jax.grad(jax.jit(run)), w) >= 3 * 3 * 4 * 8 * 8


def test_traffic_counts_every_iteration():
    """One product reads both operands and writes the result; a loop of five has at least five times the traffic."""
    a, b = (jax.ShapeDtypeStruct((64, 64), jnp.float32) for _ in range(2))
    once = hlo.traffic(jax.jit(lambda a, b: a @ b).lower(a, b).compile().as_text())
    assert once == pytest.approx(3 * 64 * 64 * 4, rel=0.1)
    loop = lambda a, b: jax.lax.scan(lambda x, _: (x @ b, None), a, length=5)[0]
    assert hlo.traffic(jax.jit(loop).lower(a, b).compile().as_text()) >= 5 * once
