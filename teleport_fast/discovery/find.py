"""find_symmetries: propose joints for every role, prove each on a perturbed float64 copy, and explain the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from teleport_fast.discovery.candidates import Candidate, Views, candidates
from teleport_fast.discovery.flow import Flow
from teleport_fast.discovery.gains import is_norm
from teleport_fast.discovery.guards import notes, shared_memory, stuck
from teleport_fast.discovery.inputs import guess_inputs
from teleport_fast.discovery.norms import norm_proposals
from teleport_fast.discovery.residual import residual_candidate, stream_width, streams
from teleport_fast.discovery.roles import Role, Unusable, canonical_names, roles
from teleport_fast.discovery.standin import is_meta, stand_in
from teleport_fast.symmetry.eager import eagerly
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Finding, Symmetries, named_tensors
from teleport_fast.symmetry.verify import CONTROL_FLOOR, Prover

if TYPE_CHECKING:
    from teleport_fast.discovery.trace.propose import Record

TOLERANCE = 1e-10
# Kinds whose single alternative holds wherever the names mean what they say; the others are known only by proof.
TRUSTED = ("value-output", "up-down", "neurons", "norm-readers")


def find_symmetries(model: nn.Module, example_inputs: Any = None, verify: bool | str = True) -> Symmetries:
    """Find the loss-invariant moves of a model's parameters and prove each one.

    example_inputs: what the model is called with, a tensor, a tuple of positional arguments or a dict of keywords; None
    guesses (2, t) token ids or (4, features) noise. With `verify` every proposed joint is moved by a random element on
    a perturbed float64 deep copy in eval mode: the outputs may deviate by 1e-10 at most, and must deviate by more than
    1e-3 under a wrong element; the model's own casts to float32 are widened for it, and a compiled model runs
    uncompiled. Modules that no builder knows by name are understood from one recorded call. With verify="blocks", and for a
    model on meta, the copy holds one block of each kind and 64 rows of the vocabulary, and what is proven there stands for
    every block of that kind. Without it joints are taken on trust: value-output, neurons and norm-readers joints and the
    diagonal of gated MLPs by their layers' names, others where a call recorded on `meta` shows every operator between those
    who write a hidden space and those who read it.
    Errors: ValueError for another `verify`, when inputs cannot be guessed or the model has no parameters; TypeError when
    it is no Module.
    Source: own derivation (docs/mathematics.md); proofs in tests/discovery/test_find.py.

    >>> from teleport_fast.experiments.gpt import GPT, GPTConfig
    >>> symmetries = find_symmetries(GPT(GPTConfig(d_model=16, layers=1, heads=2)))
    >>> [joint.name for joint in symmetries]  # doctest: +NORMALIZE_WHITESPACE
    ['blocks.0.attention.value-output', 'blocks.0.attention.query-key', 'blocks.0.attention.heads',
     'blocks.0.mlp.up-down', 'blocks.0.mlp.neurons', 'residual']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; pass the module itself")
    if not named_tensors(model):
        raise ValueError("model has no parameters, so it has no symmetries; pass a model with parameters")
    if verify not in (True, False, "blocks"):
        raise ValueError(f'verify must be True, False or "blocks", got {verify!r}')
    with eagerly(model):
        if verify is False:
            joints, findings = _search(model, None, example_inputs)
        elif verify == "blocks" or is_meta(model):
            joints, findings = _search_blocks(model, example_inputs)
        else:
            prover = Prover(model, guess_inputs(model) if example_inputs is None else example_inputs)
            joints, findings = _search(model, prover)
    joints = list(_in_one_memory(joints, findings, model))
    return Symmetries(tuple(joints), (*findings, *notes(model)), model)


def _in_one_memory(joints: list[Joint], findings: list[Finding], model: nn.Module) -> Iterator[Joint]:
    """The joints without those that would move a parameter together with another one that lies in its memory."""
    shared = shared_memory(named_tensors(model))
    for joint in joints:
        name = next((name for name in joint.parameters() if name in shared), None)
        if name is None:
            yield joint
            continue
        reason = f"{name!r} shares its memory with {shared[name]!r}, which would move with it; tie them as one Parameter"
        findings[:] = [finding for finding in findings if finding.name != joint.name]
        findings.append(Finding(joint.name, joint.kind, "rejected", reason))


