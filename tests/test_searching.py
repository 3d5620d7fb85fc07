"""Which buckets are searched together: those of which none reads what another one moves."""

from __future__ import annotations

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.searching import Waves
from teleport_fast.symmetry import GeneralLinear
from teleport_fast.symmetry.bucket import Bucket


def chain(*layers: int) -> list[tuple[int, Bucket]]:
    """A numbered bucket per layer i, whose joint layer i writes and layer i + 1 reads: neighbours share a layer's weight."""
    found = []
    for i in layers:
        plus, minus = tf.View(f"{i}.weight", 0, 1, 4), tf.View(f"{i + 1}.weight", 1, 1, 4)
        found.append((i, Bucket((tf.Joint(f"{i}", "by hand", GeneralLinear(4), 1, 4, (plus,), (minus,)),))))
    return found


def test_buckets_that_share_a_parameter_are_searched_one_after_the_other() -> None:
    waves, reads_gradients = Waves(), objectives.GradNorm()
    assert waves.of(reads_gradients, buckets := chain(0, 1, 2, 4)) == [buckets[:1], buckets[1:2], buckets[2:]]
    assert waves.of(reads_gradients, buckets := chain(0, 2, 1)) == [buckets[:2], buckets[2:]]
    assert waves.of(reads_gradients, buckets := chain(0, 1, 2, 4)) == [buckets[:1], buckets[1:2], buckets[2:]]


def test_what_reads_no_tensor_is_searched_at_once() -> None:
    buckets = chain(0, 1, 2)
    assert Waves().of(objectives.Fixed({}), buckets) == [buckets]
