"""find_symmetries: propose joints for every role, prove each on a perturbed float64 copy, and explain the rest."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from teleport_fast.discovery.candidates import (
    Candidate,
    Views,
    attention_candidates,
    mlp_candidates,
    norm_candidate,
)
from teleport_fast.discovery.inputs import guess_inputs
from teleport_fast.discovery.residual import frozen, is_norm, residual_candidate, stream_width
from teleport_fast.discovery.roles import Attention, Mlp, Slot, Unusable, canonical_names, roles
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Finding, Symmetries, named_tensors
from teleport_fast.symmetry.verify import CONTROL_FLOOR, Prover

TOLERANCE = 1e-10


def find_symmetries(model: nn.Module, example_inputs: Any = None, verify: bool = True) -> Symmetries:
    """Find the loss-invariant moves of a model's parameters and prove each one.

    example_inputs: what the model is called with, a tensor, a tuple of positional arguments or a dict of keywords; None
    guesses (2, t) token ids or (4, features) noise. With `verify` every proposed joint is moved by a random element on
    a perturbed float64 deep copy in eval mode: the outputs may deviate by 1e-10 at most, and must deviate by more than
    1e-3 under a wrong element. Without it the first alternative that needs no proof is taken on trust: only
    value-output, neurons and norm-readers joints, and the diagonal of gated MLPs.
    Errors: ValueError when inputs cannot be guessed or the model has no parameters; TypeError when it is no Module.
    Source: own derivation (math.md section 2); proofs in tests/discovery/test_find.py.

    >>> from teleport_fast.experiments.gpt import GPT, GPTConfig
    >>> symmetries = find_symmetries(GPT(GPTConfig(d_model=16, layers=1, heads=2)))
    >>> [joint.name for joint in symmetries]  # doctest: +NORMALIZE_WHITESPACE
    ['blocks.0.attention.value-output', 'blocks.0.attention.query-key', 'blocks.0.mlp.up-down',
     'blocks.0.mlp.neurons', 'residual']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; pass the module itself")
    tensors = named_tensors(model)
    if not tensors:
        raise ValueError("model has no parameters, so it has no symmetries; pass a model with parameters")
    proposals, findings = _propose(model)
    prover = None
    if verify:
        prover = Prover(model, guess_inputs(model) if example_inputs is None else example_inputs)
    joints: list[Joint] = []
    for candidate in proposals:
        joint, finding = _decide(candidate, tensors, prover)
        findings.append(finding)
        if joint is not None:
            joints.append(joint)
    findings += _skipped(model, proposals, findings)
    return Symmetries(tuple(joints), tuple(findings), model)


def _propose(model: nn.Module) -> tuple[list[Candidate], list[Finding]]:
    views = Views(canonical_names(model))
    proposals: list[Candidate] = []
    findings: list[Finding] = []
    found: list[Attention | Mlp] = []
    for role in roles(model):
        if isinstance(role, Unusable):
            findings.append(Finding(role.name, "attention", "rejected", role.reason))
            continue
        found.append(role)
        proposals += attention_candidates(role, views) if isinstance(role, Attention) else mlp_candidates(role, views)
    width = stream_width(found)
    if width is None:
        return proposals, findings
    proposals += _norm_proposals(model, found, views, width)
    residual, reason = residual_candidate(model, found, views, width)
    if residual is None:
        findings.append(Finding("residual", "residual", "rejected", reason))
    else:
        proposals.append(residual)
    return proposals, findings


def _norm_proposals(model: nn.Module, found: list[Attention | Mlp], views: Views, width: int) -> list[Candidate]:
    """Norms of a block before the roles of that block, in order; one elsewhere before linear layers without a role."""
    claimed = {id(p) for role in found for slot in role.reads() for p in slot.module.parameters()}
    claimed |= {id(p) for r in found for p in (r.output if isinstance(r, Attention) else r.down).module.parameters()}
    heads = [
        (name, [Slot(name, module, 0, module.out_features)])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.in_features == width and id(module.weight) not in claimed
    ]
    proposals = []
    for parent_name, parent in model.named_modules():
        norms = [(n, m) for n, m in parent.named_children() if is_norm(m)]
        prefix = f"{parent_name}." if parent_name else ""
        inside = [(role.name, role.reads()) for role in found if role.name.startswith(prefix)] if prefix else heads
        for index, (child, norm) in enumerate(norms):
            likeliest_first = inside[index : index + 1] + inside[:index] + inside[index + 1 :]
            candidate = norm_candidate(prefix + child, norm, likeliest_first, views, width)
            if candidate is not None:
                proposals.append(candidate)
    return proposals


def _decide(candidate: Candidate, tensors: dict[str, Tensor], prover: Prover | None) -> tuple[Joint | None, Finding]:
    def rejected(reason: str, deviation: float | None = None) -> tuple[None, Finding]:
        return None, Finding(candidate.name, candidate.kind, "rejected", reason, deviation)

    if not candidate.alternatives:
        return rejected(candidate.otherwise)
    stuck = frozen(candidate.alternatives[0], tensors)
    if stuck:
        return rejected(f"{stuck[0]!r} is frozen (requires_grad=False), a move would change it")
    if prover is None:
        joint = candidate.alternatives[0]
        if len(candidate.alternatives) > 1:
            return rejected("which group acts here is known only by proof; call with verify=True")
        return joint, Finding(joint.name, joint.kind, "found")
    smallest = float("inf")
    for joint in candidate.alternatives:
        proof = prover.prove(joint, TOLERANCE)
        if proof.ok:
            if candidate.wider is not None and joint is candidate.alternatives[0]:
                wider = prover.prove(candidate.wider, TOLERANCE)
                if wider.ok:
                    joint, proof = candidate.wider, wider
            return joint, Finding(joint.name, joint.kind, "found", deviation=proof.deviation)
        if proof.control <= CONTROL_FLOOR:
            seen = f"a wrong move passes too (deviation {proof.control:.0e})"
            return rejected(f"{seen}: the outputs do not see this joint")
        smallest = min(smallest, proof.deviation)
    dropout = "; the model has dropout, and a dense move mixes what a mask cuts" if prover.drops_units else ""
    return rejected(candidate.otherwise + dropout, smallest)


def _skipped(model: nn.Module, proposals: list[Candidate], findings: list[Finding]) -> list[Finding]:
    """Modules whose parameters no builder proposed to move: said aloud, never assumed."""
    proposed = {name for candidate in proposals for joint in candidate.alternatives for name in joint.parameters()}
    on_rejected_stream = any(finding.kind == "residual" for finding in findings)
    names = canonical_names(model)
    out = []
    for name, module in model.named_modules():
        own = {names[id(p)] for p in module.parameters(recurse=False)}
        if not own or own & proposed or is_norm(module):
            continue
        if isinstance(module, (nn.Embedding, nn.Linear)) and on_rejected_stream:
            continue
        out.append(Finding(name or type(model).__name__, type(module).__name__, "skipped", "no builder knows its role"))
    return out