def _search(
    model: nn.Module, prover: Prover | None, example_inputs: Any = None
) -> tuple[list[Joint], list[Finding]]:
    """The joints that hold, and a finding for every candidate and every module without one."""
    tensors = named_tensors(model)
    proposals, findings = _propose(model, prover)
    joints: list[Joint] = []

    def decide(candidate: Candidate) -> None:
        for joint, finding in _decide(candidate, tensors, prover):
            findings[:] = [f for f in findings if f.name != finding.name or f.status == "found"]
            findings.append(finding)
            if joint is not None:
                joints.append(joint)

    for candidate in proposals:
        decide(candidate)
    left_over = _skipped(model, proposals, findings, {})
    orders = {c.name for c in proposals if any(joint.group.form == "permutation" for joint in c.alternatives)}
    rejected = {finding.name for finding in findings if finding.status == "rejected"}
    refuted = bool(rejected if prover is None else rejected & orders)
    if left_over or refuted or _open_space(model, joints):
        from teleport_fast.discovery.trace.propose import beyond  # 0.1 s of imports, so only here

        record = _record(model, example_inputs, prover)
        if record is not None:
            if prover is None:
                joints[:] = _confirmed(joints, record, findings)
            more = beyond(record.candidates, joints)
            for candidate in more:
                decide(candidate)
            left_over = _skipped(model, [*proposals, *more], findings, record.reasons)
    findings += left_over
    if prover is not None and prover.casts:
        reason = f"its forward casts to float32 {prover.casts} times, proven with these in float64"
        findings.append(Finding("model", "float32", "noted", reason))
    return joints, findings


def _search_blocks(model: nn.Module, example_inputs: Any) -> tuple[list[Joint], list[Finding]]:
    """Search one block of each kind; joints that tie it to something else are proven again with the block in a chain."""
    small = stand_in(model)
    guessed = example_inputs is None  # six tokens tell as much as twelve, at half the cost
    inputs = small.inputs(guess_inputs(small.model), tokens=6) if guessed else small.inputs(example_inputs)
    prover = Prover(small.model, inputs, own=True, perturb=not is_meta(model))
    joints, findings = _search(small.model, prover)
    crossing = [joint for joint in joints if small.crosses(joint)]
    if crossing:
        small.chain_()
        prover.start()
    for joint in crossing:
        proof = prover.prove(joint, TOLERANCE)
        if not proof.ok:
            reason = "holds for a single block, not for a chain of them"
            findings = [f for f in findings if f.name != joint.name]
            findings.append(Finding(joint.name, joint.kind, "rejected", reason, proof.deviation))
            joints = [other for other in joints if other is not joint]
    return (
        [every for joint in joints for every in small.joints(joint)],
        [every for finding in findings for every in small.findings(finding)],
    )


def _propose(model: nn.Module, prover: Prover | None) -> tuple[list[Candidate], list[Finding]]:
    """Candidates of every role, then of the norms, then of the residual streams; roles that cannot serve."""
    watched = model if prover is None else prover.model
    views = Views(canonical_names(watched))
    flow = None if prover is None else Flow(watched, prover.call)
    proposals: list[Candidate] = []
    findings: list[Finding] = []
    found: list[Role] = []
    for role in roles(watched):
        if isinstance(role, Unusable):
            findings.append(Finding(role.name, "attention", "rejected", role.reason))
            continue
        found.append(role)
        proposals += candidates(role, views)
    proposals += norm_proposals(watched, found, views, flow)
    width = stream_width(found)
    if flow is None:
        if width is not None:
            findings.append(Finding("residual", "residual", "rejected", "known only by proof; call with verify=True"))
        return proposals, findings
    before = len(proposals)
    proposals += [residual_candidate(*stream) for stream in streams(watched, found, views, flow)]
    if len(proposals) == before and width is not None:
        reason = f"no stream of width {width}: nothing writes one outside a chain"
        findings.append(Finding("residual", "residual", "rejected", reason))
    return proposals, findings


def _open_space(model: nn.Module, joints: list[Joint]) -> bool:
    """Whether rows of one matrix and columns of another, as many, or a lone vector, are in no joint of a block."""
    moved = {(view.parameter, view.axis) for joint in joints for view in joint.views()}
    within = {name for joint in joints if not joint.kind.startswith("residual") for name in joint.parameters()}
    rows, columns, lone = set(), set(), False
    names = {name for name, module in model.named_modules() if is_norm(module)}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            rows |= {parameter.shape[0]} if (name, 0) not in moved else set()
            columns |= {parameter.shape[1]} if (name, 1) not in moved else set()
        elif name.rpartition(".")[2] not in ("weight", "bias") and name.rpartition(".")[0] not in names:
            lone |= name not in within
    return lone or bool(rows & columns)


