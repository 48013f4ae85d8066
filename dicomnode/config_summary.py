"""What a configuration means, in lines for a person."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dicomnode.cloud_check import told
from dicomnode.findings import Finding, Level
from dicomnode.settings import RuleStep, Settings


def summary(settings: Settings, findings: Iterable[Finding]) -> Iterator[str]:
    """For ``check-config``: the settings, then ``findings`` that are more than notes."""
    titles = ", ".join(settings.node.ae_titles)
    yield f"AE title {titles}, DICOM on {settings.dimse.host}:{settings.dimse.port}"
    yield _tls(settings)
    yield f"data in {settings.node.data_dir}"
    inference = settings.inference
    yield (
        f"inference on {inference.engine.value}, batches of {inference.max_batch} at most,"
        f" {inference.gpu_memory_share:.0%} of the GPU's memory for one model"
    )
    yield f"peers: {', '.join(p.name for p in settings.peers) or 'none: every caller is rejected'}"
    for peer in settings.peers:
        if "commit" in peer.allow and not peer.reachable:
            yield (
                f"note: peer {peer.name} has no host and port: it gets a report of storage commitment only on the"
                " association of its request"
            )
    if settings.inference.places:
        places = ", ".join(f"{e.name} ({e.url})" for e in settings.inference.places)
        yield f"inference: {settings.inference.engine.value}, endpoints {places}"
    for rule in settings.rules:
        yield f"rule {rule.name}: {', '.join(rule.every_model)} -> {', '.join(rule.destinations) or 'nowhere'}"
        for step in rule.ordered_steps:
            yield f"  step {step.name}: {step.model}{_needs(step)}"
    if not settings.rules:
        yield "rules: none: what arrives is stored and indexed, nothing is analysed"
    yield from told(settings)
    for finding in findings:
        if finding.level is not Level.note:
            yield f"{finding.level.value} {finding.check}: {finding.text}. {finding.hint}".rstrip(". ")


def _needs(step: RuleStep) -> str:
    after = f", after {' and '.join(step.needs.steps)}" if step.needs.steps else ""
    when = f", when {' and '.join(c.when.text for c in step.when)}" if step.when else ""
    inputs = ", ".join((*step.inputs, *(f"{name} (mask of {ref})" for name, ref in step.masks.items())))
    prior = f", earlier study from {' or '.join(step.prior.sources)}" if step.prior else ""
    return after + when + (f", inputs {inputs}" if inputs else "") + prior


def _tls(settings: Settings) -> str:
    tls = settings.tls
    if tls.port is None:
        return "TLS: only to peers with tls = true" if tls.files else "TLS: off"
    plain = "; plain callers from other machines are rejected" if tls.required else ""
    return (
        f"TLS {tls.minimum_version} or newer on {tls.host}:{tls.port},"
        f" client certificates {tls.client_certificates}{plain}"
    )
