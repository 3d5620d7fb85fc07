"""How many ranks measure, decide and move what they hold in parts: the engine's `Whole` where parameters are DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from teleport_fast.distributed.covariance import Covariances
from teleport_fast.distributed.layout import Layout, Over, as_dtensor, layout_of, local_part, widest_mesh
from teleport_fast.distributed.parts import Local, Part, Turn, local_of, zeros
from teleport_fast.distributed.reduce import all_reduce_
from teleport_fast.distributed.refuse import impossible
from teleport_fast.distributed.turn import laid_out, put_back_
from teleport_fast.distributed.verdict import anywhere
from teleport_fast.norm import clipping, total_norm
from teleport_fast.objectives import Eigenbasis, Move, Objective
from teleport_fast.objectives.sums import SUMS
from teleport_fast.schedule import Schedule, StepInfo
from teleport_fast.symmetry.bucket import Bucket, Element, Split
from teleport_fast.symmetry.joint import Joint
from teleport_fast.whole import Found, Source, Whole
from teleport_fast.writes import Write


class Shards(Whole):
    """Sums over this rank's own parts, small all-reduces, and moves where the tensors lie.

    Every decision comes from sums over all ranks of the widest mesh, to which each entry is put once, so that all ranks have
    the same bits. A tensor is laid out anew only where a rank holds part of a head of a dense or permuted joint.
    Source: own derivation (Grams and row sums add up over columns); tests/distributed.
    """

    sharded = True

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._mesh = widest_mesh(map(layout_of, parameters))
        assert self._mesh is not None
        self._over = Over(self._mesh, tuple(range(self._mesh.ndim)))
        self._first = Layout(()).counts(self._mesh)
        self._counting: dict[object, bool] = {}
        # by the bucket's id, and with the bucket, so that no other one takes its id
        self._locals: dict[object, tuple[Bucket, Local]] = {}
        self._bare: dict[int, tuple[Bucket, Bucket]] = {}
        self._covariances = Covariances(self._over, self._local, self._counts)

    def refuses(self, objective: Objective, joint: Joint, parameters: Mapping[str, Tensor]) -> str | None:
        assert self._mesh is not None
        return impossible(objective, joint, parameters, self._mesh)

    def settled(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Tensor parallelism may leave a gradient as partial sums: it is reduced, and stays so for the optimizer's step."""
        dtensor, like = as_dtensor(gradient), as_dtensor(parameter)
        if dtensor is None or like is None or tuple(dtensor.placements) == tuple(like.placements):
            return gradient
        parameter.grad = dtensor.redistribute(placements=like.placements)
        return parameter.grad

    def fires(self, schedule: Schedule, info: StepInfo) -> bool:
        fires = schedule.fires(info)
        return fires if schedule.agrees else self._any(fires and self._first)

    def any_nonzero(self, tensors: Iterable[Tensor]) -> bool:
        return self._any(any(bool(tensor.any()) for tensor in tensors))

    def first_not_finite(self, tensors: Mapping[str, Tensor]) -> str | None:
        bad = torch.tensor([float(not bool(torch.isfinite(local_part(tensor)).all())) for tensor in tensors.values()])
        all_reduce_([(bad, self._over)], "max")
        return next((name for name, flag in zip(tensors, bad.tolist(), strict=True) if flag), None)

    def verdict(self, found: Tensor) -> Tensor:
        everywhere = found.clone()
        all_reduce_([(everywhere, self._over)], "max")
        return everywhere

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        own = self._own(tensors)
        square = total_norm(own).square() if own else self._zero(tensors)
        all_reduce_([(square, self._over)])
        return square.sqrt()

    def clipping(self, gradients: Iterable[Tensor], measured: Mapping[str, Tensor], max_norm: float | None) -> list[Write]:
        return clipping(map(local_part, gradients), measured, max_norm, self.norm)

    def value(self, objective: Objective, move: Move) -> Tensor:
        if not objective.adds:
            return objective.value(move)
        own = replace(move, parameters=self._own(move.parameters), gradients=self._own(move.gradients))
        some = own.parameters if objective.measures == "parameters" else own.gradients
        value = objective.value(own).double() if some else self._zero(move.parameters)
        all_reduce_([(value, self._over)])
        return value

    def observe(self, objective: Objective, serving: Sequence[tuple[int, Bucket]], gradients: Mapping[str, Tensor]) -> None:
        if not isinstance(objective, Eigenbasis):
            super().observe(objective, serving, {name: local_part(tensor) for name, tensor in gradients.items()})
        elif objective.takes == "steps":
            self._covariances.observe_(objective, serving, gradients)

    def elements(
        self, objective: Objective, serving: Sequence[tuple[int, Bucket]], move: Move
    ) -> Iterator[tuple[int, Bucket, Found]]:
        """Buckets of disjoint parameters share one all-reduce; the next such round sees what this one has moved."""
        if isinstance(objective, Eigenbasis) and objective.takes == "turns":
            self._covariances.observe_(objective, serving, move.gradients)
        for buckets in _rounds(serving):
            totals = {i: self._sums(objective, bucket, move) for i, bucket in buckets if objective.needs_whole(bucket.joints[0]) is None}
            all_reduce_([(total, self._over) for sums in totals.values() for total in sums])
            for index, bucket in buckets:
                if index in totals:
                    yield index, bucket, objective.decide(index, bucket, totals[index], move)
                else:  # an objective that reads whole tensors, where they are whole
                    plain = {n: local_part(t) for n, t in move.parameters.items()}
                    whole = replace(move, parameters=plain, gradients={n: local_part(t) for n, t in move.gradients.items()})
                    yield index, bucket, objective.element(index, bucket, whole)

    def writes(self, bucket: Bucket, element: Element | Split, sources: Sequence[Source]) -> list[Write]:
        if isinstance(element, Split):
            plus, minus = bucket.sides
            return [*self.writes(plus, element.plus, sources), *self.writes(minus, element.minus, sources)]
        names = {*bucket.parameters(), *bucket.buffers()}
        alike: dict[object, tuple[dict[str, Layout], list[tuple[str, dict[str, Tensor]]]]] = {}
        for kind, tensors in sources:
            own = {name: tensor for name, tensor in tensors.items() if name in names}
            layouts = {name: layout_of(tensor) for name, tensor in own.items()}
            alike.setdefault(tuple(layouts.items()), (layouts, []))[1].append((kind, own))
        each = (self._alike(bucket, element, layouts, alike_sources) for layouts, alike_sources in alike.values())
        return [write for writes in each for write in writes]

    def _alike(
        self, bucket: Bucket, element: Element, layouts: dict[str, Layout], sources: list[tuple[str, dict[str, Tensor]]]
    ) -> list[Write]:
        local = self._local(bucket, layouts, _all)
        here = [(kind, {name: local_part(tensor) for name, tensor in own.items()}) for kind, own in sources]
        writes = [write for part in local.parts for write in part.bucket.writes(part.of(element, bucket), here)]

        def turned_(turn: Turn, kind: str, tensor: Tensor) -> None:
            turned = laid_out(tensor, turn.placements)
            for part in turn.parts:
                part.bucket.move_(part.of(element, bucket), [(kind, {turn.parameter: local_part(turned)})])
            put_back_(tensor, turned)

        for turn in local.turns:
            for kind, own in sources:
                if turn.parameter in own:
                    writes.append(partial(turned_, turn, kind, own[turn.parameter]))
        return writes

    def _sums(self, objective: Objective, bucket: Bucket, move: Move) -> list[Tensor]:
        found: list[Tensor] = []
        for name, source in objective.reads(bucket, move.descend):
            tensors = move.gradients if source == "gradients" else move.parameters
            count, dimensions, sums = SUMS[name]
            names = bucket.parameters()
            first = local_part(tensors[names[0]])
            totals = [zeros(bucket, dimensions, first.dtype, first.device) for _ in range(count)]

            def add(part: Part, of: Mapping[str, Tensor], totals: list[Tensor] = totals, sums: _Sums = sums) -> None:
                values = sums(part.bucket.plus(of), part.bucket.minus(of), len(part.joints))
                for total, value in zip(totals, values, strict=True):
                    part.add_(total, value, bucket)

            self._each_part(self._without_buffers(bucket), {name: tensors[name] for name in names}, add)
            found += totals
        return found

    def _each_part(self, bucket: Bucket, tensors: Mapping[str, Tensor], work: Callable[[Part, Mapping[str, Tensor]], None]) -> None:
        """Do the work on every part whose entries this rank is to count, one turned tensor at a time."""
        local = self._local(bucket, {name: layout_of(tensor) for name, tensor in tensors.items()}, self._counts)
        here = {name: local_part(tensor) for name, tensor in tensors.items()}
        for part in local.parts:
            work(part, here)
        for turn in local.turns:
            turned = local_part(laid_out(tensors[turn.parameter], turn.placements))
            for part in turn.parts:
                work(part, {turn.parameter: turned})

    def _local(self, bucket: Bucket, layouts: Mapping[str, Layout], keep: Callable[[Layout], bool]) -> Local:
        key = (id(bucket), tuple(layouts.items()), keep is _all)
        if key not in self._locals:
            self._locals[key] = bucket, local_of(bucket, layouts, keep)
        return self._locals[key][1]

    def _without_buffers(self, bucket: Bucket) -> Bucket:
        if id(bucket) not in self._bare:
            bare = Bucket(tuple(replace(joint, carried=()) for joint in bucket.joints)) if bucket.buffers() else bucket
            self._bare[id(bucket)] = bucket, bare
        return self._bare[id(bucket)][1]

    def _counts(self, layout: Layout) -> bool:
        key = (layout.mesh, layout.placements)
        if key not in self._counting:
            self._counting[key] = layout.counts(self._mesh)
        return self._counting[key]

    def _own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts that this rank puts into a sum over all."""
        return {name: local_part(tensor) for name, tensor in tensors.items() if self._counts(layout_of(tensor))}

    def _any(self, flag: bool) -> bool:
        assert self._mesh is not None
        return anywhere(torch.tensor(flag), [self._mesh])

    @staticmethod
    def _zero(tensors: Mapping[str, Tensor]) -> Tensor:
        device = local_part(next(iter(tensors.values()))).device
        return torch.zeros((), dtype=torch.float64, device=device)


_Sums = Callable[[list[Tensor], list[Tensor], int], tuple[Tensor, ...]]


def _all(layout: Layout) -> bool:
    return True


def _rounds(serving: Sequence[tuple[int, Bucket]]) -> Iterator[list[tuple[int, Bucket]]]:
    """Neighbours that share no parameter: their elements can be decided at once, and come out as one after the other."""
    names: set[str] = set()
    buckets: list[tuple[int, Bucket]] = []
    for index, bucket in serving:
        if not names.isdisjoint(bucket.parameters()):
            yield buckets
            names, buckets = set(), []
        names.update(bucket.parameters())
        buckets.append((index, bucket))
    if buckets:
        yield buckets