def _record(model: nn.Module, example_inputs: Any, prover: Prover | None) -> Record | None:
    """What a call of the model does, for modules that no builder knows; None where nobody says how to call it."""
    from teleport_fast.discovery.trace.propose import record_model, record_on_meta

    if prover is not None:
        return record_model(prover.model, prover.call)
    try:
        return record_on_meta(model, guess_inputs(model) if example_inputs is None else example_inputs)
    except (ValueError, RuntimeError, NotImplementedError):  # no inputs, or a forward that needs numbers
        return None


def _confirmed(joints: list[Joint], record: Record, findings: list[Finding]) -> list[Joint]:
    """Of the joints taken on trust, norm gains read what the recorded call shows; the others are rejected."""
    from teleport_fast.discovery.trace.propose import entries

    shown = [entries(joint) for candidate in record.candidates for joint in candidate.alternatives]
    wrong = {joint.name for joint in joints if joint.kind == "norm-readers" and entries(joint) not in shown}
    for i, finding in enumerate(findings):
        if finding.name in wrong:
            findings[i] = Finding(finding.name, finding.kind, "rejected", "other layers than these read this norm")
    return [joint for joint in joints if joint.name not in wrong]


def _decide(
    candidate: Candidate, tensors: dict[str, Tensor], prover: Prover | None
) -> Iterator[tuple[Joint | None, Finding]]:
    joint, finding = _first_that_holds(candidate, tensors, prover)
    yield joint, finding
    if joint is None and "is frozen" not in finding.reason:
        for smaller in candidate.fallback:
            yield from _decide(smaller, tensors, prover)


def _first_that_holds(
    candidate: Candidate, tensors: dict[str, Tensor], prover: Prover | None
) -> tuple[Joint | None, Finding]:
    def rejected(reason: str, deviation: float | None = None) -> tuple[None, Finding]:
        return None, Finding(candidate.name, candidate.kind, "rejected", reason, deviation)

    if not candidate.alternatives:
        return rejected(candidate.otherwise)
    why = stuck(candidate.alternatives[0], tensors)
    if why is not None:
        return rejected(why)
    if prover is None:
        joint = candidate.alternatives[0]
        if not candidate.known and (len(candidate.alternatives) > 1 or candidate.kind not in TRUSTED):
            return rejected("which group acts here is known only by proof; call with verify=True")
        return joint, Finding(joint.name, joint.kind, "found")
    smallest = float("inf")
    for joint in candidate.alternatives:
        try:
            joint.check_shapes(prover.tensors)
        except ValueError as error:
            return rejected(str(error))
        proof = prover.prove(joint, TOLERANCE)
        if proof.ok:
            if candidate.wider is not None and joint is candidate.alternatives[0]:
                wider = prover.prove(candidate.wider, TOLERANCE)
                if wider.ok:
                    joint, proof = candidate.wider, wider
            note = ""
            if proof.training is not None:
                note = f"in training mode up to the norm's eps (deviation {proof.training:.0e})"
            return joint, Finding(joint.name, joint.kind, "found", note, proof.deviation)
        if proof.control <= CONTROL_FLOOR:
            seen = f"a wrong move passes too (deviation {proof.control:.0e})"
            return rejected(f"{seen}: the outputs do not see this joint")
        smallest = min(smallest, proof.deviation)
    dropout = "; the model has dropout, and a dense move mixes what a mask cuts" if prover.drops_units else ""
    return rejected(candidate.otherwise + dropout, smallest)


def _skipped(
    model: nn.Module, proposals: list[Candidate], findings: list[Finding], known: dict[str, str]
) -> list[Finding]:
    """Modules whose parameters no builder proposed to move: said aloud, never assumed."""
    joints = [joint for candidate in proposals for joint in candidate.alternatives]
    joints += [joint for candidate in proposals for rest in candidate.fallback for joint in rest.alternatives]
    proposed = {name for joint in joints for name in joint.parameters()}
    on_rejected_stream = any(finding.kind == "residual" for finding in findings)
    names = canonical_names(model)
    out = []
    for name, module in model.named_modules():
        own = {names[id(p)] for p in module.parameters(recurse=False)}
        if not own or own & proposed or is_norm(module):
            continue
        if isinstance(module, (nn.Embedding, nn.Linear)) and on_rejected_stream:
            continue
        why = next((f": {known[parameter]}" for parameter in sorted(own) if parameter in known), "")
        reason = f"no builder knows its role{why}"
        out.append(Finding(name or type(model).__name__, type(module).__name__, "skipped", reason))
    return out
